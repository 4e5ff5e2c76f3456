"""One line of an examination."""

import re
from dataclasses import dataclass

from foreshock.probes.attention.capture import Exactness


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one quantity would be recorded of some modules or parameters."""

    quantity: str
    """Its name in the record, `group/quantity`; the group alone stands for all that its monitor records."""
    paths: tuple[str, ...] = ()
    """Modules or parameters; empty where the quantity is one of the whole model."""
    how: Exactness
    """exact, of a sample, an upper bound, or blind: not recorded."""
    why: str
    """Where it is read from; of what is blind the reason, and what to do."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys in `metrics.jsonl`.

        >>> Row(quantity="block_outputs/rms", paths=("h.0", "h.1"), how="exact", why="").keys
        ('block_outputs/rms/h.0', 'block_outputs/rms/h.1')
        """
        return tuple(f"{self.quantity}/{path}" for path in self.paths) or (self.quantity,)

    @property
    def where(self) -> str:
        """The paths in short.

        >>> Row(quantity="block_outputs/rms", paths=("h.0", "h.1"), how="exact", why="").where
        'h.* (2)'
        """
        patterns = {re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) for path in self.paths}
        if len(self.paths) < 2:
            return "".join(self.paths)
        return f"{patterns.pop() if len(patterns) == 1 else f'{self.paths[0]}, …'} ({len(self.paths)})"
