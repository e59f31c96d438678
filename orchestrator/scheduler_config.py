"""Options of schedulers, their latency model and their KV blocks, as sections of YAML files."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from orchestrator.core.baselines import SarathiOptions
from orchestrator.core.deadline_scheduler import DeadlineOptions
from orchestrator.core.kv_options import KVCacheOptions
from orchestrator.core.latency_correction import CorrectionOptions
from orchestrator.core.slide_batching import SlideBatchingOptions

_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class SlideBatchingSection(SlideBatchingOptions):
    """Parameters of the scheduler `slide-batching`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class DeadlineSection(DeadlineOptions):
    """Parameters of the other schedulers with a time budget."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class SarathiSection(SarathiOptions):
    """Parameters of the schedulers with a token budget."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class CorrectionSection(CorrectionOptions):
    """How predicted step durations follow the measured ones."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class KVCacheSection(KVCacheOptions):
    """Prefix reuse, offload of KV blocks to the host, and their reload."""
