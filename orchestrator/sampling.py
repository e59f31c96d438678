"""Logits -> tokens, one implementation for every engine that returns logits.

Order of the steps, as in vLLM (docstring of `Sampler`, vllm/v1/sample/sampler.py):

    1  logprobs are taken from the model's logits, before anything below
    2  logit bias; tokens that a request's grammar excludes become impossible
    3  repetition penalty, then frequency and presence penalties
    4  temperature (0: the most likely token, and the rest is skipped)
    5  min-p
    6  top-k
    7  top-p, of the mass that is left
    8  draw

A row's token depends on that row alone: not on the other rows of the batch, nor on their
number. Floating-point sums do not promise that (their order follows the shape of the batch),
so probabilities become integers before anything is added up: a token's *weight* is its
probability relative to the row's most likely token, in units of 2**-40. Every truncation is
then a smallest weight that stays, and the draw is an inverse CDF over exact sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import Request, SamplingParams
from orchestrator.device_sampling import (
    DrawParameters,
    PendingTokens,
    draw_on_device,
    most_likely_on_device,
)
from orchestrator.grammars import GrammarCompiler
from orchestrator.logit_adjustment import LogitAdjuster, SamplingFailed, changes_logits

# 2**40 keeps all 24 bits of a float32 probability down to 1e-5 of the largest, still tells 1e-12
# from 0, and leaves room for the sum over 2**22 tokens in 63 bits.
_WEIGHT_BITS = 40
_MAX_WEIGHT = 1 << _WEIGHT_BITS

# Logit differences over this stay finite or become -inf, both of which are right.
_MIN_TEMPERATURE = 1e-30

# Work on 8 rows of 49,152 stays in cache and in memory the process already has: 32 rows with
# top-p take 20 ms of one busy core, in one pass 33 ms with 4,000 page faults (AMD EPYC, 2 cores).
_CPU_ROWS_PER_PASS = 8

_UINT64 = (1 << 64) - 1


Draw = Callable[[torch.Tensor, DrawParameters], PendingTokens]
"""Begins to draw one token per row of scores."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What was drawn for one row."""

    token_id: int
    logprobs: TokenLogprobs | None
    """None unless the request asked for them."""


