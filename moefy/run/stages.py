"""Finished parts of a long inspection, kept so that the next run takes them up.

A part is its tables, as JSON. Its file is named after everything that decides them; a run with other
settings makes its own, and what both need is computed once.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.run.processes import ALONE, Processes


@dataclass(frozen=True)
class Stages:
    """Where finished parts lie; with no folder nothing is kept."""

    folder: Path | None
    decided_by: Any
    """JSON values that decide every part: model, texts, seeds, versions."""
    processes: Processes = ALONE
    """Those that make parts together; the first keeps what it has made."""

    def run(self, name: str, settings: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, or gave before with the same settings."""
        if self.folder is None:
            return make()
        text = json.dumps([self.decided_by, settings], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = self.folder / f"{name}-{digest}.json"
        if self.processes.once(file.is_file):
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return kept
        made = make()
        self.processes.once(lambda: _keep(file, made))
        return made


def _keep(file: Path, made: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(made), encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise MoefyError(
            f"{file}: cannot be written ({error.strerror}); finished parts are kept, run again"
        ) from None
