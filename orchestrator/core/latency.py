"""Predicts how long a step takes, and how many prompt tokens fit into a given time.

A step costs a constant plus the marginal costs of its parts (ProServe, equations 10 to 12):

    prefill piece of q new tokens on k cached ones:  a_p*q^2 + b_p*q*k + c_p*q + d_p*k
    one decode token on k cached ones:               a_d*k + b_d

The lone `d_p*k` term is the released xLLM code's. There are two constants, one for steps that
hold any prefill and one for decode-only steps, whose launch is often much cheaper.

The profile is measured once; `observe` corrects it by what steps really take.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.latency_correction import (
    BatchClass,
    ClassCorrection,
    CoefficientFilter,
    CorrectionOptions,
    StepErrors,
)

Floats = NDArray[np.float64]

_DEFAULT_OPTIONS = CorrectionOptions()


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

    @property
    def terms(self) -> tuple[int, ...]:
        """What each coefficient is multiplied with, in the order of `LatencyProfile`."""
        has_prefill = self.num_prefills > 0
        return (
            self.prefill_tokens_squared,
            self.prefill_tokens_times_context,
            self.prefill_tokens,
            self.prefill_context,
            self.decode_context,
            self.num_decodes,
            int(has_prefill),
            int(not has_prefill),
        )

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

    def prefill_s(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        """Return the marginal cost of a prefill piece (equation 10), without the constant."""
        q, k = num_new_tokens, num_cached_tokens
        quadratic_s = self.prefill_quadratic_s * q + self.prefill_context_s * k
        return q * (quadratic_s + self.prefill_token_s) + self.prefill_cached_s * k

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
    """Turns a profile into predictions, and corrects them by what was measured.

    A prediction is the corrected coefficients times the factor of the step's batch class. The
    same observations in the same order give the same predictions.
    """

    def __init__(
        self, profile: LatencyProfile, options: CorrectionOptions = _DEFAULT_OPTIONS
    ) -> None:
        self.profile = profile
        """As measured when the engine was built; never changes."""

        self._options = options
        self._filter = CoefficientFilter(list(profile.to_dict().values()), options)
        self._decode_only = ClassCorrection(options)
        self._mixed = ClassCorrection(options)
        self._last_shapes: dict[bool, BatchShape] = {}
        """By whether they hold a prefill."""

        self._seen_kinds: set[tuple[bool, int, int]] = set()
        self._coefficients = profile
        """Without the factors."""

        self._apply_factors()

    def fresh(self) -> BatchLatencyModel:
        """Return a model of the same profile and options that has observed nothing."""
        return BatchLatencyModel(self.profile, self._options)

    def prefill_s(self, num_new_tokens: int, num_cached_tokens: int) -> float:
        """Return the marginal cost of a prefill piece, without the step's constant."""
        q, k = num_new_tokens, num_cached_tokens
        return q * (self._a_p * q + self._b_p * k + self._c_p) + self._d_p * k

    def decode_s(self, num_cached_tokens: int) -> float:
        """Return the marginal cost of one token in a decode-only step, without the constant."""
        return self._a_d * num_cached_tokens + self._b_d

    def decodes_s(self, num_cached_tokens: Floats) -> Floats:
        """Return `decode_s` of many requests at once."""
        return self._a_d * num_cached_tokens + self._b_d

    @property
    def mixed_decode_factor(self) -> float:
        """What a decode costs in a mixed step, relative to `decode_s`."""
        return self._mixed.factor / self._decode_only.factor

    def marginal_work_s(
        self,
        num_new_tokens: Floats,
        num_cached_tokens: Floats,
        *,
        is_decode: NDArray[np.bool_],
    ) -> Floats:
        """Return `decode_s` or `prefill_s` of many requests at once."""
        q, k = num_new_tokens, num_cached_tokens
        prefill_s = q * (self._a_p * q + self._b_p * k + self._c_p)
        prefill_s += self._d_p * k
        return np.where(is_decode, self._a_d * k + self._b_d, prefill_s)

    def step_constant_s(self, *, has_prefill: bool) -> float:
        """Return c0 for the kind of step."""
        return self._mixed_step_s if has_prefill else self._decode_step_s

    def upper_factor(self, quantile: float, *, has_prefill: bool) -> float:
        """Return what to multiply a prediction with so that this share of steps stays below.

        At least 1; exactly 1 until enough steps of the class were observed.
        """
        return (self._mixed if has_prefill else self._decode_only).upper_factor(quantile)

    def predict_s(self, shape: BatchShape) -> float:
        """Return the predicted duration of a whole step (equation 12); 0 for an empty one."""
        if shape.num_prefills == 0 and shape.num_decodes == 0:
            return 0.0
        has_prefill = shape.num_prefills > 0
        factor = (self._mixed if has_prefill else self._decode_only).factor
        return factor * _step_s(self._coefficients, shape)

    def observe(self, shape: BatchShape, measured_s: float) -> None:
        """Learn how long a step took.

        Ignored is the first step of each kind, which pays once for what later ones reuse
        (compiled kernels, captured graphs, allocations), and a step predicted to take no time.
        A kind is a batch class with tokens and decodes up to the next power of two.

        Raises:
            ValueError: `measured_s` is not above 0 and finite.
        """
        if not 0 < measured_s < math.inf:
            raise ValueError(f"measured_s is {measured_s}, it must be above 0 and finite")
        has_prefill = shape.num_prefills > 0
        kind = (has_prefill, shape.prefill_tokens.bit_length(), shape.num_decodes.bit_length())
        if kind not in self._seen_kinds:
            self._seen_kinds.add(kind)
            return
        predicted_s = self.predict_s(shape)
        if predicted_s <= 0:
            return
        (self._mixed if has_prefill else self._decode_only).observe(measured_s, predicted_s)
        self._last_shapes[has_prefill] = shape
        values = self._filter.observe(shape.terms, measured_s)
        if values is not None:
            self._replace_coefficients(LatencyProfile(*values))
        self._apply_factors()

    def corrected_profile(self) -> LatencyProfile:
        """Return the coefficients as predictions use them now, factors included."""
        return LatencyProfile(
            prefill_quadratic_s=self._a_p,
            prefill_context_s=self._b_p,
            prefill_token_s=self._c_p,
            prefill_cached_s=self._d_p,
            decode_context_s=self._a_d,
            decode_token_s=self._b_d,
            mixed_step_s=self._mixed_step_s,
            decode_step_s=self._decode_step_s,
        )

    def errors(self) -> tuple[StepErrors, ...]:
        """Return the recent errors of each batch class that was observed."""
        classes = (
            (BatchClass.DECODE_ONLY, self._decode_only),
            (BatchClass.MIXED, self._mixed),
        )
        return tuple(c.errors(name) for name, c in classes if c.num_steps)

    def max_new_tokens(self, num_cached_tokens: int, budget_s: float) -> int:
        """Return the most new tokens whose prefill piece costs at most `budget_s`.

        0 if not even one fits. Closed form of equation (25).

        Raises:
            OverflowError: `budget_s` is infinite; bound the budget first.
        """
        left_s = budget_s - self._d_p * num_cached_tokens
        if left_s <= 0:
            return 0
        linear_s = self._c_p + self._b_p * num_cached_tokens
        # The root (-b + sqrt(b^2 + 4at)) / 2a, written so that a -> 0 loses no digits.
        root = math.sqrt(linear_s * linear_s + 4 * self._a_p * left_s)
        count = int(2 * left_s / (linear_s + root))
        # Rounding may put the floor one off in either direction.
        while self.prefill_s(count + 1, num_cached_tokens) <= budget_s:
            count += 1
        while count > 0 and self.prefill_s(count, num_cached_tokens) > budget_s:
            count -= 1
        return count

    def _replace_coefficients(self, coefficients: LatencyProfile) -> None:
        """Take over what the slow layer learned, out of the fast factors.

        Both follow the same drift: each factor gives up as much as keeps the prediction for
        the last step of its class.
        """
        for has_prefill, shape in self._last_shapes.items():
            before_s, after_s = _step_s(self._coefficients, shape), _step_s(coefficients, shape)
            (self._mixed if has_prefill else self._decode_only).rescale(before_s / after_s)
        self._coefficients = coefficients

    def _apply_factors(self) -> None:
        """Multiply out the factors, for the many predictions until the next observation."""
        p, mixed, decode_only = self._coefficients, self._mixed.factor, self._decode_only.factor
        self._a_p = mixed * p.prefill_quadratic_s
        self._b_p = mixed * p.prefill_context_s
        self._c_p = mixed * p.prefill_token_s
        self._d_p = mixed * p.prefill_cached_s
        self._mixed_step_s = mixed * p.mixed_step_s
        self._a_d = decode_only * p.decode_context_s
        self._b_d = decode_only * p.decode_token_s
        self._decode_step_s = decode_only * p.decode_step_s


def _step_s(p: LatencyProfile, shape: BatchShape) -> float:
    """Return equation (12)."""
    return (
        (p.mixed_step_s if shape.num_prefills > 0 else p.decode_step_s)
        + p.prefill_quadratic_s * shape.prefill_tokens_squared
        + p.prefill_context_s * shape.prefill_tokens_times_context
        + p.prefill_token_s * shape.prefill_tokens
        + p.prefill_cached_s * shape.prefill_context
        + p.decode_context_s * shape.decode_context
        + p.decode_token_s * shape.num_decodes
    )