class InvalidLogits(SamplingFailed):
    """Rows without a finite largest logit, as after a numeric failure in the model."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        message = f"logits are NaN or infinite for request {', '.join(request_ids)}"
        super().__init__(message, dict.fromkeys(request_ids, message))


class Drawing:
    """Tokens that are being drawn, one for each of some requests."""

    def __init__(
        self, logits: torch.Tensor, requests: Sequence[Request], tokens: PendingTokens
    ) -> None:
        self._logits, self._requests, self._tokens = logits, requests, tokens

    @property
    def device_ids(self) -> torch.Tensor:
        """The tokens, (num_requests,), int64, where the logits are; -1 for a request without."""
        return self._tokens.device_ids

    @property
    def needs_logits(self) -> bool:
        """True if `finish` reads the logits again: they must not be overwritten before."""
        return any(r.spec.sampling.num_logprobs is not None for r in self._requests)

    def wait(self) -> None:
        """Return when the tokens are drawn."""
        self._tokens.wait()

    def finish(self) -> list[SampledToken | None]:
        """Return the token of each request, in order; None if its largest logit is not finite."""
        token_ids = self._tokens.wait()
        logprobs = _logprobs(self._logits, self._requests, token_ids)
        return [
            SampledToken(token_id, logprobs.get(row)) if token_id >= 0 else None
            for row, token_id in enumerate(token_ids)
        ]


class Sampler:
    """Draws the next token of each request.

    Keeps nothing but the token counts of requests with penalties and the place of those with a
    grammar in it, and those can be rebuilt from the request at any time: a request may leave and
    come back, here or on another node.
    """

    def __init__(
        self,
        vocab_size: int,
        grammars: GrammarCompiler | None = None,
        *,
        draw_on_cpu: Draw | None = None,
    ) -> None:
        """Without `grammars`, requests with a grammar fail. `draw_on_cpu` takes the place of this
        module's own steps 4 to 8 for logits in main memory."""
        self.vocab_size = vocab_size
        self._sample_on_cpu = _sample_on_cpu
        if draw_on_cpu is not None:
            self._sample_on_cpu = partial(_sample_by, draw_on_cpu)
        self._adjuster = LogitAdjuster(grammars)

    def prepare(self, requests: Iterable[Request]) -> None:
        """Begin what can be done for the next tokens of these requests before there are logits.

        It goes on beside the model if that is run next; `sample` does without, too.
        """
        self._adjuster.prepare(requests)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """Return the next token of each request, in order: `begin`, and waiting for it.

        Raises:
            SamplingFailed: a row's largest logit is NaN or infinite, or its request's grammar
                cannot be followed.
            ValueError: `logits` has another shape.
        """
        tokens = self.begin(logits, requests).finish()
        if None in tokens:
            pairs = zip(requests, tokens, strict=True)
            raise InvalidLogits([r.request_id for r, token in pairs if token is None])
        return [token for token in tokens if token is not None]

    def begin(
        self, logits: torch.Tensor, requests: Sequence[Request], *, is_ahead: bool = False
    ) -> Drawing:
        """Begin to draw the next token of each request, in order.

        `logits` is (num_requests, vocab_size), float32 or lower, on any device; it is not
        changed. Token i of a request is drawn with a number made from its seed and i alone,
        where i is the number of tokens it has produced. With `is_ahead`, that counts a token whose
        value is not known yet; `can_begin_ahead` is then true of every request.

        Among equal logits, greedy takes the lowest token id; top-k and top-p keep every token
        that ties with the last one they keep.

        Raises:
            SamplingFailed: a request's grammar cannot be followed. Nothing was drawn.
            ValueError: `logits` has another shape.
        """
        if logits.shape != (len(requests), self.vocab_size):
            raise ValueError(
                f"logits are {tuple(logits.shape)}, expected {(len(requests), self.vocab_size)}"
            )
        if not requests:
            return Drawing(logits, requests, PendingTokens.drawn([]))
        scores = self._adjuster.adjusted(logits, requests)
        sample = self._sample_on_cpu if scores.is_cpu else sample_on_device
        return Drawing(logits, requests, sample(scores, requests, is_ahead=is_ahead))

    def can_begin_ahead(self, request: Request) -> bool:
        """Return whether a token can be drawn while the values of those before are not known."""
        return not changes_logits(request.spec.sampling)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop what is kept of these requests; unknown ids are fine."""
        self._adjuster.forget(request_ids)


def _sample_on_cpu(
    scores: torch.Tensor, requests: Sequence[Request], *, is_ahead: bool
) -> PendingTokens:
    best_ids, best_scores = _most_likely(scores)
    token_ids: list[int] = torch.where(torch.isfinite(best_scores), best_ids, -1).tolist()
    drawn = [
        row
        for row, r in enumerate(requests)
        if not _is_greedy(r.spec.sampling) and token_ids[row] >= 0
    ]
    for start in range(0, len(drawn), _CPU_ROWS_PER_PASS):
        rows = drawn[start : start + _CPU_ROWS_PER_PASS]
        drawn_ids = _draw(
            _take_rows(scores, rows),
            _take_rows(best_scores, rows),
            [requests[row] for row in rows],
            is_ahead=is_ahead,
        )
        for row, token_id in zip(rows, drawn_ids, strict=True):
            token_ids[row] = token_id
    return PendingTokens.drawn(token_ids)


def sample_on_device(
    scores: torch.Tensor, requests: Sequence[Request], *, is_ahead: bool = False
) -> PendingTokens:
    """Begin to draw the next token of each request, as `Sampler.begin` does on CUDA: the host only
    queues."""
    if all(_is_greedy(r.spec.sampling) for r in requests):
        return most_likely_on_device(scores)
    draw = partial(draw_on_device, max_weight=_MAX_WEIGHT)
    return _sample_by(draw, scores, requests, is_ahead=is_ahead)


def _sample_by(
    draw: Draw, scores: torch.Tensor, requests: Sequence[Request], *, is_ahead: bool
) -> PendingTokens:
    return draw(scores, _draw_parameters(requests, is_ahead=is_ahead))


def _draw_parameters(requests: Sequence[Request], *, is_ahead: bool) -> DrawParameters:
    params = [r.spec.sampling for r in requests]
    is_greedy = [_is_greedy(p) for p in params]
    if all(is_greedy):
        nothing = np.zeros(len(params))
        return DrawParameters(nothing + 1, nothing, nothing, nothing, nothing, nothing)
    fractions = [
        0.0 if greedy else _fraction(r, is_ahead=is_ahead)
        for r, greedy in zip(requests, is_greedy, strict=True)
    ]
    return DrawParameters(
        is_greedy=np.array(is_greedy, np.float64),
        temperature=np.array([max(p.temperature, _MIN_TEMPERATURE) for p in params]),
        min_weight=np.array([p.min_p * _MAX_WEIGHT for p in params]),
        top_k=np.array([p.top_k for p in params], np.float64),
        top_p=np.array([p.top_p for p in params]),
        fraction=np.array(fractions),
    )


def _fraction(request: Request, *, is_ahead: bool) -> float:
    """Return the number that draws the request's next token."""
    # Not `num_output_tokens`, but ahead: the token that is pending may be this one.
    num_tokens = len(request.output_token_ids) + (is_ahead and request.has_pending_token)
    return uniform(request.spec.sampling.seed, num_tokens)


