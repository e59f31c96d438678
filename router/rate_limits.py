"""Limits of one client: requests a second, tokens a minute, answers at the same time.

Pure: the time is passed in. Rates are kept by the generic cell rate algorithm, a bucket that is
one number: in any T seconds at most `burst + rate * T` passes, and a client that always asks gets
exactly that. Source: ITU-T I.371, annex A (virtual scheduling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from router.errors import Refused, TooManyRequests
from router.usage import BucketCells, OwnUsage, Usage, UsageStore

CLOCK_RESOLUTION_S = 1e-6
"""Sums of floating-point times are this exact; nobody is sent away for less."""

CONCURRENCY_RETRY_S = 1.0
"""When an answer ends is not known; other limits say when they free."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast a bucket fills, and what it holds."""

    per_s: float
    burst: float
    """Passes at once after a pause."""


class RateBucket:
    """A bucket that is full at first and fills at a steady rate.

    Other processes may take from the same one. While the clients file changes they have other
    rates for a moment: then what is taken stays the same, and is reckoned anew.
    """

    def __init__(self, rate: Rate, cells: BucketCells | None = None) -> None:
        """`cells` is its state, zeros if nothing was ever taken; None makes its own."""
        self._rate = rate
        self._cells = Usage().requests if cells is None else cells

    @property
    def rate(self) -> Rate:
        """How large it is and how fast it fills."""
        return self._rate

    def level(self, now_s: float) -> float:
        """Return what is in it now; below 0 after `set_rate` has made it smaller."""
        return self._rate.burst - self.full_after_s(now_s) * self._rate.per_s

    def whole_level(self, now_s: float) -> int:
        """Return how many whole ones can be taken now."""
        return max(0, math.floor(self.level(now_s) + CLOCK_RESOLUTION_S * self._rate.per_s))

    def full_after_s(self, now_s: float) -> float:
        """Return the seconds until it is full."""
        full_at_s, per_s = self._cells
        left_s = max(0.0, full_at_s - now_s)
        return left_s if per_s == self._rate.per_s else left_s * per_s / self._rate.per_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds until `amount`, at most `burst`, is in it; 0 if it is now."""
        wait_s = (amount - self.level(now_s)) / self._rate.per_s
        return wait_s if wait_s > CLOCK_RESOLUTION_S else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, whether it is there or not."""
        self._use_own_rate(now_s)
        self._cells[0] = max(self._cells[0], now_s) + amount / self._rate.per_s

    def give_back(self, amount: float) -> None:
        """Undo a part of what was taken; what no longer fits is lost."""
        give_back(self._cells, amount)

    def set_rate(self, rate: Rate, now_s: float) -> None:
        """Go on with another rate; what was taken stays taken."""
        self._rate = rate
        self._use_own_rate(now_s)

    def _use_own_rate(self, now_s: float) -> None:
        if self._cells[1] != self._rate.per_s:
            self._cells[0] = now_s + self.full_after_s(now_s)
            self._cells[1] = self._rate.per_s


def give_back(cells: BucketCells, amount: float) -> None:
    """Undo a part of what was taken from the bucket with this state."""
    cells[0] -= amount / cells[1]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may do; None is no limit."""

    requests: Rate | None = None
    tokens: Rate | None = None
    max_concurrent_sequences: int | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks for."""

    num_prompt_tokens: int
    max_output_tokens: int
    """Over all its sequences."""

    num_sequences: int

    @property
    def max_tokens(self) -> int:
        """Tokens it may use at most."""
        return self.num_prompt_tokens + self.max_output_tokens


