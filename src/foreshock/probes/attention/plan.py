"""What of a model's attention would be seen and how, said without running it."""

import dis
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from foreshock.probes.attention import flex, huggingface, multihead, sdpa, x_transformers
from foreshock.probes.attention.capture import Capture
from foreshock.probes.attention.core import core_paths
from foreshock.probes.attention.stage import callers

QUERY_AND_KEY = (("q_proj", "k_proj"), ("query", "key"), ("wq", "wk"), ("to_q", "to_k"), ("q", "k"), ("Wq", "Wk"))
TOGETHER = ("qkv", "c_attn", "qkv_proj", "to_qkv", "Wqkv", "query_key_value", "in_proj_qkv")
_BY_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")
_WAY_OUT = "call torch.nn.functional.scaled_dot_product_attention by its attribute to have it seen"


def attention_plan(model: nn.Module) -> dict[str, Capture]:
    """How each attention of a model would be captured, by the path of `tap_attention`; runs nothing.

    Listed are the modules whose own code reaches a seam, and those that look like an attention, by the name of
    their class or projections, but are blind; the note says why and what to do. It is read off the code, so that a
    call is expected where the name of the function appears: what was captured in fact, `AttentionTaps.captures` says.
    """
    cores = core_paths(model)
    if cores:
        return {path: Capture(source="AttentionCore", exactness="exact") for path in cores}
    hub = huggingface.interface(model) is not None
    modules = callers(model)
    plan: dict[str, Capture] = {}
    looking: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if x_transformers.is_attend(module):
            looking.pop(path.rpartition(".")[0], None)
            plan[path.rpartition(".")[0] or path] = _attend(module)
        elif isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            why = multihead.refusal(module)
            plan[path] = Capture(source=multihead.SOURCE, exactness="blind" if why else "exact", note=why)
        elif (seen := _seam(module, hub)) is not None:
            plan[path] = seen
        elif _looks_like_attention(module):
            looking[path] = module
    for path, module in looking.items():
        if not any(other.startswith(f"{path}.") for other in (*plan, *looking)):
            plan[path] = Capture(source=type(module).__name__, exactness="blind", note=_blindness(module))
    return {path: plan[path] for path in modules if path in plan}


def _attend(module: Any) -> Capture:
    why = x_transformers.refusal(module)
    if why:
        return Capture(source=x_transformers.SOURCE, exactness="blind", note=why)
    opaque = x_transformers.changes(module)
    return Capture(source=x_transformers.SOURCE, exactness="exact", note=f"no entropy: {opaque}" if opaque else "")


def _seam(module: nn.Module, hub: bool) -> Capture | None:
    """The seam that a module's own code reaches; blind where it bound the function to a name of its own."""
    attributes, values = _mentions(type(module))
    if hub and "get_interface" in attributes:
        chosen = str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))
        source = sdpa.SOURCE if chosen == "sdpa" else f"{huggingface.SOURCE}: {chosen}"
        return Capture(source=source, exactness="exact")
    for seam, name in ((sdpa, "scaled_dot_product_attention"), (flex, "flex_attention")):
        if any(value is seam.FUNCTION for value in values.values()) or callable(values.get(name)):
            note = f"it bound {name} to a name of its own (from … import {name}); call it as an attribute of its module"
            return Capture(source=seam.SOURCE, exactness="blind", note=note)
        if name in attributes:
            note = f"seen when it calls {name} as an attribute of its module"
            if "softmax" in attributes:
                note += "; its path that computes softmax(q kᵀ) itself is not"
            return Capture(source=seam.SOURCE, exactness="exact", note=note)
    return None


def _blindness(module: nn.Module) -> str:
    attributes, values = _mentions(type(module))
    names = attributes | values.keys()
    if "softmax" in names:
        return f"it computes softmax(q kᵀ) itself; {_WAY_OUT}"
    if any("flash_attn" in name for name in names):
        return f"it calls a kernel of flash-attn, whose inputs are not seen; {_WAY_OUT}"
    return f"its code reaches no function that is seen; {_WAY_OUT}"


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    children = {child for child, _ in module.named_children()}
    return (
        "attention" in name
        or "attn" in name
        or any(q in children and k in children for q, k in QUERY_AND_KEY)
        or any(child in children for child in TOGETHER)
    )


def strangers(model: nn.Module) -> set[str]:
    """Modules around an `nn.MultiheadAttention` whose own code makes no call that is heard, by path.

    When they are compiled, the call inside torch's function for that module is made where they run.
    """
    return {
        path
        for path, module in callers(model).items()
        if any(isinstance(part, nn.MultiheadAttention) and part is not module for part in module.modules())
        and not {"scaled_dot_product_attention", "flex_attention"} & _mentions(type(module))[0]
    }


def _mentions(cls: type[nn.Module]) -> tuple[set[str], dict[str, Any]]:
    """The attributes and the globals that the code uses which a class's `forward` reaches in its own package.

    What that code defines itself is followed, and is in neither.
    """
    attributes: set[str] = set()
    values: dict[str, Any] = {}
    todo, done = list(_methods(cls, "forward")), set[CodeType]()
    while todo:
        function = todo.pop()
        if function.__code__ in done:
            continue
        done.add(function.__code__)
        for before, instruction in pairwise(_instructions(function.__code__)):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL":
                value = function.__globals__.get(name)
                if isinstance(value, FunctionType) and _package(value) == _package(function):
                    todo.append(_unwrapped(value))
                else:
                    values[name] = value
            elif instruction.opname in _BY_ATTRIBUTE:
                # Of a module (`F.name`) or of a part (`self.part.name`) it is not a method of the class.
                own = [] if before.opname in ("LOAD_GLOBAL", "LOAD_ATTR") else list(_methods(cls, name))
                todo += own
                if not own:
                    attributes.add(name)
    return attributes, values


def keywords(cls: type[nn.Module]) -> set[str]:
    """The names of the arguments that the methods of a class give by keyword."""
    codes = [f.__code__ for base in cls.__mro__ for f in vars(base).values() if isinstance(f, FunctionType)]
    return {
        name
        for code in codes
        for constant in code.co_consts
        if isinstance(constant, tuple)
        for name in constant
        if isinstance(name, str)
    }


def _methods(cls: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """What a class and those it is derived from, torch's own apart, define under a name."""
    for base in cls.__mro__:
        method = vars(base).get(name)
        if isinstance(method, FunctionType) and _package(method) != "torch":
            yield _unwrapped(method)


def _unwrapped(function: FunctionType) -> FunctionType:
    inner = inspect.unwrap(function)
    return inner if isinstance(inner, FunctionType) else function


def _package(function: FunctionType) -> str:
    return function.__module__.partition(".")[0]


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Of functions inside functions too."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
