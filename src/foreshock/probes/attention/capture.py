"""How a number about an attention was come by."""

from dataclasses import dataclass
from typing import Literal

Exactness = Literal["exact", "sample", "bound", "blind"]


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Where the queries and keys of one attention are read, and how good what is made of them is."""

    source: str
    """The call or module that they are read from, such as `F.scaled_dot_product_attention`."""
    exactness: Exactness
    """All pairs of queries and keys, some queries, an upper bound by norms, or nothing."""
    note: str = ""
    """What is left out and why, what it rests on, or what to do; empty if there is nothing to say."""

    def __str__(self) -> str:
        """All of it in words.

        >>> str(Capture(source="nn.MultiheadAttention", exactness="exact"))
        'exact, from nn.MultiheadAttention'
        """
        return f"{self.exactness}, from {self.source}" + (f"; {self.note}" if self.note else "")
