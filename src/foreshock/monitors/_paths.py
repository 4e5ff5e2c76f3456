"""What rows are named by, for parameters and modules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foreshock.core.contracts import Context


def parameter_path(name: str, context: Context) -> str:
    """Layer and role in the proxy (`blocks.0.attn.q.weight` is `blocks.0.q`), the parameter's name elsewhere."""
    from foreshock.probes.hooks import path
    from foreshock.proxy.parametrization import role_of

    if not _is_proxy(context):
        return path(name)
    layer = re.match(r"blocks\.\d+\.", name)
    return (layer.group() if layer else "") + role_of(name)


def linear_path(name: str, context: Context) -> str:
    """Layer and role of a linear in the proxy (`blocks.0.attn.q` is `blocks.0.q`), the module's name elsewhere."""
    return name if not _is_proxy(context) else re.sub(r"^(blocks\.\d+\.).*\.", r"\1", name)


def _is_proxy(context: Context) -> bool:
    from foreshock.proxy.model import Proxy

    return context.config is not None and isinstance(context.model, Proxy)
