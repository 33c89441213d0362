"""One HTML file that shows an inspection with no network, and the folder for what is too large for one.

Everything is inside: styles, scripts and, in base64, the blocks that the page inflates when it needs them:

    index     meta, quality summary, prompts, and the tables that the first screens show
    texts     the documents in which something is shown, each once
    layer_XX  the rows of one layer of the tables of experts
    layer_XX.windows  how the tokens around its examples are coloured, a byte each

Figures have the three digits that are shown, and of the examples only the shown ones are here:
`inspection.json` has everything. A policy in the page forbids it to connect anywhere, and to run any
script but its own, whatever a text holds.

A folder is served on this machine's own address. Only what is written here is given: pages, `index.json` and
packed blocks, under names without a leading dot, no links, nothing outside the folder. A request must name
this machine as its host: a page of another site whose name was made to point here (DNS rebinding) learns
nothing.
"""

import base64
import contextlib
import functools
import gzip
import hashlib
import html
import http.server
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moefy.errors import MoefyError, OutputError
from moefy.inspection.record import Inspection, Table, write_file

LARGEST = 20 * 10**6
"""Most bytes of one file; what is larger becomes a folder."""
SCRIPTS = (
    "elements", "data", "marks", "texts", "labels", "figures", "overview", "layer", "spectrum",
    "expert", "prompt", "compare", "hunt", "search", "app",
)  # fmt: skip
"""Files of `web/`, in the order in which they are joined to one script."""
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; "
    "connect-src {connect}; base-uri 'none'; form-action 'none'"
)


