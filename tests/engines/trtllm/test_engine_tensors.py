"""What is bound to an engine, against what engines have; `host_*` tensors stay on the host."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.kv_pool import KVLayout, KVPool
from engines.trtllm.engine_tensors import check_tensors, input_specs, output_specs, torch_dtype
from engines.trtllm.packing import StepArrays, pack_step
from engines.trtllm.step_tensors import StepTensors
from orchestrator.core.errors import EngineDirectoryError
from orchestrator.core.ports import ScheduledRequest
from tests.engines.trtllm.fake_engines import make_config, make_options
from tests.factories import make_request

SURFACE = json.loads((Path(__file__).parents[2] / "trtllm/api_surface.json").read_text())
ENGINE_IO = SURFACE["engine_io"]

pytestmark = pytest.mark.usefixtures("stand_ins")


@dataclass
class BuiltEngine:
    """The part of `tensorrt.ICudaEngine` that tells of tensors."""

    tensors: dict[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=dict)
    """name -> mode, type, shape"""

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        import tensorrt

        return tensorrt.TensorIOMode[self.tensors[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        import tensorrt

        return tensorrt.DataType[self.tensors[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]


def built_engine(tp_size: int = 1) -> BuiltEngine:
    """Return an engine with the tensors of the recorded surface; sizes are those of
    `make_config`."""
    sizes = {"L": 3, "7*TP+3": 7 * tp_size + 3, "V": 512}
    types = {"int32": "INT32", "int64": "INT64", "logits_dtype": "FLOAT"}
    engine = BuiltEngine()
    for kind in ("inputs", "outputs"):
        for entry in ENGINE_IO[kind]:
            is_absent = "not the" in entry.get("when", "") or (
                entry.get("when") == "TP > 1" and tp_size == 1
            )
            if not is_absent:
                shape = tuple(
                    dim if isinstance(dim, int) else sizes.get(dim, -1) for dim in entry["shape"]
                )
                mode = kind.removesuffix("s").upper()
                engine.tensors[entry["name"]] = (mode, types[entry["dtype"]], shape)
    return engine


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_recorded_tensors_are_exactly_those_that_are_bound(tp_size: int) -> None:
    config, engine = make_config(tp_size=tp_size), built_engine(tp_size)

    check_tensors(engine, config, where="rank0.engine")  # type: ignore[arg-type]

    assert input_specs(config).keys() | output_specs(config).keys() == engine.tensors.keys()


def test_a_model_may_have_no_position_ids() -> None:
    engine = built_engine()
    del engine.tensors["position_ids"]

    check_tensors(engine, make_config(), where="rank0.engine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("last_token_ids", None, "the engine has no input 'last_token_ids'"),
        ("logits", None, "the engine has no output 'logits'"),
        (
            "lora_ranks",
            ("INPUT", "INT32", (-1,)),
            "the engine has an unknown input 'lora_ranks'",
        ),
        (
            "hidden_states_output",
            ("OUTPUT", "HALF", (-1, 16)),
            "the engine has an unknown output 'hidden_states_output'",
        ),
        (
            "sequence_length",
            ("INPUT", "INT64", (-1,)),
            r"input 'sequence_length' is of type .*INT64, expected torch.int32",
        ),
        (
            "logits",
            ("OUTPUT", "INT32", (-1, 512)),
            r"output 'logits' is of type .*INT32, expected torch.float32 or torch.float16",
        ),
        (
            "kv_cache_block_offsets",
            ("INPUT", "INT32", (-1, 2, -1)),
            r"input 'kv_cache_block_offsets' has shape \(-1, 2, -1\), \(1, -1, 2, 64\) is",
        ),
        (
            "host_kv_cache_pool_mapping",
            ("INPUT", "INT32", (3,)),
            r"input 'host_kv_cache_pool_mapping' has shape \(3,\), \(3, 2\) is to be bound",
        ),
        (
            "host_max_attention_window_sizes",
            ("INPUT", "INT32", (4,)),
            r"'host_max_attention_window_sizes' has shape \(4,\), \(3,\) is to be bound",
        ),
        (
            "context_lengths",
            ("INPUT", "INT32", (8,)),
            r"'context_lengths' has shape \(8,\), \(-1,\) is to be bound",
        ),
        (
            "logits",
            ("OUTPUT", "FLOAT", (-1, 520)),
            r"output 'logits' has shape \(-1, 520\), \(-1, 512\) is to be bound",
        ),
    ],
)
def test_an_engine_with_other_tensors_is_refused_by_name(
    name: str, tensor: tuple[str, str, tuple[int, ...]] | None, message: str
) -> None:
    engine = built_engine()
    engine.tensors.pop(name, None)
    if tensor is not None:
        engine.tensors[name] = tensor

    with pytest.raises(EngineDirectoryError, match=rf"^rank0\.engine: .*{message}"):
        check_tensors(engine, make_config(), where="rank0.engine")  # type: ignore[arg-type]


def test_all_wrong_tensors_are_named_at_once() -> None:
    engine = built_engine()
    del engine.tensors["input_ids"], engine.tensors["logits"]

    with pytest.raises(EngineDirectoryError) as caught:
        check_tensors(engine, make_config(), where="x")  # type: ignore[arg-type]

    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("FLOAT", torch.float32), ("HALF", torch.float16), ("BF16", torch.bfloat16), ("FP8", None)],
)
def test_types_of_logits_are_told(dtype: str, expected: torch.dtype | None) -> None:
    engine = BuiltEngine({"logits": ("OUTPUT", dtype, (-1, 512))})

    assert torch_dtype(engine, "logits") is expected  # type: ignore[arg-type]


def make_arrays(*prompt_lengths: int) -> StepArrays:
    layout = KVLayout(num_layers=3, num_kv_heads=2, block_size_tokens=4, head_dim=8)
    parts = [
        ScheduledRequest(
            make_request(str(index), num_prompt_tokens=length), 0, length, list(range(1, 64))
        )
        for index, length in enumerate(prompt_lengths)
    ]
    return pack_step(parts, layout, max_blocks_per_seq=64).arrays


def make_tensors(device: str, *, tp_size: int = 1) -> StepTensors:
    workspace = torch.arange(7 * tp_size + 3) if tp_size > 1 else None
    tensors = StepTensors(
        make_config(tp_size=tp_size, vocab_size=510),
        make_options(max_num_seqs=5, max_num_batched_tokens=40),
        device=torch.device(device),
        logits_dtype=torch.float16,
        all_reduce_workspace=workspace,
    )
    layout = KVLayout(num_layers=3, num_kv_heads=2, block_size_tokens=4, head_dim=8)
    tensors.attach(KVPool(layout, 4, dtype=torch.float32, device=torch.device("cpu")))
    return tensors


@pytest.mark.parametrize("tp_size", [1, 4])
def test_every_input_is_where_and_what_the_surface_says(tp_size: int) -> None:
    """The device is `meta`, so that what should be on the host cannot be there by chance."""
    recorded = {entry["name"]: entry for entry in ENGINE_IO["inputs"]}
    sizes = {"T": 12, "S": 3, "NL": 3, "NP": 1, "MB": 64, "L": 3, "B or S": 3, "W": 256}
    sizes["7*TP+3"] = 7 * tp_size + 3

    inputs = make_tensors("meta", tp_size=tp_size).load(make_arrays(4, 7, 1))

    assert inputs.keys() == input_specs(make_config(tp_size=tp_size)).keys()
    for name, tensor in inputs.items():
        entry = recorded[name]
        assert tensor.device.type == ("meta" if entry["placement"] == "device" else "cpu"), name
        assert str(tensor.dtype) == f"torch.{entry['dtype']}", name
        assert list(tensor.shape) == [sizes.get(dim, dim) for dim in entry["shape"]], name
        assert tensor.is_contiguous(), name


def test_inputs_hold_the_step_and_its_constants() -> None:
    tensors = make_tensors("cpu")
    arrays = make_arrays(4, 7)

    inputs = tensors.load(arrays)

    for name, array in arrays.by_name().items():
        np.testing.assert_array_equal(inputs[name].numpy(), array)
    assert torch.equal(inputs["host_context_lengths"], inputs["context_lengths"])
    assert torch.equal(inputs["host_kv_cache_block_offsets"], inputs["kv_cache_block_offsets"])
    assert inputs["host_kv_cache_pool_mapping"].tolist() == [[0, 0], [0, 1], [0, 2]]
    assert inputs["host_max_attention_window_sizes"].tolist() == [256, 256, 256]
    assert inputs["host_runtime_perf_knobs"].tolist() == [1, 1, *[-1] * 14]
    assert inputs["host_sink_token_length"].tolist() == [0]
    assert inputs["host_context_progress"].tolist() == [0]
    assert not inputs["cache_indirection"].any()


def test_pool_pointers_are_the_pool_and_no_pool_in_host_memory() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, block_size_tokens=4, head_dim=8)
    pool = KVPool(layout, 4, num_host_blocks=4, dtype=torch.float32, device=torch.device("cpu"))
    tensors = make_tensors("cpu")

    tensors.attach(pool)

    pointers = tensors.load(make_arrays(1))["host_kv_cache_pool_pointers"]
    assert pointers.tolist() == [[pool.blocks.data_ptr(), 0]]


def test_addresses_stay_and_nothing_of_a_larger_step_stays_behind() -> None:
    tensors = make_tensors("cpu")
    large = {name: tensor.data_ptr() for name, tensor in tensors.load(make_arrays(20, 9)).items()}
    arrays = make_arrays(3)

    small = tensors.load(arrays)

    assert {name: tensor.data_ptr() for name, tensor in small.items()} == large
    np.testing.assert_array_equal(
        small["kv_cache_block_offsets"].numpy(), arrays.kv_cache_block_offsets
    )


def test_logits_have_the_engines_type_and_the_padded_vocabulary() -> None:
    """510 tokens are filled up to a multiple of 4."""
    logits = make_tensors("cpu", tp_size=4).logits(3)

    assert (tuple(logits.shape), logits.dtype) == ((3, 512), torch.float16)
