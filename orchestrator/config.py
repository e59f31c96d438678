"""The YAML of one GPU node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

from orchestrator.core.scheduler_factory import SchedulerName, SchedulerOptions, options_type
from orchestrator.etcd import RegistryConfig
from orchestrator.peers import SecretConfig, ServiceUrl
from orchestrator.scheduler_config import (
    CorrectionSection,
    DeadlineSection,
    KVCacheSection,
    SarathiSection,
    SlideBatchingSection,
)
from orchestrator.tracing import TracingConfig
from orchestrator.yaml_config import Problem, problems_error

Port = Annotated[int, Field(ge=1, le=65535)]
EndpointId = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _require_size_on_cpu(device: str, device_kv_bytes: int | None) -> None:
    if device == "cpu" and device_kv_bytes is None:
        raise ValueError(
            "device_kv_bytes is not set; with device cpu it is required, because the KV cache "
            "shares main memory with everything else: write one, such as 1GiB"
        )


class TorchEngineConfig(BaseModel):
    """The embedded PyTorch engine."""

    model_config = _STRICT

    kind: Literal["torch"] = "torch"
    """Which engine runs the model."""

    directory: Path
    """Engine directory made by `proserve build`; relative to the current directory."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Precision of weights, activations and KV cache. `int8` is for CPUs with AVX2, best
    with AVX-512 VNNI, and a C++ compiler: matrices and their inputs in 8 bits, the KV cache in
    bfloat16. `auto` is bfloat16 on CUDA; on the CPU int8 where it can run, else float32."""

    num_threads: PositiveInt | None = None
    """CPU threads of the model; by default as many as PyTorch finds cores."""

    device_kv_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory of the paged KV cache, such as `512MiB`. With `device: cpu` it is required; a CUDA
    device gives `device_memory_fraction` of what it has by default."""

    device_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device memory that is free after loading the model, for the KV cache; not read
    where `device_kv_bytes` is set. The rest is for what a step computes."""

    host_kv_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    """Main memory for KV blocks that had to leave the device, such as `64GiB`; at least twice the
    device's is recommended. 0 keeps none: what leaves the device is computed again. For a CUDA
    device it is pinned: taken at the start, never swapped."""

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        _require_size_on_cpu(self.device, self.device_kv_bytes)
        return self


class TrtLlmEngineSection(BaseModel):
    """A prebuilt TensorRT-LLM engine, each step of which our scheduler decides."""

    model_config = _STRICT

    kind: Literal["trtllm"]
    """Which engine runs the model."""

    directory: Path
    """Engine directory made by `proserve build`; relative to the current directory."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where the model runs; `cpu` only with a stand-in of TensorRT-LLM, for tests."""

    device_kv_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory of the paged KV cache on each GPU, such as `40GiB`; by default
    `device_memory_fraction` of what is free there. With `device: cpu` it is required."""

    device_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device memory that is free after loading the engine, for the KV cache; not read
    where `device_kv_bytes` is set. The rest is a reserve: the engine's own memory is taken by
    then."""

    host_kv_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    """Pinned main memory, for each GPU, for KV blocks that had to leave the device, such as
    `64GiB`; at least twice the device's is recommended. 0 keeps none: what leaves the device is
    computed again."""

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        _require_size_on_cpu(self.device, self.device_kv_bytes)
        return self


class TrtLlmExecutorConfig(BaseModel):
    """A prebuilt TensorRT-LLM engine under TensorRT-LLM's own scheduler, to compare ours with."""

    model_config = _STRICT

    kind: Literal["trtllm-executor"]
    """Which engine runs the model."""

    directory: Path
    """Engine directory made by `proserve build`; relative to the current directory."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where the model runs; `cpu` only with a stand-in of TensorRT-LLM, for tests."""

    device_kv_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Memory of the KV cache on each GPU, such as `40GiB`; by default `device_memory_fraction` of
    what is free there."""

    device_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the device memory that is free after loading the engine, for the KV cache; not read
    where `device_kv_bytes` is set."""

    host_kv_bytes: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    """Pinned main memory, for each GPU, for KV blocks that no request on the device uses; the
    executor moves them by itself. Needs `block_reuse`."""

    capacity_policy: Literal["max-utilization", "guaranteed-no-evict"] = "max-utilization"
    """Whether requests are started as long as there are KV blocks, and paused when they run short,
    or only when they are sure to finish."""

    block_reuse: bool = True
    """Requests of the same client share the KV of equal beginnings, and what a paused request
    leaves behind can be found again."""

    @model_validator(mode="after")
    def _check_host(self) -> Self:
        if self.host_kv_bytes and not self.block_reuse:
            raise ValueError(
                f"host_kv_bytes is {self.host_kv_bytes:,}, but block_reuse is false: the executor "
                "keeps on the host only what can be used again; set block_reuse, or leave "
                "host_kv_bytes out"
            )
        return self


def _engine_kind(section: object) -> object:
    """Return the kind of an engine section, as read or as a model."""
    if isinstance(section, dict):
        return section.get("kind", "torch")
    return getattr(section, "kind", None)


EngineConfig = Annotated[
    Annotated[TorchEngineConfig, Tag("torch")]
    | Annotated[TrtLlmEngineSection, Tag("trtllm")]
    | Annotated[TrtLlmExecutorConfig, Tag("trtllm-executor")],
    Discriminator(
        _engine_kind,
        custom_error_type="unknown_engine_kind",
        custom_error_message="kind must be torch, trtllm or trtllm-executor",
    ),
]