def uniform(seed: int, index: int) -> float:
    """Return the number in [0, 1) that draws token `index` of a request with this seed.

    SplitMix64 started at the mixed seed, read at position `index`; a multiple of 2**-53.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA
    2014); constants of the reference code, prng.di.unimi.it/splitmix64.c.
    """
    start = _mix64(seed & _UINT64)
    bits = _mix64((start + (index + 1) * 0x9E3779B97F4A7C15) & _UINT64)
    return (bits >> 11) * 2.0**-53


def _mix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64
    return value ^ (value >> 31)


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 or sampling.top_k == 1


def _take_rows(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return these rows, which are in ascending order; without a copy if they are all."""
    return values if len(rows) == len(values) else values[rows]


def _most_likely(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first largest score as (token ids, scores); NaN counts as largest."""
    # torch.argmax on the CPU is scalar: 1.6 ms for 32 x 49,152 where numpy takes 0.14 ms.
    best_ids = torch.from_numpy(scores.float().numpy().argmax(axis=-1))
    return best_ids, scores.gather(-1, best_ids.unsqueeze(-1)).squeeze(-1)


def _draw(
    scores: torch.Tensor,
    best_scores: torch.Tensor,
    requests: Sequence[Request],
    *,
    is_ahead: bool,
) -> list[int]:
    """Return one token id per row, drawn by inverse CDF in the order of token ids."""
    params = [r.spec.sampling for r in requests]

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device).unsqueeze(-1)

    temperature = column([max(p.temperature, _MIN_TEMPERATURE) for p in params], torch.float32)
    # The best score goes first: dividing it by a small temperature could overflow.
    relative = scores.to(torch.float32, copy=True).sub_(best_scores.unsqueeze(-1))
    weights = relative.div_(temperature).exp_().mul_(_MAX_WEIGHT).to(torch.int64)

    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p * _MAX_WEIGHT for p in params], torch.float64).to(torch.int64)
        weights.masked_fill_(weights < floor, 0)
    if any(p.top_k > 0 for p in params):
        weights.masked_fill_(weights < _top_k_floor(weights, params), 0)
    if any(p.top_p < 1 for p in params):
        weights.masked_fill_(weights < _top_p_floor(weights, params), 0)

    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    fraction = column([_fraction(r, is_ahead=is_ahead) for r in requests], torch.float64)
    # The product may round up to `total`, which lies behind the last token.
    target = torch.minimum((total * fraction).to(torch.int64), total - 1)
    token_ids: list[int] = torch.searchsorted(cumulative, target, right=True).squeeze(-1).tolist()
    return token_ids


