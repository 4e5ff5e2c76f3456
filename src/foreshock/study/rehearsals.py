"""Models of the user's own are tried while planning: in a process of their own, because planning imports no torch."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterable

from foreshock.core import plugins
from foreshock.core.config import canonical_json
from foreshock.core.errors import ConfigError
from foreshock.core.run_config import RunConfig
from foreshock.study.estimate import rough_seconds
from foreshock.study.grid import Size, at_point
from foreshock.study.launchers.local import worker_environment

_TAIL = 12
"""Lines of a trial's output that are shown when it crashed."""


def check_importable(configs: Iterable[RunConfig]) -> None:
    """Raise a ConfigError if the module of a `model.build` is nowhere to be found."""
    for build in {config.model.build for config in configs} - {None}:
        if not plugins.is_importable(str(build)):
            module = str(build).partition(":")[0]
            raise ConfigError(
                f"model.build: there is no module {module!r}; give package.module:function, importable from the "
                "current folder or PYTHONPATH, or --model path/to/file.py:function"
            )


def rehearse(configs: Iterable[RunConfig]) -> None:
    """Train the smallest size of every arm that has a model of the user's own for one logged step.

    Raises:
        ConfigError: it cannot be built or trained, or an intervention or a monitor cannot work on it.
    """
    smallest: dict[str, RunConfig] = {}
    point = Size(width=1, depth=1, heads=1)
    for config in sorted(configs, key=rough_seconds):
        if config.model.build is not None:
            smallest.setdefault(canonical_json(at_point(config, point, 1.0, 0)), config)
    if smallest:
        sources = tuple(plugins.source_digest(str(config.model.build)) for config in smallest.values())
        _rehearse(canonical_json(list(smallest.values())), sources)


@functools.cache
def _rehearse(configs: str, sources: tuple[str, ...]) -> None:
    """Once a process for the same configs and sources: a search plans many times."""
    command = [sys.executable, "-P", "-m", "foreshock.training.rehearsal"]
    done = subprocess.run(command, input=configs, capture_output=True, text=True, env=worker_environment(), check=False)
    try:
        error = json.loads(done.stdout)["error"]
    except ValueError:
        tail = "\n".join(done.stderr.splitlines()[-_TAIL:])
        raise ConfigError(f"model.build: trying a model ended with exit code {done.returncode}:\n{tail}") from None
    if error is not None:
        raise ConfigError(error)
