"""How long to wait before something that failed is tried again."""

from __future__ import annotations

MAX_DOUBLINGS = 64
"""Far beyond any limit in use; 2.0**1024 is not a number."""


def backoff_s(num_failures: int, *, first_s: float, max_s: float) -> float:
    """Return the pause after so many failures in a row, at least 1: twice as long after each."""
    return min(max_s, first_s * 2.0 ** min(num_failures - 1, MAX_DOUBLINGS))
