"""The recipe of a TensorRT-LLM engine, as YAML holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag, model_validator

from build_scripts.recipe import STRICT, EngineName, StepGrid

Switch = Literal["enable", "disable"]
PluginDtype = Literal["auto", "float16", "bfloat16", "disable"]


class LocalSource(BaseModel):
    """A model in Hugging Face's format, in a folder."""

    model_config = STRICT

    path: Path
    """Folder with `config.json`, the tokenizer's files and the weights as `*.safetensors`."""

    @property
    def description(self) -> str:
        """What the manifest calls it."""
        return str(self.path)


class HubSource(BaseModel):
    """A model on the Hugging Face Hub, downloaded into Hugging Face's cache unless it is there."""

    model_config = STRICT

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Repository, such as `Qwen/Qwen2.5-7B-Instruct`. Where it needs a token, that is the one of
    the environment's `HF_TOKEN`."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit of the repository, in full: a branch may be another model tomorrow."""

    @property
    def description(self) -> str:
        """What the manifest calls it."""
        return f"{self.hub}@{self.revision}"


def _kind_of_source(values: object) -> str:
    has_path = "path" in values if isinstance(values, Mapping) else isinstance(values, LocalSource)
    return LocalSource.__name__ if has_path else HubSource.__name__


ModelSource = Annotated[
    Annotated[LocalSource, Tag(LocalSource.__name__)]
    | Annotated[HubSource, Tag(HubSource.__name__)],
    Discriminator(_kind_of_source),
]


class CalibrationSection(BaseModel):
    """Texts over which the scales of a quantised checkpoint are measured."""

    model_config = STRICT

    dataset: str = "cnn_dailymail"
    """Data set on the Hugging Face Hub, which upstream's script downloads."""

    dataset_dir: Path | None = None
    """Folder with a data set, in place of `dataset`."""

    num_samples: PositiveInt = 512
    """Texts that are read."""

    max_seq_len: PositiveInt = 512
    """Tokens of each text that are read."""


class CheckpointSection(BaseModel):
    """How weights are converted and divided over the ranks."""

    model_config = STRICT

    family: Literal["llama", "mistral", "mixtral", "qwen"]
    """Decides which of TensorRT-LLM's conversion scripts is run."""

    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    """Of activations, and of weights that are not quantised."""

    quantization: Literal["none", "fp8", "int4_awq", "int8_weight_only", "int4_weight_only"] = (
        "none"
    )
    """Of the weights. `fp8` and `int4_awq` are calibrated; `fp8` quantises activations too and
    needs a GPU of compute capability 8.9 or later."""

    kv_cache_dtype: Literal["fp8"] | None = None
    """Of the KV cache; by default `dtype`. `fp8` needs `quantization: fp8`."""

    tp_size: PositiveInt = 1
    """Tensor parallelism: one rank, and one GPU, each."""

    pp_size: Literal[1] = 1
    """Pipeline parallelism is not supported by the engine that serves."""

    calibration: CalibrationSection = CalibrationSection()
    """Read by calibrated quantisations alone."""

    @model_validator(mode="after")
    def _check_kv_cache(self) -> Self:
        if self.kv_cache_dtype == "fp8" and self.quantization != "fp8":
            raise ValueError(
                f"kv_cache_dtype is fp8 with quantization {self.quantization}: trtllm-build would "
                "turn paged context attention off without an error, and chunked prefill needs it; "
                "set quantization to fp8 too, or leave kv_cache_dtype out"
            )
        return self

    @property
    def is_calibrated(self) -> bool:
        """True if the quantisation reads texts."""
        return self.quantization in ("fp8", "int4_awq")


