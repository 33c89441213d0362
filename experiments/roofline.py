"""What the kernels could be worth on an H200: predicted from bytes and arithmetic, nothing measured.

python experiments/roofline.py          # prints every shape, size, density and batch
python experiments/roofline.py table    # a selection of them into docs/kernels.md

Routing is uniform, router and launches are counted on both sides, and both sides reach their limit.
"""

import argparse
from pathlib import Path

from pages import fill
from rich.console import Console

from moefy.run.tables import markdown, terminal
from moefy_kernels.roofline import (
    MEASURED,
    Layer,
    Work,
    dense,
    grouped,
    least_seconds,
    masked_dense,
    routing,
    union,
)

SHAPES = ((4096, 14336), (4096, 11008), (2560, 9728))
SIZES = (16, 32, 128, 512)
DENSITIES = (0.1, 0.25, 0.5)
BATCHES = tuple(2**power for power in range(13))
HEADER = ["D x N", "F", "density", "tokens", "fastest path", "us", "dense, us", "times faster"]


def paths(layer: Layer, tokens: int, density: float) -> dict[str, Work]:
    """Everything that gives the output of the sparse layer, its router included."""
    # Of memory and arithmetic, `decode` needs what `union` does for one token, in a launch less.
    one = {"decode": union(layer, 1, density)._replace(launches=2)} if tokens == 1 else {}
    kernels = one | {
        "union": union(layer, tokens, density),
        "grouped": grouped(layer, tokens, density),
        "masked dense": masked_dense(layer, tokens),
    }
    router = routing(layer, tokens)
    return {name: router.then(work) for name, work in kernels.items()}


def rows(
    shapes: tuple[tuple[int, int], ...], sizes: tuple[int, ...], batches: tuple[int, ...]
) -> list[list[str]]:
    """Cells of a table of predictions."""
    device, found = MEASURED["H200"], []
    for width, neurons in shapes:
        for size in (size for size in sizes if neurons % size == 0):
            layer = Layer(width, neurons, size)
            for density in DENSITIES:
                for tokens in batches:
                    seconds = {
                        name: least_seconds(work, device)
                        for name, work in paths(layer, tokens, density).items()
                    }
                    best = min(seconds, key=lambda name: seconds[name])
                    whole = least_seconds(dense(layer, tokens), device)
                    found.append([
                        f"{width} x {neurons}", str(size), str(density), str(tokens), best,
                        f"{seconds[best] * 1e6:.1f}", f"{whole * 1e6:.1f}",
                        f"{whole / seconds[best]:.2f}",
                    ])  # fmt: skip
    return found


def table() -> str:
    """Markdown: one shape and one size of experts."""
    note = (
        "**Predicted, nothing measured**: the least time of one bf16 MLP with its router on an H200 that "
        "copies 4.3 TB/s and multiplies at 788 TFLOP/s (one measurement of each), 2 us assumed per "
        "launch, uniform routing, against dense at its own least time (`experiments/roofline.py`)."
    )
    return note + "\n\n" + markdown(HEADER, rows(SHAPES[:1], (128,), (1, 4, 16, 64, 512, 4096)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["table"])
    if parser.parse_args().what == "table":
        fill(Path("docs/kernels.md"), "roofline", table())
        return
    title = "H200, bf16: predicted, nothing measured"
    Console().print(terminal(HEADER, rows(SHAPES, SIZES, BATCHES), title))


if __name__ == "__main__":
    main()
