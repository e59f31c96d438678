"""Requests of every mixture of sampling parameters, to compare two ways of drawing by."""

from __future__ import annotations

import itertools

from orchestrator.core.request import Request, SamplingParams
from tests.factories import make_request


def mixed_requests() -> list[Request]:
    """Return every mixture of truncations, greedy and drawn rows side by side."""
    choices = itertools.product((0.0, 0.7, 2.0), (0, 1, 5, 10_000), (1.0, 0.9, 0.3), (0.0, 0.1))
    return [
        make_request(
            str(index),
            sampling=SamplingParams(
                max_tokens=1, seed=index, temperature=t, top_k=k, top_p=p, min_p=m
            ),
        )
        for index, (t, k, p, m) in enumerate(choices)
    ]
