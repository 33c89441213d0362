"""Finished parts of a long run: JSON values, and tensors if there are any, kept so that the next run takes them up.

Where their folder serves many runs a part's file is named after everything that decides it: a run with other
settings makes its own, and what both need is computed once.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from moefy.errors import MoefyError, OutputError
from moefy.run.computing import now
from moefy.run.folder import write_whole
from moefy.run.processes import ALONE, Processes
from moefy.run.reading import reading

ANEW = "it is of an unfinished run; pass --overwrite to start anew"


def digest(decided: Any) -> str:
    """The stamp of JSON values: 64 hex digits that another run has only where all of them are the same."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stages:
    """Where finished parts lie; with no folder nothing is kept."""

    folder: Path | None
    decided_by: Any = None
    """JSON values that decide every part: model, texts, seeds, versions; None where the folder is of one run,
    as the work folder of an `OutputFolder` is."""
    processes: Processes = ALONE
    """Those that make parts together; the first keeps what `run` has made."""

    def run(self, name: str, settings: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, or gave before with the same settings."""
        if self.folder is None:
            return make()
        if not self.processes.once(lambda: self.has(name, settings)):
            made = make()
            self.processes.once(lambda: self._keep(name, made, settings))
            return made
        part: dict[str, Any] = self.read(name, settings)
        return part

    def has(self, name: str, settings: Any = None) -> bool:
        """Whether this part is finished."""
        return self._file(name, settings).is_file()

    def read(self, name: str, settings: Any = None) -> Any:
        """The JSON values of a finished part."""
        file = self._file(name, settings)
        with reading(file, ANEW, OutputError):
            return json.loads(file.read_text(encoding="utf-8"))

    def tensors(self, name: str, settings: Any = None) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        file = self._file(name, settings).with_suffix(".safetensors")
        with reading(file, ANEW, OutputError):
            return load_file(file)

    def keep(
        self,
        name: str,
        values: Any,
        tensors: Mapping[str, Tensor] | None = None,
        settings: Any = None,
    ) -> None:
        """Write a part; `name` may have a folder in it. Raises `OSError` where that fails."""
        file = self._file(name, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            write_whole(file.with_suffix(".safetensors"), save(dict(tensors)))
        # Last, and by rename: its presence says that the part is finished.
        write_whole(file, json.dumps(values))

    def _keep(self, name: str, made: dict[str, Any], settings: Any) -> None:
        try:
            self.keep(name, made, settings=settings)
        except OSError as error:
            raise MoefyError(
                f"{self._file(name, settings)}: cannot be written ({error.strerror}); finished parts are "
                "kept, run again"
            ) from None

    def _file(self, name: str, settings: Any) -> Path:
        assert self.folder is not None
        if self.decided_by is None and settings is None:
            return self.folder / f"{name}.json"
        decided = [self.decided_by, settings, *now().record()]
        return self.folder / f"{name}-{digest(decided)[:16]}.json"
