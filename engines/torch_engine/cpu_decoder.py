"""The Llama decoder on CPUs with AVX2 or AVX-512: quantised matrices, attention over paged blocks.

Computes what `engines.torch_engine.model.LlamaDecoder`, the readable specification, computes, with
matrices and their inputs in 8 bits. A request's logits are the same bits whatever else is in the
batch, however its prompt was cut, and with any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engines.kv_pool import KVPool
from engines.step_runner import StepLogits
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.cpu_library import (
    NUM_LANES,
    STEP_ARRAYS,
    Activations,
    KVCache,
    Layer,
    Matrix,
    Model,
    Step,
    Workspace,
    load_library,
)
from engines.torch_engine.cpu_sampling import draw_on_cpu
from engines.torch_engine.cpu_weights import GROUP_INPUTS, PANEL_OUTPUTS, quantize
from engines.torch_engine.model import rope_tables
from engines.torch_engine.packed_step import (
    HostBlockTables,
    PackedStep,
    pack_step,
    sampled_of,
)
from engines.torch_engine.precision import int8_obstacle
from engines.torch_engine.weights import DecoderWeights
from orchestrator.core.errors import EngineError
from orchestrator.core.ports import ScheduledRequest
from orchestrator.device_sampling import DrawParameters, PendingTokens

# Tokens of a prompt that share what is read of K and V. A prompt of 2,048 takes 1.33 s with 16 of
# them, 1.27 s with 32 and 1.25 s with 64, on 2 cores of an Intel Xeon.
_TILE_TOKENS = 32


class CpuDecoder:
    """Weights and the computation; of requests, it keeps their block tables."""

    compute_ahead = None

    def __init__(
        self,
        config: LlamaConfig,
        weights: DecoderWeights,
        pool: KVPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        """Quantise float32 weights and take the memory of a step within these limits.

        Raises:
            EngineError: the machine cannot run it, or the model's sizes do not fit the kernels.
        """
        obstacle = int8_obstacle(config)
        if obstacle is not None:
            raise EngineError(f"dtype is int8, which cannot run here: {obstacle}; use float32")
        self._library = load_library()
        self._config, self._pool = config, pool
        self._tables = HostBlockTables(max_num_seqs, max_model_len, pool.layout.block_size_tokens)
        self._kept: list[torch.Tensor] = []
        """What the structures point to."""

        self._model = self._make_model(weights, max_model_len)
        self._workspace = self._make_workspace(max_num_batched_tokens)
        self._logits = torch.empty(max_num_seqs, config.vocab_size)
        self._largest = torch.empty(max_num_seqs, -(-config.vocab_size // PANEL_OUTPUTS))

    def compute(
        self,
        parts: Sequence[ScheduledRequest],
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> StepLogits:
        """Compute a checked, non-empty plan; the logits are overwritten by the next.

        `before_layer` is called with each layer's index before the layer touches the pool.
        """
        decodes = [part for part in parts if part.num_new_tokens == 1]
        pieces = [part for part in parts if part.num_new_tokens > 1]
        sampled, rows = sampled_of([*decodes, *pieces])
        packed = pack_step(
            decodes, pieces, self._tables, sampled_rows=rows, tile_queries=_TILE_TOKENS
        )
        arrays = _with_decodes_as_tiles(packed)
        step = Step(
            **{name: array.ctypes.data for name, array in arrays.items()},
            num_rows=len(packed.token_ids),
            num_tiles=len(arrays["tile_rows"]),
            num_sampled=len(rows),
        )
        logits = self._logits[: len(rows)]
        self._run(step, logits, before_layer)
        return StepLogits(sampled, logits)

    def draw(self, scores: torch.Tensor, parameters: DrawParameters) -> PendingTokens:
        """Draw one token per row of scores, such as the last logits; -1 where the largest is not
        finite."""
        is_unchanged = scores.data_ptr() == self._logits.data_ptr()
        return draw_on_cpu(scores, parameters, largest=self._largest if is_unchanged else None)

    def close(self) -> None:
        """Release the weights. No call follows."""
        self._kept.clear()

    def _run(
        self, step: Step, logits: torch.Tensor, before_layer: Callable[[int], None] | None
    ) -> None:
        model, work = ctypes.byref(self._model), ctypes.byref(self._workspace)
        self._library.proserve_embed(model, step, work)
        num_layers = self._config.num_hidden_layers
        if before_layer is None:
            self._library.proserve_run_layers(model, step, work, 0, num_layers)
        else:
            for index in range(num_layers):
                before_layer(index)
                self._library.proserve_run_layers(model, step, work, index, index + 1)
        self._library.proserve_logits(
            model, step, work, logits.data_ptr(), self._largest.data_ptr()
        )

    def _make_model(self, weights: DecoderWeights, max_model_len: int) -> Model:
        config, layout = self._config, self._pool.layout
        cosines, sines = rope_tables(
            config, max_model_len, dtype=torch.float32, device=torch.device("cpu")
        )
        layers = (Layer * config.num_hidden_layers)(
            *(
                Layer(
                    input_norm=self._keep(layer.input_norm),
                    qkv=self._matrix(layer.qkv),
                    attention_output=self._matrix(layer.attention_output),
                    mlp_norm=self._keep(layer.mlp_norm),
                    gate_up=self._matrix(_interleaved(layer.gate_up)),
                    down=self._matrix(layer.down),
                )
                for layer in weights.layers
            )
        )
        return Model(
            layers=layers,
            embedding=self._keep(weights.embedding),
            final_norm=self._keep(weights.final_norm),
            lm_head=self._matrix(weights.lm_head),
            cosines=self._keep(cosines),
            sines=self._keep(sines),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            cache=KVCache(
                blocks=self._pool.blocks.data_ptr(),
                is_bfloat16=self._pool.blocks.dtype == torch.bfloat16,
                num_layers=layout.num_layers,
                num_kv_heads=layout.num_kv_heads,
                block_size_tokens=layout.block_size_tokens,
                head_dim=layout.head_dim,
            ),
        )

    def _make_workspace(self, max_rows: int) -> Workspace:
        config, num_threads = self._config, torch.get_num_threads()
        qkv_size = config.query_size + 2 * config.key_value_size
        max_inputs = max(config.hidden_size, config.query_size, config.intermediate_size)
        group_size = config.num_attention_heads // config.num_key_value_heads
        thread_bytes = self._library.proserve_thread_bytes(
            max_inputs, config.head_dim, _TILE_TOKENS * group_size
        )

        def floats(size: int) -> int:
            return self._keep(torch.empty(max_rows, size))

        num_groups = max_inputs // GROUP_INPUTS
        return Workspace(
            hidden=floats(config.hidden_size),
            qkv=floats(qkv_size),
            attention=floats(config.query_size),
            product=floats(config.intermediate_size),
            activations=Activations(
                codes=self._keep(torch.empty(max_rows, max_inputs, dtype=torch.int8)),
                scales=floats(num_groups),
                sums=floats(num_groups),
            ),
            thread_memory=self._keep(torch.empty(num_threads, thread_bytes, dtype=torch.uint8)),
            thread_bytes=thread_bytes,
            num_threads=num_threads,
        )

    def _matrix(self, matrix: torch.Tensor) -> Matrix:
        quantized = quantize(matrix)
        return Matrix(
            panels=self._keep(quantized.packed()),
            num_outputs=matrix.shape[0],
            num_inputs=matrix.shape[1],
            bits=quantized.bits,
        )

    def _keep(self, tensor: torch.Tensor) -> int:
        """Return the address of a tensor that lives as long as this decoder."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """Return rows of the gate and of `up` in turn, 16 of each: both halves of a product are then
    computed by one thread at a time."""
    gate, up = gate_up.unflatten(0, (2, -1, NUM_LANES))
    return torch.stack((gate, up), dim=1).flatten(0, 2)


def _with_decodes_as_tiles(step: PackedStep) -> dict[str, NDArray[np.int32]]:
    """Return the step's arrays; each decode is a tile of one token before those of the pieces."""
    decode_tiles = {
        "tile_rows": np.arange(len(step.context_lens), dtype=np.int32),
        "tile_counts": np.ones(len(step.context_lens), np.int32),
        "tile_positions": step.context_lens - 1,
        "tile_table_starts": step.table_starts,
    }
    arrays = {name: getattr(step, name) for name in STEP_ARRAYS}
    for name, decodes in decode_tiles.items():
        arrays[name] = np.concatenate((decodes, arrays[name]))
    return {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()}
