"""Checks a real installation of TensorRT-LLM against what this project was written for.

python -m tests.trtllm.acceptance [--engine-dir DIR] [--output-dir DIR]

Records the live surface and compares it with `api_surface.json`, builds a small engine, runs the
engine contract on it, and writes `report.md` and `report.json` for a bug report. Every step runs,
whatever became of the others, except that nothing runs on an engine that was not built.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from engines.trtllm.engine_rules import SUPPORTED_VERSION
from tests.trtllm.acceptance_report import Report, Step, environment, write_report
from tests.trtllm.stub_modules import load_surface
from tests.trtllm.surface_diff import Severity, compare

ROOT = Path(__file__).parent.parent.parent
RECIPE = Path(__file__).with_name("acceptance.yaml")
TORCH_RECIPE = ROOT / "configs/engines/smollm2-135m.yaml"
CONTRACT = ("test_engine_contract.py", "test_engine_contract_copies.py", "test_live_engine.py")

SERVING_ROUTES = frozenset({"A", "B"})
"""Routes whose differences fail the acceptance. The others are experimental, or not used."""

RunProgram = Callable[[Sequence[str], Path], int]
"""Runs a program, its output into a file, and returns its exit status."""


def run_program(command: Sequence[str], log: Path) -> int:
    """Run a program in the repository's root. See `RunProgram`."""
    with log.open("wb") as file:
        process = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return process.returncode


@dataclass(frozen=True)
class Acceptance:
    """One run of the kit."""

    output_dir: Path
    engine_dir: Path | None
    """An engine to test; None builds one."""

    run: RunProgram = run_program

    def steps(self) -> list[Step]:
        """Carry all steps out and return what became of each."""
        surface = self.check_surface()
        build, engine_dir = self.build_engine()
        return [surface, build, self.check_contract(engine_dir)]

    def check_surface(self) -> Step:
        """Record the installed surface, in a process of its own, and compare it with ours."""
        log, path = self.output_dir / "surface.log", self.output_dir / "live_surface.json"
        path.unlink(missing_ok=True)
        command = (sys.executable, "-m", "tests.trtllm.live_surface", str(path))
        status = self.run(command, log)
        if status != 0 or not path.is_file():
            summary = f"recording ended with status {status}"
            return Step("surface", is_ok=False, summary=summary, log=log)
        differences = compare(load_surface(), json.loads(path.read_text(encoding="utf-8")))
        breaking = [d for d in differences if d.severity is Severity.BREAKS]
        serving = [d for d in breaking if SERVING_ROUTES.intersection(d.routes)]
        summary = (
            f"{len(differences)} differences, {len(breaking)} of which may break what was written "
            f"against the record, {len(serving)} of those in what serves"
        )
        return Step(
            "surface",
            is_ok=not serving,
            summary=summary,
            differences=tuple(differences),
            log=log,
        )

    def build_engine(self) -> tuple[Step, Path | None]:
        """Build the small engine; return its directory too, or None if there is none."""
        if self.engine_dir is not None:
            return Step("build", is_ok=True, summary=f"not built: {self.engine_dir} is given"), (
                self.engine_dir
            )
        engine_dir = self.output_dir / "engine"
        log = self.output_dir / "build.log"
        proserve = (sys.executable, "-m", "orchestrator.command_line.main", "build")
        commands = (
            (*proserve, str(TORCH_RECIPE)),  # whose directory is the model that is compiled
            (*proserve, str(RECIPE), "--output-dir", str(engine_dir)),
        )
        for command in commands:
            status = self.run(command, log)
            if status != 0:
                summary = f"`{' '.join(command[2:])}` ended with status {status}"
                return Step("build", is_ok=False, summary=summary, log=log), None
        return Step("build", is_ok=True, summary=f"built {engine_dir}", log=log), engine_dir

    def check_contract(self, engine_dir: Path | None) -> Step:
        """Run the engine contract on an engine."""
        if engine_dir is None:
            return Step("contract", is_ok=False, summary="not run: there is no engine")
        log, results = self.output_dir / "contract.log", self.output_dir / "contract.xml"
        results.unlink(missing_ok=True)
        # Warnings of TensorRT-LLM are no failures of ours, and importing it takes its time.
        command = [sys.executable, "-m", "pytest", "-W", "default", "--timeout", "600"]
        command += [str(ROOT / "tests/engines" / name) for name in CONTRACT]
        command += ["--trtllm-engine", str(engine_dir), f"--junit-xml={results}"]
        status = self.run(command, log)
        if not results.is_file():
            summary = f"pytest ended with status {status} before it had run a test"
            return Step("contract", is_ok=False, summary=summary, log=log)
        num_tests, num_skipped, failures = read_results(results)
        num_run = num_tests - num_skipped
        summary = f"{num_run - len(failures)} of {num_run} tests passed, {num_skipped} skipped"
        is_ok = status == 0 and num_run > 0
        return Step("contract", is_ok=is_ok, summary=summary, failures=failures, log=log)


def read_results(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Return how many tests a JUnit file has, how many were skipped, and what failed: the name of
    the test and the first line of its message."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures = [
        f"{case.get('name')}: {(problem.get('message') or '').partition(chr(10))[0]}"
        for case in cases
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    num_skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases), num_skipped, tuple(failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kit; return 0 if the installation does what this project needs, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-dir", type=Path, help="test this engine instead of building one")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "build/trtllm-acceptance")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("tensorrt_llm") is None:
        sys.stderr.write(
            f"tensorrt_llm is not installed for {sys.executable}; on a machine with an NVIDIA GPU: "
            f"pip install tensorrt-llm=={SUPPORTED_VERSION}\n"
        )
        return 1
    output_dir: Path = options.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    steps = Acceptance(output_dir, options.engine_dir).steps()
    report = Report(environment(ROOT), tuple(steps))
    sys.stdout.write(write_report(report, output_dir))
    return 0 if report.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
