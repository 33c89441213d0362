"""llama.cpp, from llama-cpp-python, runs the files: its logits and tokens against moefy's own.

Weights, keys and values are fp32 unless a test says otherwise, so that what is left is the order of
sums and, in the exports, the routers' `eps`. Scores nearer than about 2**-8 of their spread are ties
in fp32, which two programs decide in two ways; from such a token on they compute different models.
Errors are therefore bounded up to the first near-tie of a document, and beyond it the cross-entropy.

Shapes: T tokens, E routed experts, V vocabulary.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_reading import DEMO
from safetensors.torch import load_file, save_file
from tiny_exports import CASES, Case, moefied, source, token_ids
from torch import Tensor

from moefy import recipe as recipes
from moefy.conversion.convert import convert
from moefy.data.corpus import load_corpus
from moefy.experts.loading import load
from moefy.exporting.export import export
from moefy.exporting.gguf import write_gguf

pytestmark = pytest.mark.slow

NEAR = 2.0**-22
"""Weights of experts closer than this, relatively, may change places: two to four units in the last
place of fp32."""
MODELS = {
    "llama": CASES["llama"],
    "mistral": Case(
        "Mistral", "mixtral", {**CASES["mistral"].settings, "sliding_window": None}, {}
    ),
    "qwen2": CASES["qwen2"],
    "qwen3": CASES["qwen3"],
    "shared": Case("Qwen2", "qwen2_moe", {}, {"partition.shared": "2"}),
    "llama_shared": CASES["llama_shared"],
}
Logits = Callable[[Path, list[list[int]]], list[Tensor]]
Note = Callable[[str, Tensor], None]


@pytest.fixture(scope="module")
def open_file() -> Callable[..., Any]:
    """Open a GGUF in llama.cpp."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="a build of minutes: pip install moefy[llama-cpp]"
    )

    def opened(file: Path) -> Any:
        return llama_cpp.Llama(
            str(file),
            n_ctx=128,
            n_gpu_layers=0,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    return opened


@pytest.fixture(scope="module")
def llama_logits(open_file: Callable[..., Any]) -> Logits:
    """Logits `[T, V]` of every document, as llama.cpp computes them."""

    def run(file: Path, documents: list[list[int]]) -> list[Tensor]:
        model, found = open_file(file), []
        for ids in documents:
            model.reset()
            model.eval(ids)
            found.append(torch.from_numpy(model.scores[: len(ids)].copy()))
        model.close()
        return found

    return run


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Keep what was measured: `pytest --junitxml FILE` writes it down."""

    def keep(what: str, error: Tensor) -> None:
        record_property(f"{what} median", f"{error.median():.2e}")
        record_property(f"{what} largest", f"{error.max():.2e}")
        record_property(f"{what} share over 1e-3", f"{(error > 1e-3).float().mean():.4f}")
        record_property(f"{what} tokens", len(error))

    return keep


@torch.no_grad()
def before_ties(stock: Path, documents: list[list[int]]) -> Tensor:
    """Which tokens of the documents, one after another, come before any near-tie of theirs."""
    model = dense(stock)
    found: list[Tensor] = []

    def decided(module: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        prob_TE = (inputs[0].double() @ module.weight.double().T).softmax(-1)
        ranked_TE = prob_TE.view(-1, prob_TE.shape[-1]).sort(descending=True).values
        k = model.config.num_experts_per_tok
        found.append(ranked_TE[:, k - 1] - ranked_TE[:, k] > NEAR * ranked_TE[:, k])

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(decided)
    masks = []
    for ids in documents:
        found.clear()
        model(torch.tensor([ids]))
        masks.append(torch.stack(found).all(0).long().cumprod(0).bool())
    return torch.cat(masks)


def cross_entropy(logits: list[Tensor], documents: list[list[int]]) -> float:
    """Nats a token."""
    losses = [
        torch.nn.functional.cross_entropy(one[:-1], torch.tensor(ids[1:]), reduction="none")
        for one, ids in zip(logits, documents, strict=True)
    ]
    return float(torch.cat(losses).mean())


@torch.no_grad()
def own_logits(model: Any, documents: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([ids])).logits[0].float() for ids in documents]


def errors(got: list[Tensor], want: list[Tensor]) -> Tensor:
    """Relative error of the logits of every token."""
    pairs = list(zip(got, want, strict=True))
    assert all(have.shape == true.shape for have, true in pairs)
    return torch.cat([(have - true).norm(dim=1) / true.norm(dim=1) for have, true in pairs])


def dense(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_moefys_function(
    name: str, llama_logits: Logits, note: Note, tmp_path: Path
) -> None:
    case, documents = MODELS[name], [ids[:24] for ids in token_ids()]
    folder = source(case, tmp_path / "source")
    made = moefied(folder, tmp_path / "moefied", case.recipe)
    export(folder, tmp_path / "dense.gguf", to="gguf")
    export(made, tmp_path / "stock", to=case.to)
    write_gguf(tmp_path / "stock", tmp_path / "moe.gguf")

    control = own_logits(dense(folder), documents)
    error = errors(llama_logits(tmp_path / "dense.gguf", documents), control)
    note("dense", error)
    assert error.max() < 1e-5

    want = own_logits(load(made, dtype=torch.float32), documents)
    error = errors(llama_logits(tmp_path / "moe.gguf", documents), want)
    clear = before_ties(tmp_path / "stock", documents)
    note("export", error)
    note("export before near-ties", error[clear])
    assert clear.sum() > 100
    assert error[clear].max() < 2e-4
    assert (errors(control, want)[clear] > 1e-3).all()
    assert error.median() < 2e-4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled Llama, converted."""
    settings = {
        "context": "64", "partition.experts": "16", "selection.k": "8", "partition.tokens": "1024",
        "router.tokens": "2048", "router.epochs": "2",
    }  # fmt: skip
    recipe = recipes.override(recipes.load("export"), settings)
    root = tmp_path_factory.mktemp("demo")
    convert(DEMO, root / "moefied", recipe=recipe, corpus=token_ids(), quiet=True)
    export(root / "moefied", root / "mixtral", to="mixtral")
    return root


def in_fp32(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    held = {name: value.float() for name, value in load_file(out / "model.safetensors").items()}
    save_file(held, out / "model.safetensors", {"format": "pt"})
    return out


def texts() -> list[str]:
    return [document.text or "" for document in load_corpus().take(8).documents]


@pytest.mark.parametrize(
    ("form", "median"), [("fp32", 1e-2), ("bf16", 2e-2), ("q8_0", 3e-2)], ids=str
)
def test_the_demo(
    form: str,
    median: float,
    demo: Path,
    llama_logits: Logits,
    note: Note,
    record_property: Callable[[str, object], None],
    tmp_path: Path,
) -> None:
    """Where activations are rounded, as llama.cpp does for all but fp32, the export loses as the
    dense model does; other experts here and there cost no cross-entropy."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    documents = [tokenizer(text)["input_ids"][:48] for text in texts()]
    for name, folder, model in (
        ("dense", DEMO, dense(DEMO)),
        ("export", demo / "mixtral", load(demo / "moefied", dtype=torch.float32)),
    ):
        file = tmp_path / f"{name}.gguf"
        if form == "fp32":
            folder = in_fp32(folder, tmp_path / name)
        write_gguf(folder, file, quantize="q8_0" if form == "q8_0" else None)
        got, want = llama_logits(file, documents), own_logits(model, documents)
        error = errors(got, want)
        note(name, error)
        loss, own = (cross_entropy(logits, documents) for logits in (got, want))
        record_property(f"{name} cross-entropy", f"{loss:.4f}, moefy {own:.4f}")
        assert error.median() < median
        assert abs(loss - own) < 0.03


def test_tokens_are_those_of_transformers(open_file: Callable[..., Any], tmp_path: Path) -> None:
    assert_same_tokens(DEMO, open_file, tmp_path)


def test_tokens_of_sentence_piece(
    shared_models: Path,
    open_file: Callable[..., Any],
    llama_logits: Logits,
    note: Note,
    tmp_path: Path,
) -> None:
    folder = shared_models / "stories260K"
    documents = assert_same_tokens(folder, open_file, tmp_path)
    error = errors(
        llama_logits(tmp_path / "model.gguf", documents), own_logits(dense(folder), documents)
    )
    note("dense", error)
    assert error.max() < 1e-4


def assert_same_tokens(
    folder: Path, open_file: Callable[..., Any], tmp_path: Path
) -> list[list[int]]:
    """The tokens, 48 of each text at most."""
    write_gguf(folder, tmp_path / "model.gguf")
    model, tokenizer = (
        open_file(tmp_path / "model.gguf"),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    odd = ["It's 12345 o'clock;\n\n\tnaïve café — 中文 🙂", "  two  spaces ", "x"]
    found = []
    for text in [*texts(), *odd]:
        want = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=True, special=False) == want
        found.append(want[:48])
    model.close()
    return found
