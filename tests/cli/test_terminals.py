"""Whatever a path, a domain or a token is made of, and whatever the terminal can show of it."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from moefy.cli import command
from moefy.cli.command import Shown
from moefy.run.console import Reporter
from moefy.run.tables import terminal

ODD = ["a[/b]c", "[bold]x[/bold]", "[/]", "a:cat:b", "[link=http://x]y", "\\[x]", "[0]", "x\\"]


@pytest.mark.parametrize("text", ODD)
def test_no_text_is_taken_for_markup(text, capsys, monkeypatch):
    report = Reporter()
    report.say(text)
    with report.progress(1, text) as step:
        step(text)
    list(report.track([1], text))
    captured = capsys.readouterr().err
    assert captured.splitlines() == [text, f"{text} 1/1: {text}", f"{text} (1)"]

    report.console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None,
                             markup=False, emoji=False)  # fmt: skip
    with report.progress(1, text) as step:
        step(text)
    list(report.track([1], text))
    assert report.console.file.getvalue().count(text) >= 3

    table = terminal([text, "a"], [[text, text]], title=text)
    command._show(Shown(None, [text, table, f"written to {text}"]), as_json=False)
    shown = capsys.readouterr().out
    assert shown.count(text) == 6 and f"written to {text}" in shown


SHOW = """
from moefy.cli.command import Shown, app, verb
from moefy.errors import MoefyError
from moefy.run.tables import terminal
@verb()
def show():
    '''Show.'''
    name = "\\u05d3\\u05d9\\u05df \\u4e2d \\ud83d\\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
    view = [terminal(["domain", "loss"], [[name, "1.5"]], title=name), f"written to {name} \\udcff"]
    return Shown({"domain": name}, view, MoefyError(f"{name} failed"))
app(["show", *(["--json"] if JSON else [])])
"""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8", "cp1252"])
def test_results_are_shown_with_whatever_letters_there_are(encoding):
    def run(as_json):
        done = subprocess.run(
            [sys.executable, "-c", SHOW.replace("JSON", str(as_json))],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr.decode()
        assert b"moefy: " in done.stderr and b"failed" in done.stderr
        return done.stdout.decode(encoding)

    text = run(False)
    assert "1.5" in text and "written to" in text
    assert ("\u05d3" in text) == (encoding == "utf-8")
    assert json.loads(run(True)) == {"domain": "\u05d3\u05d9\u05df \u4e2d \U0001f600"}
