"""Predicts how long a step takes, and how many prompt tokens fit into a given time.

A step costs a constant plus the marginal costs of its parts (ProServe, equations 10 to 12):

    prefill piece of q new tokens on k cached ones:  a_p*q^2 + b_p*q*k + c_p*q + d_p*k
    one decode token on k cached ones:               a_d*k + b_d

The lone `d_p*k` term is the released xLLM code's. There are two constants, one for steps that
hold any prefill and one for decode-only steps, whose launch is often much cheaper.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What of a step's content decides its duration; sums, so that parts can be added."""

    num_prefills: int = 0
    prefill_tokens: int = 0
    """Sum of q over prefill pieces."""

    prefill_tokens_squared: int = 0
    """Sum of q*q."""

    prefill_tokens_times_context: int = 0
    """Sum of q*k."""

    prefill_context: int = 0
    """Sum of k."""

    num_decodes: int = 0
    decode_context: int = 0
    """Sum of cached tokens over decodes."""

    @classmethod
    def of_prefill(cls, num_new_tokens: int, num_cached_tokens: int) -> Self:
        """Return the shape of one prefill piece."""
        return cls(
            num_prefills=1,
            prefill_tokens=num_new_tokens,
            prefill_tokens_squared=num_new_tokens**2,
            prefill_tokens_times_context=num_new_tokens * num_cached_tokens,
            prefill_context=num_cached_tokens,
        )

    @classmethod
    def of_decode(cls, num_cached_tokens: int) -> Self:
        """Return the shape of one decode token."""
        return cls(num_decodes=1, decode_context=num_cached_tokens)

    def __add__(self, other: BatchShape) -> BatchShape:
        return BatchShape(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(BatchShape))
        )


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Coefficients of the model above, in seconds; measured once per engine and machine."""

    prefill_quadratic_s: float
    """a_p, per token squared."""

    prefill_context_s: float
    """b_p, per new token and cached token."""

    prefill_token_s: float
    """c_p, per new token."""

    prefill_cached_s: float
    """d_p, per cached token."""

    decode_context_s: float
    """a_d, per cached token."""

    decode_token_s: float
    """b_d, per decode token."""

    mixed_step_s: float
    """c0 of a step with any prefill."""

    decode_step_s: float
    """c0 of a decode-only step."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"latency profile: {f.name} is {value}, it must be finite and at least 0; "
                    "profile the engine again"
                )
        if self.prefill_token_s == 0 and self.prefill_quadratic_s == 0:
            raise ValueError(
                "latency profile: prefill_token_s and prefill_quadratic_s are both 0, so prompts "
                "would cost nothing; profile the engine again"
            )

    def to_dict(self) -> dict[str, float]:
        """Return the coefficients by name, as stored in a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the profile stored by `to_dict`.

        Raises:
            ValueError: a coefficient is missing, unknown, or out of range.
        """
        names = {f.name for f in fields(cls)}
        if values.keys() != names:
            wrong = ", ".join(sorted(values.keys() ^ names))
            raise ValueError(f"latency profile: missing or unknown coefficients: {wrong}")
        return cls(**{name: float(values[name]) for name in names})


class BatchLatencyModel:
    """Turns a profile into predictions."""

    def __init__(self, profile: LatencyProfile) -> None:
        self.profile = profile

    def prefill_s(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        """Return the marginal cost of a prefill piece, without the step's constant."""
        p = self.profile
        q, k = num_new_tokens, num_cached_tokens
        return q * (p.prefill_quadratic_s * q + p.prefill_context_s * k + p.prefill_token_s) + (
            p.prefill_cached_s * k
        )

    def decode_s(self, num_cached_tokens: int) -> float:
        """Return the marginal cost of one decode token, without the step's constant."""
        p = self.profile
        return p.decode_context_s * num_cached_tokens + p.decode_token_s

    def step_constant_s(self, *, has_prefill: bool) -> float:
        """Return c0 for the kind of step."""
        return self.profile.mixed_step_s if has_prefill else self.profile.decode_step_s

    def predict_s(self, shape: BatchShape) -> float:
        """Return the predicted duration of a whole step (equation 12); 0 for an empty one."""
        if shape.num_prefills == 0 and shape.num_decodes == 0:
            return 0.0
        p = self.profile
        return (
            self.step_constant_s(has_prefill=shape.num_prefills > 0)
            + p.prefill_quadratic_s * shape.prefill_tokens_squared
            + p.prefill_context_s * shape.prefill_tokens_times_context
            + p.prefill_token_s * shape.prefill_tokens
            + p.prefill_cached_s * shape.prefill_context
            + p.decode_context_s * shape.decode_context
            + p.decode_token_s * shape.num_decodes
        )

    def max_new_tokens(self, num_cached_tokens: int, budget_s: float) -> int:
        """Return the most new tokens whose prefill piece costs at most `budget_s`.

        0 if not even one fits. Closed form of equation (25).

        Raises:
            OverflowError: `budget_s` is infinite; bound the budget first.
        """
        p = self.profile
        left_s = budget_s - p.prefill_cached_s * num_cached_tokens
        if left_s <= 0:
            return 0
        linear_s = p.prefill_token_s + p.prefill_context_s * num_cached_tokens
        square_s = p.prefill_quadratic_s
        # The root (-b + sqrt(b^2 + 4at)) / 2a, written so that a -> 0 loses no digits.
        root = math.sqrt(linear_s * linear_s + 4 * square_s * left_s)
        count = int(2 * left_s / (linear_s + root))
        # Rounding may put the floor one off in either direction.
        while self.prefill_s(count + 1, num_cached_tokens) <= budget_s:
            count += 1
        while count > 0 and self.prefill_s(count, num_cached_tokens) > budget_s:
            count -= 1
        return count
