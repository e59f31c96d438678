"""The engines that the contract suite runs on, all made in the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from engines.block_copies import CopyBlocks, copy_blocks
from engines.engine_options import EngineOptions
from engines.host_link import HostLink
from engines.simulated import SimulatedEngine
from engines.torch_engine.config import LlamaConfig
from engines.trtllm.engine import TrtLlmEngine
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import Engine
from tests.engines.tiny_llama import (
    BLOCK_SIZE_TOKENS,
    int8_config,
    make_manifest,
    tiny_config,
    tiny_engine,
    tiny_tensors,
)
from tests.factories import make_capabilities, make_copy_profile, make_profile
from tests.trtllm.reference_engine import llama_spec, write_engine
from tests.trtllm.stand_in_path import stand_ins_importable

EngineKind = Literal["simulated", "torch", "torch-int8", "trtllm", "live"]

BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE_TOKENS * 8 * 4
"""Of the tiny model: 2 layers, K and V, 2 heads, 8 numbers of 4 bytes, or 16 of 2."""


class EngineMaker:
    """Makes engines of one kind."""

    def __init__(self, kind: EngineKind, folder: Path) -> None:
        """Engine directories go into `folder`; for `live` it is one, of TensorRT-LLM's."""
        self._kind, self._folder = kind, folder
        self._num_written = 0
        self._open: list[Engine] = []

    def __call__(
        self,
        *,
        copy_blocks: CopyBlocks = copy_blocks,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **limits: int,
    ) -> Engine:
        """Return a new engine of the tiny model, with 128 blocks, 256 tokens and 16 requests a step
        unless `limits` (fields of EngineCapabilities) say otherwise.

        A simulated engine has no copies to disturb and no tensors.
        """
        defaults = {
            "num_device_blocks": 128,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 16,
            "max_model_len": 256,
        }
        engine = self._make(defaults | limits, copy_blocks, tensors)
        self._open.append(engine)
        return engine

    @property
    def config(self) -> LlamaConfig:
        """The tiny model's, in sizes that the kind can compute."""
        return int8_config() if self._kind == "torch-int8" else tiny_config()

    def assert_same_tokens(
        self, found: Mapping[str, list[int]], expected: Mapping[str, list[int]]
    ) -> None:
        """Fail unless requests that were computed in two ways have the same tokens.

        A live engine computes in half precision, and sums in an order that depends on the batch.
        Where two tokens are nearly as likely it may choose the other one, and goes on from there
        differently; so half of its requests may differ. A wrong address, length or position
        changes nearly all.
        """
        if self._kind != "live":
            assert found == expected
            return
        assert found.keys() == expected.keys()
        num_same = sum(found[name] == tokens for name, tokens in expected.items())
        assert num_same >= len(expected) / 2, f"{found} for {expected}"

    def close(self, engine: Engine) -> None:
        """Close an engine before the test is over."""
        self._open.remove(engine)
        engine.close()

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.pop().close()

    def write_trtllm_dir(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write a reference engine of the tiny model, with the largest limits of any test, and
        return its directory."""
        config = tiny_config()
        spec = llama_spec(
            config, tokens_per_block=BLOCK_SIZE_TOKENS, max_batch_size=16, max_num_tokens=256
        )
        self._num_written += 1
        directory = self._folder / f"engine-{self._num_written}"
        directory.mkdir()
        write_engine(directory, [spec], make_manifest(), tensors or tiny_tensors(config))
        return directory

    def _make(
        self,
        limits: Mapping[str, int],
        copy_blocks: CopyBlocks,
        tensors: Mapping[str, torch.Tensor] | None,
    ) -> Engine:
        match self._kind:
            case "simulated":
                return SimulatedEngine(
                    make_capabilities(block_size_tokens=BLOCK_SIZE_TOKENS, **limits),
                    BatchLatencyModel(make_profile()),
                    output_lengths={},
                    link=HostLink(make_copy_profile()),
                    block_bytes=BLOCK_BYTES,
                )
            case "torch" | "torch-int8":
                return tiny_engine(
                    self.config,
                    None if tensors is None else dict(tensors),
                    grammars=None,
                    copy_blocks=copy_blocks,
                    dtype="int8" if self._kind == "torch-int8" else "float32",
                    **limits,
                )
            case "trtllm":
                return TrtLlmEngine(
                    self.write_trtllm_dir(tensors),
                    EngineOptions(device="cpu", **limits),
                    copy_blocks=copy_blocks,
                )
            case "live":
                device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
                return TrtLlmEngine(self._folder, EngineOptions(device=device, **limits))


@contextlib.contextmanager
def engine_maker(kind: EngineKind, folder: Path) -> Iterator[EngineMaker]:
    """Make engines of one kind; close them when the block ends.

    TensorRT-LLM's is over the reference Session.
    """
    maker = EngineMaker(kind, folder)
    with stand_ins_importable() if kind == "trtllm" else contextlib.nullcontext():
        try:
            yield maker
        finally:
            maker.close_all()
