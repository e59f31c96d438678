"""What a request changes about its logits before a token is drawn: biases, grammar, penalties."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch

from orchestrator.core.request import Request, SamplingParams
from orchestrator.grammars import GrammarCompiler, GrammarFailed, GrammarMasks


class SamplingFailed(ValueError):
    """Rows for which no token can be drawn; the other rows can be sampled again.

    `reasons` tells why for each of their requests.
    """

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons


class GrammarsFailed(SamplingFailed):
    """Rows whose requests' grammars cannot be followed."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"request {i}: {why}" for i, why in reasons.items()), reasons)


class LogitAdjuster:
    """Applies the biases, grammars and penalties of requests, in this order.

    What it keeps of a request can be rebuilt from it at any time: the place of its output in its
    grammar, and how often it produced which token.
    """

    def __init__(self, grammars: GrammarCompiler | None) -> None:
        """Without `grammars`, requests with a grammar fail."""
        self._token_counts: dict[str, _TokenCounts] = {}
        self._masks = None if grammars is None else GrammarMasks(grammars)

    def prepare(self, requests: Iterable[Request]) -> None:
        """Begin to find what the grammars of these requests allow next."""
        if self._masks is not None:
            self._masks.begin(r for r in requests if r.spec.sampling.grammar is not None)

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop what is kept of these requests; unknown ids are fine."""
        for request_id in request_ids:
            self._token_counts.pop(request_id, None)
        if self._masks is not None:
            self._masks.forget(request_ids)

    def adjusted(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """Return logits, float32, as these requests change them; `logits` itself if none does.

        Raises:
            GrammarsFailed: grammars of some requests cannot be followed.
        """
        params = [r.spec.sampling for r in requests]
        biased = [row for row, p in enumerate(params) if p.logit_bias]
        guided = [row for row, p in enumerate(params) if p.grammar is not None]
        penalized = [row for row, p in enumerate(params) if _has_penalty(p)]
        if not biased and not guided and not penalized:
            return logits
        scores = logits.to(torch.float32, copy=True)
        if biased:
            _add_biases(scores, biased, requests)
        if guided:
            allowed = self._allowed([requests[row] for row in guided]).to(scores.device)
            scores[guided] = scores[guided].masked_fill_(~allowed, -torch.inf)
        if penalized:
            self._penalize(scores, penalized, requests)
        return scores

    def _allowed(self, requests: Sequence[Request]) -> torch.Tensor:
        """Return which tokens these requests' grammars allow, (num_requests, vocab_size)."""
        if self._masks is None:
            raise GrammarsFailed({r.request_id: "there is no tokenizer" for r in requests})
        found, reasons = [], {}
        for request in requests:
            try:
                found.append(self._masks.take(request))
            except GrammarFailed as error:
                reasons[request.request_id] = str(error)
        if reasons:
            raise GrammarsFailed(reasons)
        return torch.from_numpy(np.stack(found))

    def _penalize(
        self, scores: torch.Tensor, rows: Sequence[int], requests: Sequence[Request]
    ) -> None:
        """Apply the penalties of these rows to `scores`."""
        counts = [self._caught_up_counts(requests[row]) for row in rows]
        params = [requests[row].spec.sampling for row in rows]
        num_seen = [len(each.token_ids) for each in counts]

        def to_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(scores.device)

        row_ids = to_device(np.repeat(np.array(rows, dtype=np.int64), num_seen))
        token_ids = to_device(np.concatenate([each.token_ids for each in counts]))
        factor = to_device(
            np.repeat(np.array([p.repetition_penalty for p in params], dtype=np.float32), num_seen)
        )
        decrease = to_device(
            np.concatenate(
                [
                    p.frequency_penalty * each.output_counts
                    + p.presence_penalty * (each.output_counts > 0)
                    for p, each in zip(params, counts, strict=True)
                ],
                dtype=np.float32,
            )
        )
        seen = scores[row_ids, token_ids]
        seen = torch.where(seen > 0, seen / factor, seen * factor)
        scores[row_ids, token_ids] = seen - decrease

    def _caught_up_counts(self, request: Request) -> _TokenCounts:
        counts = self._token_counts.get(request.request_id)
        # An id may come back with another Request object: resumed here after a failure.
        if counts is None or counts.request is not request:
            counts = self._token_counts[request.request_id] = _TokenCounts(request)
        counts.catch_up()
        return counts


class _TokenCounts:
    """The distinct tokens of one request, and how often each was produced.

    The prompt is left out when it does not matter, that is without a repetition penalty.
    """

    def __init__(self, request: Request) -> None:
        sampling = request.spec.sampling
        max_distinct = request.num_prompt_tokens + sampling.max_tokens
        self.request = request
        self._position = 0 if sampling.repetition_penalty != 1.0 else request.num_prompt_tokens
        self._slots: dict[int, int] = {}
        self._token_ids = np.empty(max_distinct, dtype=np.int64)
        self._output_counts = np.zeros(max_distinct, dtype=np.float32)

    @property
    def token_ids(self) -> np.ndarray:  # (num_distinct,)
        return self._token_ids[: len(self._slots)]

    @property
    def output_counts(self) -> np.ndarray:  # (num_distinct,), 0 for tokens of the prompt alone
        return self._output_counts[: len(self._slots)]

    def catch_up(self) -> None:
        """Count the tokens that came since the last call."""
        num_prompt_tokens = self.request.num_prompt_tokens
        token_ids = self.request.all_token_ids
        for position in range(self._position, len(token_ids)):
            token_id = token_ids[position]
            slot = self._slots.setdefault(token_id, len(self._slots))
            self._token_ids[slot] = token_id
            self._output_counts[slot] += position >= num_prompt_tokens
        self._position = len(token_ids)


def changes_logits(sampling: SamplingParams) -> bool:
    """Return whether a request with these parameters changes its logits."""
    return bool(sampling.logit_bias) or sampling.grammar is not None or _has_penalty(sampling)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


def _add_biases(scores: torch.Tensor, rows: Sequence[int], requests: Sequence[Request]) -> None:
    """Add the logit biases of these rows to `scores`."""
    entries = [
        (row, token_id, bias)
        for row in rows
        for token_id, bias in requests[row].spec.sampling.logit_bias
    ]
    row_ids, token_ids, biases = zip(*entries, strict=True)
    index = torch.tensor([row_ids, token_ids], device=scores.device)
    scores[index[0], index[1]] += torch.tensor(biases, dtype=torch.float32, device=scores.device)
