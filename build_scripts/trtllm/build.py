"""Builds TensorRT-LLM engine directories from recipes.

    verify inputs -> checkpoint -> engine -> compare with the recipe -> profile -> manifest

Each command's result is kept beside the engine directory, in `.<recipe name>.work`, until a later
build of the recipe needs it no more: whatever is interrupted goes on where it stopped, and a
changed line of the recipe runs again only what depends on it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console

from build_scripts.hardware import hardware_name
from build_scripts.progress import work_progress
from build_scripts.staging import exclusive, staged
from build_scripts.target import check_replaceable, reason_to_build
from build_scripts.trtllm import hub, installation
from build_scripts.trtllm.built_config import check_built_engine
from build_scripts.trtllm.commands import Programs, build_commands, download_command
from build_scripts.trtllm.engine_dir import is_built_file, write_engine_dir
from build_scripts.trtllm.model_files import ModelFiles
from build_scripts.trtllm.plan import BuildPlan, Contents, plan_build
from build_scripts.trtllm.profile_file import EngineProfile
from build_scripts.trtllm.recipe import HubSource, LocalSource, TrtLlmRecipe
from build_scripts.trtllm.workspace import Step, Workspace
from orchestrator.core.errors import BuildError, ProServeError


@dataclass(frozen=True, slots=True)
class Target:
    """One engine directory to make."""

    recipe: TrtLlmRecipe
    engine_dir: Path

    @classmethod
    def of(cls, recipe: TrtLlmRecipe, output_dir: Path | None = None) -> Self:
        """Return where a recipe's engine goes: to `output_dir`, or where the recipe says."""
        default = Path("built_engines") / recipe.name
        return cls(recipe, output_dir or recipe.output_dir or default)


def dry_run_lines(recipes: Sequence[TrtLlmRecipe]) -> list[str]:
    """Return the commands of the builds, one a line, in an order in which they can be run in an
    empty folder; several engines each in one of their own, under a line with their name.

    Nothing is looked at but the recipes: neither the model nor TensorRT-LLM nor what is built.
    """
    lines = []
    for recipe in recipes:
        if len(recipes) > 1:
            lines.append(f"# {recipe.name}")
        programs = _programs(recipe)
        if isinstance(recipe.source, HubSource):
            lines.append(shlex.join(download_command(recipe.source, programs.python)))
        lines += [shlex.join(command) for command in build_commands(recipe, programs)]
    return lines


def build_targets(targets: Sequence[Target], name: str, *, force: bool) -> None:
    """Make the engine directories, each unless it is up to date; one that fails does not keep the
    others from being made.

    Finished steps are kept beside the first one, in `.<name>.work`.

    Raises:
        BuildError: TensorRT-LLM is not installed, a command failed, or one of several builds did.
        ConfigError: a recipe, or what it names, cannot be used.
        EngineDirectoryError: an engine that was built cannot be served, or an output directory
            holds something that no build wrote.
    """
    installation.check_installed()
    work_dir = targets[0].engine_dir.with_name(f".{name}.work")
    with exclusive(work_dir):
        builder = _Builder(Workspace(work_dir), force=force)
        try:
            if len(targets) == 1:
                builder.build(targets[0])
            else:
                _build_each(targets, builder)
        except KeyboardInterrupt:
            builder.say("Stopped; the same command goes on after the last finished step")
            raise
        builder.workspace.remove_all_but(builder.used)


def _build_each(targets: Sequence[Target], builder: _Builder) -> None:
    results = {}
    for target in targets:
        try:
            builder.build(target)
            results[target.recipe.name] = f"ready in {target.engine_dir}"
        except ProServeError as error:
            builder.say(f"{target.recipe.name}: {error}")
            results[target.recipe.name] = "failed"
    for name, result in results.items():
        builder.say(f"{name}: {result}")
    failed = [name for name, result in results.items() if result == "failed"]
    if failed:
        raise BuildError(
            f"{len(failed)} of {len(targets)} engines failed: {', '.join(failed)}; the same "
            "command goes on with them"
        )


