"""What a class puts out is known for all classes of transformers that a corpus can be run through."""

from collections.abc import Iterator

import pytest
import transformers
from transformers.models.auto import modeling_auto

from moefy.errors import UnsupportedModel
from moefy.models.answers import answer_of_class

TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"next", "masked"},
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": {"masked", "next"},
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": {"labels"},
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": {"token labels"},
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": {"spans"},
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": set(),
}
TYPES = (
    "llama", "mistral", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "t5", "bart",
    "bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "xlm-roberta", "mpnet",
)  # fmt: skip


def classes() -> Iterator[tuple[str, str, str]]:
    for task in TASKS:
        for kind, name in getattr(modeling_auto, task).items():
            if kind in TYPES:
                yield task, kind, name if isinstance(name, str) else name[0]


@pytest.mark.parametrize(("task", "kind", "name"), classes())
def test_the_answer_is_that_of_the_task(task, kind, name):
    config = transformers.AutoConfig.for_model(kind)
    two = "Seq2Seq" in str(getattr(transformers, name).forward.__annotations__.get("return"))
    if not TASKS[task] or (two and TASKS[task] & {"labels", "spans"}):
        with pytest.raises(UnsupportedModel, match=name):
            answer_of_class(getattr(transformers, name), config)
        return
    got = answer_of_class(getattr(transformers, name), config).form
    # Types that have a masked language model see what comes next, unless config.json says otherwise.
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    wanted = TASKS[task] - ({"masked"} if not masked or config.is_encoder_decoder else {"next"})
    assert {got} == wanted


def test_a_bert_that_decodes_predicts_the_next_token():
    config = transformers.BertConfig(is_decoder=True)
    assert answer_of_class(transformers.BertLMHeadModel, config).form == "next"