def _top_k_floor(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return each row's k-th largest weight, (num_rows, 1); 0 without top-k."""
    floor = weights.new_zeros(len(params), 1)
    rows = [row for row, p in enumerate(params) if 0 < p.top_k < weights.shape[-1]]
    if rows:
        ks = [params[row].top_k for row in rows]
        largest = _take_rows(weights, rows).topk(max(ks), dim=-1).values
        positions = torch.tensor(ks, device=weights.device).unsqueeze(-1) - 1
        floor[rows] = largest.gather(-1, positions)
    return floor


def _top_p_floor(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Return the smallest weight that stays in each row, (num_rows, 1); 0 without top-p."""
    floor = weights.new_zeros(len(params), 1)
    rows = [row for row, p in enumerate(params) if p.top_p < 1]
    top_p = torch.tensor(
        [params[row].top_p for row in rows], dtype=torch.float64, device=weights.device
    )
    floor[rows] = _nucleus_floor(_take_rows(weights, rows), top_p).unsqueeze(-1)
    return floor


def _nucleus_floor(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return each row's smallest weight inside its nucleus, (num_rows,).

    The nucleus is the smallest set of tokens that holds `top_p` of the row's mass. Sorts only
    tokens that may be inside: all tokens under (1 - top_p) * mass / vocab_size together weigh
    less than what the nucleus leaves out.
    """
    mass = weights.sum(dim=-1).to(torch.float64)
    bound = (mass * (1 - top_p) / weights.shape[-1]).to(torch.int64).clamp_(min=1)
    rows, columns = torch.nonzero(weights >= bound.unsqueeze(-1), as_tuple=True)
    # One flat sort over rows of any length: by row, then by weight from the largest.
    keys = (rows << (_WEIGHT_BITS + 1)) + (_MAX_WEIGHT - weights[rows, columns])
    keys = torch.from_numpy(np.sort(keys.numpy()))
    candidates = _MAX_WEIGHT - (keys & ((1 << (_WEIGHT_BITS + 1)) - 1))

    num_rows = len(weights)
    num_candidates = torch.bincount(rows, minlength=num_rows)
    starts = num_candidates.cumsum(0) - num_candidates
    cumulative = candidates.cumsum(0)
    mass_before_row = cumulative[starts] - candidates[starts]
    needed = (mass * top_p).ceil().to(torch.int64) + mass_before_row
    num_short = torch.bincount(rows[cumulative < needed[rows]], minlength=num_rows)
    return candidates[starts + num_short]


def _logprobs(
    logits: torch.Tensor, requests: Sequence[Request], token_ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Return row -> log-probabilities, for the rows with a token whose request asked."""
    num_tops = {
        row: num_top
        for row, r in enumerate(requests)
        if (num_top := r.spec.sampling.num_logprobs) is not None and token_ids[row] >= 0
    }
    if not num_tops:
        return {}
    rows = list(num_tops)
    logprobs = _take_rows(logits, rows).float().log_softmax(dim=-1)
    chosen_ids = torch.tensor([token_ids[row] for row in rows], device=logits.device)
    chosen = logprobs.gather(-1, chosen_ids.unsqueeze(-1)).squeeze(-1).tolist()
    top_ids = _most_likely_ids(logprobs, max(num_tops.values()))
    top_logprobs = logprobs.gather(-1, top_ids).tolist()
    return {
        row: TokenLogprobs(
            token_logprob=chosen[position],
            top=tuple(zip(ids[:num_top], top_logprobs[position][:num_top], strict=True)),
        )
        for position, ((row, num_top), ids) in enumerate(
            zip(num_tops.items(), top_ids.tolist(), strict=True)
        )
    }


def _most_likely_ids(logprobs: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count` most likely token ids per row, the lowest id first among equals.

    Equals are common with bf16 logits, and topk alone orders them differently from argmax.
    """
    vocab_size = logprobs.shape[-1]
    bits = logprobs.view(torch.int32)
    # IEEE 754 order as integer order: a negative float's magnitude counts downwards.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    reversed_ids = torch.arange(vocab_size - 1, -1, -1, device=logprobs.device)
    keys = (ordered << 32) + reversed_ids
    return vocab_size - 1 - (keys.topk(min(count, vocab_size), dim=-1).values & 0xFFFFFFFF)
