"""What decides in a simulation: schedulers and routing policies, as parts of its YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from pydantic.dataclasses import dataclass as pydantic_dataclass

from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.scheduler_config import DeadlineSection, SarathiSection, SlideBatchingSection
from router.routing_config import RoutingConfig

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class KVPolicySection(KVCacheOptions):
    """What becomes of the KV of preempted requests, and of prompts that begin alike."""

    prefix_caching: bool = False
    """Whether requests of a client share the KV of equal beginnings; needs traces with a
    `shared_prefix`, because traces have lengths but no content."""


class _Policy(BaseModel):
    model_config = _STRICT

    kv_cache: KVPolicySection = KVPolicySection()
    """What becomes of the KV of preempted requests, where the engine has host blocks."""

    routing: RoutingConfig | None = None
    """How requests find their node under this policy; by default as `router` says."""


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


class RouterConfig(RoutingConfig):
    """How requests find their node."""

    snapshot_interval_s: PositiveFloat = 0.1
    """Between two snapshots of a node; in between only what was sent there is known."""
