"""A report's folder on this machine's own address, for reports that are too large for one file."""

import contextlib
import functools
import http.server
from collections.abc import Callable
from pathlib import Path

from moefy.errors import MoefyError, OutputError

LOOPBACK = "127.0.0.1"


def server(folder: str | Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of this folder that only this machine can reach; port 0 is any that is free.

    `serve_forever()` runs it; `server_address` says where. Raises `MoefyError` where there is no
    report or the port is taken.
    """
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise MoefyError(f"{folder}: holds no index.html; give a folder that moefy inspect wrote")
    handler = functools.partial(_Handler, directory=str(folder))
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


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of one folder, without a line on stderr for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def list_directory(self, path: object) -> None:
        """Show pages only."""
        self.send_error(http.HTTPStatus.NOT_FOUND)
