from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from build_scripts.trtllm.model_files import ModelFiles
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.core.errors import ConfigError
from tests.build_scripts.trtllm.fake_machine import MODEL_CONFIG, recipe_values, write_model

INDEX = "model.safetensors.index.json"


def write_index(folder: Path, *shards: str) -> None:
    weights = {f"weight{i}": shard for i, shard in enumerate(shards)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weights}))


def test_a_model_is_read(tmp_path: Path) -> None:
    model = ModelFiles.read(write_model(tmp_path))

    assert model.weight_files == ("config.json", "model.safetensors")
    assert model.tokenizer_files == ("tokenizer.json", "tokenizer_config.json")
    assert model.eos_token_ids == (2, 0)
    assert model.bos_token_id is None


def test_a_model_in_several_files_is_what_its_index_names(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_index(tmp_path, "a.safetensors", "b.safetensors", "a.safetensors")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()

    assert ModelFiles.read(tmp_path).weight_files == (
        "a.safetensors",
        "b.safetensors",
        "config.json",
        INDEX,
    )


def test_a_chat_template_beside_the_tokenizer_is_taken_along(tmp_path: Path) -> None:
    (write_model(tmp_path) / "chat_template.jinja").touch()

    assert ModelFiles.read(tmp_path).tokenizer_files[-1] == "chat_template.jinja"


def test_the_end_token_of_the_config_counts_if_there_is_no_other(tmp_path: Path) -> None:
    (write_model(tmp_path) / "generation_config.json").unlink()

    assert ModelFiles.read(tmp_path).eos_token_ids == (2,)


def test_the_token_that_begins_a_text_is_the_one_that_the_tokenizer_adds(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(tokenizer))
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"bos_token": {"content": "<|endoftext|>"}}
    config_path.write_text(json.dumps(config))

    assert ModelFiles.read(tmp_path).bos_token_id == 0


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"config\.json: is missing; download the model again"),
        (write("config.json", "{"), r"config\.json: cannot be read"),
        (write("config.json", "[]"), r"config\.json: is not a JSON object"),
        (remove("tokenizer.json"), r"tokenizer\.json: is missing; download the model again"),
        (remove("model.safetensors"), r"has no \*\.safetensors, the only format of weights"),
        (
            lambda folder: write_index(folder, "model.safetensors", "lost.safetensors"),
            r"lost\.safetensors: is missing; download the model again",
        ),
        (write(INDEX, "{}"), "names no weights"),
        (
            lambda folder: (
                remove("generation_config.json")(folder),
                write("config.json", "{}")(folder),
            ),
            r"neither generation_config\.json nor config\.json has an eos_token_id",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_model(tmp_path))

    with pytest.raises(ConfigError, match=message):
        ModelFiles.read(tmp_path)


def recipe(**sections: object) -> TrtLlmRecipe:
    return TrtLlmRecipe.model_validate(recipe_values(Path(), **sections))


def long_recipe(max_seq_len: int) -> TrtLlmRecipe:
    limits = {"max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": max_seq_len}
    return recipe(limits=limits)


def test_requests_may_be_as_long_as_the_model_was_trained_for(tmp_path: Path) -> None:
    model = ModelFiles.read(write_model(tmp_path))

    model.check(long_recipe(512))
    with pytest.raises(
        ConfigError,
        match=r"limits\.max_seq_len is 513, the model was trained for 512 tokens at most",
    ):
        model.check(long_recipe(513))


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "llama3", "factor": 8.0}, 512),  # already in max_position_embeddings
    ],
)
def test_scaled_rotary_embeddings_make_requests_longer(
    tmp_path: Path, scaling: dict[str, object], longest: int
) -> None:
    model = ModelFiles.read(write_model(tmp_path, rope_scaling=scaling))

    model.check(long_recipe(longest))
    with pytest.raises(ConfigError, match=f"trained for {longest} tokens"):
        model.check(long_recipe(longest + 1))


def test_heads_must_be_divided_over_the_ranks(tmp_path: Path) -> None:
    model = ModelFiles.read(write_model(tmp_path))

    with pytest.raises(
        ConfigError, match=r"checkpoint\.tp_size is 3, the model has 4 attention heads"
    ):
        model.check(recipe(checkpoint={"family": "llama", "tp_size": 3}))


def test_a_config_without_sizes_is_refused(tmp_path: Path) -> None:
    config = {k: v for k, v in MODEL_CONFIG.items() if k != "num_attention_heads"}
    (write_model(tmp_path) / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match="num_attention_heads is null, it must be a positive"):
        ModelFiles.read(tmp_path).check(recipe())
