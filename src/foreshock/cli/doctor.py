"""`foreshock doctor`: what is installed, what this machine offers, and what runs here."""

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

BYTES = 257
"""Vocabulary of the base proxy: bytes, and the end of a document."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show versions, processors, devices and the token cache, and what runs here."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object and nothing else."""

    def run(self) -> int:
        """Look, show, and end with 2 if torch is missing or too old."""
        from foreshock.cli.output import console, print_json
        from foreshock.study.machine import check_torch

        facts = examine()
        if self.json:
            print_json(facts)
        screen = console(quiet=self.json)
        for name, value in facts.items():
            screen.print(f"{name:<12} {shown(value)}", markup=False, soft_wrap=True)
        check_torch()
        return 0


def examine() -> dict[str, Any]:
    """Everything the doctor looks at."""
    from foreshock.core.manifest import environment
    from foreshock.core.run_config import RuntimeConfig
    from foreshock.proxy.data.cache import cache_folder
    from foreshock.study import machine

    here = environment()
    devices, runtime = machine.cuda_devices(), RuntimeConfig()
    return {
        "python": here["python"],
        "packages": here["packages"],
        "platform": here["platform"],
        "processors": machine.processors(),
        "threads": f"{runtime.threads} a run, {machine.check_workers(None, runtime)} runs side by side",
        "device": f"{len(devices)} CUDA" if devices else "cpu",
        "cache": str(cache_folder()),
        "runs here": ["cpu, fp32", *(["cuda, bf16 and compile"] if devices else [])],
        "curvature": curvature_products(),
    }


def curvature_products() -> dict[str, str] | str:
    """The back end that makes Hessian-vector products of the base proxy, and why it is chosen."""
    from foreshock.core.errors import ConfigError
    from foreshock.study.machine import check_torch

    try:
        check_torch()
    except ConfigError:
        return "unknown without torch"
    from foreshock.core.run_config import RunConfig
    from foreshock.probes.curvature.backends import choose_backend
    from foreshock.probes.curvature.space import ParameterSpace
    from foreshock.proxy.model import Proxy

    config = RunConfig()
    model = Proxy(config.model, BYTES, config.data.seq_len)
    name, reason = choose_backend(model, ParameterSpace(model.parameters()))
    return {"backend": name, "reason": reason}


def shown(value: Any) -> str:
    """A fact for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
