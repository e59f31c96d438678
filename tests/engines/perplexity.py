"""How well each precision predicts a text.

python -m tests.engines.perplexity
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engines.kv_pool import KVPool
from engines.torch_engine.cpu_decoder import CpuDecoder
from engines.torch_engine.engine import Decoder, PlainDecoder
from engines.torch_engine.model import LlamaDecoder
from engines.torch_engine.precision import KV_DTYPES, Dtype
from engines.torch_engine.weights import fuse_weights, read_config, read_tensors
from orchestrator.core.ports import ScheduledRequest
from tests.engine_dirs import smollm2_engine_dir
from tests.factories import make_request

TEXT = Path(__file__).parent / "texts" / "perplexity.txt"
_BLOCK_SIZE_TOKENS = 16


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


def perplexities(engine_dir: Path) -> dict[Dtype, float]:
    """Return the perplexity of the committed text in every precision of the embedded engine."""
    config, tensors = read_config(engine_dir), read_tensors(engine_dir)
    tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
    token_ids = tokenizer.encode(TEXT.read_text()).ids
    device, limit = torch.device("cpu"), len(token_ids)

    def decoder(dtype: Dtype) -> Decoder:
        number = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        weights = fuse_weights(config, tensors, dtype=number, device=device)
        layout = config.kv_layout(_BLOCK_SIZE_TOKENS)
        num_blocks = -(-limit // _BLOCK_SIZE_TOKENS)
        pool = KVPool(layout, num_blocks, dtype=KV_DTYPES[dtype], device=device)
        if dtype == "int8":
            return CpuDecoder(
                config,
                weights,
                pool,
                max_num_seqs=limit,
                max_num_batched_tokens=limit,
                max_model_len=limit,
            )
        return PlainDecoder(LlamaDecoder(config, weights, max_model_len=limit), pool)

    return {dtype: perplexity(decoder(dtype), token_ids, _BLOCK_SIZE_TOKENS) for dtype in KV_DTYPES}


if __name__ == "__main__":
    for name, value in perplexities(smollm2_engine_dir()).items():
        sys.stdout.write(f"{name:10} {value:.3f}\n")
