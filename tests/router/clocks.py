"""A clock for tests."""

from __future__ import annotations


class ManualClock:
    """Shows what the test last set."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now_s(self) -> float:
        return self.time_s
