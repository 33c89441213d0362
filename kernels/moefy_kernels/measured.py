"""What was measured on a device and is checked in: `tables/<device>.json`.

`kernels` holds configurations, `{kernel: {shape class: parameters}}`; `reached` the share of its limit that
every path of `dispatch` reached. `scripts/gpu_check.sh` makes such a file.
"""

import functools
import json
from importlib.resources import files
from typing import Any

import torch


@functools.cache
def device_name(device: torch.device) -> str:
    """The name that torch gives a GPU, `none` for anything else."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


@functools.cache
def table(device: str) -> dict[str, Any]:
    """`kernels` and `reached` of a device; both are empty where nothing was measured."""
    file = files("moefy_kernels") / "tables" / f"{device.replace(' ', '_')}.json"
    if not file.is_file():
        return {"kernels": {}, "reached": {}}
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result
