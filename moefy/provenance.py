"""Where and with what a number was made."""

import os
import platform
import time
from typing import Any

import torch
import transformers

import moefy


def versions() -> dict[str, str]:
    """Versions that decide the bytes of an artefact."""
    return {
        "moefy": moefy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, Any]:
    """What a record says of the machine and the moment it was made."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
