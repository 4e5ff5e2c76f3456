"""Process-wide settings of torch, held at another value for a while."""

from collections.abc import Callable


class Setting:
    """A setting of torch that is needed at another value for a while; the last holder puts it back."""

    def __init__(self, get: Callable[[], bool], put: Callable[[bool], None]) -> None:
        self._get, self._put = get, put
        self._before, self._holders = False, 0

    def hold(self, value: bool) -> Callable[[], None]:
        """Set it; returns what ends that."""
        if self._holders == 0:
            self._before = self._get()
            self._put(value)
        self._holders += 1

        def end() -> None:
            self._holders -= 1
            if self._holders == 0:
                self._put(self._before)

        return end


def _allows_side_effects() -> bool:
    from torch._dynamo import config  # slow to import

    return bool(config.skip_fwd_side_effects_in_bwd_under_checkpoint)


def _allow_side_effects(value: bool) -> None:
    from torch._dynamo import config

    config.skip_fwd_side_effects_in_bwd_under_checkpoint = value


SIDE_EFFECTS = Setting(_allows_side_effects, _allow_side_effects)
"""Whether a checkpointed part may, when compiled, note in Python which module runs. Compiled code recomputes inside its
graph, where nobody asks."""
