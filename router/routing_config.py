"""Which rule routes requests and its parameters, as a part of YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from router import baselines
from router.baselines import LlumnixOptions, PrefixAwareOptions
from router.gorouting import GoRoutingOptions, GoRoutingPolicy
from router.policy import RoutingPolicy
from router.prefix_index import PrefixIndexOptions

_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)

PolicyName = Literal[
    "gorouting",
    "least-load",
    "least-request",
    "round-robin",
    "random",
    "power-of-two",
    "prefix-aware",
    "static-partition",
    "llumnix",
    "slo-aware",
    "highest-load-feasible",
]


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class PrefixIndexSection(PrefixIndexOptions):
    """What a router remembers of the beginnings of prompts."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class GoRoutingSection(GoRoutingOptions):
    """Parameters of the policy `gorouting`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class PrefixAwareSection(PrefixAwareOptions):
    """Parameters of the policy `prefix-aware`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class LlumnixSection(LlumnixOptions):
    """Parameters of the policy `llumnix`."""


class RoutingConfig(BaseModel):
    """How a node is chosen for a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    policy: PolicyName = "gorouting"
    """How a node is chosen for a request; all but the first are there to compare with, see
    [routing](routing.md)."""

    gorouting: GoRoutingSection | None = None
    """Parameters of `gorouting`. `slo-aware` and `highest-load-feasible` estimate a node's load by
    `steps_per_prompt` and `counts_hopeless`, the latter also reads `kappa`."""

    prefix_aware: PrefixAwareSection | None = None
    """Parameters of `prefix-aware`."""

    static_partition: Annotated[dict[str, PositiveFloat], Field(min_length=1)] | None = None
    """Parts of the nodes for `static-partition`: each class and its share, in proportion to the
    others'; by default equal shares, the most valuable class first."""

    prefix_index: PrefixIndexSection | None = None
    """What `prefix-aware`, and `gorouting` with `prefix_reuse`, remember of prompts."""

    llumnix: LlumnixSection | None = None
    """Parameters of `llumnix`."""

    routing_seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws of `random` and `power-of-two`."""

    @property
    def estimates(self) -> GoRoutingOptions:
        """Return the options by which loads and gains are estimated."""
        return self.gorouting or GoRoutingOptions()

    def make_policy(self, class_weights: Mapping[str, float]) -> RoutingPolicy:
        """Return the policy, new; `class_weights` has every service class and its weight.

        Raises:
            ValueError: `static_partition` does not name exactly those classes.
        """
        prefix_index = self.prefix_index or PrefixIndexOptions()
        policy: RoutingPolicy
        match self.policy:
            case "gorouting":
                policy = GoRoutingPolicy(self.estimates, prefix_index)
            case "least-load":
                policy = baselines.LeastLoadPolicy()
            case "least-request":
                policy = baselines.LeastRequestPolicy()
            case "round-robin":
                policy = baselines.RoundRobinPolicy()
            case "random":
                policy = baselines.RandomPolicy(self.routing_seed)
            case "power-of-two":
                policy = baselines.PowerOfTwoPolicy(self.routing_seed)
            case "prefix-aware":
                options = self.prefix_aware or PrefixAwareOptions()
                policy = baselines.PrefixAwarePolicy(options, prefix_index)
            case "static-partition":
                policy = baselines.StaticPartitionPolicy(self._shares(class_weights))
            case "llumnix":
                policy = baselines.LlumnixPolicy(
                    self.llumnix or LlumnixOptions(), highest_weight=max(class_weights.values())
                )
            case "slo-aware":
                policy = baselines.SloAwarePolicy()
            case "highest-load-feasible":
                policy = baselines.HighestLoadFeasiblePolicy(kappa=self.estimates.kappa)
        return policy

    def _shares(self, class_weights: Mapping[str, float]) -> Mapping[str, float]:
        if self.static_partition is None:
            heaviest_first = sorted(class_weights, key=lambda name: -class_weights[name])
            return dict.fromkeys(heaviest_first, 1.0)
        if self.static_partition.keys() != class_weights.keys():
            raise ValueError(
                f"static_partition has shares for {', '.join(self.static_partition)}; it must have "
                f"one for each of the classes {', '.join(class_weights)}"
            )
        return self.static_partition

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        readers: dict[str, tuple[str, ...]] = {
            "gorouting": ("gorouting", "slo-aware", "highest-load-feasible"),
            "prefix_aware": ("prefix-aware",),
            "prefix_index": ("prefix-aware", "gorouting"),
            "static_partition": ("static-partition",),
            "llumnix": ("llumnix",),
        }
        for name, policies in readers.items():
            if getattr(self, name) is not None and self.policy not in policies:
                raise ValueError(f"{name} is set, but policy {self.policy} does not read it")
        return self
