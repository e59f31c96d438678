"""The tensors of one engine, by the `engine_io` section of the recorded surface."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tests.trtllm.engine_spec import EngineSpec
from tests.trtllm.rules import Rule, RuleBroken

SURFACE_FILE = Path(__file__).parent / "api_surface.json"


@dataclass(frozen=True, slots=True)
class IoTensor:
    """One input or output of an engine."""

    name: str
    dtype: str
    """As torch calls it."""

    dims: tuple[str | int, ...]
    """A number where the engine fixes the size; else the name of what it counts."""

    placement: Literal["device", "host"]
    is_input: bool


@dataclass(frozen=True, slots=True)
class EngineIo:
    """All tensors of an engine, and the ranges of its optimization profile."""

    tensors: Mapping[str, IoTensor]
    ranges: Mapping[str, tuple[int, int]]
    """Symbol -> smallest and largest size."""

    @property
    def inputs(self) -> Mapping[str, IoTensor]:
        """What a run reads."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.is_input}

    @property
    def outputs(self) -> Mapping[str, IoTensor]:
        """What a run writes."""
        return {name: tensor for name, tensor in self.tensors.items() if not tensor.is_input}

    def profile_shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the smallest and the largest shape of a tensor."""
        ranges = [
            (dim, dim) if isinstance(dim, int) else self.ranges[dim]
            for dim in self.tensors[name].dims
        ]
        return tuple(low for low, _ in ranges), tuple(high for _, high in ranges)

    def admits(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether the optimization profile has this shape."""
        low, high = self.profile_shapes(name)
        return len(shape) == len(low) and all(
            least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        )

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the size of each symbol, from the shapes of all inputs.

        Raises:
            RuleBroken: two tensors disagree.
        """
        sizes: dict[str, int] = {}
        for name, tensor in self.inputs.items():
            for dim, size in zip(tensor.dims, shapes[name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise RuleBroken(
                        Rule.SYMBOLS, f"{dim} is {size} in {name}, {sizes[dim]} before it"
                    )
        if sizes["B or S"] not in {sizes["S"], self.ranges["S"][1]}:
            raise RuleBroken(
                Rule.SYMBOLS,
                f"cache_indirection is for {sizes['B or S']} sequences, "
                f"there are {sizes['S']}, at most {self.ranges['S'][1]}",
            )
        return sizes

    def output_shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that a run gives an output."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.tensors[name].dims)


@cache
def surface() -> Mapping[str, Any]:
    """Return the recorded surface of TensorRT-LLM."""
    content: Mapping[str, Any] = json.loads(SURFACE_FILE.read_text(encoding="utf-8"))
    return content


def engine_io(spec: EngineSpec) -> EngineIo:
    """Return the tensors that an engine of this kind has."""
    has = {
        None: True,
        "first pipeline rank": True,
        "last pipeline rank": True,
        "not the first pipeline rank": False,
        "not the last pipeline rank": False,
        "last pipeline rank and no gather_context_logits": True,
        "remove_input_padding": True,
        "model has position inputs, first pipeline rank": spec.has_position_ids,
        "TP > 1": spec.tp_size > 1,
    }
    fixed: Mapping[str, int] = {
        "L": spec.num_layers,
        "V": spec.vocab_size_padded,
        "7*TP+3": 7 * spec.tp_size + 3,
    }
    dtypes = {"logits_dtype": spec.logits_dtype, "model": spec.dtype}
    tensors = {}
    for kind in ("inputs", "outputs"):
        for entry in surface()["engine_io"][kind]:
            if has[entry.get("when")]:
                tensors[entry["name"]] = IoTensor(
                    name=entry["name"],
                    dtype=dtypes.get(entry["dtype"], entry["dtype"]),
                    dims=tuple(fixed.get(dim, dim) for dim in entry["shape"]),
                    placement=entry["placement"],
                    is_input=kind == "inputs",
                )
    batch = (1, spec.max_batch_size)
    return EngineIo(
        tensors=tensors,
        ranges={
            "T": (1, spec.max_num_tokens),
            "S": batch,
            "NL": batch,
            "B or S": batch,
            "NP": (1, spec.num_layers),
            "MB": (1, spec.max_blocks_per_seq),
            "W": (1, spec.max_seq_len),
        },
    )
