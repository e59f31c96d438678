"""The YAML of one simulation: an engine, traces, policies and loads, and what to measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from engines.simulated import StepTimeError
from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.slo import GainWeights, PriorityClass, Slo
from orchestrator.scheduler_config import DeadlineSection, SarathiSection, SlideBatchingSection
from orchestrator.simulation.trace import Burst
from orchestrator.simulation.workload import ClassShare, PrioritiesPer

Fraction = Annotated[float, Field(ge=0, lt=0.5)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,61}$")]

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class ProfileSection(LatencyProfile):
    """The eight coefficients of a step's duration; see `LatencyProfile`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class CopyProfileSection(CopyProfile):
    """How long copies of KV blocks take; see `CopyProfile`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class KVPolicySection(KVCacheOptions):
    """What becomes of the KV of preempted requests. The prompts of a trace have lengths but no
    content, so no two of them begin alike."""

    prefix_caching: Literal[False] = False
    """Always off."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class StepTimeErrorSection(StepTimeError):
    """How the engine differs from its profile; see `StepTimeError`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class BurstSection(Burst):
    """A stretch of time with more requests; see `Burst`."""


class EngineConfig(BaseModel):
    """The simulated engine of every node."""

    model_config = _STRICT

    profile: ProfileSection
    """What schedulers believe a step costs."""

    error: StepTimeErrorSection = StepTimeErrorSection()
    """How the engine's true durations differ; the seed of a run is added to its `seed`."""

    block_size_tokens: PositiveInt = 16
    """Tokens in one KV block."""

    num_device_blocks: PositiveInt
    """KV blocks in device memory."""

    num_host_blocks: NonNegativeInt = 0
    """KV blocks in host memory; 0 for no offload."""

    num_layer_groups: PositiveInt = 4
    """Parts in which reloaded blocks arrive, each in time for its layers."""

    copies: CopyProfileSection | None = None
    """How long copies between the two take; needed with host blocks."""

    max_num_batched_tokens: PositiveInt = 2048
    """New tokens in one step, over all requests."""

    max_num_seqs: PositiveInt = 256
    """Requests in one step."""

    max_model_len: PositiveInt
    """Prompt and output tokens of one request."""

    def capabilities(self) -> EngineCapabilities:
        """Return the limits as schedulers see them."""
        return EngineCapabilities(
            block_size_tokens=self.block_size_tokens,
            num_device_blocks=self.num_device_blocks,
            num_host_blocks=self.num_host_blocks,
            num_layer_groups=self.num_layer_groups,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
        )

    @model_validator(mode="after")
    def _check_copies(self) -> Self:
        if self.num_host_blocks and self.copies is None:
            raise ValueError(
                f"num_host_blocks is {self.num_host_blocks:,}, so copies are made; say in "
                "`copies` how long they take"
            )
        return self


class TraceConfig(BaseModel):
    """A trace, and how much of it is replayed."""

    model_config = _STRICT

    file: Path
    """Gzip CSV; relative to the current directory."""

    num_requests: PositiveInt | None = None
    """Consecutive requests in one run, beginning where the seed says; by default all."""

    max_output_tokens: PositiveInt
    """Longer outputs are cut; every client asks for this many tokens, if its prompt leaves room."""

    @property
    def name(self) -> str:
        """Return the file's name without its endings."""
        return self.file.name.removesuffix(".gz").removesuffix(".csv")


class _Policy(BaseModel):
    model_config = _STRICT

    kv_cache: KVPolicySection = KVPolicySection()
    """What becomes of the KV of preempted requests, where the engine has host blocks."""


class SlideBatchingPolicy(_Policy):
    """SlideBatching under test."""

    scheduler: Literal["slide-batching"]
    """Which scheduler decides."""

    options: SlideBatchingSection = SlideBatchingSection()
    """Its parameters."""


class TimeBudgetPolicy(_Policy):
    """Another scheduler with a time budget under test."""

    scheduler: Literal[
        "fair-batching",
        "edf",
        "sjf",
        "density",
        "decode-first-edf",
        "decode-first-density",
        "urgency-priority",
    ]
    """Which scheduler decides."""

    options: DeadlineSection = DeadlineSection()
    """Its parameters."""


class TokenBudgetPolicy(_Policy):
    """A scheduler with a token budget under test."""

    scheduler: Literal["sarathi-fcfs", "sarathi-priority", "weighted-vtc", "strict-priority"]
    """Which scheduler decides."""

    options: SarathiSection = SarathiSection()
    """Its parameters."""


class PlainPolicy(_Policy):
    """A scheduler without parameters under test."""

    scheduler: Literal["fcfs", "vllm-fcfs"]
    """Which scheduler decides."""

    options: None = None
    """It has none."""


PolicyConfig = Annotated[
    SlideBatchingPolicy | TimeBudgetPolicy | TokenBudgetPolicy | PlainPolicy,
    Field(discriminator="scheduler"),
]


class RouterConfig(BaseModel):
    """How requests find their node."""

    model_config = _STRICT

    policy: Literal["least-load"] = "least-load"
    """The rule that picks the node."""

    poll_interval_s: PositiveFloat = 0.25
    """Between two looks at the nodes' load; in between only dispatches are known."""


class FixedSlo(BaseModel):
    """The same objectives for every trace."""

    model_config = _STRICT

    rule: Literal["fixed"]
    """Which rule sets the objectives."""

    ttft_s: PositiveFloat
    """From arrival to the first token."""

    tpot_s: PositiveFloat
    """Between consecutive tokens."""


