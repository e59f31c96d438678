"""Small wrong edits of the code that drives TensorRT-LLM's engines, and whether the tests notice.

    python -m tests.trtllm.mutations

applies one at a time to a copy of the tree, runs the fast tests of the driver there, prints a
table, writes `mutations.json` and fails if a mutation survived. Takes some ten minutes on two
cores; `test_mutations.py` keeps the list and the record in step with the source.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("mutations.json")
COPIED = ("engines", "orchestrator", "router", "build_scripts", "tests", "configs")
TESTS = tuple(
    f"tests/engines/trtllm/{name}.py"
    for name in (
        "test_packing",
        "test_engine_tensors",
        "test_packing_properties",
        "test_trtllm_engine",
        "test_rank_group",
    )
)
TIMEOUT_S = 300
"""Of all tests together; a mutation that makes them hang is noticed by then."""

PACKING = "engines/trtllm/packing.py"
TENSORS = "engines/trtllm/step_tensors.py"
DRIVER = "engines/trtllm/session_driver.py"
WORKER = "engines/trtllm/rank_worker.py"
ENGINE = "engines/trtllm/engine.py"
GROUP = "engines/trtllm/rank_group.py"
RUNNER = "engines/step_runner.py"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One replacement of text that occurs once in a file."""

    what: str
    """The mistake, in words."""

    path: str
    """From the root of the tree."""

    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Make the edit in a tree.

        Raises:
            ValueError: the text is not there, or more than once.
        """
        path = root / self.path
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.path} holds {count} times: {self.old!r}")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutation."""

    mutation: Mutation
    is_caught: bool
    by: str
    """The first test that failed, or why there is none."""


