"""What a pass says: the same as its whole logits, in any family, however small the chunks."""

import pytest
import torch
from tiny_models import FAMILIES_TINY, SEARCHED_TINY, example_inputs, random_model, tiny_model

from moefy.activations import run
from moefy.data import IGNORED, Batch, Document, Sample
from moefy.outputs import say

TEXT = [name for name in (*FAMILIES_TINY, *SEARCHED_TINY) if tiny_model(name).family != "vit"]


def batch_of(name: str) -> Batch:
    """Two documents; a language model predicts some of their tokens."""
    inputs = example_inputs(name)
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    targets = None
    if ids is not None and random_model_of(name).can_generate():
        targets = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], 1)
    samples = [Sample(Document("d", str(i)), {}, None, 0) for i in range(2)]
    return Batch(samples, inputs, targets)


def random_model_of(name: str):  # type: ignore[no-untyped-def]
    tiny = tiny_model(name)
    return random_model(tiny.auto, tiny.make_config())


@pytest.mark.parametrize("name", TEXT)
def test_said(name):
    model, batch = random_model_of(name), batch_of(name)
    with torch.no_grad():
        result = run(model, batch)
        said = say(model, batch)
    print(name, said.head is not None, hasattr(result, "logits"), said.classes)
    assert not hasattr(result, "logits") or said.head is not None
    if said.head is not None:
        whole = result.logits[said.keep_BT]
        assert torch.allclose(said.logits(said.rows_JD), whole, atol=1e-5)