class ClientLimiter:
    """Counts what one client uses.

    Each request is counted when it comes. Its prompt and the longest answers it may get are taken
    from the tokens when it is accepted; what it did not use comes back when it has ended.
    """

    def __init__(self, client: str, limits: Limits, store: UsageStore | None = None) -> None:
        """`store` counts for all processes that serve the client; None counts for this one.

        Raises:
            ConfigError: as `UsageStore.of_client`.
        """
        self._client = client
        self._store = OwnUsage() if store is None else store
        self._usage = self._store.of_client(client)
        self._requests = _bucket(limits.requests, self._usage.requests)
        self._tokens = _bucket(limits.tokens, self._usage.tokens)
        self._max_sequences = limits.max_concurrent_sequences

    def set_limits(self, limits: Limits, now_s: float) -> None:
        """Go on under other limits; what is used stays used."""
        usage = self._usage
        with self._store.exclusively():
            self._requests = _changed(self._requests, limits.requests, usage.requests, now_s)
            self._tokens = _changed(self._tokens, limits.tokens, usage.tokens, now_s)
        self._max_sequences = limits.max_concurrent_sequences

    def take_request(self, now_s: float) -> None:
        """Count a request.

        Raises:
            TooManyRequests: it comes too early, and is not counted.
        """
        if self._requests is None:
            return
        with self._store.exclusively():
            wait_s = self._requests.wait_s(1, now_s)
            if not wait_s:
                self._requests.take(1, now_s)
        if wait_s:
            raise TooManyRequests(
                f"client {self._client!r} may send {self._requests.rate.per_s:g} requests a "
                f"second, {self._requests.rate.burst:g} at once; try again in {duration(wait_s)}",
                kind="requests",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )

    def reserve(self, demand: Demand, now_s: float) -> Reservation:
        """Take what a request may need at most.

        Raises:
            TooManyRequests: it is not free now; nothing is taken.
            Refused: it will never be free, being more than the limit.
        """
        with self._store.exclusively():
            self._check_sequences(demand)
            self._check_tokens(demand, now_s)
            self._usage.num_sequences.add(demand.num_sequences)
            if self._tokens is not None:
                self._tokens.take(demand.max_tokens, now_s)
                self._usage.num_reserved_tokens.add(demand.max_tokens)
        return Reservation(self._store, self._usage, demand, self._tokens)

    def headers(self, now_s: float) -> Iterator[tuple[str, str]]:
        """Yield what to tell the client, under OpenAI's names."""
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{name}", f"{bucket.rate.burst:.0f}"
                yield f"x-ratelimit-remaining-{name}", str(bucket.whole_level(now_s))
                yield f"x-ratelimit-reset-{name}", duration(bucket.full_after_s(now_s))

    def _check_sequences(self, demand: Demand) -> None:
        limit = self._max_sequences
        if limit is None:
            return
        num_sequences = self._usage.num_sequences.total()
        if num_sequences + demand.num_sequences <= limit:
            return
        if demand.num_sequences > limit:
            raise Refused(
                f"the request asks for {demand.num_sequences:,} answers, client {self._client!r} "
                f"may have {limit:,} made at a time; ask for fewer by n, or send fewer prompts",
                field="n",
                code="over_client_limit",
            )
        raise TooManyRequests(
            f"the request asks for {demand.num_sequences:,} answers, client {self._client!r} may "
            f"have {limit:,} made at a time and {num_sequences:,} are; wait until some end",
            kind="sequences",
            code="rate_limit_exceeded",
            retry_after_s=CONCURRENCY_RETRY_S,
        )

    def _check_tokens(self, demand: Demand, now_s: float) -> None:
        if self._tokens is None:
            return
        rate = self._tokens.rate
        is_over_limit = demand.max_tokens > rate.burst
        wait_s = self._tokens.wait_s(demand.max_tokens, now_s)
        if not is_over_limit and not wait_s:
            return
        need = (
            f"the request may use {demand.max_tokens:,} tokens, {demand.num_prompt_tokens:,} of "
            f"prompt and {demand.max_output_tokens:,} of answers; client {self._client!r} may use "
            f"{rate.burst:,.0f} at once"
        )
        if is_over_limit:
            raise Refused(
                f"{need}; ask for a smaller max_tokens",
                field="max_tokens",
                code="over_client_limit",
            )
        raise TooManyRequests(
            f"{need}, {rate.per_s * 60:,.0f} a minute, and has "
            f"{self._tokens.whole_level(now_s):,} left; try again in {duration(wait_s)}, "
            "or ask for a smaller max_tokens",
            kind="tokens",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )


class Reservation:
    """What an accepted request has taken, until `close`."""

    def __init__(
        self, store: UsageStore, usage: Usage, demand: Demand, tokens: RateBucket | None
    ) -> None:
        self._store = store
        self._usage = usage
        self._demand = demand
        self._tokens = tokens
        """Where its tokens were taken from, whatever the limits are by now."""

    def close(self, *, num_used_tokens: int) -> None:
        """Give back what the request, now ended, did not use; called once."""
        self._usage.num_sequences.add(-self._demand.num_sequences)
        if self._tokens is not None:
            with self._store.exclusively():
                self._tokens.give_back(self._demand.max_tokens - num_used_tokens)
                self._usage.num_reserved_tokens.add(-self._demand.max_tokens)


def duration(seconds: float) -> str:
    """Return a time as OpenAI's rate limit headers write it: 250ms, 7.5s, 1m30s."""
    milliseconds = math.ceil(seconds * 1000 - CLOCK_RESOLUTION_S)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    if hours or minutes:
        text += f"{minutes}m"
    return f"{text}{rest / 1000:g}s"


def _bucket(rate: Rate | None, cells: BucketCells) -> RateBucket | None:
    return None if rate is None else RateBucket(rate, cells)


def _changed(
    bucket: RateBucket | None, rate: Rate | None, cells: BucketCells, now_s: float
) -> RateBucket | None:
    if bucket is None or rate is None:
        return _bucket(rate, cells)
    bucket.set_rate(rate, now_s)
    return bucket
