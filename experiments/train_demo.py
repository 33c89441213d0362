"""Train the bundled demo models from labelled text and measure them against n-gram models.

    python experiments/train_demo.py llama ../shared/data/corpora runs/llama
    python experiments/train_demo.py opt   ../shared/data/corpora runs/opt --keep 4
    python experiments/train_demo.py llama ../shared/data/corpora runs/llama --install

A byte-level BPE tokenizer is trained first (the same for both models, since it sees the same text).
Training is restarted from the newest state in the run folder if there is one. At the end the model
is written in bf16, and `record.json` holds the loss curve, the hashes of the data, and bits/byte on
every domain of the held-out corpus beside a unigram and an interpolated bigram model that were
fitted on exactly the tokens the model was trained on. `--install` copies a finished run into the
package and its record into `benchmarks/records`.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from build_corpus import DOMAINS, read_domain, split
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 3072
CONTEXT = 512
BATCH = 8
EOS = "<|endoftext|>"
# Prose of books and poems is the hardest text here: it is drawn more often.
WEIGHTS = {"novels": 1.6, "zh_poetry": 1.4, "python_code": 1.2, "c_code": 1.2, "latex_math": 1.1}

CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, rope_theta=10000.0,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=192, ffn_dim=1024, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=CONTEXT, word_embed_proj_dim=192,
        dropout=0.0, activation_function="relu", bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
CLASSES = {"llama": LlamaForCausalLM, "opt": OPTForCausalLM}


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) in fp32: torch's own rounds to bf16, which many CPUs emulate."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # The scale of Liu et al. 2025: a root mean square like AdamW's.
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix."""
    x = gradient.mT if gradient.shape[0] > gradient.shape[1] else gradient
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if gradient.shape[0] > gradient.shape[1] else x


def make_tokenizer(texts: dict[str, list[str]], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the first 1.2 MB of training text of every domain."""
    path = folder / "tokenizer"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        sample = (text[:20000] for domain in texts.values() for text in _head(domain, 1_200_000))
        bpe.train_from_iterator(sample, trainer)
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS).save_pretrained(
            path
        )
    return PreTrainedTokenizerFast.from_pretrained(path, trust_remote_code=False)


def _head(texts: list[str], size: int):
    # Documents come in the order of their sources: a stride takes some of every source.
    stride = max(1, sum(map(len, texts)) // size)
    return texts[::stride]


def token_stream(texts: dict[str, list[str]], tokenizer, seed: int) -> dict[str, np.ndarray]:
    """Tokens of each domain: shuffled documents, each after an end-of-text token."""
    streams = {}
    for domain, documents in texts.items():
        order = np.random.default_rng(seed).permutation(len(documents))
        rows = tokenizer.backend_tokenizer.encode_batch_fast([documents[i] for i in order])
        streams[domain] = np.concatenate([[0, *row.ids] for row in rows]).astype(np.int32)
    return streams


class Batches:
    """Batch `i` is a function of the seed, the phases and `i`: a restart sees the same data.

    A phase is `{"from": first step, "steps": length of the run, "weights": how often each domain is
    drawn}`; a run that is continued with another length or other weights has several.
    """

    def __init__(self, streams: dict[str, np.ndarray], seed: int):
        self.domains, self.streams, self.seed = list(streams), streams, seed
        self.phases: list[dict] = []

    def windows(self, step: int) -> list[tuple[str, int]]:
        """Domain and first token of each row, drawn at random."""
        weights = [phase["weights"] for phase in self.phases if phase["from"] <= step][-1]
        p = np.array([weights.get(d, 1.0) for d in self.domains])
        rng = np.random.default_rng([self.seed, step])
        rows = []
        for domain in rng.choice(self.domains, BATCH, p=p / p.sum()):
            length = len(self.streams[domain])
            rows.append((str(domain), int(rng.integers(length - CONTEXT - 1))))
        return rows

    def __getitem__(self, step: int) -> torch.Tensor:
        rows = [self.streams[d][s : s + CONTEXT + 1] for d, s in self.windows(step)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 25 steps, constant, then linear to zero over the last 45 %.

    Until the decay begins the schedule does not depend on `steps`: a run may be continued with
    another length and equals one that had that length from the start. Continued later it is warmed
    up again, and its record says so in `phases`.
    """
    return min(1.0, (step + 1) / 25, (steps - step) / (0.45 * steps))


def save_state(path: Path, model, optimizers, step: int, phases: list[dict]) -> None:
    """All that a restart needs, as one safetensors file written by rename."""
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in state.items()}
    tensors = {k: v.clone().contiguous() for k, v in tensors.items()}
    save_file(tensors, path.with_suffix(".tmp"), metadata={"state": json.dumps([step, phases])})
    path.with_suffix(".tmp").replace(path)


