"""What this machine offers: processors, CUDA devices, and a torch that is new enough. Never imports torch here."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from foreshock.core.errors import ConfigError, require
from foreshock.core.run_config import RuntimeConfig

TORCH_NEEDED = (2, 11)
"""Oldest torch that works."""

_CUDA_PROBE = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@cache
def cuda_devices() -> tuple[str, ...]:
    """CUDA devices that torch can use, as CUDA_VISIBLE_DEVICES names them; torch is asked in another process."""
    if shutil.which("nvidia-smi") is None:
        return ()
    probe = subprocess.run([sys.executable, "-c", _CUDA_PROBE], capture_output=True, text=True, check=False)
    count = int(probe.stdout) if probe.stdout.strip().isdigit() else 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(visible[:count] if visible else map(str, range(count)))


def check_workers(asked: int | None, runtime: RuntimeConfig) -> int:
    """Runs side by side: as asked, else as many as the processors carry, or one a CUDA device."""
    if asked is not None:
        require(asked >= 1, "workers", "must be at least 1", asked)
        return asked
    if runtime.device == "cuda":
        return max(1, len(cuda_devices()))
    return max(1, processors() // runtime.threads)


def torch_version() -> str | None:
    """The version of the torch installed, without importing it; None if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def check_torch() -> None:
    """Raise a ConfigError if torch is missing or too old."""
    found, needed = torch_version(), ".".join(map(str, TORCH_NEEDED))
    if found is None or tuple(map(int, re.findall(r"\d+", found)[:2])) < TORCH_NEEDED:
        raise ConfigError(f"torch {needed} or newer is needed, found {found}; run: pip install -U 'torch>={needed}'")


def check_device(runtime: RuntimeConfig) -> None:
    """Raise a ConfigError if a CUDA device is asked for and there is none."""
    if runtime.device == "cuda" and not cuda_devices():
        raise ConfigError("runtime.device is 'cuda' but there is no CUDA device that torch can use; use --device cpu")