class NodeRegistrationConfig(SecretConfig):
    """Routers at which a node registers itself, with the secret that they know."""

    router_urls: Annotated[tuple[ServiceUrl, ...], Field(min_length=1)]
    """Each of these routers, as http://HOST:PORT: they tell each other nothing."""

    advertise_url: ServiceUrl | None = None
    """Under which the routers reach the node; by default http://HOST:PORT of its `host` and
    `port`."""


class NodeRegistryConfig(RegistryConfig):
    """etcd, in which a node registers itself."""

    advertise_host: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Under which the routers reach the node; by default its `host`."""


class NodeSettings(BaseModel):
    """A node, but for its name and port."""

    model_config = _STRICT

    host: str = "127.0.0.1"
    """Address the HTTP service listens on."""

    engine: EngineConfig
    """The engine and its resources."""

    scheduler: SchedulerName = "slide-batching"
    """What decides the content of each step; all but the first are there to compare with."""

    slide_batching: SlideBatchingSection | None = None
    """Parameters of `slide-batching`."""

    deadline: DeadlineSection | None = None
    """Parameters of `fair-batching`, `edf`, `sjf`, `density`, `decode-first-edf`,
    `decode-first-density` and `urgency-priority`."""

    sarathi: SarathiSection | None = None
    """Parameters of `sarathi-fcfs`, `sarathi-priority`, `weighted-vtc` and `strict-priority`."""

    kv_cache: KVCacheSection = KVCacheSection()
    """What is kept of the KV cache when a request ends or is preempted."""

    latency_correction: CorrectionSection = CorrectionSection()
    """How predicted step durations follow the measured ones."""

    plan_ahead: bool | None = None
    """Plan a step while the engine runs the one before. By default where that is on a GPU: on a
    CPU, it pays only if the engine leaves a core idle."""

    max_num_batched_tokens: PositiveInt = 2048
    """New tokens in one step, over all requests."""

    max_num_seqs: PositiveInt = 64
    """Requests in one step."""

    max_model_len: PositiveInt | None = None
    """Prompt and output tokens of one request; by default what the engine directory allows."""

    stall_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """An engine silent for this long counts as unhealthy until it speaks again."""

    registry: NodeRegistryConfig | None = None
    """etcd, through which routers find the node. None: they have it in their configuration."""

    tracing: TracingConfig | None = None
    """Spans of requests for OpenTelemetry. None makes none."""

    def scheduler_options(self) -> SchedulerOptions | None:
        """Return the section of the chosen scheduler; None for its defaults."""
        return self.slide_batching or self.deadline or self.sarathi

    def plans_ahead(self) -> bool:
        """Return whether steps are planned ahead."""
        return self.engine.device == "cuda" if self.plan_ahead is None else self.plan_ahead

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        problems = [*self._unread_sections(), *self._what_the_engine_decides()]
        if problems:
            raise problems_error(type(self), problems)
        return self

    def _unread_sections(self) -> Iterator[Problem]:
        expected = options_type(self.scheduler)
        sections = {"slide_batching": self.slide_batching, "deadline": self.deadline,
                    "sarathi": self.sarathi}  # fmt: skip
        for name, section in sections.items():
            # SlideBatching's options are deadline options and more, so the type must be exact.
            if section is not None and (
                expected is None or type(section).__mro__[1] is not expected
            ):
                yield (name,), f"{name} is set, but scheduler {self.scheduler} does not read it"

    def _what_the_engine_decides(self) -> Iterator[Problem]:
        if self.engine.kind == "trtllm-executor":
            for name in (
                "scheduler",
                "slide_batching",
                "kv_cache",
                "latency_correction",
                "plan_ahead",
            ):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield (
                        (name,),
                        f"{name} is set, but engine kind {self.engine.kind} schedules by itself; "
                        "leave it out",
                    )


class NodeConfig(NodeSettings):
    """One node: an engine behind an executor loop and an HTTP service."""

    endpoint_id: EndpointId
    """Name of this node, unique among the nodes of a router."""

    port: Port
    """Port the HTTP service listens on."""

    registration: NodeRegistrationConfig | None = None
    """Routers at which this node registers itself. None: routers have it in their
    configuration."""

    def advertised_url(self) -> str:
        """Return the address under which others reach the node."""
        if self.registration is not None and self.registration.advertise_url is not None:
            return self.registration.advertise_url
        host = self.host
        if self.registry is not None and self.registry.advertise_host is not None:
            host = self.registry.advertise_host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        problems = list(self._address_problems())
        if problems:
            raise problems_error(type(self), problems)
        return self

    def _address_problems(self) -> Iterator[Problem]:
        way_out = None
        if self.registration is not None and self.registration.advertise_url is None:
            way_out = "registration.advertise_url to one"
        if self.registry is not None and self.registry.advertise_host is None:
            way_out = "registry.advertise_host to one"
        if way_out is not None and self.host in ("0.0.0.0", "::"):
            yield (
                ("host",),
                f"host is {self.host}, which is no address to come to; set {way_out} under which "
                "routers reach this node",
            )
        if self.registration is not None and self.registry is not None:
            yield (
                ("registration",),
                "registration and registry are both set, so the node could come twice; remove one",
            )
