"""What a run's record says about where it ran: versions, machine, code, command. Never about who ran it."""

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("foreshock", "torch", "numpy", "scipy", "polars", "altair")


def environment() -> dict[str, Any]:
    """Versions of Python and packages, the platform, the code's commit, the command and the time."""
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "git": git_commit(Path(__file__).parent),
        "command": sys.argv,
        "started": time.time(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit the code was at, with `+changes` if files differed; None outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
