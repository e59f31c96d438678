"""How much of the time that KV blocks take to come back hides under the step that needs them.

A 7B-shaped model with random weights in bfloat16 runs steps of decodes and one prefill piece. Each
step also brings 4,096 tokens of KV cache back from the host, 512 MiB, for the piece's own cached
prefix. The same step is measured with all blocks resident, with layer groups, waiting for whole
copies, and with as many blocks on their way to the host. All of it for each way to copy blocks, of
64 tokens and of 16.

python -m benchmarks.gpu.copy_overlap
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shared.reporting import argument_parser, report
from engines.batch_copies import copy_in_batch
from engines.block_copies import CopyBlocks, copy_blocks
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import tensor_shapes
from orchestrator.core.errors import EngineError
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
NUM_RELOADED_TOKENS = 4096  # 64 blocks of 64 tokens, of 8 MiB
NUM_DECODES = 32
DECODE_CONTEXT_TOKENS = 1024
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Variant:
    """What a step copies."""

    name: str
    direction: TransferDirection | None
    waits_for_transfers: bool = False


VARIANTS = (
    Variant("resident", None),
    Variant("by_layer_group", TransferDirection.ONBOARD),
    Variant("whole_copies_first", TransferDirection.ONBOARD, waits_for_transfers=True),
    Variant("beside_offload", TransferDirection.OFFLOAD),
)


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine copies blocks."""

    copy_blocks: CopyBlocks
    num_layer_groups: int
    block_size_tokens: int = 64

    @property
    def num_reloaded_blocks(self) -> int:
        return NUM_RELOADED_TOKENS // self.block_size_tokens


# The engine's own are batches in 8 groups. PyTorch's copies cost the host so much per block and
# group that more than 6 groups would take it longer than the step.
SETUPS = {
    "torch, 6 groups": Setup(copy_blocks, 6),
    "torch, 6 groups, blocks of 16": Setup(copy_blocks, 6, block_size_tokens=16),
    "batch, 8 groups": Setup(copy_in_batch, 8),
    "batch, 8 groups, blocks of 16": Setup(copy_in_batch, 8, block_size_tokens=16),
    "batch, 4 groups": Setup(copy_in_batch, 4),
    "batch, 16 groups": Setup(copy_in_batch, 16),
}


def random_tensors() -> dict[str, torch.Tensor]:
    """Return weights, made on the device."""
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        for name, shape in tensor_shapes(CONFIG).items()
    }


def make_engine(setup: Setup, tensors: Mapping[str, torch.Tensor]) -> TorchEngine:
    """Return the model on the device."""
    block_size = setup.block_size_tokens
    num_decode_blocks = NUM_DECODES * (DECODE_CONTEXT_TOKENS // block_size + 1)
    return TorchEngine(
        CONFIG,
        tensors,
        TorchEngineOptions(
            device="cuda",
            dtype="bfloat16",
            num_device_blocks=num_decode_blocks
            + setup.num_reloaded_blocks
            + PREFILL_TOKENS // block_size,
            num_host_blocks=2 * setup.num_reloaded_blocks,
            max_num_batched_tokens=NUM_DECODES + PREFILL_TOKENS,
            max_num_seqs=NUM_DECODES + 1,
            max_model_len=8192,
            num_layer_groups=setup.num_layer_groups,
        ),
        block_size_tokens=block_size,
        copy_blocks=setup.copy_blocks,
    )


def make_parts(setup: Setup) -> list[ScheduledRequest]:
    """Return the requests of every step: decodes, and a piece behind the reloaded blocks, which
    are the first of the device."""
    block_size = setup.block_size_tokens
    num_piece_blocks = setup.num_reloaded_blocks + PREFILL_TOKENS // block_size
    parts = [make_part("piece", NUM_RELOADED_TOKENS, PREFILL_TOKENS, range(num_piece_blocks))]
    first = num_piece_blocks
    num_decode_blocks = DECODE_CONTEXT_TOKENS // block_size + 1
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
    transfers: Sequence[KVTransfer] = (),
    *,
    waits_for_transfers: bool = False,
) -> SchedulerOutput:
    """Return one step."""
    return SchedulerOutput(
        step_id=step_id,
        scheduled=tuple(parts),
        preempted_ids=(),
        finished_ids=(),
        transfers=tuple(transfers),
        predicted_step_s=0.0,
        reasons=ScheduleReasons(),
        waits_for_transfers=waits_for_transfers,
    )


class Steps:
    """Runs steps of one engine that copy the piece's blocks."""

    def __init__(self, engine: TorchEngine, setup: Setup) -> None:
        self._engine, self._parts = engine, make_parts(setup)
        self._num_blocks, self._num_steps = setup.num_reloaded_blocks, 0
        # Scattered on the host, as after hours of serving, so that no two are copied as one.
        generator = torch.Generator().manual_seed(0)
        self._host_blocks = torch.randperm(2 * self._num_blocks, generator=generator).tolist()
        self._run(make_plan(0, self._parts[:1]))  # something worth copying
        self._run(make_plan(1, (), [self._transfer(TransferDirection.OFFLOAD, is_spare=False)]))

    def run(self, variant: Variant) -> StepOutput:
        """Return the step's own output; what it leaves on its way has ended."""
        transfers = []
        if variant.direction is not None:
            is_spare = variant.direction is TransferDirection.OFFLOAD
            transfers = [self._transfer(variant.direction, is_spare=is_spare)]
        return self._run(
            make_plan(
                self._num_steps,
                self._parts,
                transfers,
                waits_for_transfers=variant.waits_for_transfers,
            )
        )

    def _run(self, plan: SchedulerOutput) -> StepOutput:
        self._num_steps += 1
        output = latest = self._engine.step(plan)
        ended = set(latest.completed_transfers)
        while latest.failed_transfers or ended < {t.transfer_id for t in plan.transfers}:
            if latest.failed_transfers:
                raise EngineError(f"a copy failed: {latest.failed_transfers}")
            self._num_steps += 1
            latest = self._engine.step(make_plan(self._num_steps, ()))
            ended |= set(latest.completed_transfers)
        return output

    def _transfer(self, direction: TransferDirection, *, is_spare: bool) -> KVTransfer:
        """Return a copy of the piece's blocks, or, if `is_spare`, to where nobody needs them."""
        first = self._num_blocks if is_spare else 0
        host_blocks = self._host_blocks[first : first + self._num_blocks]
        device_blocks = tuple(range(self._num_blocks))
        return KVTransfer(self._num_steps, "piece", direction, device_blocks, tuple(host_blocks))


def measure(
    setup: Setup, tensors: Mapping[str, torch.Tensor], num_steps: int
) -> dict[str, list[StepOutput]]:
    """Return the measured steps of each variant; variants take turns."""
    engine = make_engine(setup, tensors)
    try:
        steps = Steps(engine, setup)
        outputs: dict[str, list[StepOutput]] = {variant.name: [] for variant in VARIANTS}
        num_warm_up_steps = 3
        for index in range(num_warm_up_steps + num_steps):
            for variant in VARIANTS:
                output = steps.run(variant)
                if index >= num_warm_up_steps:
                    outputs[variant.name].append(output)
        return outputs
    finally:
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()


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
    arguments = argument_parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; PyTorch sees none")
    tensors = random_tensors()
    figures: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "reloaded_tokens_per_step": NUM_RELOADED_TOKENS,
        "setups": {},
    }
    for name, setup in SETUPS.items():
        try:
            outputs = measure(setup, tensors, 10 if arguments.quick else 20)
            figures["setups"][name] = figures_of(outputs)
        except EngineError as error:
            figures["setups"][name] = str(error)
        report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
