"""The finished steps of a build, kept by what they were made from.

    <step>-<key>/        what the step made
    <step>-<key>.json    what it was made from, and what it made, with the content of every file
    attempt-*/           folders that steps run in; of use to nobody once their step has ended
    logs/                what the commands printed
    hashes.json          content of files that have been read

Whatever interrupts a build, a step's result is there, whole and recorded, or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_scripts.trtllm.file_hashes import FileHashes
from build_scripts.trtllm.run_command import run_command
from orchestrator.core.errors import BuildError

BUILD_VERSION = 1
"""Raise it whenever a step would make something else of the same input: all are then run again."""

_KEY_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class Step:
    """One command of a build."""

    name: str
    """Also the name of the folder that it makes."""

    command: tuple[str, ...]
    inputs: Mapping[str, Any]
    """All that decides the result beside the steps before it, as JSON: the command without places,
    contents of files, versions."""

    needs: tuple[Step, ...] = ()
    """Steps whose results the command finds, by their names, in the folder that it runs in."""

    @property
    def key(self) -> str:
        """Hash of the inputs: same key, same result."""
        keys = [step.key for step in self.needs]
        text = json.dumps([BUILD_VERSION, self.name, self.inputs, keys], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Workspace:
    """Folder of finished steps. Its user holds the lock on it."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for left_behind in path.glob("attempt-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        (path / "logs").mkdir(exist_ok=True)
        self.path = path
        self.hashes = FileHashes(path / "hashes.json")

    def result_dir(self, step: Step) -> Path:
        """Return where the step's result is, or would be."""
        return self.path / f"{step.name}-{step.key[:_KEY_CHARACTERS]}"

    def log(self, step: Step) -> Path:
        """Return where the step's output is, or would be."""
        return self.path / "logs" / f"{self.result_dir(step).name}.log"

    def is_finished(self, step: Step) -> bool:
        """Return whether the step's result is there and is what the step made."""
        result = self.result_dir(step)
        try:
            record = json.loads(self._record(step).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        if record["key"] != step.key or not result.is_dir():
            return False
        found = {name: asdict(entry) for name, entry in self.hashes.entries(result).items()}
        return bool(found == record["outputs"])

    def run(self, step: Step) -> Path:
        """Run a step, finished or not, and return the folder with its result. The steps that it
        needs are finished.

        Raises:
            BuildError: the command fails, or makes no such folder.
        """
        attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=self.path))
        try:
            for needed in step.needs:
                (attempt / needed.name).symlink_to(self.result_dir(needed).absolute())
            run_command(step.name, step.command, cwd=attempt, log=self.log(step))
            made = attempt / step.name
            if not made.is_dir():
                raise BuildError(
                    f"{step.name} ended well, but made no folder {step.name!r}; "
                    f"its output is in {self.log(step)}"
                )
            return self._keep(step, made)
        finally:
            shutil.rmtree(attempt, ignore_errors=True)

    def remove_all_but(self, steps: Iterable[Step]) -> None:
        """Remove the results of all other steps; a checkpoint is as large as its model."""
        kept = {self.result_dir(step).name for step in steps}
        for record in self.path.glob("*-*.json"):
            if record.stem not in kept:
                record.unlink()
                shutil.rmtree(record.with_suffix(""), ignore_errors=True)

    def _keep(self, step: Step, made: Path) -> Path:
        result, record = self.result_dir(step), self._record(step)
        record.unlink(missing_ok=True)
        shutil.rmtree(result, ignore_errors=True)
        made.rename(result)
        outputs = {name: asdict(entry) for name, entry in self.hashes.entries(result).items()}
        values = {
            "key": step.key,
            "inputs": step.inputs,
            "command": list(step.command),
            "outputs": outputs,
        }
        staged = record.with_suffix(".json.new")
        staged.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        staged.replace(record)
        return result

    def _record(self, step: Step) -> Path:
        result = self.result_dir(step)
        return result.with_name(f"{result.name}.json")
