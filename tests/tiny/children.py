"""Child processes that begin where the imports end: forks of a server that has them, one a session.

    child = start("import sys; print(sys.argv[1])", "hello", RANK=0)
    done = child.end()  # returncode, stdout, stderr

The server has computed nothing. It holds libraries alone, never moefy, which a child imports by itself.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest", "hypothesis", "torch", "torch._dynamo", "triton", "transformers", "accelerate",
        "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt",
        "sklearn.cluster", "scipy.optimize", "peft", "matplotlib.pyplot", "typer", "rich.progress",
    ]
)  # fmt: skip

# `--multi_gpu` is how accelerate starts several processes on one machine; without GPUs they run on
# its CPUs.
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip
"""Arguments of Python that run what follows in two processes."""


@dataclass(frozen=True)
class Child:
    """A running process and the folder of what it says."""

    process: ForkServerProcess
    said: Path

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for it; a killed one has a negative return code, as of `subprocess`."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        out, err = ((self.said / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(self.process.name, code, out, err)


def start(code: str, *arguments: object, **environment: object) -> Child:
    """Run `code` as a script with `arguments` in `sys.argv`, beside this process's environment."""
    said = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
    settings = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    given = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(
        target=_run, args=(code, given, settings, sys.path, said), daemon=True
    )
    process.start()
    return Child(process, said)


def run_two(code: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Run `code` in two processes that know of each other, as `accelerate launch` starts them.

    Unlike a launcher this leaves the one alive when the other dies.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in (0, 1)]
    return [child.end() for child in [start(code, *arguments, **rank) for rank in ranks]]


def _run(
    code: str, arguments: list[str], settings: dict[str, str], path: list[str], said: Path
) -> None:
    os.environ.clear()
    os.environ.update(settings)
    sys.argv[:], sys.path[:] = ["-c", *arguments], path
    for number, name in ((1, "out"), (2, "err")):
        with (said / name).open("w") as file:
            os.dup2(file.fileno(), number)
    exec(compile(code, "child", "exec"), {"__name__": "__main__"})
