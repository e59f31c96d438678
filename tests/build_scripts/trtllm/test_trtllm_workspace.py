from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from build_scripts.trtllm.file_hashes import FileHashes
from build_scripts.trtllm.run_command import run_command
from build_scripts.trtllm.workspace import Step, Workspace
from engines.manifest import FileEntry
from orchestrator.core.errors import BuildError
from tests.integration.deployments import is_alive, until


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def step(script: str = "mkdir made; echo a > made/file", *, seed: int = 0) -> Step:
    return Step("made", shell(script), inputs={"seed": seed})


def test_a_step_is_finished_once_it_has_run(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert not workspace.is_finished(step())

    result = workspace.run(step())

    assert (result / "file").read_text() == "a\n"
    assert Workspace(tmp_path).is_finished(step())


def test_other_inputs_are_another_step(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.run(step())

    assert not workspace.is_finished(step(seed=1))


def test_a_step_finds_what_it_needs_by_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = step()
    second = Step("next", shell("mkdir next; cat made/file > next/copy"), {}, needs=(first,))
    workspace.run(first)

    assert (workspace.run(second) / "copy").read_text() == "a\n"
    assert second.key != Step("next", second.command, {}, needs=(step(seed=1),)).key


@pytest.mark.parametrize("damage", ["echo b > file", "rm file", "echo c > more"])
def test_a_changed_result_is_not_finished(tmp_path: Path, damage: str) -> None:
    workspace = Workspace(tmp_path)
    result = workspace.run(step())

    run_command("damage", shell(damage), cwd=result, log=tmp_path / "log")

    assert not workspace.is_finished(step())


def test_the_record_tells_what_a_result_was_made_from(tmp_path: Path) -> None:
    result = Workspace(tmp_path).run(step(seed=7))

    record = json.loads(result.with_name(f"{result.name}.json").read_text())
    assert record["inputs"] == {"seed": 7}
    assert record["command"][-1] == "mkdir made; echo a > made/file"
    assert record["outputs"]["file"]["size_bytes"] == 2


def test_a_step_that_fails_leaves_nothing_but_its_log(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)

    with pytest.raises(BuildError, match="made failed with exit status 4"):
        workspace.run(step("mkdir made; echo words; exit 4"))

    assert "words" in workspace.log(step("mkdir made; echo words; exit 4")).read_text()
    assert not list(tmp_path.glob("*made-*/")) + list(tmp_path.glob("attempt-*"))


def test_a_command_that_makes_nothing_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="ended well, but made no folder 'made'"):
        Workspace(tmp_path).run(step("true"))


def test_a_second_run_replaces_the_result(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    (workspace.run(step()) / "file").write_text("damaged")

    assert (workspace.run(step()) / "file").read_text() == "a\n"
    assert workspace.is_finished(step())


def test_only_the_end_of_a_long_output_is_shown(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as error:
        run_command("count", shell("seq 1 9999; exit 1"), cwd=tmp_path, log=tmp_path / "log")

    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [str(i) for i in range(9988, 10000)]
    assert lines[-1] == f"all of it is in {tmp_path / 'log'}"


@pytest.mark.parametrize(
    ("signal", "message"),
    [("TERM", "was ended by SIGTERM;"), ("KILL", "as the kernel does when memory runs out")],
)
def test_a_command_that_is_killed_says_by_what(tmp_path: Path, signal: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        run_command("victim", shell(f"kill -{signal} $$"), cwd=tmp_path, log=tmp_path / "log")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="profile: mpirun-of-nobody: No such file or directory"):
        run_command("profile", ["mpirun-of-nobody"], cwd=tmp_path, log=tmp_path / "log")


def test_what_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    """A worker that outlives a failed command would hold the GPU."""
    script = "sleep 600 & echo $! > pid; exit 1"
    with pytest.raises(BuildError):
        run_command("parent", shell(script), cwd=tmp_path, log=tmp_path / "log")

    pid = int((tmp_path / "pid").read_text())
    until(lambda: not is_alive(pid), "the worker has ended")


def test_a_file_is_read_again_only_if_it_may_have_changed(tmp_path: Path) -> None:
    """A change of the content that keeps size and time shows that it was not read."""
    path = tmp_path / "file"
    path.write_text("one")
    first = FileHashes(tmp_path / "memory").entries(tmp_path, ["file"])
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert FileHashes(tmp_path / "memory").entries(tmp_path, ["file"]) == first
    os.utime(path, ns=(0, 0))
    assert FileHashes(tmp_path / "memory").entries(tmp_path, ["file"]) == {
        "file": FileEntry.of(path)
    }


def test_a_damaged_memory_of_hashes_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    (tmp_path / "memory").write_text("{")

    entries = FileHashes(tmp_path / "memory").entries(tmp_path, ["file"])

    assert entries["file"] == FileEntry.of(tmp_path / "file")
