"""`foreshock train`: one run from a config file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from foreshock.cli.options import import_from


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model; the folder becomes one run folder. The same command resumes what was interrupted."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG.json")]
    """JSON file with the fields that differ from the base recipe, or the config.json of another run."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """The run folder."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object at the end and nothing else."""

    def run(self) -> int:
        """Check everything, train, and say how it ended."""
        from foreshock.cli.output import console, print_error, print_json
        from foreshock.core.config import from_json
        from foreshock.core.files import number
        from foreshock.core.run_config import RunConfig, resolve
        from foreshock.core.run_folder import RunFolder
        from foreshock.study.plan import plan_single
        from foreshock.study.progress import Display
        from foreshock.study.runner import run_plan

        config = resolve(from_json(RunConfig, read_config(Path(self.config))))
        if config.model.build is not None:
            import_from(Path.cwd())
        screen = console(quiet=self.json)
        with Display(screen) as display:
            result = run_plan(plan_single(config, self.out, display.data), on_progress=display)
        status = RunFolder(self.out).status()
        if self.json:
            print_json({"out": self.out, **status})
        if result.interrupted:
            raise KeyboardInterrupt
        for failure in result.failures:
            print_error(f"{failure.reason}; see {Path(self.out) / 'log.txt'}")
            return 1
        loss = f", held-out loss {number(status['loss_held_out']):.4f}" if "loss_held_out" in status else ""
        screen.print(f"{status['status']} at step {status['step']}{loss}")
        return 0


def read_config(path: Path) -> Any:
    """The content of a config file.

    Raises:
        ConfigError: there is no such file, or it is not JSON.
    """
    from foreshock.core.errors import ConfigError

    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}; give the path of a config file, such as config.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}; give a file that holds one JSON object") from error
