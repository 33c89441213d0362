"""Selective removal: the ranking, the checkpoint that is written, the figures, and what is refused."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_conversion import convert_tiny
from tiny_models import VOCAB, build, tiny_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.data.corpus import Corpus, Document, load_corpus
from moefy.errors import CorpusError, MoefyError, OutputError, UnsupportedModel
from moefy.inspection.causal.engine import Neurons
from moefy.inspection.removal import (
    EXPERT,
    NEURON,
    Source,
    neurons_of_units,
    open_source,
    units_of,
)
from moefy.inspection.removal.figures import (
    TIMES,
    Point,
    against,
    area,
    largest,
    measured,
    rises,
)
from moefy.inspection.removal.parts import Parts, choose_domains, read_parts
from moefy.inspection.removal.relearning import verdict
from moefy.inspection.removal.sets import (
    CONTROLS,
    RANKINGS,
    Control,
    Drawn,
    Removal,
    energy_matched,
    importance,
    random_neurons,
    ranked,
    relative,
)
from moefy.inspection.removal.summary import lines
from moefy.models.artefact import read_artefact
from moefy.run.console import Reporter
from moefy.run.output import Stages

QUIET = Reporter(quiet=True)
FORGOTTEN = 2
"""Number of the domain, and of the expert, that planted models forget."""


def two_domains(documents: int = 40) -> Corpus:
    """Random token ids under two labels, of unlike ranges."""
    draw = np.random.default_rng(5)
    found = []
    for domain, (low, high) in {"low": (3, 40), "high": (30, VOCAB - 4)}.items():
        for number in range(documents):
            ids = tuple(int(i) for i in draw.integers(low, high, 10 + number % 7))
            found.append(Document(domain, f"{domain}{number}", ids=ids))
    return Corpus("two", found)


def parts_of(source: Source, corpus: Corpus, forget: str, tokens: int = 2000) -> Parts:
    domains = choose_domains(corpus, forget, None)
    return read_parts(source, corpus, domains, tokens, seed=0)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """The planted model, and what removing one of its domains found."""
    folder = tmp_path_factory.mktemp("prune")
    made, corpus = planted.build(folder, "domain")
    out = folder / "out"
    record = moefy.prune(made, out, forget=f"d{FORGOTTEN}", corpus=corpus, tokens=6000, quiet=True)
    return made, out, record


def test_the_expert_of_the_domain_goes_and_no_other(planted_run) -> None:
    _, out, record = planted_run
    block = range(FORGOTTEN * planted.CONTENT, (FORGOTTEN + 1) * planted.CONTENT)
    assert record["neurons"] == [list(block)]
    assert record["removed"]["units"] == 1 and record["removed"]["of_units"] == planted.DOMAINS
    removal, energy = record["at"]["removal"], record["at"]["energy"]
    assert removal["forget_rise"]["ci95"][0] > 0.5
    assert abs(removal["retain_loss"]["mean"]) < 1e-4
    # What the neurons of a block write cancels but for one token, so that no set of their number has
    # the energy of a block but a block; which one, of whatever domain, each of the draws decides.
    assert record["energy"]["close"]
    own = energy["draws"] * energy["forget_rise"]["mean"] / removal["forget_rise"]["mean"]
    assert own == pytest.approx(round(own), abs=0.1)
    assert (energy["retain_loss"]["ci95"][0] > 0.01) == (round(own) < energy["draws"])
    assert record["against_energy"]["selective"] == (TIMES * round(own) < energy["draws"])
    assert record["area"] < 0.7
    assert json.loads((out / "removal.json").read_text()) == record
    with Image.open(out / "removal.png") as picture:
        assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5
    assert "without d2" in (out / "README.md").read_text()


def test_what_is_written_is_what_was_measured(planted_run) -> None:
    _, out, record = planted_run
    source = open_source(out, NEURON)
    texts = parts_of(source, planted.corpus(), f"d{FORGOTTEN}", tokens=6000).measure.forget
    got = measured(source.without({}), texts).ce(texts)
    assert got == pytest.approx(record["at"]["removal"]["ce_forget"], rel=1e-6)


def stored(folder: Path) -> tuple[bytes, dict[str, Tensor]]:
    """Header and tensors of a weight file."""
    file = folder / "model.safetensors"
    with file.open("rb") as stream:
        header = stream.read(8 + int.from_bytes(file.read_bytes()[:8], "little"))
    with safe_open(file, "pt") as opened:
        return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


FORMS = {
    "llama": ("llama", EXPERT, {}),
    "an adapter": ("opt", EXPERT, {"adapter": True}),
    "fused": ("phi3", EXPERT, {}),
    "transposed": ("gpt2", EXPERT, {}),
    "neurons": ("llama_mlp_bias", NEURON, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_only_zeros_in_down_projections_differ_from_the_source(form: str, tmp_path: Path) -> None:
    name, unit, options = FORMS[form]
    dense = model = build(name, tmp_path / "source", torch.bfloat16)
    if options is not None:
        model = tmp_path / "moefied"
        convert_tiny(name, dense, model, **options)
    source, out = open_source(model, unit), tmp_path / "out"
    engine = source.engine()
    counts = units_of(engine, unit)
    numbers = torch.arange(0, sum(counts.values()), 3)
    gone = neurons_of_units(engine, unit, numbers)
    removed = source.write(gone, out, QUIET)
    (before, want), (after, got) = stored(dense), stored(out)
    assert before == after
    whole = open_source(dense, NEURON)
    downs = {f"{site.path('down')}.weight": site for site in whole.sites}
    seen = 0
    for tensor in want:
        site = next((s for n, s in downs.items() if n.endswith(tensor)), None)
        expected = want[tensor].clone()
        if site is not None:
            seen += 1
            down_ND = expected if site.family.transposed else expected.T
            down_ND[removed[site.index]] = 0.0
        assert torch.equal(expected.view(torch.int16), got[tensor].view(torch.int16)), tensor
    assert seen == len(downs)
    size = 8 if unit == EXPERT else 1
    assert sum(map(len, removed)) == len(numbers) * size
    if options is not None:
        # Whole experts, as the folder says which neurons they are.
        artefact = read_artefact(model)
        experts = [artefact.permutation(site.index).view(-1, 8) for site in whole.sites]
        named = [
            torch.isin(e_EF, torch.tensor(n)) for n, e_EF in zip(removed, experts, strict=True)
        ]
        assert torch.cat(named).all(1).nonzero().flatten().tolist() == numbers.tolist()
    assert not (out / "moefy.json").exists()
    plain = tiny_model(name).auto.from_pretrained(out).float()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = plain(ids).logits
        before_logits = whole.without({})(ids).logits
        torch.testing.assert_close(got, source.without(gone)(ids).logits)
        with engine.without(gone):
            torch.testing.assert_close(got, engine.model(ids).logits, rtol=1e-4, atol=1e-5)
        with engine.without({}):
            torch.testing.assert_close(
                engine.model(ids).logits, before_logits, rtol=1e-4, atol=1e-5
            )
        assert (got - before_logits).norm() > 0.01 * before_logits.norm()


@pytest.mark.parametrize("unit", [EXPERT, NEURON])
def test_importance_is_that_of_a_naive_loop(unit: str, tmp_path: Path) -> None:
    source_folder = build("llama", tmp_path / "source")
    convert_tiny("llama", source_folder, tmp_path / "moefied")
    source = open_source(tmp_path / "moefied", EXPERT)
    engine, plain = source.engine(), source.without({})
    part = parts_of(source, two_domains(), "low").rank
    got = [importance(engine, texts, unit, QUIET, "") for texts in (part.forget, part.retain)]
    for texts, per_layer in zip((part.forget, part.retain), got, strict=True):
        samples = [sample for batch in texts.batches for sample in batch.samples]
        for site, module, found_E in zip(
            source.sites, engine.modules.values(), per_layer, strict=True
        ):
            mlp = module.weights
            sums, tokens = torch.zeros(len(found_E), dtype=torch.float64), 0
            heard: list[Tensor] = []
            handle = plain.get_submodule(site.module).register_forward_pre_hook(
                lambda _, args, heard=heard: heard.append(args[0][0])
            )
            for sample in samples:
                with torch.no_grad():
                    plain(sample.inputs["input_ids"][None])
            handle.remove()
            for x_TD in heard:
                for h_N in mlp.hidden(x_TD).double():
                    y_ND = h_N[:, None] * mlp.down_ND.double()
                    y_ED = y_ND.view(len(found_E), -1, y_ND.shape[1]).sum(1)
                    sums += y_ED.square().sum(1)
                    tokens += 1
            torch.testing.assert_close(found_E, sums / tokens, rtol=1e-4, atol=0)
    score = relative(*got)
    forget_E, retain_E = (torch.cat([layer[:1] for layer in side]) for side in got)
    alpha = 0.01 * float((got[0][0] + got[1][0]).mean()) / 2
    first = np.log((float(forget_E[0]) + alpha) / (float(retain_E[0]) + alpha))
    assert float(score[0]) == pytest.approx(first, rel=1e-6)
    order = ranked(engine, part, unit, QUIET)
    assert torch.equal(order, score.argsort(descending=True, stable=True))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_rescale_that_changes_nothing_leaves_the_ranking(name: str, tmp_path: Path) -> None:
    """Up by c and down by 1/c: any c with a gate, positive ones before a ReLU."""
    source = open_source(build(name, tmp_path / name), NEURON)
    engine = source.engine()
    part = parts_of(source, two_domains(), "low").rank

    def scores() -> Tensor:
        sides = (part.forget, part.retain)
        return relative(*(importance(engine, texts, NEURON, QUIET, "") for texts in sides))

    before = scores()
    order = ranked(engine, part, NEURON, QUIET)
    generator = torch.Generator().manual_seed(4)
    for module in engine.modules.values():
        mlp = module.weights
        c_N = torch.randn(mlp.neurons, generator=generator).exp()
        if mlp.gate_ND is not None:
            c_N *= torch.randint(0, 2, c_N.shape, generator=generator) * 2 - 1
        mlp.up_ND.data.mul_(c_N[:, None])
        mlp.down_ND.data.div_(c_N[:, None])
        if mlp.up_bias_N is not None:
            mlp.up_bias_N.data.mul_(c_N)
    assert before.std() > 0.05
    torch.testing.assert_close(scores(), before, rtol=1e-3, atol=1e-4)
    assert torch.equal(ranked(engine, part, NEURON, QUIET)[:16], order[:16])


def test_points_are_those_of_one_document_at_a_time(tmp_path: Path) -> None:
    source = open_source(build("llama", tmp_path / "source"), NEURON)
    model = source.without({})
    texts = parts_of(source, two_domains(), "low").measure.retain
    point = measured(model, texts)
    ce, right = [], []
    for batch in texts.batches:
        for sample in batch.samples:
            ids = sample.inputs["input_ids"]
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1].double()
            ce.append(float(cross_entropy(logits, ids[1:], reduction="sum")))
            right.append(int((logits.argmax(-1) == ids[1:]).sum()))
    np.testing.assert_allclose(point.ce_Q, ce, rtol=1e-4)
    np.testing.assert_array_equal(point.right_Q, right)


def test_energy_matched_sets_have_the_number_and_the_energy(tmp_path: Path) -> None:
    source = open_source(build("opt", tmp_path / "source"), NEURON)
    engine, plain = source.engine(), source.without({})
    part = parts_of(source, two_domains(), "low").rank
    gone = random_neurons(engine, 20, seed=7)
    found = energy_matched(Removal(engine, NEURON, 20, gone, part, 0, QUIET))

    def energy(layer: int, gone_N: Tensor) -> float:
        """`E ||sum_j h_j d_j||^2`, token by token; both domains count alike."""
        total = 0.0
        site, mlp = source.sites[layer], engine.modules[layer].weights
        for texts in (part.forget, part.retain):
            squares = []
            for batch in texts.batches:
                for sample in batch.samples:
                    heard: list[Tensor] = []
                    handle = plain.get_submodule(site.module).register_forward_pre_hook(
                        lambda _, a, heard=heard: heard.append(a[0])
                    )
                    with torch.no_grad():
                        plain(sample.inputs["input_ids"][None])
                    handle.remove()
                    h_TN = mlp.hidden(heard[0].reshape(-1, site.width)).double() * gone_N
                    squares.append((h_TN @ mlp.down_ND.double()).square().sum(1))
            total += float(torch.cat(squares).mean()) / 2
        return total

    assert found.close
    for drawn in found.sets:
        assert set(drawn) == set(gone)
        for layer, want_N in gone.items():
            assert drawn[layer].sum() == want_N.sum() and not torch.equal(drawn[layer], want_N)
            assert energy(layer, drawn[layer]) == pytest.approx(energy(layer, want_N), rel=0.051)


def test_a_control_and_a_ranking_are_one_row_each(
    planted_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, *_ = planted_run

    def nothing(removal: Removal) -> Drawn:
        empty: Neurons = {}
        return Drawn([empty])

    monkeypatch.setitem(CONTROLS, "nothing", Control("no {unit} at all", nothing))
    given: dict[str, Any] = {"corpus": planted.corpus(), "tokens": 600, "quiet": True, "share": 0.2}
    record = moefy.prune(made, tmp_path / "out", forget="d1", **given)
    assert record["at"]["nothing"]["forget_rise"]["mean"] == 0.0
    assert "no expert at all" in (tmp_path / "out" / "README.md").read_text()
    source = open_source(made, EXPERT)
    part = parts_of(source, planted.corpus(), "d1", tokens=600).rank
    monkeypatch.setitem(RANKINGS, "retained", lambda forget, retain: torch.cat(retain))
    engine = source.engine()
    retained = torch.cat(importance(engine, part.retain, EXPERT, QUIET, ""))
    assert int(ranked(engine, part, EXPERT, QUIET, "retained")[0]) == int(retained.argmax())


def test_the_area_by_hand() -> None:
    straight = [(0.6 * x, 0.4 * x) for x in (1.0, 0.7, 0.3)]
    assert area(straight) == pytest.approx(1.0)
    assert area([(0.6, 0.4), (0.6, 0.0), (0.2, 0.0)]) == pytest.approx(0.0)
    # 0.25 (0.2 + 0.1) / 2 + 0.25 * 0.1 / 2 over 0.5 * 0.5 * 0.4.
    assert area([(0.5, 0.4), (0.5, 0.2), (0.25, 0.1)]) == pytest.approx(0.5)
    # What costs the others everything and the domain nothing is twice as bad as unselective.
    assert area([(0.5, 0.4), (0.0, 0.4)]) == pytest.approx(2.0)


@pytest.mark.parametrize("total", [1, 2, 7, 192])
def test_the_largest_number_that_fits(total: int) -> None:
    for limit in range(total + 2):
        got = largest(total, lambda n, limit=limit: n <= limit)
        assert got <= min(limit, total)
        assert got >= min(limit, total) * 0.97 - 1e-9


def test_ratios_are_paired_and_say_when_there_is_none(planted_run) -> None:
    made, *_ = planted_run
    source = open_source(made, EXPERT)
    texts = parts_of(source, planted.corpus(), "d0").measure.forget
    count = len(texts.documents)
    draw = np.random.default_rng(0)
    base = Point(draw.uniform(50, 60, count), np.zeros(count))
    up_D = draw.uniform(1, 2, count)
    ours = Point(base.ce_Q + 6 * up_D, base.right_Q)
    found = against(ours, base, [Point(base.ce_Q + 2 * up_D, base.right_Q)] * 2, texts)
    assert found["ratio"]["mean"] == pytest.approx(3.0)
    assert found["ratio"]["ci95"] == pytest.approx([3.0, 3.0])
    assert found["selective"] is bool(6 * up_D.sum() > 3 * 2 * up_D.sum())
    found = against(ours, base, [Point(base.ce_Q + up_D, base.right_Q)], texts)
    assert found["ratio"]["mean"] == pytest.approx(6.0) and found["selective"]
    found = against(ours, base, [Point(base.ce_Q - 0.1, base.right_Q)], texts)
    assert found["ratio"] is None and found["selective"]
    same = against(base, base, [Point(base.ce_Q + up_D, base.right_Q)], texts)
    assert not same["selective"]
    share = rises(Point(base.ce_Q * 1.25, base.right_Q), base, texts)["loss"]
    assert share["mean"] == pytest.approx(0.25)


def test_relearning_says_what_steps_say(planted_run) -> None:
    _, _, record = planted_run
    found = record["relearning"]
    assert found["tokens"] <= 1000
    for run in (found["removal"], found["control"]):
        assert run["ce"][0] > run["goal"]
        if run["steps"] is not None:
            assert run["ce"][-1] <= run["goal"] < run["ce"][-2]
            assert len(run["ce"]) == run["steps"] + 1
    assert any(line.startswith("relearning") for line in lines(record))
    told: dict[str, Any] = {"lost": 1.0, "whole_model": {"gain": 0.4}}
    steps = [(3, 9), (9, 3), (5, 5), (3, None), (None, 3), (None, None)]
    said = [
        verdict({**told, "removal": {"steps": ours}, "control": {"steps": theirs}}).split()[0]
        for ours, theirs in steps
    ]
    taught = {**told, "whole_model": {"gain": 0.5}, "removal": {"steps": 3}, "control": None}
    assert verdict(taught).endswith("nothing can be told")
    assert said == ["hiding", "removal", "no", "hiding", "removal", "neither"]


def test_a_disk_that_fills_up_loses_nothing(
    planted_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, whole = planted_run
    keep, names = Stages.keep, []
    given: dict[str, Any] = {"forget": f"d{FORGOTTEN}", "corpus": planted.corpus(), "tokens": 6000}

    def filling(self: Stages, name: str, value: Any) -> None:
        if len(names) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        names.append(name)
        keep(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "keep", filling)
        with pytest.raises(OutputError, match="disk is full; free some room and pass --resume"):
            moefy.prune(made, tmp_path / "out", quiet=True, **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="unfinished run"):
        moefy.prune(made, tmp_path / "out", quiet=True, **given)
    with pytest.raises(OutputError, match="another model, recipe or corpus"):
        moefy.prune(made, tmp_path / "out", quiet=True, resume=True, **{**given, "tokens": 5000})
    again: list[str] = []

    def counted(self: Stages, name: str, value: Any) -> None:
        again.append(name)
        keep(self, name, value)

    monkeypatch.setattr(Stages, "keep", counted)
    record = moefy.prune(made, tmp_path / "out", quiet=True, resume=True, **given)
    assert not set(names) & set(again)
    assert {**record, "machine": 0} == {**whole, "machine": 0}


def few(documents: int) -> Corpus:
    """A domain with too few documents beside one that has enough."""
    enough = two_domains()
    rare = [Document("rare", f"r{n}", ids=(5, 6, n + 7)) for n in range(documents)]
    return Corpus("few", enough.documents + rare)


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "unknown": (MoefyError, "unknown domain 'd22'; did you mean 'd2'", {"forget": "d22"}),
    "unknown to retain": (MoefyError, "unknown domain 'x'", {"retain": ["x"]}),
    "in both": (MoefyError, "--retain d2: that is the domain to forget", {"retain": ["d1", "d2"]}),
    "no labels": (
        CorpusError, "all its documents are of one domain, 'tokens'",
        {"corpus": [[1, 2, 3], [2, 3, 4]]},
    ),
    "few": (
        CorpusError, "domain 'rare' has 6 documents, of which 1 fall to the part 'rank'",
        {"corpus": few(6), "forget": "rare"},
    ),
    "both amounts": (MoefyError, "give one of them", {"share": 0.1, "retain_loss": 0.1}),
    "share": (MoefyError, "--share 1.5: must be above 0 and at most 1", {"share": 1.5}),
    "loss": (MoefyError, "--retain-loss 0: must be above 0", {"retain_loss": 0.0}),
    "unit": (MoefyError, "unknown unit 'neurons'; did you mean 'neuron'", {"unit": "neurons"}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str, planted_run, tmp_path: Path) -> None:
    made, *_ = planted_run
    kind, message, given = BAD[case]
    given = {"forget": "d2", "corpus": planted.corpus(), **given}
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        moefy.prune(made, tmp_path / "out", quiet=True, **given)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_pruned_is_refused(planted_run, tmp_path: Path) -> None:
    made, out, _ = planted_run
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    given: dict[str, Any] = {"forget": "low", "corpus": two_domains(), "quiet": True}
    with pytest.raises(OutputError, match="exists already"):
        moefy.prune(made, out, forget="d2", corpus=planted.corpus(), tokens=600, quiet=True)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before
    dense = build("llama", tmp_path / "dense")
    with pytest.raises(MoefyError, match="a dense checkpoint has no experts"):
        moefy.prune(dense, tmp_path / "out", **given)
    encoder = build("bert", tmp_path / "encoder")
    with pytest.raises(UnsupportedModel, match="give a decoder"):
        moefy.prune(encoder, tmp_path / "out", unit=NEURON, **given)
    result = CliRunner().invoke(
        app, ["prune", str(made), str(tmp_path / "out"), "--forget", "python_kode"]
    )
    assert result.exit_code == 1
    assert "did you mean 'python_code'" in result.stderr and "Traceback" not in result.stderr


def test_the_parts_share_no_document() -> None:
    source = open_source(Path(moefy.__file__).parent / "demo" / "opt", NEURON)
    corpus = load_corpus().take(11 * 40)
    domains = choose_domains(corpus, "novels", None)
    parts = read_parts(source, corpus, domains, 3000, seed=0)
    seen: set[str] = set()
    for part in (parts.rank, parts.decide, parts.measure):
        for texts in (part.forget, part.retain):
            found = {doc.sha256 for doc in texts.documents.documents}
            assert found and not found & seen
            seen |= found
        assert set(part.retain.documents.domains) == set(domains.retain)
        assert part.forget.documents.domains == ["novels"]
    data = [sample for batch in parts.relearn for sample in batch.samples]
    assert not {sample.document.sha256 for sample in data} & seen
    assert 0 < sum(len(sample.inputs["input_ids"]) for sample in data) <= 1000