MUTATIONS = (
    # The order of the batch.
    Mutation(
        "generations are not sorted behind contexts", PACKING,
        "tuple(sorted(parts, key=_is_generation))", "tuple(parts)",
    ),
    Mutation(
        "generations come first", PACKING,
        "sorted(parts, key=_is_generation)", "sorted(parts, key=_is_generation, reverse=True)",
    ),
    Mutation(
        "tokens stay in scheduling order", PACKING,
        "for part in sequences for token_id", "for part in parts for token_id",
    ),
    Mutation(
        "a chunk's tokens are reversed", PACKING,
        "for token_id in part.token_ids)", "for token_id in reversed(part.token_ids))",
    ),
    Mutation(
        "block tables stay in scheduling order", PACKING,
        "_block_offsets(sequences, layout", "_block_offsets(parts, layout",
    ),
    Mutation(
        "rows of logits are taken to be in scheduling order", ENGINE,
        "StepLogits(packed.sequences,", "StepLogits(parts,",
    ),
    # Positions and prefix sums.
    Mutation(
        "last_token_ids are lengths", PACKING,
        "last_token_ids=ends,", "last_token_ids=num_new,",
    ),
    Mutation(
        "last_token_ids are an exclusive sum", PACKING,
        "last_token_ids=ends,", "last_token_ids=ends - num_new,",
    ),
    Mutation(
        "last_token_ids count from 0", PACKING,
        "last_token_ids=ends,", "last_token_ids=ends - 1,",
    ),
    Mutation(
        "positions begin at 0 in every chunk", PACKING,
        "starts - (ends - num_new), num_new", "num_new - ends, num_new",
    ),
    Mutation(
        "positions are one chunk too low", PACKING,
        "starts - (ends - num_new), num_new", "starts - ends, num_new",
    ),
    # Lengths.
    Mutation(
        "a generation's context length is its one new token", PACKING,
        "context_lengths=np.where(is_generation, num_prompt, num_new)", "context_lengths=num_new",
    ),
    Mutation(
        "a generation's context length is all that is cached", PACKING,
        "np.where(is_generation, num_prompt, num_new)", "np.where(is_generation, starts, num_new)",
    ),
    Mutation(
        "a chunk's context length is the whole prompt", PACKING,
        "context_lengths=np.where(is_generation, num_prompt, num_new)",
        "context_lengths=num_prompt",
    ),
    Mutation(
        "a chunk's context length includes the chunks before it", PACKING,
        "np.where(is_generation, num_prompt, num_new)",
        "np.where(is_generation, num_prompt, starts + num_new)",
    ),
    Mutation(
        "sequence_length leaves the new tokens out", PACKING,
        "sequence_length=starts + num_new,", "sequence_length=starts,",
    ),
    Mutation(
        "sequence_length leaves a generation's new token out", PACKING,
        "sequence_length=starts + num_new,",
        "sequence_length=np.where(is_generation, starts, starts + num_new),",
    ),
    Mutation(
        "past lengths leave a context's chunk out", PACKING,
        "host_past_key_value_lengths=np.where(is_generation, starts, starts + num_new)",
        "host_past_key_value_lengths=starts",
    ),
    Mutation(
        "past lengths include a generation's new token", PACKING,
        "host_past_key_value_lengths=np.where(is_generation, starts, starts + num_new)",
        "host_past_key_value_lengths=starts + num_new",
    ),
    # Context or generation.
    Mutation(
        "request types are swapped", PACKING,
        "np.where(is_generation, GENERATION, CONTEXT)",
        "np.where(is_generation, CONTEXT, GENERATION)",
    ),
    Mutation(
        "everything is context", PACKING,
        "np.where(is_generation, GENERATION, CONTEXT)",
        "np.where(is_generation, CONTEXT, CONTEXT)",
    ),
    Mutation(
        "output that is computed again is a generation, however many tokens", PACKING,
        "part.num_new_tokens == 1", "part.num_new_tokens >= 1",
    ),
    Mutation(
        "the first decode is context", PACKING,
        "part.num_computed_tokens >= part.request.num_prompt_tokens",
        "part.num_computed_tokens > part.request.num_prompt_tokens",
    ),
    Mutation(
        "a last chunk of one token is a generation", PACKING,
        "part.num_computed_tokens >= part.request.num_prompt_tokens",
        "part.num_computed_tokens > 0",
    ),
    Mutation(
        "a chunk of one token of recomputed output is a generation", PACKING,
        "        and part.is_sampled\n    )\n", "    )\n",
    ),
    # Block offsets.
    Mutation(
        "offsets leave out that a block has K and V", PACKING,
        "pieces_per_block = layout.num_layers * 2", "pieces_per_block = layout.num_layers",
    ),
    Mutation(
        "offsets are those of a pool with one layer", PACKING,
        "pieces_per_block = layout.num_layers * 2", "pieces_per_block = 2",
    ),
    Mutation(
        "offsets are block numbers", PACKING,
        "dtype=np.int32) * pieces_per_block", "dtype=np.int32)",
    ),
    Mutation(
        "offsets have bit 31", PACKING,
        "dtype=np.int32) * pieces_per_block", "dtype=np.int32) * pieces_per_block - 2**31",
    ),
    Mutation(
        "V lies where K does", PACKING,
        "1, :num_blocks] = first_pieces + 1", "1, :num_blocks] = first_pieces",
    ),
    Mutation(
        "V lies behind all layers' K", PACKING,
        "1, :num_blocks] = first_pieces + 1", "1, :num_blocks] = first_pieces + layout.num_layers",
    ),
    Mutation(
        "K and V are swapped in the tables", PACKING,
        "offsets[0, row, 0, :num_blocks] = first_pieces\n"
        "        offsets[0, row, 1, :num_blocks] = first_pieces + 1\n",
        "offsets[0, row, 1, :num_blocks] = first_pieces\n"
        "        offsets[0, row, 0, :num_blocks] = first_pieces + 1\n",
    ),
    Mutation(
        "a table has no block for the last, partly filled one", PACKING,
        "num_blocks = -(-num_tokens // layout.block_size_tokens)",
        "num_blocks = num_tokens // layout.block_size_tokens",
    ),
    Mutation(
        "a table has no block for the new tokens", PACKING,
        "num_tokens = part.num_computed_tokens + part.num_new_tokens\n",
        "num_tokens = part.num_computed_tokens\n",
    ),
    Mutation(
        "blocks are sorted", PACKING,
        "np.array(part.block_ids[:num_blocks]", "np.array(sorted(part.block_ids[:num_blocks])",
    ),
    Mutation(
        "a request's last blocks are taken for its first", PACKING,
        "np.array(part.block_ids[:num_blocks]", "np.array(part.block_ids[-num_blocks:]",
    ),
    Mutation(
        "the unused end of a table holds rubbish", PACKING,
        "offsets = np.zeros((1, len(sequences), 2, max_blocks_per_seq), dtype=np.int32)",
        "offsets = np.full((1, len(sequences), 2, max_blocks_per_seq), 7, dtype=np.int32)",
    ),
    Mutation(
        "block 0 is taken for no block when tables are narrowed", PACKING,
        "np.count_nonzero(tables[:, :, 1], axis=-1)", "np.count_nonzero(tables[:, :, 0], axis=-1)",
    ),
    # What is bound to the engine.
    Mutation(
        "the host pool is given as a secondary pool", TENSORS,
        "[[pool.blocks.data_ptr(), 0]]",
        "[[pool.blocks.data_ptr(), pool.host_blocks.data_ptr()]]",
    ),
    Mutation(
        "the layer mapping is the wrong way round", TENSORS,
        "[[0, layer] for layer", "[[layer, 0] for layer",
    ),
    Mutation(
        "attention forgets all but the last block", TENSORS,
        "(num_layers,), config.max_seq_len, dtype", "(num_layers,), config.tokens_per_block, dtype",
    ),
    Mutation(
        "cache_indirection counts blocks", TENSORS,
        "num_seqs, 1, config.max_seq_len, dtype", "num_seqs, 1, config.max_blocks_per_seq, dtype",
    ),
    Mutation(
        "cache_indirection has a row for each token", TENSORS,
        "self._cache_indirection[: len(arrays.last_token_ids)]",
        "self._cache_indirection[: len(arrays.input_ids)]",
    ),
    Mutation(
        "nothing is copied to the device", TENSORS,
        "staged.device[used].copy_(host, non_blocking=True)", "staged.device[used]",
    ),
    Mutation(
        "a host tensor is given on the device", TENSORS,
        "inputs[_HOST_COPIES[name]] = host", "inputs[_HOST_COPIES[name]] = inputs[name]",
    ),
    Mutation(
        "past lengths are given on the device", TENSORS,
        '"host_past_key_value_lengths": staged(sequences, is_on_host=True)',
        '"host_past_key_value_lengths": staged(sequences)',
    ),
    # Running the step.
    Mutation(
        "shapes are not set again for another number of sequences", DRIVER,
        "if shape == self._step_shape:", "if self._step_shape and shape[0] == self._step_shape[0]:",
    ),
    Mutation(
        "nobody looks whether the step was started", DRIVER,
        'if not self._session.run(inputs, {"logits": logits}, stream):',
        'if self._session.run(inputs, {"logits": logits}, stream) is None:',
    ),
    Mutation(
        "the padding of the vocabulary is sampled from", DRIVER,
        "return logits[:, : self._config.vocab_size]", "return logits",
    ),
    Mutation(
        "the step does not wait for onboarded blocks", WORKER,
        "if self.copies.waits_by_layer:", "if not self.copies.waits_by_layer:",
    ),
    Mutation(
        "every rank keeps all KV heads", WORKER,
        "num_kv_heads=config.num_kv_heads_per_rank()", "num_kv_heads=config.num_kv_heads",
    ),
    Mutation(
        "ranks take as many blocks as the largest has room for", ENGINE,
        "num_blocks = min(\n", "num_blocks = max(\n",
    ),
    Mutation(
        "a copy has ended when the first rank has ended it", GROUP,
        "copy.ranks.discard(rank)", "copy.ranks.clear()",
    ),
    Mutation(
        "a failed copy of another rank is overlooked", GROUP,
        "for answer in self._answers.values():\n            broken.update(answer.copies.failed)",
        "for answer in self._answers.values():\n            broken.update(answer.copies.completed)",
    ),
    Mutation(
        "a token is drawn for prompts that are not through", RUNNER,
        "if part.is_sampled and not (lost and part.request_id in lost)",
        "if not (lost and part.request_id in lost)",
    ),
    Mutation(
        "a token is drawn from blocks that were not brought", RUNNER,
        "if part.is_sampled and not (lost and part.request_id in lost)", "if part.is_sampled",
    ),
)  # fmt: skip


