"""What a model puts out for a text, decided from its class and its config before anything is run.

    answer = answer_of(model)          # the kind of output, where it is, how it is judged

The class says what `forward` returns (its declared return type) and what the head is for (its name, by the
naming of transformers, since most heads return something called `logits`). Shapes decide nothing: hidden
states may be as wide as a vocabulary.

Shapes: B documents, T tokens, C classes, V vocabulary, D width.
"""

import inspect
import typing
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

from moefy.errors import UnsupportedModel
from moefy.models.families import Kind

Form = Literal["next", "masked", "states", "labels", "token labels", "values", "spans"]


@dataclass(frozen=True)
class Answer:
    """The output by which a model is compared with its dense self."""

    form: Form
    field: str = "logits"
    """Where it is in what `forward` returns; of spans `start_logits`, with `end_logits` beside it."""
    binary: bool = False
    """Whether every number is the logit of a label of its own, against its absence."""

    @property
    def classes(self) -> bool:
        """Whether the numbers are log-probabilities of something, but for a constant: KL is defined."""
        return self.form in ("next", "labels", "token labels", "spans")

    @property
    def pooled(self) -> bool:
        """Whether a document has one output, not one a token."""
        return self.form in ("labels", "values", "spans")

    @property
    def tokens(self) -> bool:
        """Whether the numbers are logits `[B, T, V]` of the vocabulary."""
        return self.form in ("next", "masked")

    def describe(self) -> str:
        """By what quality is measured, in words."""
        return _JUDGED_BY[self.form]


_JUDGED_BY: dict[Form, str] = {
    "next": "the next token: cross-entropy, KL and agreement",
    "masked": "the last hidden states: cosine, token by token",
    "states": "the last hidden states: cosine, token by token",
    "labels": "the labels of every document: KL and agreement",
    "token labels": "the labels of every token: KL and agreement",
    "values": "the values of every document: squared error",
    "spans": "where the answer starts and ends in every document: KL and agreement",
}
_LABELS = ("ForSequenceClassification", "ForImageClassification", "ForNextSentencePrediction")
_TOKEN_LABELS = ("ForTokenClassification",)
_PRETRAINING = "ForPreTraining"
"""With `logits` and no `prediction_logits`: whether each token was replaced (ELECTRA)."""
_SPANS = ("AlbertForQuestionAnswering",)
"""Classes that return spans and declare something else."""


def answer_of(model: PreTrainedModel) -> Answer:
    """The answer of a model, also of a compiled one; raises what `answer_of_class` raises."""
    plain: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    return answer_of_class(type(plain), plain.config)


def answer_of_class(kind: Any, config: PreTrainedConfig) -> Answer:
    """The answer of a class of transformers.

    Raises `UnsupportedModel` by the name of the class where it is of no known kind.
    """
    problem = str(getattr(config, "problem_type", None))
    one = getattr(config, "num_labels", None) == 1
    # BERT and its kin see what comes next unless they are set up as decoders.
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    masked = masked and not (getattr(config, "is_decoder", False) or config.is_encoder_decoder)
    return _answer(kind, problem, one, masked)


@cache
def _answer(kind: Any, problem: str, one: bool, masked: bool) -> Answer:
    declared, name = _declared(kind), kind.__name__
    answer = None
    if "start_logits" in declared or name in _SPANS:
        answer = Answer("spans", "start_logits")
    elif "MultipleChoice" in name:
        pass  # reads several texts at a time
    elif "prediction_logits" in declared and name.endswith(_PRETRAINING):
        answer = Answer("masked", "prediction_logits")
    elif name.endswith(_LABELS):
        binary = problem == "multi_label_classification"
        values = problem == "regression" or (one and not binary)
        answer = Answer("values") if values else Answer("labels", binary=binary)
    elif name.endswith(_TOKEN_LABELS):
        answer = Answer("token labels", binary=one)
    elif kind.can_generate():
        answer = Answer("masked" if masked else "next")
    elif name.endswith("ForMaskedLM"):
        answer = Answer("masked")
    elif name.endswith(_PRETRAINING) and "logits" in declared:
        answer = Answer("token labels", binary=True)
    elif "last_hidden_state" in declared or (not declared and name.endswith("Model")):
        answer = Answer("states", "last_hidden_state")
    if answer is None or (reads_two_texts(kind) and answer.form not in ("next", "states")):
        base = kind.__name__.partition("For")[0]
        raise UnsupportedModel(
            f"{name}: by what its output is judged is not known; convert the model below its head "
            f"({base}Model, or {base}'s language model) and put the head on what that gives"
        )
    return answer


@cache
def _declared(kind: Any) -> frozenset[str]:
    """Names of what `forward` declares to return; none where it declares no such type."""
    try:
        hint: Any = typing.get_type_hints(kind.forward).get("return")
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers alone
        return frozenset()
    types = typing.get_args(hint) or (hint,)
    outputs: list[Any] = [
        one for one in types if isinstance(one, type) and issubclass(one, ModelOutput)
    ]
    return frozenset(field.name for one in outputs for field in fields(one))


def arguments(kind: Any) -> frozenset[str]:
    """Names of what `forward` of a class takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def reads_two_texts(kind: Any) -> bool:
    """Whether a class has an encoder and a decoder."""
    return "decoder_input_ids" in arguments(kind)


def kind_of(model: PreTrainedModel) -> Kind:
    """What a model reads: an encoder is whatever reads one text and predicts no next token."""
    if model.main_input_name == "pixel_values":
        return "image"
    if reads_two_texts(type(model)):
        return "encoder-decoder"
    return "decoder" if answer_of(model).form == "next" else "encoder"
