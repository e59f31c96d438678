"""The simulated engines of a simulation's YAML."""

from __future__ import annotations

from typing import Self

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from engines.simulated import StepTimeError
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import EngineCapabilities

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
_STRICT_DATACLASS = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class ProfileSection(LatencyProfile):
    """The eight coefficients of a step's duration; see `LatencyProfile`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class CopyProfileSection(CopyProfile):
    """How long copies of KV blocks take; see `CopyProfile`."""


@pydantic_dataclass(config=_STRICT_DATACLASS, frozen=True)
class StepTimeErrorSection(StepTimeError):
    """How the engine differs from its profile; see `StepTimeError`."""


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


class NodeGroupConfig(BaseModel):
    """Nodes that are alike."""

    model_config = _STRICT

    count: PositiveInt
    """How many."""

    slowdown: PositiveFloat = 1.0
    """What a step takes, in times of `engine`; the nodes' schedulers know it."""

    num_device_blocks: PositiveInt | None = None
    """KV blocks in device memory; by default as `engine` says."""

    def engine(self, engine: EngineConfig) -> EngineConfig:
        """Return the engine of each of these nodes."""
        profile = engine.profile.to_dict()
        scaled = ProfileSection(**{name: self.slowdown * value for name, value in profile.items()})
        num_device_blocks = self.num_device_blocks or engine.num_device_blocks
        return engine.model_copy(update={"profile": scaled, "num_device_blocks": num_device_blocks})
