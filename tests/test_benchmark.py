import pytest
import torch

from moefy.benchmark import bench_layer, side_by_side
from moefy.tables import speed_rows


def test_samples_alternate_and_are_all_kept():
    calls = []
    seconds = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=1
    )
    assert calls == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_record_compares_with_the_faster_dense(dtype):
    record = bench_layer(width=64, neurons=128, experts=8, k=2, dtype=dtype, samples=3)
    medians = record["median_seconds"]
    assert record["speedup"]["moefied"] == pytest.approx(medians["dense"] / medians["moefied"])
    assert record["chosen"] in ("views", "masked")
    assert "synthetic" in record["label"]
    header, rows = speed_rows(record)
    assert len(header) == len(rows[0]) == 3


def test_sparse_reads_fewer_weights_so_it_is_faster_than_masked_dense():
    """A ratio with a wide margin: 1 of 16 experts of a 100 MB layer beats all of them by far."""
    record = bench_layer(width=1024, neurons=8192, experts=16, k=1, samples=5)
    medians = record["median_seconds"]
    assert medians["views"] < medians["masked dense"] / 2
    assert record["chosen"] == "views"
