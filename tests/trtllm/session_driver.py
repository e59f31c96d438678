"""Generates greedily through a stand-in Session, packed by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from tests.trtllm.engine_spec import TORCH_DTYPES, EngineSpec
from tests.trtllm.packer import Part, pack


def make_pool(spec: EngineSpec, num_blocks: int) -> torch.Tensor:
    """Return a KV pool full of garbage: who reads what nobody wrote gets wrong tokens, or NaN."""
    shape = (
        num_blocks,
        spec.num_layers,
        2,
        spec.num_kv_heads_per_rank,
        spec.tokens_per_block,
        spec.row_bytes,
    )
    generator = torch.Generator().manual_seed(0)
    garbage = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return garbage.view(TORCH_DTYPES[spec.kv_cache_dtype])


def make_workspace(spec: EngineSpec) -> tuple[list[object], dict[str, torch.Tensor]]:
    """Return what several ranks reduce through, and the inputs that name it; empty for one rank."""
    from tensorrt_llm.mapping import Mapping as RankMapping
    from tensorrt_llm.plugin.plugin import CustomAllReduceHelper

    if spec.tp_size == 1:
        return [], {}
    mapping = RankMapping(world_size=spec.tp_size, rank=spec.rank, tp_size=spec.tp_size)
    size = CustomAllReduceHelper.max_workspace_size_auto(spec.tp_size)
    buffers, workspace = CustomAllReduceHelper.allocate_workspace(mapping, size)
    return [*buffers], {"all_reduce_workspace": workspace}


class SessionDriver:
    """Owns requests and blocks. Needs the stand-ins on the path. Blocks come in random order."""

    def __init__(
        self, content: bytes, spec: EngineSpec, prompts: Mapping[str, Sequence[int]]
    ) -> None:
        from tensorrt_llm.runtime import Session

        self.spec = spec
        self.session = Session.from_serialized_engine(content)
        self.pool = make_pool(spec, 128)
        self.prompts = prompts
        self.token_ids = {name: list(prompt) for name, prompt in prompts.items()}
        self.num_computed = dict.fromkeys(prompts, 0)
        self.blocks: dict[str, list[int]] = {name: [] for name in prompts}
        self._free = random.Random(0).sample(range(128), 128)
        self._shared, self._workspace = make_workspace(spec)

    def step(self, num_new_tokens: Mapping[str, int]) -> None:
        """Compute so many tokens of each of these, at most what is left."""
        parts = {name: self._part(name, count) for name, count in num_new_tokens.items()}
        order = sorted(parts, key=lambda name: not parts[name].is_context)
        inputs = pack(self.spec, [parts[name] for name in order], self.pool) | self._workspace
        logits_dtype = TORCH_DTYPES[self.spec.logits_dtype]
        logits = torch.empty(len(order), self.spec.vocab_size_padded, dtype=logits_dtype)
        self.session.set_shapes(inputs)
        assert self.session.run(inputs, {"logits": logits}, 0)
        for name, row in zip(order, logits[:, : self.spec.vocab_size], strict=True):
            self.num_computed[name] = parts[name].end
            if parts[name].end == len(self.token_ids[name]):
                self.token_ids[name].append(int(row.argmax()))

    def run(self, num_tokens: int, *, chunk_tokens: int) -> dict[str, list[int]]:
        """Generate for all; prompts in chunks, requests join one step after the other."""
        num_steps = 0
        while names := [name for name in self.outputs() if len(self.outputs()[name]) < num_tokens]:
            num_steps += 1
            joined = [name for name in names if list(self.prompts).index(name) < num_steps]
            self.step(dict.fromkeys(joined or names[:1], chunk_tokens))
        return self.outputs()

    def outputs(self) -> dict[str, list[int]]:
        return {name: self.token_ids[name][len(prompt) :] for name, prompt in self.prompts.items()}

    def _part(self, name: str, num_new_tokens: int) -> Part:
        begin = self.num_computed[name]
        end = min(begin + num_new_tokens, len(self.token_ids[name]))
        while len(self.blocks[name]) * self.spec.tokens_per_block < end:
            self.blocks[name].append(self._free.pop())
        return Part(self.token_ids[name], len(self.prompts[name]), begin, end, self.blocks[name])
