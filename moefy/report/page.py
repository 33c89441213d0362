"""One HTML file that shows an inspection with no network, and the folder for what is too large for one.

Everything is inside: styles, scripts and the blocks of `blocks.py` in base64. A policy in the page
forbids it to connect anywhere, and to run any script but its own, whatever a text holds.
"""

import base64
import hashlib
import html
import re
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from moefy.errors import OutputError
from moefy.interpret.inspection import Inspection
from moefy.report.blocks import blocks, pack
from moefy.report.neuronpedia import export_neuronpedia
from moefy.report.plots import save_plots

LARGEST = 20 * 10**6
"""Most bytes of one file; what is larger becomes a folder."""
SCRIPTS = (
    "elements", "data", "marks", "texts", "labels", "figures", "overview", "layer", "spectrum",
    "expert", "prompt", "compare", "hunt", "search", "app",
)  # fmt: skip
"""Files of `page/`, in the order in which they are joined to one script."""
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
        _write(out, report.html.encode("utf-8"))
        return out
    folder = out.with_suffix("") if single else out
    _check(folder / "index.html", overwrite)
    for name, content in report.folder().items():
        _write(folder / name, content)
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

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """`write_report` of this inspection."""
        return write_report(self.inspection, out, overwrite=overwrite)

    def export_neuronpedia(self, folder: str | Path) -> Path:
        """`moefy.report.export_neuronpedia` of this inspection."""
        return export_neuronpedia(self.inspection, folder)

    def save_plots(self, folder: str | Path) -> list[Path]:
        """`moefy.report.save_plots` of this inspection."""
        return save_plots(self.inspection, folder)

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
    part = files("moefy.report") / "page"
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


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
