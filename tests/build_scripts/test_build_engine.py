"""Builds of a tiny GGUF file, written here into a package of its own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from gguf import GGUFWriter
from tokenizers import Tokenizer

from build_scripts.build_engine import build_engine, main
from engines.manifest import read_manifest
from engines.torch_engine import TorchEngine
from orchestrator.core.errors import ConfigError, EngineDirectoryError
from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import tiny_options
from tests.factories import make_request

VOCABULARY = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "ab", "abc")
FILES = {
    "config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write_gguf(path: Path, *, seed: int = 0) -> None:
    """One layer, four heads of 64 over two KV heads; wide enough that a prompt's tokens cost
    more than the noise of a shared machine."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(1024)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(VOCABULARY))
    writer.add_token_types([3, 3, 3] + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(VOCABULARY), 256),
        "output_norm.weight": (256,),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_k.weight": (128, 256),
        "blk.0.attn_v.weight": (128, 256),
        "blk.0.attn_output.weight": (256, 256),
        "blk.0.ffn_norm.weight": (256,),
        "blk.0.ffn_gate.weight": (1024, 256),
        "blk.0.ffn_up.weight": (1024, 256),
        "blk.0.ffn_down.weight": (256, 1024),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose source is an installed package, as far as Python can tell."""
    site = tmp_path / "site"
    (site / "tiny_model").mkdir(parents=True)
    (site / "tiny_model" / "__init__.py").write_text("raise AssertionError('never imported')\n")
    write_gguf(site / "tiny_model" / "tiny.gguf")
    metadata = site / "tiny_model-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    path = tmp_path / "tiny.yaml"
    write_recipe(path, max_model_len=128)
    return path


def write_recipe(path: Path, **changes: object) -> None:
    values = {
        "name": "tiny",
        "source": {
            "package": "tiny-model",
            "version": "1.0",
            "module": "tiny_model",
            "file": "tiny.gguf",
        },
        "additional_eos_tokens": ["<|endoftext|>"],
        "block_size_tokens": 4,
        "profile": {
            "max_s": 0.5,
            "num_threads": 1,
            "prefill_new_tokens": [8, 32, 64, 120],
            "prefill_cached_tokens": [0],
            "decode_batch_sizes": [1, 8, 32],
            "decode_cached_tokens": [16, 100],
            "max_mean_error": 1000,
        },
    }
    path.write_text(yaml.safe_dump(values | changes))


def test_a_built_directory_is_whole_and_runs(recipe: Path, tmp_path: Path) -> None:
    engine_dir = build_engine(recipe, tmp_path / "out")

    manifest = read_manifest(engine_dir)
    engine = TorchEngine.load(engine_dir, tiny_options(max_model_len=128))
    outputs = StepDriver(engine, make_request(prompt_token_ids=[3, 4])).run(chunk_tokens=8)
    assert len(outputs["r"]) == 8
    assert {path.name for path in engine_dir.iterdir()} == FILES
    assert manifest.model_name == "tiny"
    assert manifest.block_size_tokens == 4
    assert manifest.eos_token_ids == (2, 0)
    assert manifest.vocab_size == len(VOCABULARY)


def test_the_tokenizer_merges_and_keeps_special_tokens(recipe: Path, tmp_path: Path) -> None:
    engine_dir = build_engine(recipe, tmp_path / "out")

    tokenizer = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
    assert tokenizer.encode("abcd<|im_end|>").tokens == ["abc", "d", "<|im_end|>"]


def test_the_default_place_is_named_after_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert build_engine(recipe) == Path("built_engines/tiny")


def test_unchanged_input_is_a_no_op_that_says_so(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_dir = build_engine(recipe, tmp_path / "out")
    before = (engine_dir / "manifest.json").stat()

    recipe.write_text("# a comment changes nothing\n" + recipe.read_text())
    build_engine(recipe, tmp_path / "out")

    assert (engine_dir / "manifest.json").stat() == before
    assert "is up to date" in capsys.readouterr().err.splitlines()[-1]


def is_rebuilt(recipe: Path, engine_dir: Path, *, force: bool = False) -> bool:
    before = (engine_dir / "tokenizer.json").stat().st_ino
    build_engine(recipe, engine_dir, force=force)
    read_manifest(engine_dir)
    return (engine_dir / "tokenizer.json").stat().st_ino != before


def test_a_changed_recipe_is_built_again(recipe: Path, tmp_path: Path) -> None:
    build_engine(recipe, tmp_path / "out")
    write_recipe(recipe, max_model_len=64)

    assert is_rebuilt(recipe, tmp_path / "out")
    assert read_manifest(tmp_path / "out").max_model_len == 64


def test_a_changed_source_is_built_again(recipe: Path, tmp_path: Path) -> None:
    build_engine(recipe, tmp_path / "out")
    write_gguf(tmp_path / "site" / "tiny_model" / "tiny.gguf", seed=1)

    assert is_rebuilt(recipe, tmp_path / "out")


def test_force_builds_again(recipe: Path, tmp_path: Path) -> None:
    build_engine(recipe, tmp_path / "out")

    assert is_rebuilt(recipe, tmp_path / "out", force=True)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, append])
def test_a_damaged_directory_is_built_again(
    recipe: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """A blank at the end of the manifest is no damage."""
    engine_dir = build_engine(recipe, tmp_path / "out")
    damage(engine_dir / name)

    assert is_rebuilt(recipe, engine_dir) == (damage is not append or name != "manifest.json")


def test_a_directory_with_files_of_others_is_never_replaced(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises(EngineDirectoryError, match=r"holds thesis\.txt, which no build wrote"):
        build_engine(recipe, tmp_path / "out", force=True)

    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    """The old one stays byte for byte, and no half of the new one is left."""
    build_engine(recipe, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_recipe(recipe, max_model_len=128, additional_eos_tokens=["<|nothing|>"])

    with pytest.raises(ConfigError, match=r"no token '<\|nothing\|>'"):
        build_engine(recipe, tmp_path / "out")

    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if "building" in path.name]


def test_what_a_killed_build_left_behind_is_removed(recipe: Path, tmp_path: Path) -> None:
    left_behind = tmp_path / ".out.building"
    left_behind.mkdir()
    (left_behind / "manifest.json").write_text("{")

    build_engine(recipe, tmp_path / "out")

    assert not left_behind.exists()


def build_in_another_process(site: str, recipe: Path, output_dir: Path) -> None:
    sys.path.insert(0, site)
    build_engine(recipe, output_dir)


def test_a_second_process_waits_and_finds_the_work_done(recipe: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "site"), recipe, tmp_path / "out")
    processes = [context.Process(target=build_in_another_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 129}, "the model was trained for 128 tokens at most"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 128, "blok_size": 16}, "did you mean 'block_size_tokens'"),
        ({"max_model_len": 128, "name": "Not A Name"}, "name"),
    ],
)
def test_an_impossible_recipe_is_refused(
    recipe: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_recipe(recipe, **changes)

    with pytest.raises(ConfigError, match=message):
        build_engine(recipe, tmp_path / "out")


def test_the_command_reports_errors_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "missing.yaml")]) == 1
    assert "cannot be read" in capsys.readouterr().err