def run(mutation: Mutation, tree: Path) -> Outcome:
    """Return what the tests say of a mutation; `tree` is the unchanged copy, and stays so."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        root = Path(directory) / "tree"
        shutil.copytree(tree, root)
        mutation.apply(root)
        status, output = _run_tests(root)
    failures = [line for line in output.splitlines() if line.startswith("FAILED ")]
    match status:
        case None:
            return Outcome(mutation, is_caught=True, by=f"tests that hang for {TIMEOUT_S} s")
        case 1 if failures:
            return Outcome(mutation, is_caught=True, by=_test_name(failures[0]))
        case 0:
            return Outcome(mutation, is_caught=False, by="no test")
    # A mutation that cannot be imported proves nothing.
    raise RuntimeError(f"pytest ended with status {status} on: {mutation.what}\n{output}")


def _run_tests(root: Path) -> tuple[int | None, str]:
    """Return pytest's status, None if it took too long, and what it said."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return None, str(error)
    return result.returncode, result.stdout + result.stderr


def _test_name(line: str) -> str:
    """Return the test of one line of pytest's summary, without its parameters."""
    return line.removeprefix("FAILED ").partition(" - ")[0].partition("[")[0]


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    target.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)


def record(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Return the outcomes as `mutations.json` has them."""
    return [
        asdict(outcome.mutation) | {"is_caught": outcome.is_caught, "by": outcome.by}
        for outcome in outcomes
    ]


def main() -> int:
    """Run all mutations; return 1 if one survived."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        tree = Path(directory) / "tree"
        copy_tree(tree)
        status, output = _run_tests(tree)
        if status != 0:
            console.print(output, markup=False)
            console.print("the tests fail without any mutation", style="red")
            return 1
        with ThreadPoolExecutor(max_workers=2) as pool:
            outcomes = list(pool.map(lambda mutation: run(mutation, tree), MUTATIONS))
    table = Table("mutation", "file", "caught by")
    for outcome in outcomes:
        style = None if outcome.is_caught else "bold red"
        table.add_row(outcome.mutation.what, outcome.mutation.path, outcome.by, style=style)
    console.print(table)
    survivors = [outcome for outcome in outcomes if not outcome.is_caught]
    console.print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutations caught")
    RECORD.write_text(json.dumps(record(outcomes), indent=2) + "\n", encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