class _Builder:
    """Builds one engine after another in one workspace, so that they share steps."""

    def __init__(self, workspace: Workspace, *, force: bool) -> None:
        self.workspace = workspace
        self.used: list[Step] = []
        """Steps of all engines so far, whether they had to be run or not."""

        self._finished: set[str] = set()  # keys of steps that this run has made or found whole
        self._console = Console(stderr=True)
        self._force = force

    def build(self, target: Target) -> None:
        """Make one engine directory unless it is up to date."""
        with exclusive(target.engine_dir):
            model, plan = self._verify_inputs(target.recipe)
            self.used += plan.steps
            reason = reason_to_build(target.engine_dir, plan.build_hash)
            if reason is None and not self._force:
                self.say(f"{target.engine_dir} is up to date")
                return
            check_replaceable(target.engine_dir, is_built_file)
            self.say(f"Building {target.engine_dir} ({reason or 'forced'})")
            self._make(target, model, plan)
            self.say(f"{target.engine_dir} is ready")

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _verify_inputs(self, recipe: TrtLlmRecipe) -> tuple[ModelFiles, BuildPlan]:
        installation.check_launcher(recipe)
        script = installation.find_script(recipe)
        if isinstance(recipe.source, HubSource):
            hub.download(recipe.source)
        programs = _programs(recipe)
        model = ModelFiles.read(programs.model_dir)
        model.check(recipe)
        hashes, calibration_dir = self.workspace.hashes, programs.calibration_dir
        with self._running("Reading the inputs"):
            contents = Contents(
                model=hashes.entries(model.folder, model.weight_files),
                tokenizer=hashes.entries(model.folder, model.tokenizer_files),
                eos_token_ids=model.eos_token_ids,
                calibration={} if calibration_dir is None else hashes.entries(calibration_dir),
                script=hashes.entries(script.parent, [script.name])[script.name],
                hardware=hardware_name(recipe.profile.device),
            )
        return model, plan_build(recipe, programs, contents)

    def _make(self, target: Target, model: ModelFiles, plan: BuildPlan) -> None:
        built_dir = self._finish(plan.engine)
        check_built_engine(target.recipe, built_dir)
        profile = EngineProfile.read(self._finish(plan.profile))
        with staged(target.engine_dir) as staging, self._running("Writing the manifest"):
            write_engine_dir(
                staging,
                target.recipe,
                model,
                built_dir=built_dir,
                profile=profile,
                build_hash=plan.build_hash,
            )

    def _finish(self, step: Step) -> Path:
        """Return the folder with the step's result, made in this run or an earlier one; what it
        needs is made only if it is run itself."""
        result = self.workspace.result_dir(step)
        if step.key in self._finished:
            return result
        if not self._force and self.workspace.is_finished(step):
            self.say(f"  {step.name}: unchanged")
        else:
            for needed in step.needs:
                self._finish(needed)
            self.say(f"  {step.name}: its output is in {self.workspace.log(step)}")
            with self._running(step.name):
                self.workspace.run(step)
        self._finished.add(step.key)
        return result

    @contextmanager
    def _running(self, name: str) -> Iterator[None]:
        with work_progress(self._console) as progress, progress.running(name):
            yield


def _programs(recipe: TrtLlmRecipe) -> Programs:
    """Return what the recipe's commands are called on this machine, from any folder."""
    match recipe.source:
        case LocalSource(path=model_dir):
            pass
        case HubSource() as source:
            model_dir = hub.snapshot_dir(source)
    calibration_dir = recipe.checkpoint.calibration.dataset_dir
    return Programs(
        python=sys.executable,
        trtllm_build=installation.compiler(),
        tensorrt_llm_dir=installation.repository_dir(recipe).absolute(),
        model_dir=model_dir.absolute(),
        calibration_dir=None if calibration_dir is None else calibration_dir.absolute(),
    )
