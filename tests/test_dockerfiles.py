"""The Dockerfiles. No engine can build them here: a linter judges them, and what they copy is
compared with what there is."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from orchestrator.command_line.kubernetes.objects import USER_ID

ROOT = Path(__file__).parent.parent
DOCKERFILES = (ROOT / "Dockerfile", ROOT / "Dockerfile.trtllm")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"

each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.name))


def lint(text: str) -> str:
    """Return what the linter says of a Dockerfile, down to matters of style."""
    result = subprocess.run(
        [HADOLINT, "--failure-threshold", "style", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) == (result.stdout == ""), result.stderr
    return result.stdout


def copied_from_here(text: str) -> set[str]:
    """Return what COPY takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", text, flags=re.MULTILINE)
    return {name for line in lines for name in line.split()}


@each
def test_the_linter_has_nothing_to_say(path: Path) -> None:
    assert lint(path.read_text()) == ""


def test_the_linter_would_notice_an_image_without_a_version() -> None:
    assert "DL3006" in lint("FROM python\n")


@each
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = copied_from_here(path.read_text())

    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert copied <= kept
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.removesuffix("*") for package in packages} <= copied


@each
def test_processes_run_as_the_user_that_manifests_name(path: Path) -> None:
    text = path.read_text()

    assert f"useradd --uid {USER_ID} " in text
    assert re.findall(r"^USER (.+)$", text, flags=re.MULTILINE) == [f"{USER_ID}:{USER_ID}"]


@each
def test_images_have_what_every_configuration_may_ask_for(path: Path) -> None:
    """Without the extra, a pod whose configuration has `tracing` would never start."""
    assert re.search(r"pip install .* '\.\[otel\]'", path.read_text())


def test_the_image_of_tensorrt_llm_has_the_version_that_we_drive() -> None:
    [requirement] = PROJECT["project"]["optional-dependencies"]["trtllm"]
    [image] = re.findall(r"^FROM (\S+)", DOCKERFILES[1].read_text(), flags=re.MULTILINE)

    assert image.rpartition(":")[2] == requirement.rpartition("==")[2]
