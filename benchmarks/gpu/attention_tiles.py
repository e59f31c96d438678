"""How fast the decode attention kernel reads the KV cache, by tile sizes and splits.

`engines.torch_engine.triton_attention` takes its tile sizes from here.

python -m benchmarks.gpu.attention_tiles
"""

from __future__ import annotations

import statistics
import sys

import torch

from benchmarks.shared.reporting import argument_parser, report
from engines.torch_engine.triton_attention import BlockTables, TileSizes, attend_decodes

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
# Rotated through, so that what a launch reads is far more than the cache holds.
NUM_TOKENS = 1 << 18
BATCHES = ((64, 1024), (32, 1024), (8, 1024), (1, 1024), (4, 16_384))
SPLITS = {64: (1, 2), 32: (2, 4), 8: (8, 16), 1: (32, 64), 4: (16, 32)}
TILES = tuple(
    TileSizes(num_context_tokens=tokens, num_warps=warps, num_stages=stages)
    for tokens, warps, stages in (
        (64, 4, 3),
        (64, 4, 5),
        (64, 2, 4),
        (32, 4, 5),
        (32, 2, 6),
        (128, 4, 4),
        (128, 8, 4),
    )
)


def read_gb_per_s(
    batch_size: int, context_tokens: int, block_size: int, tiles: TileSizes, num_splits: int
) -> float:
    """Return KV bytes read per second, from a replayed graph of a launch per layer."""
    num_blocks = context_tokens // block_size
    num_layers = min(32, NUM_TOKENS // (batch_size * context_tokens))
    blocks = torch.empty(
        batch_size * num_blocks, num_layers, 2, NUM_KV_HEADS, block_size, HEAD_DIM,
        dtype=torch.bfloat16, device="cuda",
    ).normal_()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(blocks), generator=generator).to("cuda", torch.int32)
    tables = BlockTables(
        order,
        torch.arange(batch_size, dtype=torch.int32, device="cuda") * num_blocks,
        torch.full((batch_size,), context_tokens, dtype=torch.int32, device="cuda"),
    )
    qkv = torch.randn(batch_size, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    output = torch.empty(batch_size, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for layer in range(num_layers):
            attend_decodes(
                qkv, blocks[:, layer], tables, output, num_splits=num_splits, tiles=tiles
            )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    durations: list[float] = []
    for _ in range(8):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(5):
            graph.replay()
        ended.record()
        ended.synchronize()
        durations.append(begun.elapsed_time(ended) / 5000)
    return float(blocks.nbytes / statistics.median(durations[2:]) / 1e9)


def main() -> None:
    """Run the benchmark."""
    arguments = argument_parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; PyTorch sees none")
    block_sizes = (64,) if arguments.quick else (64, 16)
    figures: dict[str, dict[str, float]] = {}
    for block_size in block_sizes:
        for batch_size, context_tokens in BATCHES:
            name = f"batch {batch_size}, context {context_tokens}, blocks of {block_size}"
            figures[name] = {
                f"tokens {t.num_context_tokens}, warps {t.num_warps}, stages {t.num_stages}, "
                f"splits {splits}": round(
                    read_gb_per_s(batch_size, context_tokens, block_size, t, splits), 1
                )
                for t in TILES
                for splits in SPLITS[batch_size]
            }
            for tiles, speed in sorted(figures[name].items(), key=lambda item: -item[1])[:4]:
                print(f"{name}: {speed} GB/s with {tiles}")
    report({"gpu": torch.cuda.get_device_name(), "kv_gb_per_s": figures}, file_name=arguments.json)


if __name__ == "__main__":
    main()
