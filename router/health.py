"""Whether and how much a node may be used, judged by what became of it before.

Pure: no clock and no I/O; times are seconds on the caller's clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.backoff import backoff_s


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a circuit breaker opens, and for how long."""

    num_failures: int
    """So many failures in a row open it."""

    first_open_s: float
    """How long it stays open at first; twice as long each time that the node fails again."""

    max_open_s: float


class CircuitBreaker:
    """Keeps requests from a node that fails one after the other, and finds out when it is well.

        closed ---- num_failures in a row ----> open
        open ---- time ----> half-open, which lets one request through as a probe
        half-open ---- the probe is answered ----> closed, though one failure reopens it
        half-open ---- the probe fails ----> open, twice as long

    Time alone leads from open to half-open and a probe always ends, so no node is left out for
    ever. Each request is an `attempt`, any object of the caller's, for which first `begin`, in the
    end `end`, and in between whatever happens is called.
    """

    def __init__(self, rules: BreakerRules) -> None:
        self._rules = rules
        self._num_failures = 0
        self._num_openings = 0
        self._open_until_s: float | None = None
        self._probe: object | None = None

    @property
    def is_open(self) -> bool:
        """False if the breaker is closed."""
        return self._open_until_s is not None

    def obstacle(self, now_s: float) -> str | None:
        """Return why no request may be sent now; None if one may."""
        if self._open_until_s is None:
            return None
        failures = f"failed {self._num_failures} times in a row"
        if now_s < self._open_until_s:
            return f"{failures}, is tried again in {self._open_until_s - now_s:.1f} s"
        return None if self._probe is None else f"{failures}, is being tried with one request"

    def begin(self, attempt: object, now_s: float) -> None:
        """A request is sent."""
        is_half_open = self._open_until_s is not None and now_s >= self._open_until_s
        if is_half_open and self._probe is None:
            self._probe = attempt

    def answer(self, attempt: object) -> bool:
        """A request has got its first token; return whether that closes the breaker."""
        if attempt is not self._probe:
            return False
        self._probe = self._open_until_s = None
        self._num_failures = self._rules.num_failures - 1
        return True

    def succeed(self) -> None:
        """A request has got its last token."""
        if self._open_until_s is None:
            self._num_failures = self._num_openings = 0

    def fail(self, attempt: object, now_s: float) -> None:
        """The node has failed on a request."""
        # A node that dies takes all its requests along; that is one opening, not one for each.
        if self._open_until_s is not None and attempt is not self._probe:
            return
        self._probe = None
        self._num_failures += 1
        if self._num_failures >= self._rules.num_failures:
            self._num_openings += 1
            self._open_until_s = now_s + backoff_s(
                self._num_openings, first_s=self._rules.first_open_s, max_s=self._rules.max_open_s
            )

    def end(self, attempt: object) -> None:
        """Nothing more is heard of a request, for example because its client left."""
        if attempt is self._probe:
            self._probe = None


class SlowStart:
    """Bounds what a node is given after it came back, for then it looks the least loaded of all.

    Without, all new requests and all that other nodes lost would go there at once: to a node with
    cold caches, which may be back only to fail again.
    """

    LEAST_SHARE = 0.1

    def __init__(self, duration_s: float) -> None:
        self._duration_s = duration_s
        self._begun_s: float | None = None

    def begin(self, now_s: float) -> None:
        """The node has come back."""
        self._begun_s = now_s

    def is_running(self, now_s: float) -> bool:
        """Return whether the node came back so lately that it is not to have everything yet."""
        return self._begun_s is not None and now_s - self._begun_s < self._duration_s

    def max_requests(self, now_s: float, *, capacity: int) -> int | None:
        """Return how many requests the node should have at most; None: as many as come.

        It grows evenly from a tenth of `capacity`, the requests in one step of the node.
        """
        if self._begun_s is None or not self.is_running(now_s):
            return None
        share = max(self.LEAST_SHARE, (now_s - self._begun_s) / self._duration_s)
        return max(1, int(share * capacity))
