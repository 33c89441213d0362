"""The report as files: what is in them, how large they are, that nothing in them loads or runs."""

import base64
import gzip
import html
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from synthetic_inspection import HOSTILE, HOSTILE_TOKENS, inspection

from moefy.errors import MoefyError, OutputError
from moefy.inspection import report
from moefy.inspection.record import Inspection, rows
from moefy.inspection.report import SHOWN, Report, blocks, server, write_report
from moefy.inspection.report.neuronpedia import export_neuronpedia
from moefy.inspection.report.plots import save_plots


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspection(layers=2, experts=8, documents=60, examples=120)


@pytest.fixture(scope="module")
def text(found: Inspection) -> str:
    return Report(found).html


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of scripts by type."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = (
            (dict(attrs).get("id") or tag) if tag in ("script", "title", "style") else None
        )

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.data[self.inside] = self.data.get(self.inside, "") + data


def inflated(text: str, name: str) -> bytes:
    return gzip.decompress(base64.b64decode(Elements(text).data[f"block-{name}"]))


def test_page_loads_nothing_and_runs_its_own_script_only(text):
    parsed = Elements(text)
    assert "://" not in text
    for tag, given in parsed.tags:
        assert given.get("src") is None, (tag, given)
        assert (given.get("href") or "data:,") == "data:,"
        assert not [name for name in given if name.startswith("on")]
    (policy,) = (
        a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    for kind in ("script", "style"):
        assert f"{kind}-src '{report._sha(parsed.data[kind])}'" in policy
    assert "innerHTML" not in text
    assert "</script" not in parsed.data["script"]


def test_hostile_texts_and_names_stay_data(text):
    parsed = Elements(text)
    assert [tag for tag, _ in parsed.tags if tag in ("b", "img")] == []
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1 + 2 + 2 * 2
    texts = json.loads(inflated(text, "texts"))
    assert texts["0"]["text"] == HOSTILE
    names = json.loads(inflated(text, "index"))["meta"]["vocabulary"]
    assert tuple(names[str(i)] for i in range(len(HOSTILE_TOKENS))) == HOSTILE_TOKENS


def test_half_of_a_surrogate_pair_survives(found):
    changed = deepcopy(found)
    changed.texts["0"]["text"] = "a\ud83d"
    assert json.loads(blocks(changed)["texts"])["0"]["text"] == "a\ud83d"


def test_blocks_hold_the_rows_of_their_layer_with_three_digits(found):
    made = blocks(found)
    index = json.loads(made["index"])
    assert index["tables"]["something_new"]["name"] == ["a", "b"]
    assert index["tables"]["experts"]["figure_of_tomorrow"] == pytest.approx(
        found.tables["experts"]["figure_of_tomorrow"], rel=5.1e-3
    )
    layer = json.loads(made["layer_01"])
    wanted = [row for row in rows(found.tables["domains"]) if row["layer"] == 1]
    own = layer["tables"]["domains"]
    assert own["expert"] == [row["expert"] for row in wanted]
    assert own["domain"] == [row["domain"] for row in wanted]
    assert own["ds_adj"] == pytest.approx([row["ds_adj"] for row in wanted], rel=5.1e-3)


def test_windows_and_examples_stay_together(found):
    made = blocks(found)
    layer = json.loads(made["layer_01"])
    own, at = layer["tables"]["examples"], 0
    kept = {
        (r["expert"], r["panel"], r["shard"], r["document"], r["position"]): r["window"]
        for r in rows(found.tables["examples"])
        if r["layer"] == 1
    }
    keys = zip(*(own[n] for n in ("expert", "panel", "shard", "document", "position")), strict=True)
    for key, length in zip(keys, layer["windows"], strict=True):
        window = made["layer_01.windows"][at : at + length]
        assert window == base64.b64decode(kept[key])
        at += length
    assert at == len(made["layer_01.windows"])


def test_examples_are_the_first_of_every_panel(found):
    own = json.loads(blocks(found)["layer_00"])["tables"]["examples"]
    counts: dict[tuple, int] = {}
    for expert, panel, shard, group in zip(
        own["expert"], own["panel"], own["shard"], own["bin"], strict=True
    ):
        key = (expert, panel, shard, group if panel == "spectrum" else None)
        counts[key] = counts.get(key, 0) + 1
    assert all(count <= SHOWN[key[1], key[2]] for key, count in counts.items())
    assert counts[0, "top", "select", None] == SHOWN["top", "select"]
    first = [r for r in rows(found.tables["examples"]) if (r["layer"], r["expert"]) == (0, 3)]
    first = [r["document"] for r in first if (r["panel"], r["shard"]) == ("random", "select")]
    shown = [
        d
        for d, e, p in zip(own["document"], own["expert"], own["panel"], strict=True)
        if (e, p) == (3, "random")
    ]
    assert shown == first[: len(shown)]
    assert len(shown) == SHOWN["random", "select"]


def test_only_documents_that_are_shown_are_in_the_file(found):
    changed = deepcopy(found)
    changed.tables = {"examples": {k: v[:1] for k, v in found.tables["examples"].items()}}
    number = changed.tables["examples"]["document"][0]
    assert list(json.loads(blocks(changed)["texts"])) == [str(number)]


def test_lengths_of_tokens_give_their_ends_again(found):
    texts = json.loads(blocks(found)["texts"])
    for number, given in found.texts.items():
        if number in texts:
            assert np.cumsum(texts[number]["lengths"]).tolist() == given["ends"]


def test_an_inspection_without_tables_still_makes_a_page(found):
    bare = Inspection(found.meta, {}, {})
    assert json.loads(inflated(Report(bare).html, "index"))["tables"] == {}


def test_same_inspection_same_bytes(found):
    assert Report(found).html == Report(deepcopy(found)).html


def test_full_size_fits_eight_megabytes():
    assert len(Report(inspection()).html) < 8e6


def test_write_refuses_what_is_in_the_way(found, tmp_path):
    out = tmp_path / "sub" / "report.html"
    assert write_report(found, out) == out
    before = out.read_bytes()
    with pytest.raises(OutputError, match="in the way"):
        write_report(found, out)
    assert write_report(found, out, overwrite=True).read_bytes() == before
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_what_is_too_large_for_a_file_becomes_a_folder(found, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGEST", 1000)
    index = write_report(found, tmp_path / "report.html")
    assert index == tmp_path / "report" / "index.html"
    names = {file.name for file in index.parent.iterdir()}
    assert names == {
        "index.html", "index.json", "texts.json.gz", "layer_00.json.gz", "layer_00.windows.gz",
        "layer_01.json.gz", "layer_01.windows.gz",
    }  # fmt: skip
    parsed = Elements(index.read_text(encoding="utf-8"))
    assert not [name for name in parsed.data if name.startswith("block-")]
    assert json.loads((index.parent / "index.json").read_bytes()) == json.loads(
        blocks(found)["index"]
    )
    layer = gzip.decompress((index.parent / "layer_01.json.gz").read_bytes())
    assert layer == blocks(found)["layer_01"]


def test_notebook_frame_holds_the_whole_page(found, text):
    parsed = Elements(Report(found)._repr_html_())
    ((tag, given),) = parsed.tags
    assert tag == "iframe"
    assert given["srcdoc"] == text
    assert "allow-same-origin" not in given["sandbox"]
    assert html.unescape(given["srcdoc"]) == html.unescape(text)


@pytest.fixture
def served(found, tmp_path):
    write_report(found, tmp_path / "folder")
    (tmp_path / "secret").write_text("x")
    with server(tmp_path / "folder") as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


def get(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return answer.read()


def test_server_gives_the_folder_and_nothing_else(found, served):
    assert get(served) == Report(found).folder()["index.html"]
    assert json.loads(get(served + "index.json"))["meta"]["model"] == found.meta["model"]
    for path in ("../secret", "%2e%2e/secret", "nothing"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(served + path)


def test_server_is_of_this_machine_only(found, tmp_path):
    write_report(found, tmp_path / "folder")
    with server(tmp_path / "folder") as running:
        assert running.server_address[0] == "127.0.0.1"
        with pytest.raises(OutputError, match="port"):
            server(tmp_path / "folder", running.server_address[1])
    with pytest.raises(MoefyError, match=re.escape("no index.html")):
        server(tmp_path)


def test_serve_verb_says_where_and_ends_with_ctrl_c(found, tmp_path):
    write_report(found, tmp_path / "folder")
    process = subprocess.Popen(
        [sys.executable, "-m", "moefy", "serve", str(tmp_path / "folder"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Shells start what is in the background without an ear for Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        url = process.stdout.readline().strip()
        assert get(url) == Report(found).folder()["index.html"]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, rest, errors) == (0, "", "")


NEURONPEDIA = {
    "release": {"name": str, "description": str, "creatorName": str, "urls": list},
    "model": {"id": str, "creatorId": str, "layers": int, "neuronsPerLayer": int, "owner": str,
              "instruct": bool, "displayName": str},
    "sourceset": {"modelId": str, "name": str, "creatorId": str, "creatorName": str, "urls": list},
    "source": {"id": str, "modelId": str, "setName": str, "creatorId": str},
    "features": {"modelId": str, "layer": str, "index": str, "creatorId": str, "maxActApprox": float,
                 "frac_nonzero": float, "pos_str": list, "pos_values": list, "neg_str": list,
                 "neg_values": list, "freq_hist_data_bar_heights": list,
                 "freq_hist_data_bar_values": list, "hookName": str, "sourceSetName": str},
    "activations": {"id": str, "tokens": list, "index": str, "layer": str, "modelId": str,
                    "creatorId": str, "maxValue": float, "maxValueTokenIndex": int,
                    "minValue": float, "values": list, "qualifyingTokenIndex": int},
}  # fmt: skip
"""Columns that the tables of Neuronpedia require or that are filled here, with their types."""


def lines(path: Path) -> list[dict]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in data.decode("utf-8").splitlines()]


def test_neuronpedia_files_have_the_columns_of_its_tables(found, tmp_path):
    root = export_neuronpedia(found, tmp_path, creator="someone", release="my-set")
    assert re.fullmatch(r"[a-z0-9_-]+", root.name)
    assert sorted(f.name for f in root.iterdir()) == ["0-my-set", "1-my-set"]
    folder = root / "1-my-set"
    files = {
        **{name: lines(folder / f"{name}.jsonl") for name in list(NEURONPEDIA)[:4]},
        **{n: lines(folder / n / "batch-0.jsonl.gz") for n in ("features", "activations")},
    }
    for name, columns in NEURONPEDIA.items():
        assert files[name], name
        for line in files[name]:
            for column, kind in columns.items():
                assert isinstance(line[column], kind | int if kind is float else kind), (
                    name,
                    column,
                )
    assert [line["index"] for line in files["features"]] == [str(i) for i in range(8)]
    # What points at each other must be there: source -> set -> release, rows -> source.
    (source,), (chosen,), (release,) = files["source"], files["sourceset"], files["release"]
    assert source["setName"] == chosen["name"]
    assert chosen["releaseName"] == release["name"]
    assert {line["layer"] for line in files["features"]} == {source["id"]} == {"1-my-set"}
    assert len({line["id"] for line in files["activations"]}) == len(files["activations"])


def test_neuronpedia_activations_are_the_windows_of_the_examples(found, tmp_path):
    root = export_neuronpedia(found, tmp_path)
    shown = lines(root / "0-moefy" / "activations" / "batch-0.jsonl.gz")
    largest = {r["expert"]: r["norm_max"] for r in rows(found.tables["experts"]) if r["layer"] == 0}
    given = {
        (r["expert"], r["document"], r["position"]): r
        for r in reversed(rows(found.tables["examples"]))
        if r["layer"] == 0
    }
    for one in shown:
        expert = int(one["index"])
        text = found.texts[one["dataIndex"]]
        assert "".join(one["tokens"]) in text["text"]
        assert len(one["tokens"]) == len(one["values"])
        position = next(
            p for e, d, p in given
            if (e, d) == (expert, int(one["dataIndex"])) and one["dataSource"].endswith(f"@{p}")
        )  # fmt: skip
        raw = base64.b64decode(given[expert, int(one["dataIndex"]), position]["window"])
        values = [byte / 254 * largest[expert] for byte in raw if byte != 255]
        assert one["values"] == pytest.approx(values, abs=1e-3)
        assert one["maxValue"] == max(one["values"])
        assert one["values"][one["maxValueTokenIndex"]] == one["maxValue"]
        first = position - one["qualifyingTokenIndex"]
        start = ([0, *text["ends"]])[first]
        assert text["text"][start:].startswith("".join(one["tokens"]))


def test_neuronpedia_refuses_what_has_no_examples(found, tmp_path):
    with pytest.raises(MoefyError, match="no examples"):
        export_neuronpedia(Inspection(found.meta, {}, {}), tmp_path)


def test_plots_are_pictures_and_miss_only_what_is_missing(found, tmp_path):
    names = ["causal", "domains", "random_weights", "routing"]
    paths = save_plots(found, tmp_path / "plots")
    assert sorted(path.stem for path in paths) == names
    for path in paths:
        grey = np.asarray(Image.open(path).convert("L"))
        assert grey.shape[0] > 200
        assert grey.std() > 5
    fewer = Inspection(found.meta, {}, {"layers": found.tables["layers"]})
    assert [path.stem for path in save_plots(fewer, tmp_path / "fewer")] == ["routing"]


def test_plots_without_matplotlib_say_what_to_install(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoefyError, match=re.escape("moefy[plots]")):
        save_plots(found, tmp_path)
