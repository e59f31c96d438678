"""A machine on which TensorRT-LLM engines can be built, as far as a build can tell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.build_scripts.trtllm.fake_programs import BEHAVIOUR, CALLS, HANGING, PROFILE
from tests.tiny_tokenizer import write_tiny_tokenizer
from tests.trtllm.cli_surface import PROGRAMS

ROOT = Path(__file__).parents[3]
STAND_INS = ROOT / "tests" / "trtllm" / "stand_ins"

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 420,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write_model(folder: Path, *, weights: bytes = b"weights", **changes: object) -> Path:
    """Write a model in Hugging Face's files, whose weights nobody computes with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | changes))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def recipe_values(machine_dir: Path, **changes: object) -> dict[str, Any]:
    """Return a recipe of a tiny model, as YAML holds it; sections are replaced whole."""
    return {
        "kind": "trtllm",
        "name": "tiny",
        "source": {"path": str(machine_dir / "model")},
        "output_dir": str(machine_dir / "engines" / "tiny"),
        "tensorrt_llm_dir": str(machine_dir / "TensorRT-LLM"),
        "checkpoint": {"family": "llama"},
        "limits": {"max_batch_size": 16, "max_num_tokens": 128, "max_seq_len": 256},
        "plugins": {"tokens_per_block": 16},
        "profile": {
            "device": "cpu",
            "num_device_blocks": 64,
            "prefill_new_tokens": [8, 32, 64, 120],
            "prefill_cached_tokens": [0],
            "decode_batch_sizes": [1, 8, 16],
            "decode_cached_tokens": [16, 40],
            "num_mixed_steps": 4,
            "num_repeats": 3,
            "max_s": 0.5,
            "max_mean_error": 1000,
        },
        **changes,
    }


@dataclass(frozen=True)
class FakeMachine:
    """Folders of one test, and what its programs do and did."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def engine_dir(self) -> Path:
        return self.folder / "engines" / "tiny"

    @property
    def work_dir(self) -> Path:
        return self.folder / "engines" / ".tiny.work"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that builds on this machine."""
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        packages = os.pathsep.join(map(str, (ROOT, STAND_INS, self.folder / "site")))
        return os.environ | {
            "PATH": path,
            "PYTHONPATH": packages,
            "FAKE_PROGRAMS": str(self.folder / "programs"),
        }

    @property
    def python(self) -> Path:
        """A Python that does not measure engines, but says that it did."""
        return self.folder / "bin" / "python"

    def write_recipe(self, **changes: object) -> None:
        self.recipe.write_text(
            yaml.safe_dump(recipe_values(self.folder, **changes), sort_keys=False)
        )

    def behave(self, **programs: Mapping[str, object]) -> None:
        """Say what programs do, by the ends of their names: `checkpoint`, `build`, `profile`."""
        behaviour = {
            name: what
            for name in (*PROGRAMS, PROFILE)
            for word, what in programs.items()
            if name.removesuffix(".py").endswith(word)
        }
        (self.folder / "programs" / BEHAVIOUR).write_text(json.dumps(behaviour))

    def calls(self) -> list[str]:
        """Return the programs that were started since the last call, in order."""
        path = self.folder / "programs" / CALLS
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return [Path(name).stem for name in names]

    @property
    def hanging(self) -> Path:
        """The file that a program makes when it begins to hang."""
        return self.folder / "programs" / HANGING


def make_machine(folder: Path) -> FakeMachine:
    """Set up a machine with a tiny model and a recipe for it."""
    machine = FakeMachine(folder)
    write_model(folder / "model")
    (folder / "programs").mkdir()
    machine.behave()
    _write_programs(folder / "bin")
    for script in PROGRAMS:
        if script.endswith(".py"):
            _write_script(folder / "TensorRT-LLM" / script, script)
    version_file = folder / "TensorRT-LLM" / "tensorrt_llm" / "version.py"
    version_file.parent.mkdir()
    version_file.write_text('__version__ = "1.2.1"\n')
    package = folder / "site" / "tensorrt_llm" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("raise AssertionError('a build imports no tensorrt_llm')\n")
    metadata = folder / "site" / "tensorrt_llm-1.2.1+reference.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1+reference\n")
    machine.write_recipe()
    return machine


def _write_programs(folder: Path) -> None:
    folder.mkdir()
    fake = f"{sys.executable} -m tests.build_scripts.trtllm.fake_programs"
    programs = {
        "trtllm-build": f'exec {fake} trtllm-build "$@"\n',
        "python": (
            f'if [ "$2" = build_scripts.trtllm.profile_step ]; then shift 2; '
            f'exec {fake} {PROFILE} "$@"; fi\n'
            f'exec {sys.executable} "$@"\n'
        ),
        # Starts the first rank alone: `mpirun -n RANKS --bind-to none COMMAND`.
        "mpirun": 'shift 4; exec "$@"\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)


def _write_script(path: Path, program: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "import sys\n"
        "from tests.build_scripts.trtllm.fake_programs import main\n"
        f"sys.argv[1:1] = [{program!r}]\n"
        "main()\n"
    )
