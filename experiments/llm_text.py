"""What a language model writes: two-step arithmetic scored exactly, and greedy text, dense beside moefied.

python experiments/llm_text.py arithmetic SMOLLM2 [MOEFIED ...]     # benchmarks/records/arithmetic.json
python experiments/llm_text.py generate SMOLLM2 MOEFIED             # benchmarks/records/generation.json

Arithmetic: problems of two steps in words (a sum, then another one or a difference), drawn by a seed, behind eight
solved ones; the first number that the model writes greedily has to be the answer. Beside it what the answer that is
most common would reach. Sparsity is known to fail here before it shows in KL.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moefy.experts.loading import open_model
from moefy.run.computing import machine

RECORDS = Path("benchmarks/records")
SHOTS = 8
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stones")
PROMPTS = (
    "The old lighthouse keeper opened the door and", "Photosynthesis is the process by which",
    "The three most important rules of good writing are", "def fibonacci(n):", "Dear Professor Miller,",
    "In 1969, the first humans landed on the Moon.", "To bake a simple loaf of bread, you need",
    "Question: Why is the sky blue?\nAnswer:", "The stock market fell sharply today after",
    "Once upon a time, in a village by the sea,",
)  # fmt: skip


def problem(draw: random.Random) -> tuple[str, int]:
    """A text that ends before its answer, and the answer."""
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    first, more = draw.randint(2, 9), draw.randint(2, 9)
    text = f"{name} has {first} {thing} and gets {more} more. "
    if draw.random() < 0.5:
        less = draw.randint(1, first + more - 1)
        text += f"Then {name} gives away {less}. How many {thing} does {name} have?"
        answer = first + more - less
    else:
        last = draw.randint(2, 9)
        text += f"Then {name} finds {last} others. How many {thing} does {name} have?"
        answer = first + more + last
    return f"Question: {text}\nAnswer:", answer


def problems(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts with the same solved problems in front."""
    draw = random.Random(seed)
    shots = "\n\n".join(
        f"{text} {answer}" for text, answer in (problem(draw) for _ in range(SHOTS))
    )
    return [
        (f"{shots}\n\n{text}", answer) for text, answer in (problem(draw) for _ in range(count))
    ]


class Writer:
    """A model that writes greedily."""

    def __init__(self, where: str, dense: str) -> None:
        self.model = open_model(where)
        self.tokenizer = AutoTokenizer.from_pretrained(dense, trust_remote_code=False)

    @torch.inference_mode()
    def write(self, prompt: str, tokens: int) -> str:
        """The tokens that follow, as text."""
        ids = self.tokenizer(prompt, return_tensors="pt")
        out = self.model.generate(
            **ids, max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.eos_token_id
        )
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def right(text: str, answer: int) -> bool:
    """Whether the first number of a text is the answer."""
    number = re.search(r"-?\d+", text)
    return number is not None and int(number.group()) == answer


def arithmetic(models: list[str], count: int, seed: int) -> dict[str, Any]:
    asked = problems(count, seed)
    common = Counter(answer for _, answer in asked).most_common(1)[0][1]
    rows = []
    for where in models:
        writer, began = Writer(where, models[0]), time.perf_counter()
        scored = [right(writer.write(prompt, 4), answer) for prompt, answer in asked]
        rows.append({
            "model": Path(where).resolve().name, "right": sum(scored), "of": count, "each": scored,
            "seconds": round(time.perf_counter() - began, 1),
        })  # fmt: skip
        print(rows[-1]["model"], f"{sum(scored)} of {count}", flush=True)
    record = {"kind": "arithmetic", "seed": seed, "shots": SHOTS, "most_common_answer": common}
    return {**record, "rows": rows, "machine": machine()}


def generate(models: list[str], tokens: int) -> dict[str, Any]:
    rows = []
    for where in models:
        writer = Writer(where, models[0])
        texts = [writer.write(prompt, tokens) for prompt in PROMPTS]
        rows.append({"model": Path(where).resolve().name, "texts": texts})
        print(rows[-1]["model"], "done", flush=True)
    return {
        "kind": "generation",
        "tokens": tokens,
        "prompts": PROMPTS,
        "rows": rows,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("arithmetic", "generate"))
    parser.add_argument("models", nargs="+", help="the dense model first, its tokenizer serves all")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "arithmetic":
        name, record = "arithmetic", arithmetic(args.models, args.count, args.seed)
    else:
        name, record = "generation", generate(args.models, args.tokens)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (RECORDS / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
