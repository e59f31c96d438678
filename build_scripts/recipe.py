"""The YAML that says which engine directory to build from what."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

BUILD_VERSION = 2
"""Raise it whenever the build would write other bytes: finished directories are then rebuilt."""

STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

EngineName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class CheckpointSource(BaseModel):
    """A GGUF file inside an installed Python package, which is never imported."""

    model_config = STRICT

    package: str
    """Distribution name, as given to pip."""

    version: str
    """Exact version of the package."""

    module: str
    """Import name of the package: the folder that holds the file."""

    file: str
    """Path of the GGUF file inside that folder."""


class StepGrid(BaseModel):
    """Which steps are measured for the latency profile, and for how long.

    Combinations that do not fit into the KV blocks or the engine's limits are left out.
    """

    model_config = STRICT

    prefill_new_tokens: tuple[PositiveInt, ...] = (16, 64, 128, 256, 512)
    """Sizes of prefill pieces."""

    prefill_cached_tokens: tuple[Annotated[int, Field(ge=0)], ...] = (0, 512, 2048)
    """Tokens already cached before a prefill piece."""

    decode_batch_sizes: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Requests in a decode-only step."""

    decode_cached_tokens: tuple[PositiveInt, ...] = (16, 256, 1024, 2048)
    """Tokens already cached before a decode."""

    num_mixed_steps: PositiveInt = 12
    """Random steps of decodes and prefill pieces; every second one only checks the fit."""

    num_repeats: PositiveInt = 5
    """Times that each step is measured; the shortest counts, since disturbances only add time."""

    max_s: PositiveFloat = 40.0
    """No further repetition begins after this time; each step is measured once in any case, and
    so is each copy of KV blocks, for which 3 s are enough."""

    max_mean_error: PositiveFloat = 1.0
    """Mean absolute percentage error, as a fraction, over which the fit is refused."""


class TorchMeasurement(BaseModel):
    """How the torch engine is run while it is measured."""

    model_config = STRICT

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to measure."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Precision to measure in, as a node's configuration names it."""

    num_threads: PositiveInt | None = None
    """CPU threads; by default as many as PyTorch finds cores."""

    num_device_blocks: PositiveInt = 1024
    """KV blocks of the measured engine."""


class ProfileSettings(StepGrid, TorchMeasurement):
    """How the torch engine is profiled. The defaults suit two CPU cores."""


class EngineRecipe(BaseModel):
    """One engine directory to build."""

    model_config = STRICT

    kind: Literal["gguf"] = "gguf"
    """Which build reads this file."""

    name: EngineName
    """Model name that clients ask for; also the directory's name unless `output_dir` is set."""

    source: CheckpointSource
    """Where the weights and the tokenizer come from."""

    output_dir: Path | None = None
    """Directory to make, relative to the current one; `built_engines/<name>` by default."""

    additional_eos_tokens: tuple[str, ...] = ()
    """Tokens that end a generation beside the one named in the file."""

    block_size_tokens: PositiveInt = 16
    """Tokens per KV block."""

    max_model_len: PositiveInt
    """Prompt and output tokens of one request, at most what the model was trained for."""

    profile: ProfileSettings = ProfileSettings()
    """How the latency profile is measured, and the copy profile after it."""

    def build_hash(self, source_sha256: str) -> str:
        """Return the hash of everything that decides the directory's content.

        The output directory is not part of it, so that a directory can be moved; nor is the
        kind, which every recipe of this model shares.
        """
        recipe = self.model_dump_json(exclude={"output_dir", "kind"})
        return hashlib.sha256(f"{BUILD_VERSION}\n{source_sha256}\n{recipe}".encode()).hexdigest()
