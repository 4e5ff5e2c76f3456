"""Into how many groups channels are cut where nobody says. Imports no torch."""

MOST = 32
"""Groups, at most, as in the published EvoNorms."""
SMALLEST = 4
"""Channels of a group, at least: the statistic of one channel would be that of an instance norm."""


def groups_of(channels: int) -> int:
    """The most groups, up to 32, that divide the channels into groups of four or more; else one.

    >>> [groups_of(channels) for channels in (2, 8, 24, 64, 256)]
    [1, 2, 6, 16, 32]
    """
    return max(g for g in range(1, MOST + 1) if channels % g == 0 and (channels // g >= SMALLEST or g == 1))
