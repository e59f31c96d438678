"""The acceptance kit, over programs that a test writes, and once as a whole over the stand-ins."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from build_scripts.build_engine import load_recipe
from build_scripts.trtllm.commands import ANYWHERE, build_commands
from build_scripts.trtllm.recipe import TrtLlmRecipe
from tests.engines.contract_engines import EngineMaker
from tests.trtllm.acceptance import RECIPE, ROOT, Acceptance, main, read_results
from tests.trtllm.acceptance_report import Report, Step, write_report
from tests.trtllm.cli_surface import parse
from tests.trtllm.live_surface import record_surface
from tests.trtllm.stub_modules import Surface, load_surface, stub_modules
from tests.trtllm.surface_diff import Difference, Severity

PASSED = """\
<testsuites><testsuite>
<testcase name="test_a"/>
<testcase name="test_b"><skipped message="no"/></testcase>
</testsuite></testsuites>
"""
FAILED = """\
<testsuites><testsuite>
<testcase name="test_a"/>
<testcase name="test_b"><failure message="assert 1 == 2&#10;where 1 = f()"/></testcase>
<testcase name="test_c"><error message="no engine"/></testcase>
</testsuite></testsuites>
"""


class Programs:
    """Stands in for the programs that the kit runs; `installed` is what can be recorded."""

    def __init__(self, installed: Surface, *, build_status: int = 0, results: str = PASSED) -> None:
        self._installed = installed
        self._build_status = build_status
        self._results = results
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str], log: Path) -> int:
        self.commands.append(command)
        log.write_text("first line\nlast words\n")
        if "tests.trtllm.live_surface" in command:
            with stub_modules(self._installed):
                Path(command[-1]).write_text(json.dumps(record_surface(load_surface())))
            return 0
        if "build" in command:
            return self._build_status
        (results,) = (a.partition("=")[2] for a in command if a.startswith("--junit-xml"))
        if self._results:
            Path(results).write_text(self._results)
        return int(self._results != PASSED)


def run(tmp_path: Path, programs: Programs, engine_dir: Path | None = None) -> Report:
    steps = Acceptance(tmp_path, engine_dir, run=programs).steps()
    return Report({"gpu": "none"}, tuple(steps))


def without(*names: str) -> Surface:
    """Return the surface without these classes."""
    return {
        module: {name: e for name, e in entries.items() if f"{module}.{name}" not in names}
        for module, entries in load_surface().items()
    }


def test_an_installation_as_recorded_with_a_sound_engine_is_accepted(tmp_path: Path) -> None:
    report = run(tmp_path, Programs(load_surface()))

    assert report.is_ok
    assert [step.name for step in report.steps] == ["surface", "build", "contract"]
    assert report.steps[2].summary == "1 of 1 tests passed, 1 skipped"


def test_the_small_engine_is_built_and_then_tested(tmp_path: Path) -> None:
    programs = Programs(load_surface())
    run(tmp_path, programs)

    torch_build, build, contract = programs.commands[1:]
    assert str(ROOT / "configs/engines/smollm2-135m.yaml") in torch_build
    assert build[-2:] == ("--output-dir", str(tmp_path / "engine"))
    assert contract[contract.index("--trtllm-engine") + 1] == str(tmp_path / "engine")
    assert contract[contract.index("-W") + 1] == "default", "warnings of others fail nothing"


def test_a_given_engine_is_not_built(tmp_path: Path) -> None:
    programs = Programs(load_surface())

    report = run(tmp_path, programs, Path("mine"))

    assert report.is_ok
    assert not any("build" in command for command in programs.commands)
    assert "mine" in programs.commands[-1]


def test_what_serves_must_be_as_recorded_and_what_is_experimental_need_not(tmp_path: Path) -> None:
    scheduler = "tensorrt_llm._torch.pyexecutor.scheduler.scheduler.RequestScheduler"
    executor = "tensorrt_llm.bindings.executor.Executor"

    experimental = run(tmp_path, Programs(without(scheduler))).steps[0]
    serving = run(tmp_path, Programs(without(scheduler, executor))).steps[0]

    assert experimental.is_ok
    assert experimental.summary.startswith("1 differences, 1 of which may break")
    assert not serving.is_ok
    assert serving.summary.endswith("1 of those in what serves")


def test_without_an_engine_no_contract_is_run(tmp_path: Path) -> None:
    report = run(tmp_path, Programs(load_surface(), build_status=2))

    assert not report.is_ok
    assert "ended with status 2" in report.steps[1].summary
    assert report.steps[2].summary == "not run: there is no engine"


def test_failed_tests_are_named_with_their_first_line(tmp_path: Path) -> None:
    contract = run(tmp_path, Programs(load_surface(), results=FAILED)).steps[2]

    assert not contract.is_ok
    assert contract.summary == "1 of 3 tests passed, 0 skipped"
    assert contract.failures == ("test_b: assert 1 == 2", "test_c: no engine")


def test_tests_that_did_not_even_start_are_a_failure(tmp_path: Path) -> None:
    contract = run(tmp_path, Programs(load_surface(), results="")).steps[2]

    assert not contract.is_ok
    assert "before it had run a test" in contract.summary


def test_nothing_but_skipped_tests_is_no_success(tmp_path: Path) -> None:
    skipped = PASSED.replace('<testcase name="test_a"/>', "")

    contract = run(tmp_path, Programs(load_surface(), results=skipped)).steps[2]

    assert not contract.is_ok


def test_results_are_counted(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(FAILED)

    assert read_results(tmp_path / "r.xml")[:2] == (3, 0)


def test_the_report_has_everything_for_people_and_for_programs(tmp_path: Path) -> None:
    (tmp_path / "contract.log").write_text("first\nlast words\n")
    difference = Difference(Severity.BREAKS, "pkg.Class(name)", "is gone", ("A", "B"))
    report = Report(
        {"gpu": "H100", "tensorrt_llm": "1.2.1"},
        (
            Step("surface", is_ok=False, summary="1 difference", differences=(difference,)),
            Step(
                "contract",
                is_ok=False,
                summary="0 of 1",
                failures=("test_b: assert 1 == 2",),
                log=tmp_path / "contract.log",
            ),
        ),
    )

    text = write_report(report, tmp_path)

    assert (tmp_path / "report.md").read_text() == text
    for line in (
        "| surface | **failed** | 1 difference |",
        "| gpu | H100 |",
        "| `pkg.Class(name)` | is gone | A, B |",
        "- test_b: assert 1 == 2",
        "last words",
    ):
        assert line in text.splitlines()
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["is_ok"] is False
    assert values["steps"][0]["differences"][0]["name"] == "pkg.Class(name)"


def test_every_option_of_the_small_engines_build_is_recorded() -> None:
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, TrtLlmRecipe)

    checkpoint, engine, _ = build_commands(recipe, ANYWHERE)

    assert parse("examples/models/core/llama/convert_checkpoint.py", list(checkpoint[2:]))
    assert parse("trtllm-build", list(engine[1:]))["max_batch_size"]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_llm") is not None, reason="TensorRT-LLM is installed"
)
def test_a_machine_without_the_wheel_is_told_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output-dir", str(tmp_path / "out")]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tensorrt_llm is not installed for ")
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_kit_runs_over_the_stand_ins(tmp_path: Path) -> None:
    """They compute with the reference engine, so the contract holds; but they have only a part of
    what is recorded, and the report says which."""
    engine_dir = EngineMaker("trtllm", tmp_path).write_trtllm_dir()
    command = [sys.executable, "-m", "tests.trtllm.acceptance", "--engine-dir", str(engine_dir)]
    command += ["--output-dir", str(tmp_path / "out")]
    stand_ins = str(ROOT / "tests/trtllm/stand_ins")

    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": stand_ins}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip

    values = json.loads((tmp_path / "out/report.json").read_text())
    surface, build, contract = values["steps"]
    assert process.returncode == 1
    assert process.stdout == (tmp_path / "out/report.md").read_text()
    assert not surface["is_ok"]
    missing = {d["name"] for d in surface["differences"]}
    assert "tensorrt_llm.bindings.executor.Executor" in missing
    assert "tensorrt_llm.runtime.session.Session" not in missing
    assert build["is_ok"]
    assert contract["is_ok"], contract
