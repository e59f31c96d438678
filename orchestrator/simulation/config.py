"""The YAML of one simulation: an engine, traces, policies and loads, and what to measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from orchestrator.core.slo import GainWeights, PriorityClass, Slo
from orchestrator.simulation.engine_config import EngineConfig, NodeGroupConfig
from orchestrator.simulation.policy_config import PolicyConfig, RouterConfig, TokenBudgetPolicy
from orchestrator.simulation.trace import Burst
from orchestrator.simulation.workload import ClassShare, PrioritiesPer
from router.routing_config import RoutingConfig

Fraction = Annotated[float, Field(ge=0, lt=0.5)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,61}$")]

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class BurstSection(Burst):
    """A stretch of time with more requests; see `Burst`."""


class SharedPrefixConfig(BaseModel):
    """Beginnings that prompts have in common, such as system prompts."""

    model_config = _STRICT

    num_prefixes: PositiveInt
    """Different beginnings; one is drawn for each request."""

    num_tokens: PositiveInt
    """Length of each; a shorter prompt has it but for the end. Lengths of prompts do not change."""


class TraceConfig(BaseModel):
    """A trace, and how much of it is replayed."""

    model_config = _STRICT

    file: Path
    """Gzip CSV; relative to the current directory."""

    num_requests: PositiveInt | None = None
    """Consecutive requests in one run, beginning where the seed says; by default all."""

    max_output_tokens: PositiveInt
    """Longer outputs are cut; every client asks for this many tokens, if its prompt leaves room.
    With 1 the nodes are those of a prefill pool: a request ends with its first token."""

    shared_prefix: SharedPrefixConfig | None = None
    """Beginnings that prompts share; by default no two prompts begin alike."""

    @property
    def name(self) -> str:
        """Return the file's name without its endings."""
        return self.file.name.removesuffix(".gz").removesuffix(".csv")


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

    num_nodes: PositiveInt | None = None
    """Nodes behind the router, all alike; by default 1."""

    nodes: Annotated[tuple[NodeGroupConfig, ...], Field(min_length=1)] | None = None
    """Nodes that are not alike, in place of `num_nodes`."""

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

    def engines(self) -> list[EngineConfig]:
        """Return the engine of each node."""
        groups = self.nodes or (NodeGroupConfig(count=self.num_nodes or 1),)
        return [engine for g in groups for engine in [g.engine(self.engine)] * g.count]

    @property
    def relative_speed(self) -> float:
        """How fast the nodes are together, in times of one with `engine`."""
        groups = self.nodes or (NodeGroupConfig(count=self.num_nodes or 1),)
        return sum(group.count / group.slowdown for group in groups)

    @property
    def class_weights(self) -> dict[str, float]:
        """Return the weight of each service class."""
        return {c.name: c.weight for c in self.priorities.classes}

    def routing_of(self, policy: PolicyConfig) -> RoutingConfig:
        """Return how requests find their node under a policy."""
        return policy.routing or self.router

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.nodes is not None:
            for name, is_set in (
                ("num_nodes", self.num_nodes is not None),
                ("plan", self.plan is not None),
                ("metrics.has_upper_bound", self.metrics.has_upper_bound),
            ):
                if is_set:
                    raise ValueError(
                        f"{name} is for nodes that are all alike; with `nodes`, "
                        "which need not be, leave it out or set it to false"
                    )
        return self

    @model_validator(mode="after")
    def _check_policies(self) -> Self:
        has_content = all(trace.shared_prefix is not None for trace in self.traces)
        for name, policy in {**self.policies, "reference": self.reference}.items():
            self.routing_of(policy).make_policy(self.class_weights)  # or says what does not fit
            if policy.kv_cache.prefix_caching and not has_content:
                raise ValueError(
                    f"policy {name} has prefix_caching, but not every trace a shared_prefix: "
                    "their prompts have no content that could be alike"
                )
        return self

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
