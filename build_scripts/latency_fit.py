"""Fits the coefficients of a `LatencyProfile` to measured steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from orchestrator.core.errors import EngineError
from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step."""

    shape: BatchShape
    step_s: float


def fit_latency_profile(samples: Sequence[StepSample]) -> LatencyProfile:
    """Return the non-negative coefficients that minimise the squared relative error.

    Weights of 1/T^2 make a 60 ms step count as much as a 2 s one.

    Raises:
        EngineError: the samples do not behave like a model's steps: no cost per prompt
            token, or none per decode.
    """
    columns = np.array([_columns(sample.shape) for sample in samples], dtype=np.float64)
    step_s = np.array([sample.step_s for sample in samples])
    # Scaled, because q^2 and the constants differ by six orders of magnitude.
    scale = np.maximum(columns.max(axis=0), 1.0)
    solution, _ = nnls(columns / scale / step_s[:, None], np.ones(len(samples)))
    # In seconds now, each coefficient at its column's largest; dust of the solver is no cost.
    solution[solution < _NEGLIGIBLE_S] = 0.0
    values = (solution / scale).tolist()
    fitted = dict(zip(_COEFFICIENTS, values, strict=True))
    if fitted["decode_context_s"] == 0 and fitted["decode_token_s"] == 0:
        raise EngineError(f"the fit over {len(samples)} steps gives decodes no cost; {_WAY_OUT}")
    try:
        return LatencyProfile(**fitted)
    except ValueError as error:
        raise EngineError(f"the fit over {len(samples)} steps failed: {error}") from error


def mean_absolute_percentage_error(profile: LatencyProfile, samples: Sequence[StepSample]) -> float:
    """Return the mean of |predicted - measured| / measured, as a fraction."""
    model = BatchLatencyModel(profile)
    errors = [abs(model.predict_s(s.shape) - s.step_s) / s.step_s for s in samples]
    return float(np.mean(errors))


_NEGLIGIBLE_S = 1e-9
_WAY_OUT = "is something else using the machine? profile again, or over larger sizes"

_COEFFICIENTS = (
    "prefill_quadratic_s",
    "prefill_context_s",
    "prefill_token_s",
    "prefill_cached_s",
    "decode_context_s",
    "decode_token_s",
    "mixed_step_s",
    "decode_step_s",
)


def _columns(shape: BatchShape) -> tuple[int, ...]:
    """Return what each coefficient is multiplied with, in the order of `_COEFFICIENTS`."""
    has_prefill = shape.num_prefills > 0
    return (
        shape.prefill_tokens_squared,
        shape.prefill_tokens_times_context,
        shape.prefill_tokens,
        shape.prefill_context,
        shape.decode_context,
        shape.num_decodes,
        int(has_prefill),
        int(not has_prefill),
    )
