"""Shapes that are set before a run."""

from __future__ import annotations

import pytest
import torch

from tests.trtllm.bad_calls import TWO_RANKS, Call

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_ids", (0,)),
        ("input_ids", (257,)),
        ("input_ids", (1, 10)),
        ("sequence_length", (17,)),
        ("last_token_ids", (17,)),
        ("host_kv_cache_block_offsets", (1, 4, 2, 65)),
        ("host_kv_cache_block_offsets", (4, 2, 64)),
        ("host_kv_cache_pool_pointers", (4, 2)),
        ("host_kv_cache_pool_mapping", (3,)),
        ("cache_indirection", (4, 2, 256)),
        ("cache_indirection", (4, 1, 257)),
        ("host_runtime_perf_knobs", (17,)),
        ("host_context_progress", (0,)),
    ],
)
def test_shapes_outside_of_the_optimization_profile_are_refused(
    name: str, shape: tuple[int, ...]
) -> None:
    """256 tokens, 16 sequences of 256 tokens in 64 blocks, 3 layers."""
    import tensorrt as trt
    from tensorrt_llm.runtime import TensorInfo

    call = Call()
    dtype = call.session.engine.get_tensor_dtype(name)

    with pytest.raises(ValueError, match=f"{name} cannot have shape .* takes "):
        call.session.set_shapes(call.inputs | {name: torch.empty(shape)})
    with pytest.raises(RuntimeError, match=f"{name} cannot have shape .* takes "):
        call.session.infer_shapes([TensorInfo(name, dtype, shape)])
    assert dtype in {trt.DataType.INT32, trt.DataType.INT64}


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("tokens", "INT32", "tokens is not an input"),
        ("logits", "FLOAT", "logits is not an input"),
        ("input_ids", "INT64", "input_ids is DataType.INT64, the engine has DataType.INT32"),
    ],
)
def test_shapes_are_inferred_from_the_engines_inputs_alone(
    name: str, dtype: str, message: str
) -> None:
    import tensorrt as trt
    from tensorrt_llm.runtime import TensorInfo

    with pytest.raises(ValueError, match=message):
        Call().session.infer_shapes([TensorInfo(name, trt.DataType[dtype], (1,))])


def test_shapes_of_some_inputs_are_not_enough_to_set() -> None:
    call = Call()

    with pytest.raises(KeyError, match="host_sink_token_length"):
        call.session.set_shapes(
            {n: tensor for n, tensor in call.inputs.items() if n != "host_sink_token_length"}
        )


def test_inferred_shapes_name_the_logits() -> None:
    import tensorrt as trt
    from tensorrt_llm.runtime import TensorInfo

    call = Call(TWO_RANKS)
    dtypes = {torch.int32: trt.DataType.INT32, torch.int64: trt.DataType.INT64}
    infos = [TensorInfo(n, dtypes[t.dtype], tuple(t.shape)) for n, t in call.inputs.items()]

    outputs = call.session.infer_shapes(infos)

    assert outputs == [TensorInfo("logits", trt.DataType.FLOAT, (4, 512))]
