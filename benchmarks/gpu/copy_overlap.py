"""How much of the time that KV blocks take to come back hides under the step that needs them.

A 7B-shaped model with random weights in bfloat16 runs steps of decodes and one prefill piece. Each
step also brings 64 blocks of 64 tokens back from the host, for the piece's own cached prefix. The
same step is measured with all blocks resident, with layer groups, and waiting for whole copies.

python -m benchmarks.gpu.copy_overlap
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.shared.reporting import argument_parser, report
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import tensor_shapes
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import (
    ScheduledRequest,
    ScheduleReasons,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slo import Slo

# Mistral 7B's sizes.
CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    tie_word_embeddings=False,
)
BLOCK_SIZE_TOKENS = 64  # 8 MiB a block
NUM_RELOADED_BLOCKS = 64
NUM_DECODES = 32
DECODE_CONTEXT_TOKENS = 1024
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Variant:
    """How a step gets the blocks of its prefill piece."""

    name: str
    is_reloading: bool
    waits_for_transfers: bool = False


VARIANTS = (
    Variant("resident", is_reloading=False),
    Variant("by_layer_group", is_reloading=True),
    Variant("whole_copies_first", is_reloading=True, waits_for_transfers=True),
)


def random_tensors() -> dict[str, torch.Tensor]:
    """Return weights, made on the device."""
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        for name, shape in tensor_shapes(CONFIG).items()
    }


def make_engine(num_layer_groups: int) -> TorchEngine:
    """Return the model on the device."""
    num_decode_blocks = NUM_DECODES * (DECODE_CONTEXT_TOKENS // BLOCK_SIZE_TOKENS + 1)
    return TorchEngine(
        CONFIG,
        random_tensors(),
        TorchEngineOptions(
            device="cuda",
            dtype="bfloat16",
            num_device_blocks=num_decode_blocks
            + NUM_RELOADED_BLOCKS
            + PREFILL_TOKENS // BLOCK_SIZE_TOKENS,
            num_host_blocks=NUM_RELOADED_BLOCKS,
            max_num_batched_tokens=NUM_DECODES + PREFILL_TOKENS,
            max_num_seqs=NUM_DECODES + 1,
            max_model_len=8192,
            num_layer_groups=num_layer_groups,
        ),
        block_size_tokens=BLOCK_SIZE_TOKENS,
    )


def make_parts() -> list[ScheduledRequest]:
    """Return the requests of every step: decodes, and a piece behind the reloaded blocks, which
    are device blocks [0, NUM_RELOADED_BLOCKS)."""
    num_cached_tokens = NUM_RELOADED_BLOCKS * BLOCK_SIZE_TOKENS
    num_piece_blocks = NUM_RELOADED_BLOCKS + PREFILL_TOKENS // BLOCK_SIZE_TOKENS
    parts = [make_part("piece", num_cached_tokens, PREFILL_TOKENS, range(num_piece_blocks))]
    first = num_piece_blocks
    num_decode_blocks = DECODE_CONTEXT_TOKENS // BLOCK_SIZE_TOKENS + 1
    for index in range(NUM_DECODES):
        blocks = range(first, first + num_decode_blocks)
        parts.append(make_part(f"decode-{index}", DECODE_CONTEXT_TOKENS, 1, blocks))
        first += num_decode_blocks
    return parts


def make_part(
    request_id: str, num_cached_tokens: int, num_new_tokens: int, blocks: Sequence[int]
) -> ScheduledRequest:
    """Return one request's part of a step that samples it greedily."""
    tokens = tuple(i % CONFIG.vocab_size for i in range(num_cached_tokens + num_new_tokens))
    spec = RequestSpec(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=8, seed=0, temperature=0.0),
        priority_class="benchmark",
        weight=1.0,
        slo=Slo(),
    )
    return ScheduledRequest(
        Request(spec, arrival_s=0.0), num_cached_tokens, num_new_tokens, list(blocks)
    )


def make_plan(
    step_id: int,
    parts: Sequence[ScheduledRequest],
    direction: TransferDirection | None,
    *,
    waits_for_transfers: bool = False,
) -> SchedulerOutput:
    """Return one step, with a copy of all reloaded blocks in this direction, or none."""
    generator = torch.Generator().manual_seed(0)
    # Scattered on the host, as after hours of serving, so that no two blocks are copied as one.
    host_blocks = torch.randperm(NUM_RELOADED_BLOCKS, generator=generator).tolist()
    device_blocks = tuple(range(NUM_RELOADED_BLOCKS))
    transfers: tuple[KVTransfer, ...] = ()
    if direction is not None:
        transfers = (KVTransfer(step_id, "piece", direction, device_blocks, tuple(host_blocks)),)
    return SchedulerOutput(
        step_id=step_id,
        scheduled=tuple(parts),
        preempted_ids=(),
        finished_ids=(),
        transfers=transfers,
        predicted_step_s=0.0,
        reasons=ScheduleReasons(),
        waits_for_transfers=waits_for_transfers,
    )


def measure(num_layer_groups: int, num_steps: int) -> dict[str, list[StepOutput]]:
    """Return the measured steps of each variant; variants take turns."""
    engine = make_engine(num_layer_groups)
    parts = make_parts()
    try:
        engine.step(make_plan(0, parts[:1], None))  # something worth copying
        engine.step(make_plan(1, (), TransferDirection.OFFLOAD))
        outputs: dict[str, list[StepOutput]] = {variant.name: [] for variant in VARIANTS}
        step_id = 1
        num_warm_up_steps = 3
        for index in range(num_warm_up_steps + num_steps):
            for variant in VARIANTS:
                step_id += 1
                plan = make_plan(
                    step_id,
                    parts,
                    TransferDirection.ONBOARD if variant.is_reloading else None,
                    waits_for_transfers=variant.waits_for_transfers,
                )
                output = engine.step(plan)
                if output.failed_transfers:
                    sys.exit(f"a copy failed: {output.failed_transfers}")
                if index >= num_warm_up_steps:
                    outputs[variant.name].append(output)
        return outputs
    finally:
        engine.close()


def figures_of(outputs: Mapping[str, Sequence[StepOutput]]) -> dict[str, float]:
    """Return medians, and the hidden share by two ways: what the engine says it waited, and how
    much longer the step became."""
    step_s = {name: statistics.median(o.step_s for o in steps) for name, steps in outputs.items()}
    layered = outputs["by_layer_group"]
    copy_s = statistics.median(output.copies.copy_s for output in layered)
    exposed_s = statistics.median(output.copies.exposed_s for output in layered)
    added_s = step_s["by_layer_group"] - step_s["resident"]
    gib = layered[0].copies.onboarded_bytes / 1024**3
    return {
        **{f"step_ms_{name}": round(seconds * 1000, 2) for name, seconds in step_s.items()},
        "copy_ms": round(copy_s * 1000, 2),
        "copy_gib_per_s": round(gib / copy_s, 1),
        "exposed_ms": round(exposed_s * 1000, 2),
        "hidden_share": round(1 - exposed_s / copy_s, 3),
        "hidden_share_by_step_time": round(1 - added_s / copy_s, 3),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--layer-groups", type=_positive, default=4)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; PyTorch sees none")
    outputs = measure(arguments.layer_groups, 10 if arguments.quick else 50)
    report(
        {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "reloaded_blocks_per_step": NUM_RELOADED_BLOCKS,
            "block_size_tokens": BLOCK_SIZE_TOKENS,
            "layer_groups": arguments.layer_groups,
            **figures_of(outputs),
        },
        file_name=arguments.json,
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    main()
