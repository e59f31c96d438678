from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.manifest import read_manifest, write_manifest
from orchestrator.core.errors import EngineDirectoryError
from tests.engines.tiny_llama import write_tiny_engine_dir

Values = dict[str, Any]


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    write_tiny_engine_dir(tmp_path / "tiny")
    return tmp_path / "tiny"


def rewrite(engine_dir: Path, change: Callable[[Values], object]) -> None:
    path = engine_dir / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = write_tiny_engine_dir(tmp_path / "tiny")

    assert read_manifest(tmp_path / "tiny") == manifest


def test_rewriting_a_manifest_leaves_no_other_file(engine_dir: Path) -> None:
    write_manifest(engine_dir, read_manifest(engine_dir))

    names = {path.name for path in engine_dir.iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json"}


def test_a_missing_directory_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(EngineDirectoryError, match=r"nowhere: no such engine directory.*build"):
        read_manifest(tmp_path / "nowhere")


def test_a_missing_manifest_is_refused(engine_dir: Path) -> None:
    (engine_dir / "manifest.json").unlink()

    with pytest.raises(EngineDirectoryError, match=r"manifest\.json: is missing"):
        read_manifest(engine_dir)


@pytest.mark.parametrize("text", ["", "{", '{"format_version": 1', "\0", "é".encode("latin-1")])
def test_an_unreadable_manifest_is_refused(engine_dir: Path, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (engine_dir / "manifest.json").write_bytes(content)

    with pytest.raises(EngineDirectoryError, match=r"manifest\.json: cannot be read"):
        read_manifest(engine_dir)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 1}', '{"format_version": "2"}'])
def test_an_unknown_format_is_refused(engine_dir: Path, text: str) -> None:
    (engine_dir / "manifest.json").write_text(text)

    with pytest.raises(
        EngineDirectoryError, match=r"format version .* this release reads 2.*proserve build"
    ):
        read_manifest(engine_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(color="red"), "unknown keys: color"),
        (lambda v: v.pop("vocab_size"), "missing .* keys: vocab_size"),
        (lambda v: v.pop("profile_conditions"), "missing .* keys: profile_conditions"),
        (lambda v: v["profile_conditions"].update(mood="good"), "profile_conditions: .* mood"),
        (lambda v: v.update(profile_conditions=[]), "profile_conditions is list"),
        (lambda v: v["files"]["config.json"].pop("sha256"), "files: config.json: .* sha256"),
        (lambda v: v["files"].update({"../x": {"size_bytes": 1, "sha256": ""}}), "plain file name"),
        (lambda v: v.update(files=7), "malformed"),
        (lambda v: v.update(eos_token_ids=None), "malformed"),
        (lambda v: v["latency_profile"].pop("decode_step_s"), "latency profile: .* decode_step_s"),
        (lambda v: v["latency_profile"].update(decode_step_s=-1), "decode_step_s is -1"),
        (lambda v: v["latency_profile"].update(decode_step_s=None), "malformed"),
        (lambda v: v.pop("copy_profile"), "missing .* keys: copy_profile"),
        (lambda v: v["copy_profile"].pop("start_s"), "copy profile: .* start_s"),
        (lambda v: v["copy_profile"].update(start_s=-1), "start_s is -1"),
        (lambda v: v.update(copy_profile=7), "malformed"),
    ],
)
def test_a_manifest_of_other_content_is_refused(
    engine_dir: Path, change: Callable[[Values], object], message: str
) -> None:
    rewrite(engine_dir, change)

    with pytest.raises(EngineDirectoryError, match=message):
        read_manifest(engine_dir)


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete, "is missing"),
        (truncate, "bytes, the build wrote"),
        (flip_a_bit, "was altered after the build"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    engine_dir: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(engine_dir / name)

    with pytest.raises(EngineDirectoryError, match=f"{name}: .*{message}.*rebuild"):
        read_manifest(engine_dir)


def test_files_are_not_hashed_on_request(engine_dir: Path) -> None:
    flip_a_bit(engine_dir / "model.safetensors")

    assert read_manifest(engine_dir, verify_files=False).model_name == "tiny"
