"""One rank's engine: a TensorRT-LLM session, run one step at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engines.engine_options import EngineOptions
from engines.kv_pool import KVPool
from engines.trtllm.engine_config import TrtLlmEngineConfig
from engines.trtllm.engine_tensors import check_tensors, input_names, torch_dtype
from engines.trtllm.packing import StepArrays
from engines.trtllm.step_tensors import StepTensors
from orchestrator.core.errors import EngineDirectoryError, EngineError

if TYPE_CHECKING:
    from tensorrt_llm.runtime import Session


class SessionDriver:
    """Runs steps of one rank. One thread may use it at a time."""

    def __init__(
        self,
        engine_dir: Path,
        config: TrtLlmEngineConfig,
        options: EngineOptions,
        *,
        rank: int,
        device: torch.device,
    ) -> None:
        """Load the rank's engine and take all memory but the KV pool's. All ranks must do so at
        the same time: their engines find each other while they are loaded.

        Raises:
            EngineDirectoryError: TensorRT cannot load the engine, or it has other inputs or
                outputs than this driver binds.
            EngineError: the ranks' GPUs cannot share memory.
        """
        self._config, self._device = config, device
        path = engine_dir / f"rank{rank}.engine"
        self._session = _load_session(path)
        engine = self._session.engine
        check_tensors(engine, config, where=str(path))
        self._input_dtypes = {name: engine.get_tensor_dtype(name) for name in input_names(engine)}
        logits_dtype = torch_dtype(engine, "logits")
        assert logits_dtype is not None  # or the check would have failed
        # The buffers live as long as this object; the workspace holds their addresses.
        self._all_reduce_buffers, workspace = _allocate_workspace(config, rank)
        self._tensors = StepTensors(
            config,
            options,
            device=device,
            logits_dtype=logits_dtype,
            all_reduce_workspace=workspace,
        )
        self._step_shape: tuple[int, int] | None = None  # tokens and sequences, as last set

    def attach(self, pool: KVPool) -> None:
        """Let the engine read and write the K and V of this pool."""
        self._tensors.attach(pool)

    def enqueue(self, arrays: StepArrays) -> torch.Tensor:
        """Start one step on the current stream; return its logits, (num_sequences, vocab_size),
        which hold until the next call.

        Raises:
            RuntimeError, ValueError: TensorRT refuses the step.
        """
        tensors = self._tensors.load(arrays)
        inputs = {name: tensors[name] for name in self._input_dtypes}
        logits = self._tensors.logits(len(arrays.last_token_ids))
        self._set_shapes(inputs, logits)
        is_cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if is_cuda else 0
        if not self._session.run(inputs, {"logits": logits}, stream):
            raise RuntimeError("TensorRT did not start the step; its log says why")
        return logits[:, : self._config.vocab_size]

    def _set_shapes(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Tell TensorRT the shapes of this step, unless they are those of the step before."""
        from tensorrt_llm.runtime import TensorInfo

        shape = len(inputs["input_ids"]), len(logits)
        if shape == self._step_shape:
            return
        self._step_shape = None
        outputs = self._session.infer_shapes(
            [
                TensorInfo(name, self._input_dtypes[name], tuple(tensor.shape))
                for name, tensor in inputs.items()
            ]
        )
        found = {info.name: tuple(info.shape) for info in outputs}
        if found != {"logits": tuple(logits.shape)}:
            raise RuntimeError(f"the engine computes {found}, expected logits {logits.shape}")
        self._step_shape = shape


def _load_session(path: Path) -> Session:
    from tensorrt_llm.runtime import Session

    try:
        session = Session.from_serialized_engine(path.read_bytes())
    # TensorRT reads no engine of another release or GPU and returns None, on which Session stumbles
    # with an AttributeError; it asserts that there is memory for activations.
    except (AttributeError, AssertionError, OSError, RuntimeError, ValueError) as error:
        raise EngineDirectoryError(
            f"{path}: TensorRT cannot load it: {str(error) or 'no memory'}; an engine runs only "
            "under the release of TensorRT and on the kind of GPU that built it, and needs free "
            "device memory for weights and activations; rebuild the directory with `proserve build`"
        ) from error
    if session.context is None:
        raise EngineDirectoryError(
            f"{path}: the engine streams its weights, which serving does not do; "
            "rebuild it without --weight_streaming"
        )
    num_profiles = session.engine.num_optimization_profiles
    if num_profiles != 1:
        raise EngineDirectoryError(
            f"{path}: the engine has {num_profiles} optimization profiles, serving uses one; "
            "rebuild with `plugins: {multiple_profiles: disable}`"
        )
    return session


def _allocate_workspace(
    config: TrtLlmEngineConfig, rank: int
) -> tuple[object, torch.Tensor | None]:
    """Return the buffers through which the ranks add up their results, and the tensor that tells
    the engine of them; None for an engine of one rank.

    Raises:
        EngineError: the ranks' GPUs cannot share memory.
    """
    if config.tp_size == 1:
        return None, None
    from tensorrt_llm.mapping import Mapping
    from tensorrt_llm.plugin.plugin import CustomAllReduceHelper

    # All ranks are on this machine, whatever its number of GPUs.
    mapping = Mapping(
        world_size=config.tp_size, rank=rank, gpus_per_node=config.tp_size, tp_size=config.tp_size
    )
    size = CustomAllReduceHelper.max_workspace_size_auto(config.tp_size)
    try:
        buffers, workspace = CustomAllReduceHelper.allocate_workspace(mapping, size)
    except RuntimeError as error:
        raise EngineError(
            f"the ranks cannot share memory between their GPUs: {error}; a container needs "
            "--ipc=host for it"
        ) from error
    return buffers, workspace
