"""Stands in for `tensorrt`: the names of tests/trtllm/api_surface.json, over `LoadedEngine`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from tests.trtllm.engine_spec import is_engine
from tests.trtllm.execution import LoadedEngine


class DataType(Enum):
    """Types of an engine's tensors."""

    FLOAT = auto()
    HALF = auto()
    BF16 = auto()
    INT8 = auto()
    INT32 = auto()
    INT64 = auto()
    BOOL = auto()
    UINT8 = auto()
    FP8 = auto()


_DATA_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
}


class TensorIOMode(Enum):
    """Direction of an engine's tensor."""

    INPUT = auto()
    OUTPUT = auto()


class TensorLocation(Enum):
    """Where an engine expects a tensor."""

    DEVICE = auto()
    HOST = auto()


class Logger:
    """Takes messages; there are none."""

    __slots__ = ()

    class Severity(Enum):
        """Least important messages last."""

        INTERNAL_ERROR = auto()
        ERROR = auto()
        WARNING = auto()
        INFO = auto()
        VERBOSE = auto()

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        if not isinstance(min_severity, Logger.Severity):
            raise TypeError(f"min_severity is {type(min_severity).__name__}")


class Runtime:
    """Loads engines."""

    __slots__ = ()

    def __init__(self, logger: Logger) -> None:
        if not isinstance(logger, Logger):
            raise TypeError(f"logger is {type(logger).__name__}")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        """Return the engine in these bytes; None if this release and machine cannot run them."""
        if not is_engine(serialized_engine):
            return None
        return ICudaEngine(LoadedEngine(serialized_engine))


class ICudaEngine:
    """An engine; made by a Runtime."""

    __slots__ = ("_loaded",)

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded

    @property
    def num_io_tensors(self) -> int:
        return len(self._loaded.io.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return 1

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes a context takes: here the logits of the largest step."""
        spec = self._loaded.spec
        return spec.max_batch_size * spec.vocab_size_padded * 4

    def get_tensor_name(self, index: int) -> str:
        return list(self._loaded.io.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = self._loaded.io.tensors[name].is_input
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DATA_TYPES[self._loaded.io.tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, -1 where it changes."""
        dims = self._loaded.io.tensors[name].dims
        return tuple(dim if isinstance(dim, int) else -1 for dim in dims)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        """Return the smallest, best and largest shape."""
        if profile_index != 0:
            raise IndexError(f"profile {profile_index} of 1")
        low, high = self._loaded.io.profile_shapes(name)
        return [low, high, high]

    def get_tensor_location(self, name: str) -> TensorLocation:
        """Always DEVICE, as TensorRT-LLM's engines say of their host tensors too.

        Source: TensorRT-LLM, docs/source/legacy/reference/troubleshooting.md, table of inputs.
        """
        return TensorLocation.DEVICE

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self._loaded)


class IExecutionContext:
    """What one stream of runs needs; made by an engine. It sees addresses: what lies there is
    checked by `Session.run` alone."""

    __slots__ = ("_addresses", "_loaded", "_profile", "_shapes")

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded = loaded
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    @property
    def active_optimization_profile(self) -> int:
        """-1 while none is set."""
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index != 0:
            return False
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether the active profile has this shape, and keep it if so."""
        io = self._loaded.io
        if self._profile < 0 or name not in io.inputs or not io.admits(name, shape):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that was set, or that follows for an output; -1 where none does."""
        io = self._loaded.io
        if name in self._shapes:
            return self._shapes[name]
        if name in io.outputs and self._shapes.keys() == io.inputs.keys():
            return io.output_shape(name, io.bind(self._shapes))
        return tuple(dim if isinstance(dim, int) else -1 for dim in io.tensors[name].dims)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._loaded.io.tensors:
            return False
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        """Return the address, 0 if none was set."""
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Compute, and return when that is done, as early as a caller must be ready for."""
        self._loaded.run(self._addresses, self._shapes)
        return True
