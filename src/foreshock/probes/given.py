"""What stands for a tensor that somebody else's loop does not give."""

from typing import Any, NoReturn

from foreshock.core.errors import UserError


class NotGiven:
    """Says what to do as soon as somebody reads it."""

    def __init__(self, advice: str) -> None:
        self._advice = advice

    def __getattr__(self, _: str) -> NoReturn:
        raise UserError(self._advice)

    @classmethod
    def __torch_function__(cls, _func: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> NoReturn:
        next(arg for arg in args if isinstance(arg, cls)).__getattr__("")