def write_report(inspection: Inspection, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the report to `out` and return what to open.

    `out` is a `.html` file, or else a folder for `moefy serve`. A file of over 20 MB becomes a folder
    of the same name without `.html`, whose `index.html` is returned.

    Raises `OutputError` where something is in the way and `overwrite` is not given.
    """
    report, out = Report(inspection), Path(out)
    single = out.suffix == ".html"
    if single and len(report.html) <= LARGEST:
        _check(out, overwrite)
        write_file(out, report.html.encode("utf-8"))
        return out
    folder = out.with_suffix("") if single else out
    _check(folder / "index.html", overwrite)
    for name, content in report.folder().items():
        write_file(folder / name, content)
    return folder / "index.html"


class Report:
    """The report of one inspection; a notebook shows it in a frame of its own."""

    def __init__(self, inspection: Inspection) -> None:
        self.inspection = inspection

    @cached_property
    def html(self) -> str:
        """The page with all data inside."""
        packed = {name: pack(block) for name, block in self._blocks.items()}
        return _page(self._title, packed, connect="'none'")

    def folder(self) -> dict[str, bytes]:
        """The same as files by name: `index.html` loads the others when it needs them."""
        found = {"index.html": _page(self._title, {}, connect="'self'").encode("utf-8")}
        for name, block in self._blocks.items():
            if name == "index":
                found["index.json"] = block
            else:
                found[f"{name}.gz" if "." in name else f"{name}.json.gz"] = pack(block)
        return found

    def _repr_html_(self) -> str:
        # Sandboxed without `allow-same-origin`: neither page can touch the other.
        page = html.escape(self.html, quote=True)
        return (
            '<iframe sandbox="allow-scripts allow-downloads" width="100%" height="800" '
            f'style="border:1px solid #ddd" srcdoc="{page}"></iframe>'
        )

    @property
    def _title(self) -> str:
        return f"{Path(str(self.inspection.meta.get('model', 'model'))).name}: experts"

    @cached_property
    def _blocks(self) -> dict[str, bytes]:
        return blocks(self.inspection)


def _page(title: str, packed: dict[str, bytes], *, connect: str) -> str:
    part = files("moefy.inspection.report") / "web"
    style = (part / "style.css").read_text(encoding="utf-8")
    parts = [(part / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    # One scope for all of them, and none of it global.
    script = "\n".join(['(() => {\n"use strict";', *parts, "start();\n})();"])
    policy = _POLICY.format(script=_sha(script), style=_sha(style), connect=connect)
    data = "\n".join(
        f'<script type="application/gzip" id="block-{name}">{base64.b64encode(block).decode()}</script>'
        for name, block in packed.items()
    )
    given = {
        "POLICY": policy, "TITLE": html.escape(title), "STYLE": style, "SCRIPT": script, "DATA": data,
    }  # fmt: skip
    page = (part / "template.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: given[found[1]], page)


def _sha(text: str) -> str:
    """How a content security policy names an inline script or style."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode()


def _check(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: is in the way; give another name or overwrite")


FIRST = ("experts", "causal")
"""Tables of experts that the first screens show for all layers together."""
SHOWN = {
    ("top", "select"): 10, ("top", "held_out"): 6, ("spectrum", "select"): 2,
    ("spectrum", "held_out"): 1, ("random", "select"): 6, ("near", "select"): 6,
    ("negative", "select"): 4,
}  # fmt: skip
"""Examples of an expert by panel and shard; of `spectrum` those of every bin. Others: all."""
UNSHOWN = {
    "tokens": ("precision", "total", "end"), "logits": ("rank", "direct_only"),
    "documents": ("sha256", "source"), "examples": ("margin",), "energy": ("energy", "energy_low", "energy_high"),
}  # fmt: skip
"""Columns of large tables that no screen shows."""
_DIGITS = 3
_WINDOW = "window"


def pack(block: bytes) -> bytes:
    """One block in gzip's format; the same bytes for the same block."""
    return gzip.compress(block, 9, mtime=0)


def blocks(inspection: Inspection) -> dict[str, bytes]:
    """The blocks by name, not yet compressed. Tables of experts go by layer, all others into the index."""
    tables = {name: _shown(name, given) for name, given in inspection.tables.items() if given}
    by_layer = {name for name, given in tables.items() if {"layer", "expert"} <= given.keys()}
    by_layer -= set(FIRST)
    index = {
        "meta": inspection.meta,
        "honesty": inspection.honesty,
        "prompts": [_short(prompt) for prompt in inspection.prompts],
        "tables": {name: _short(tables[name]) for name in tables if name not in by_layer},
        "by_layer": sorted(by_layer),
    }
    shown = [given for name, given in tables.items() if name != "documents"]
    wanted = {str(number) for given in shown for number in given.get("document", ())}
    texts = {
        str(number): {"text": text["text"], "lengths": np.diff(text["ends"], prepend=0).tolist()}
        for number, text in inspection.texts.items()
        if str(number) in wanted
    }
    found = {"index": _json(index), "texts": _json(texts)}
    for layer in range(len(inspection.meta["layers"])):
        cut = {name: _of_layer(tables[name], layer) for name in sorted(by_layer)}
        windows = cut.get("examples", {}).pop(_WINDOW, [])
        bytes_ = [base64.b64decode(window or "") for window in windows]
        lengths = [len(window) for window in bytes_]
        name = f"layer_{layer:02d}"
        found[name] = _json({"tables": _short(cut), "windows": lengths})
        found[f"{name}.windows"] = b"".join(bytes_)
    return found


def _shown(name: str, given: Table) -> Table:
    """The columns of a table that are shown, and of the examples the first of every panel."""
    kept = {key: column for key, column in given.items() if key not in UNSHOWN.get(name, ())}
    if name != "examples":
        return kept
    seen: Counter[tuple[Any, ...]] = Counter()
    at = []
    for i, (panel, shard) in enumerate(zip(given["panel"], given["shard"], strict=True)):
        group = given["bin"][i] if panel == "spectrum" else None
        key = (given["layer"][i], given["expert"][i], panel, shard, group)
        if seen[key] < SHOWN.get((panel, shard), len(given["panel"])):
            at.append(i)
        seen[key] += 1
    return {key: [column[i] for i in at] for key, column in kept.items()}


def _of_layer(given: Table, layer: int) -> Table:
    at = np.flatnonzero(np.array(given["layer"]) == layer).tolist()
    return {name: [column[i] for i in at] for name, column in given.items() if name != "layer"}


def _short(value: Any) -> Any:
    """The same JSON values with the digits that are shown."""
    if isinstance(value, float):
        return (
            int(value) if value.is_integer() and abs(value) < 1e9 else float(f"{value:.{_DIGITS}g}")
        )
    if isinstance(value, list):
        return [_short(item) if isinstance(item, float | list | dict) else item for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Half of a surrogate pair is no UTF-8, but what it is replaced by here is JSON's escape of it.
    return text.encode("utf-8", errors="backslashreplace")


LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"(?i)(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
"""Any port: it is another one where a tunnel leads here."""
_PART = re.compile(r"\w[\w.\-]*", re.ASCII)
_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "index.json": "application/json",
    ".gz": "application/gzip",
}


def server(folder: str | Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of this folder that only this machine can reach; port 0 is any that is free.

    `serve_forever()` runs it; `server_address` says where. Raises `MoefyError` if there is no
    report, or the port is none or taken.
    """
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise MoefyError(f"{folder}: holds no index.html; give a folder that moefy inspect wrote")
    if not 0 <= port < 2**16:
        raise OutputError(f"port {port}: there is none; give one from 1024 to 65535, or 0 for any")
    handler = functools.partial(_Handler, folder.resolve())
    try:
        return http.server.ThreadingHTTPServer((LOOPBACK, port), handler)
    except OSError as error:
        raise OutputError(f"port {port}: cannot be used ({error.strerror}); give another") from None


def serve(folder: str | Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the folder until Ctrl-C; `say` is told the address first. Errors are those of `server`."""
    with server(folder, port) as found:
        say(f"http://{LOOPBACK}:{found.server_address[1]}/")
        with contextlib.suppress(KeyboardInterrupt):
            found.serve_forever()


def find(folder: Path, target: str) -> Path | None:
    """The file of a report that a request is for; None for anything that is not of the report.

    `folder` is a real path, without links.
    """
    parts = target.partition("?")[0].removeprefix("/").split("/")
    if parts == [""]:
        parts = ["index.html"]
    # What a name may be made of leaves no `..`, no dot file and no escapes.
    if not all(_PART.fullmatch(part) for part in parts) or _type(parts[-1]) is None:
        return None
    file = folder.joinpath(*parts)
    try:
        return file if file.resolve() == file and file.is_file() else None
    except (OSError, RuntimeError):
        return None


def _type(name: str) -> str | None:
    return _TYPES.get(name, _TYPES.get(Path(name).suffix))


class _Handler(http.server.BaseHTTPRequestHandler):
    """Files of one report, without a line on stderr for each."""

    def __init__(self, folder: Path, *args: Any) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        """A file of the report, or an error that says nothing about others."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, explain=f"Ask for {LOOPBACK}.")
            return
        file = find(self.folder, self.path)
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            content = file.read_bytes()
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", str(_type(file.name)))
        self.send_header("Content-Length", str(len(content)))
        # Other sites neither show it nor take it for a script.
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Frame-Options", "SAMEORIGIN")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
