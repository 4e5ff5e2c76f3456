"""What tasks that train by a loop of their own, or not at all, have no use for."""

from foreshock.core.errors import require
from foreshock.core.run_config import RunConfig


def check_plain(config: RunConfig) -> None:
    """Refuse settings that would be accepted and do nothing.

    Raises:
        ConfigError: interventions, another device than the CPU, bf16, or compilation.
    """
    task, runtime = config.task.name, config.runtime
    given = [spec.name for spec in config.interventions]
    require(not given, "interventions", f"play no part in task {task}; leave them out", given)
    require(runtime.device == "cpu", "runtime.device", f"must be cpu in task {task}", runtime.device)
    require(runtime.precision == "fp32", "runtime.precision", f"must be fp32 in task {task}", runtime.precision)
    require(not runtime.compile, "runtime.compile", f"must be false in task {task}", runtime.compile)