class DerivedSlo(BaseModel):
    """Objectives from what the engine can do on each trace."""

    model_config = _STRICT

    rule: Literal["derived"]
    """Which rule sets the objectives."""

    ttft_prefills: PositiveFloat = 5.0
    """TTFT objective in isolated prefills of the trace's 90th percentile prompt."""

    min_ttft_s: PositiveFloat = 1.0
    """Least TTFT objective."""

    max_ttft_s: PositiveFloat = 5.0
    """Largest TTFT objective."""

    tpot_gaps: PositiveFloat = 2.0
    """TPOT objective in medians of the time between tokens at half of the saturated rate."""

    min_tpot_s: NonNegativeFloat = 0.0
    """Least TPOT objective; nobody is promised tokens at the rate of an idle GPU."""


SloConfig = Annotated[FixedSlo | DerivedSlo, Field(discriminator="rule")]


class ClassConfig(BaseModel):
    """A service class and its share of the requests."""

    model_config = _STRICT

    name: Name
    """Of the class."""

    weight: NonNegativeFloat
    """Gain of one token in time."""

    share: PositiveFloat
    """How often the class is drawn, in proportion to the others."""

    slo_factor: PositiveFloat = 1.0
    """Both objectives of this class, in times of the trace's."""


class PrioritiesConfig(BaseModel):
    """Who is in which service class."""

    model_config = _STRICT

    per: PrioritiesPer = PrioritiesPer.REQUEST
    """Whether a class is drawn for every request or once for every client."""

    classes: Annotated[tuple[ClassConfig, ...], Field(min_length=1)]
    """The classes."""

    def shares(self, slo: Slo) -> list[ClassShare]:
        """Return the classes around a trace's objectives."""
        return [
            ClassShare(
                PriorityClass(
                    c.name,
                    c.weight,
                    Slo(ttft_s=slo.ttft_s * c.slo_factor, tpot_s=slo.tpot_s * c.slo_factor),
                ),
                c.share,
            )
            for c in self.classes
        ]


class RatesConfig(BaseModel):
    """The loads of a sweep."""

    model_config = _STRICT

    unit: Literal["requests_per_s", "knee"] = "knee"
    """`knee`: in times of the rate at which the reference policy still attains enough SLOs."""

    values: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """Mean rates over all nodes, ascending."""

    knee_attainment: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """SLO attainment of the reference policy that defines the knee."""


class MetricsConfig(BaseModel):
    """What is counted and how."""

    model_config = _STRICT

    warmup_fraction: Fraction = 0.1
    """Share of the arrival span, from its beginning, whose requests are not counted."""

    drain_fraction: Fraction = 0.1
    """The same from its end."""

    max_drain_s: NonNegativeFloat | None = None
    """After the last arrival; requests that run longer are unfinished. By default all end."""

    first_token_weight: NonNegativeFloat = 1.0
    """What a request's first token counts, times its class's weight."""

    later_token_weight: NonNegativeFloat = 1.0
    """What each later token counts, times its class's weight."""

    has_upper_bound: bool = True
    """Also compute what no schedule can exceed."""

    @property
    def gain_weights(self) -> GainWeights:
        """Return the weights of tokens."""
        return GainWeights(self.first_token_weight, self.later_token_weight)


class PlanConfig(BaseModel):
    """What `proserve plan` looks for: the fewest nodes that meet a target."""

    model_config = _STRICT

    requests_per_s: PositiveFloat
    """Mean rate over all nodes."""

    metric: Literal["slo_attainment", "tdg_ratio"] = "slo_attainment"
    """What the target is about."""

    target: Annotated[float, Field(gt=0, le=1)]
    """The least value, in every service class and on the mean over seeds."""

    max_nodes: PositiveInt = 64
    """No more are tried."""


class SimulationConfig(BaseModel):
    """A simulation: every policy on every trace at every rate with every seed."""

    model_config = _STRICT

    description: str = ""
    """What the simulation shows, for the titles of plots."""

    engine: EngineConfig
    """The engine of every node."""

    num_nodes: PositiveInt = 1
    """Nodes behind the router."""

    router: RouterConfig = RouterConfig()
    """How requests find their node."""

    traces: Annotated[tuple[TraceConfig, ...], Field(min_length=1)]
    """What is replayed."""

    policies: Annotated[dict[Name, PolicyConfig], Field(min_length=1)]
    """Schedulers under test, by the name that results use."""

    reference: PolicyConfig = TokenBudgetPolicy(scheduler="sarathi-fcfs")
    """The policy that defines saturation and the knee."""

    priorities: PrioritiesConfig
    """Who is in which service class."""

    slo: SloConfig
    """What is promised."""

    rates: RatesConfig
    """The loads."""

    bursts: tuple[BurstSection, ...] = ()
    """Stretches of overload on top of the rates."""

    num_seeds: PositiveInt = 5
    """Seeds 0, 1, ...: each begins elsewhere in the trace and draws other priorities."""

    metrics: MetricsConfig = MetricsConfig()
    """What is counted and how."""

    plan: PlanConfig | None = None
    """What `proserve plan` looks for."""

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        for trace in self.traces:
            if trace.max_output_tokens >= self.engine.max_model_len:
                raise ValueError(
                    f"max_output_tokens of {trace.name} is {trace.max_output_tokens:,}, it must "
                    f"be below engine.max_model_len, {self.engine.max_model_len:,}"
                )
        if len({trace.name for trace in self.traces}) < len(self.traces):
            raise ValueError(
                "two traces have the same file name; results could not tell them apart"
            )
        return self
