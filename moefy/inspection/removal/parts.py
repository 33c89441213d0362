"""Parts of a corpus that share no document, and what each of them decides.

    rank      how important every unit is, and what energy it has
    decide    how much may go
    relearn   what is trained on to bring back what went
    measure   every figure that is reported

`moefy.data.shards` says which documents they are: those of the conversion, so that what its router learned
from is never measured on.
"""

from dataclasses import dataclass, replace

from moefy.data.corpus import Batch, Corpus, make_batches, sample_length
from moefy.data.documents import Documents
from moefy.data.inputs import read_batches
from moefy.data.shards import CONTEXT, by_role
from moefy.errors import CorpusError, MoefyError, unknown_choice
from moefy.inspection.causal.documents import Texts, draw
from moefy.inspection.removal import Source
from moefy.inspection.texts import Reading
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.recipe import from_dict

RANK, DECIDE, RELEARN, MEASURE = "rank", "decide", "relearn", "measure"
FORGET_SHARE = 0.25
"""Share of the tokens that is of the domain to forget."""
RETAIN_DOCUMENTS = 16
"""Most documents of each domain to retain: fewer and longer ones than of the one to forget."""
LEAST = 3
"""Documents that every domain has in every part."""
RELEARNED = 1000
"""Most tokens that are trained on to relearn."""


@dataclass(frozen=True)
class Domains:
    """What is to be forgotten, and what is not."""

    forget: str
    retain: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """The texts of one part."""

    forget: Texts
    retain: Texts


@dataclass(frozen=True)
class Parts:
    """All that is read."""

    rank: Part
    decide: Part
    measure: Part
    relearn: list[Batch]
    """At most `RELEARNED` tokens of the domain to forget."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and judged tokens of every part."""
        counts: dict[str, dict[str, int]] = {}
        for name in (RANK, DECIDE, MEASURE):
            part: Part = getattr(self, name)
            counts[name] = {
                "forget_documents": len(part.forget.documents),
                "forget_tokens": int(part.forget.tokens_Q.sum()),
                "retain_documents": len(part.retain.documents),
                "retain_tokens": int(part.retain.tokens_Q.sum()),
            }
        samples = [sample for batch in self.relearn for sample in batch.samples]
        tokens = sum(map(sample_length, samples))
        counts[RELEARN] = {"forget_documents": len(samples), "forget_tokens": tokens}
        return counts


def choose_domains(corpus: Corpus, forget: str, retain: list[str] | None) -> Domains:
    """The domains that were named; `retain` None is all others.

    Raises `CorpusError` for a corpus without labels, `MoefyError` for names that are not in it.
    """
    known = corpus.domains
    if len(known) < 2:
        raise CorpusError(
            f"corpus {corpus.name}: all its documents are of one domain, '{known[0]}'; removal takes "
            "one to forget and one to retain: give a folder with a sub-folder for each, or .jsonl lines "
            'with "domain"'
        )
    names = list(dict.fromkeys(retain)) if retain else [name for name in known if name != forget]
    for name in (forget, *names):
        if name not in known:
            raise MoefyError(f"corpus {corpus.name}: {unknown_choice('domain', name, known)}")
    if forget in names:
        raise MoefyError(f"--retain {forget}: that is the domain to forget; leave it out")
    return Domains(forget, tuple(names))


def read_parts(
    source: Source, corpus: Corpus, domains: Domains, tokens: int, *, seed: int
) -> Parts:
    """About `tokens` tokens for each part, in the shards of the conversion; of a dense checkpoint in
    those of `seed`.

    Raises `CorpusError` where a domain has too few documents.
    """
    recipe, checkpoint = source.artefact.recipe, source.checkpoint
    texts = by_role(corpus, from_dict(recipe).seed if recipe else seed)
    _require_enough(corpus, texts, domains)
    share = round(FORGET_SHARE * tokens)
    parts = {}
    for role in (RANK, DECIDE, MEASURE):
        forget = _read(checkpoint, _of(texts[role], (domains.forget,)), role)
        retained = _of(texts[role], domains.retain).take(RETAIN_DOCUMENTS * len(domains.retain))
        retain = _read(checkpoint, retained, role)
        parts[role] = Part(
            draw(forget, role, share, seed=seed), draw(retain, role, tokens - share, seed=seed)
        )
    relearn = _read(checkpoint, _of(texts[RELEARN], (domains.forget,)), RELEARN)
    return Parts(**parts, relearn=_first_whole(relearn))


def _of(texts: Corpus, names: tuple[str, ...]) -> Corpus:
    return replace(texts, documents=[doc for doc in texts.documents if doc.domain in names])


def _require_enough(corpus: Corpus, texts: dict[str, Corpus], domains: Domains) -> None:
    for name in (domains.forget, *domains.retain):
        for role in (RANK, DECIDE, RELEARN, MEASURE):
            count = len(_of(texts[role], (name,)).documents)
            if count < LEAST:
                total = sum(doc.domain == name for doc in corpus.documents)
                raise CorpusError(
                    f"corpus {corpus.name}: domain '{name}' has {total} documents, of which {count} "
                    f"fall to the part '{role}', and it takes {LEAST}; give about 30, or leave the "
                    "domain out"
                )


def _read(checkpoint: Checkpoint, texts: Corpus, role: str) -> Reading:
    """These documents, tokenized."""
    batches = read_batches(checkpoint, "decoder", texts, CONTEXT)
    documents = [sample.document for batch in batches for sample in batch.samples]
    labels = [role] * len(documents), [texts.name] * len(documents)
    vocabulary = read_config(checkpoint).get_text_config().vocab_size
    return Reading(batches, Documents(documents, *labels), None, "decoder", vocabulary, {})


def _first_whole(reading: Reading) -> list[Batch]:
    """Whole documents while they fit, and the first one cut where even that does not."""
    samples = [sample for batch in reading.batches for sample in batch.samples]
    taken, left = [], RELEARNED
    for sample in sorted(samples, key=lambda s: s.document.sha256):
        size = sample_length(sample)
        if size <= left:
            taken.append(sample)
            left -= size
    return make_batches(taken) if taken else draw(reading, RELEARN, RELEARNED).batches
