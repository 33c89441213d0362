"""A report's folder on this machine's own address, for reports that are too large for one file.

Only files that `moefy.inspection.report` writes are given: pages, `index.json` and packed blocks, under names
without a leading dot, no links, nothing outside the folder. A request must name this machine as its host:
a page of another site whose name was made to point here (DNS rebinding) learns nothing.
"""

import contextlib
import functools
import http.server
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError, OutputError

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

    `serve_forever()` runs it; `server_address` says where. Raises `MoefyError` where there is no
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