class LimitsSection(BaseModel):
    """The largest step that the engine can run. Larger limits take memory from the KV cache, for
    the activations of such a step, whether it ever runs or not."""

    model_config = STRICT

    max_batch_size: PositiveInt
    """Requests in one step: at least a node's `max_num_seqs`."""

    max_num_tokens: PositiveInt
    """New tokens in one step: at least a node's `max_num_batched_tokens`."""

    max_seq_len: PositiveInt
    """Prompt and output tokens of one request; at most what the model was trained for."""

    opt_num_tokens: PositiveInt | None = None
    """New tokens of the step that kernels are chosen for; by default `max_batch_size`, a step of
    decodes alone."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        # trtllm-build would lower the first number without an error.
        most = self.max_seq_len * self.max_batch_size
        if self.max_num_tokens > most:
            raise ValueError(
                f"max_num_tokens is {self.max_num_tokens}, but max_batch_size requests of "
                f"max_seq_len hold {most}; lower it"
            )
        if self.opt_num_tokens is not None and self.opt_num_tokens > self.max_num_tokens:
            raise ValueError(
                f"opt_num_tokens is {self.opt_num_tokens}, more than max_num_tokens "
                f"{self.max_num_tokens}; lower it"
            )
        return self


class PluginsSection(BaseModel):
    """Options of trtllm-build. Those with one value are what serving depends on: they are there to
    be read, and to be named when an engine that was built otherwise is refused."""

    model_config = STRICT

    kv_cache_type: Literal["paged"] = "paged"
    """The scheduler gives out attention memory in blocks."""

    remove_input_padding: Literal["enable"] = "enable"
    """Requests of different lengths share a step."""

    context_fmha: Literal["enable"] = "enable"
    """Fused attention over prompts, which the next one builds on."""

    use_paged_context_fmha: Literal["enable"] = "enable"
    """A chunk of a prompt sees the chunks before it."""

    multiple_profiles: Literal["disable"] = "disable"
    """One optimization profile covers every step; several would have to be switched between."""

    streamingllm: Literal["disable"] = "disable"
    """It would turn paged context attention off."""

    gpt_attention_plugin: Literal["auto", "float16", "bfloat16"] = "auto"
    """Attention over KV blocks; `auto` is the checkpoint's dtype."""

    tokens_per_block: PositiveInt = 32
    """Tokens per KV block; a power of two. Smaller ones waste less at the end of each request,
    larger ones need shorter tables and fewer, larger copies."""

    gemm_plugin: Literal["auto", "float16", "bfloat16", "fp8", "disable"] = "auto"
    """Matrix products by cuBLASLt instead of TensorRT's own kernels: faster builds, and no slow
    kernel for step sizes far from `opt_num_tokens`. `fp8` for `quantization: fp8`."""

    moe_plugin: PluginDtype = "auto"
    """Kernels of mixture-of-experts layers; other models do not read it."""

    gemm_swiglu_plugin: Literal["fp8", "disable"] = "disable"
    """One kernel for the two products and the activation of the MLP; FP8 on Hopper alone."""

    low_latency_gemm_plugin: Literal["fp8", "disable"] = "disable"
    """FP8 matrix products for steps of a few tokens."""

    reduce_fusion: Switch = "disable"
    """Normalisation in the all-reduce kernel; Llama with `tp_size` over 1 alone."""

    use_fused_mlp: Switch = "enable"
    """The MLP's first two products as one."""

    @model_validator(mode="after")
    def _check_block(self) -> Self:
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise ValueError(
                f"tokens_per_block is {self.tokens_per_block}, it must be a power of two; 32 is "
                "upstream's default"
            )
        return self


class EngineProfileSettings(StepGrid):
    """How the built engine is profiled. The defaults suit one data-centre GPU."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Where to measure; `cpu` is for the stand-ins of the tests alone."""

    num_device_blocks: PositiveInt | None = None
    """KV blocks of the measured engine; by default as many as the GPU has room for."""

    prefill_new_tokens: tuple[PositiveInt, ...] = (64, 256, 1024, 2048, 4096, 8192)
    """Sizes of prefill pieces."""

    prefill_cached_tokens: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1024, 4096)
    """Tokens already cached before a prefill piece."""

    decode_batch_sizes: tuple[PositiveInt, ...] = (1, 4, 16, 64, 128, 256)
    """Requests in a decode-only step."""

    decode_cached_tokens: tuple[PositiveInt, ...] = (64, 512, 2048, 4096)
    """Tokens already cached before a decode."""

    max_s: Annotated[float, Field(gt=0)] = 120.0
    """No further repetition begins after this time; each step is measured once in any case, and
    so is each copy of KV blocks, for which 3 s are enough."""


class TrtLlmRecipe(BaseModel):
    """One TensorRT-LLM engine directory to build, or several variants of it."""

    model_config = STRICT

    kind: Literal["trtllm"]
    """Which build reads this file."""

    name: EngineName
    """Model name that clients ask for; also the directory's name unless `output_dir` is set."""

    source: ModelSource
    """Where the model comes from."""

    output_dir: Path | None = None
    """Directory to make, relative to the current one; `built_engines/<name>` by default."""

    tensorrt_llm_dir: Path | None = None
    """Checkout of the TensorRT-LLM repository, whose examples hold the conversion scripts (the
    wheel does not); by default `TENSORRT_LLM_DIR` of the environment, else `TensorRT-LLM`."""

    checkpoint: CheckpointSection
    """Precision and ranks."""

    limits: LimitsSection
    """The largest step."""

    plugins: PluginsSection = PluginsSection()
    """Kernels."""

    profile: EngineProfileSettings = EngineProfileSettings()
    """How the latency profile is measured, and the copy profile after it."""

    matrix: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")], dict[str, Any]] = {}
    """Variants that `proserve build --matrix` makes: name -> keys of this file that differ. Each
    engine is called `<name>-<variant>`, and lies beside the recipe's own directory, unless the
    variant says otherwise."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.limits.max_num_tokens < self.plugins.tokens_per_block:
            raise ValueError(
                f"limits.max_num_tokens is {self.limits.max_num_tokens}, less than one KV block of "
                f"plugins.tokens_per_block {self.plugins.tokens_per_block}; trtllm-build would "
                "raise it: do so here"
            )
        needs_fp8 = {
            "gemm_plugin": self.plugins.gemm_plugin,
            "gemm_swiglu_plugin": self.plugins.gemm_swiglu_plugin,
            "low_latency_gemm_plugin": self.plugins.low_latency_gemm_plugin,
        }
        for name, value in needs_fp8.items():
            if value == "fp8" and self.checkpoint.quantization != "fp8":
                raise ValueError(
                    f"plugins.{name} is fp8, but checkpoint.quantization is "
                    f"{self.checkpoint.quantization}; set both, or neither"
                )
        return self