def load_state(path: Path, model, optimizers) -> tuple[int, list[dict]]:
    """Steps made, and the phases of the run so far."""
    from safetensors import safe_open

    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = defaultdict(dict)
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{i}."):
                _, _, j, name = key.split(".")
                state[int(j)][name] = value
        optimizer.load_state_dict(
            {"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]}
        )
    with safe_open(path, "pt") as file:
        step, phases = json.loads(file.metadata()["state"])
    return step, phases


def train(kind: str, batches: Batches, args) -> tuple[torch.nn.Module, list]:
    """Train for `args.steps` steps; the loss curve has the mean of every 10 steps."""
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CLASSES[kind](CONFIGS[kind]()).to(device)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    optimizers = [
        Muon(hidden, lr=args.lr),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    state, curve_file = args.out / "state.safetensors", args.out / "curve.jsonl"
    start, phases = load_state(state, model, optimizers) if state.exists() else (0, [])
    now = {"from": start, "steps": args.steps, "weights": WEIGHTS | dict(args.weight)}
    last = phases[-1] if phases else now | {"steps": 0, "weights": {}}
    constant = start <= 0.55 * last["steps"] or last["steps"] == args.steps
    if last["weights"] == now["weights"] and constant:
        now["from"] = phases.pop()["from"]
    batches.phases = [*phases, now]
    curve = [json.loads(line) for line in curve_file.read_text().splitlines()] if start else []
    curve = [point for point in curve if point["step"] <= start]
    keep_at = {round(args.steps * (i + 1) / (args.keep + 1)) for i in range(args.keep)}
    losses, began, saved = [], time.time(), time.time()
    for step in range(start, args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, args.steps)
        ids_BT = batches[step].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids_BT[:, 1:].flatten()
        )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            speed = (step + 1 - start) * BATCH * CONTEXT / (time.time() - began)
            curve.append({"step": step + 1, "loss": round(sum(losses) / len(losses), 4)})
            curve_file.write_text("".join(json.dumps(point) + "\n" for point in curve))
            print(
                f"step {step + 1}/{args.steps} loss {curve[-1]['loss']:.3f} {speed:.0f} tok/s",
                flush=True,
            )
            losses = []
        if time.time() - saved > 120 and (step + 1) % 10 == 0:
            save_state(state, model, optimizers, step + 1, batches.phases)
            saved = time.time()
        if step + 1 in keep_at:
            model.save_pretrained(args.out / f"step-{step + 1}")
    save_state(state, model, optimizers, args.steps, batches.phases)
    return model, curve


class Bigram:
    """Interpolated bigram with absolute discounting down to a unigram with add-0.5 smoothing."""

    def __init__(self, tokens: np.ndarray, boundaries: np.ndarray):
        self.unigram = np.bincount(tokens, minlength=VOCABULARY) + 0.5
        self.unigram = self.unigram / self.unigram.sum()
        pairs = (tokens[:-1].astype(np.int64) * VOCABULARY + tokens[1:])[boundaries[:-1]]
        self.counts = np.bincount(pairs, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY)
        self.total = self.counts.sum(1)
        self.kinds = (self.counts > 0).sum(1)
        ones, twos = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = ones / (ones + 2 * twos)  # Ney, Essen and Kneser 1994

    def nats(self, ids: np.ndarray) -> tuple[float, float]:
        """Total cross-entropy of `ids[1:]` under the unigram and the bigram."""
        before, after = ids[:-1], ids[1:]
        unigram = self.unigram[after]
        total = np.maximum(self.total[before], 1)
        direct = np.maximum(self.counts[before, after] - self.discount, 0) / total
        back = np.where(self.total[before] > 0, self.discount * self.kinds[before] / total, 1.0)
        return -np.log(unigram).sum(), -np.log(direct + back * unigram).sum()


@torch.no_grad()
def measure(model, tokenizer, bigram: Bigram, corpus: list[dict]) -> dict[str, dict[str, float]]:
    """Bits/byte of every domain: model, unigram, bigram, all on the same tokens and bytes."""
    device = next(model.parameters()).device
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for doc in corpus:
        ids = np.array([0, *tokenizer(doc["text"])["input_ids"]])[: CONTEXT + 1]
        read = len(tokenizer.decode(ids[1:]).encode())
        batch = torch.from_numpy(ids)[None].to(device)
        logits = model(input_ids=batch[:, :-1]).logits.float()
        nats = torch.nn.functional.cross_entropy(logits[0], batch[0, 1:], reduction="sum").item()
        totals[doc["domain"]] += [nats, *bigram.nats(ids), read]
    return {
        domain: {
            "model": nats / size / math.log(2),
            "unigram": uni / size / math.log(2),
            "bigram": bi / size / math.log(2),
            "fewer_than_bigram": 1 - nats / bi,
        }
        for domain, (nats, uni, bi, size) in sorted(totals.items())
    }


def _weight(text: str) -> tuple[str, float]:
    domain, _, weight = text.partition("=")
    if domain not in DOMAINS:
        raise argparse.ArgumentTypeError(f"{domain} is none of {', '.join(DOMAINS)}")
    return domain, float(weight)


def main() -> None:
    """Train, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1400, help=f"{BATCH * CONTEXT} tokens each")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--weight", type=_weight, action="append", default=[], metavar="DOMAIN=W",
        help="draw a domain more or less often than WEIGHTS says; may be repeated",
    )  # fmt: skip
    parser.add_argument("--keep", type=int, default=0, help="intermediate checkpoints to keep")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own")
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    texts, hashes = {}, {}
    for domain in DOMAINS:
        documents, _ = split(read_domain(args.corpora / domain))
        texts[domain] = [doc.text for doc in documents]
        hashes[domain] = hashlib.sha256("\0".join(texts[domain]).encode()).hexdigest()
    tokenizer = make_tokenizer(texts, args.out)
    batches = Batches(token_stream(texts, tokenizer, args.seed), args.seed)
    model, curve = train(args.kind, batches, args)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")

    windows = [
        batches.streams[d][s : s + CONTEXT + 1]
        for i in range(args.steps)
        for d, s in batches.windows(i)
    ]
    ends = np.tile(np.arange(CONTEXT + 1) < CONTEXT, len(windows))
    bigram = Bigram(np.concatenate(windows), ends)
    lines = Path("moefy/demo/corpus.jsonl").read_text(encoding="utf-8").splitlines()
    domains = measure(model.float(), tokenizer, bigram, [json.loads(line) for line in lines])
    record = {
        "kind": "demo_model",
        "model": args.kind,
        "config": model.config.to_dict(),
        "parameters": model.num_parameters(),
        "tokens": args.steps * BATCH * CONTEXT,
        "settings": {"lr": args.lr, "seed": args.seed, "phases": batches.phases},
        "data_sha256": hashes,
        "corpus_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "bits_per_byte": domains,
        "loss_curve": curve,
        "last_start_seconds": round(time.time() - began),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (args.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{'domain':14}{'unigram':>9}{'bigram':>9}{'model':>9}{'fewer':>8}")
    for domain, row in domains.items():
        print(
            f"{domain:14}{row['unigram']:9.3f}{row['bigram']:9.3f}{row['model']:9.3f}"
            f"{row['fewer_than_bigram']:8.1%}"
        )
    if args.install:
        target = Path("moefy/demo") / args.kind
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(args.out / "model", target)
        shutil.copy(args.out / "record.json", f"benchmarks/records/demo_{args.kind}.json")


if __name__ == "__main__":
    main()
