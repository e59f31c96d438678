"""How well a decoder predicts a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engines.torch_engine.engine import Decoder
from orchestrator.core.ports import ScheduledRequest
from tests.factories import make_request


def perplexity(decoder: Decoder, token_ids: Sequence[int], block_size_tokens: int) -> float:
    """Return e to the power of the mean negative log-likelihood of all tokens but the first.

    Every beginning of the text is a request of its own with one new token, and all of them share
    their blocks: one step gives the logits at every position.
    """
    blocks = list(range(-(-len(token_ids) // block_size_tokens)))
    parts = [
        ScheduledRequest(
            make_request(str(end), prompt_token_ids=token_ids[:end]), end - 1, 1, blocks
        )
        for end in range(1, len(token_ids))
    ]
    with torch.inference_mode():
        step = decoder.compute(parts)
        targets = torch.tensor([token_ids[part.num_computed_tokens + 1] for part in step.sequences])
        loss = torch.nn.functional.cross_entropy(step.logits.float(), targets)
    return float(loss.exp())
