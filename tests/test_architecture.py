"""Who may import what, how long code may get, and what no file may contain.

The tables below are the rules of "Dependency direction" in the project's architecture. Every
checker is a function of source text, so that the tests at the end can show each of them failing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("orchestrator", "engines", "router", "build_scripts")

# What each layer may import of ours. A module belongs to the longest name that it is under. A name
# in a right column stands for what is under it, except for layers with a line of their own.
LAYERS: Mapping[str, tuple[str, ...]] = {
    "orchestrator.core": ("orchestrator.core",),
    "orchestrator": ("orchestrator.core", "orchestrator"),
    "engines": (
        "orchestrator.core",
        "orchestrator.device_sampling",
        "orchestrator.grammars",
        "orchestrator.logit_adjustment",
        "orchestrator.sampling",
        "engines",
    ),
    "router": (
        "orchestrator.core",
        "orchestrator.etcd",
        "orchestrator.journal",
        "orchestrator.peers",
        "orchestrator.tracing",
        "orchestrator.wire",
        "orchestrator.yaml_config",
        "router",
    ),
    "build_scripts": (
        "orchestrator.core",
        "orchestrator.sampling",
        "orchestrator.yaml_config",
        "engines",
        "build_scripts",
    ),
    "orchestrator.simulation": (
        "orchestrator.core",
        "orchestrator.scheduler_config",
        "orchestrator.simulation",
        "engines.simulated",
        "engines.host_link",
        "router.fleet",
        "router.policy",
        "router.routing_config",
    ),
    "orchestrator.command_line": (
        "orchestrator.core",
        "orchestrator",
        "orchestrator.simulation",
        "orchestrator.command_line",
        "engines",
        "router",
        "build_scripts",
    ),
}

# Packages of others that only some of ours may import.
CONFINED: Mapping[str, tuple[str, ...]] = {
    "tensorrt_llm": ("engines.trtllm", "engines.trtllm_pytorch", "build_scripts"),
    "tensorrt": ("engines.trtllm",),
    "torch": (
        "engines",
        "orchestrator.device_sampling",
        "orchestrator.logit_adjustment",
        "orchestrator.sampling",
        "orchestrator.triton_fetch",
        "build_scripts",
    ),
    "llguidance": ("orchestrator.grammars", "router.output_form"),
    "opentelemetry": ("orchestrator.tracing",),
}

# Whoever wants these imports them himself.
EXPERIMENTAL = ("engines.trtllm_pytorch",)

# The core decides; it neither looks at a clock nor waits, draws, reads or writes.
IMPURE_MODULES = frozenset(
    {"asyncio", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib"}
    | {"queue", "random", "secrets", "select", "shutil", "signal", "socket", "subprocess"}
    | {"tempfile", "threading", "time", "uuid"}
)

# Modules that a GPU machine with nothing but torch and numpy can import.
LEAN = ("orchestrator.core", "orchestrator.executor", "engines")
LEAN_PACKAGES = frozenset({"torch", "numpy", "triton"})

TYPE_CHECKING_TESTS = ("TYPE_CHECKING", "typing.TYPE_CHECKING")

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 80

FORBIDDEN_TEXT: Mapping[str, re.Pattern[str]] = {
    "a path of one machine": re.compile(
        r"(?<![\w.~])/(?:work|root|home/\w+|opt/(?:wheels|pypi))\b"
    ),
    "a package index": re.compile(
        r"\b(?:pypi\.org|pypi\.nvidia\.com|pythonhosted\.org|download\.pytorch\.org)\b"
    ),
}
TEXT_FOLDERS = (*PACKAGES, "tests", "configs", "benchmarks", "docs", ".ci")


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a module."""

    target: str
    """Dotted name, down to the imported name: `from a import b` imports a.b."""

    line: int
    is_at_import_time: bool
    """False inside functions and under `if TYPE_CHECKING`."""


@cache
def imports_in(source: str, module: str, *, is_package: bool = False) -> tuple[Import, ...]:
    """Return every import in `source`, wherever it stands, including `import_module("name")`."""
    package = module if is_package else module.rpartition(".")[0]
    tree = ast.parse(source, filename=module)
    return tuple(_imports_under(tree, package, is_at_import_time=True))


def _imports_under(node: ast.AST, package: str, *, is_at_import_time: bool) -> Iterator[Import]:
    for target in _targets(node, package):
        yield Import(target, getattr(node, "lineno", 0), is_at_import_time)
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    never_run: list[ast.stmt] = []
    if isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_CHECKING_TESTS:
        never_run = node.body
    for child in ast.iter_child_nodes(node):
        is_run = is_at_import_time and not is_function and child not in never_run
        yield from _imports_under(child, package, is_at_import_time=is_run)


def _targets(node: ast.AST, package: str) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=name, names=names, level=level):
            start = package.rsplit(".", level - 1)[0] if level else None
            prefix = ".".join(part for part in (start, name) if part)
            return [f"{prefix}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


def is_under(module: str, *prefixes: str) -> bool:
    """Return whether `module` is one of the prefixes or inside one."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def layer_of(module: str) -> str:
    """Return the longest name in LAYERS that `module` is under."""
    return max((layer for layer in LAYERS if is_under(module, layer)), key=len)


def is_ours(target: str) -> bool:
    """Return whether `target` is in one of our packages."""
    return is_under(target, *PACKAGES)


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return what `source`, as `module`, imports against LAYERS, CONFINED and the core's rules."""
    layer = layer_of(module)
    problems = []
    for imported in imports_in(source, module, is_package=is_package):
        target = imported.target
        top = target.partition(".")[0]
        if is_ours(target):
            is_allowed = any(
                is_under(target, allowed) and layer_of(target) == layer_of(allowed)
                for allowed in LAYERS[layer]
            )
        elif layer == "orchestrator.core":
            is_allowed = top == "numpy" or (
                top in sys.stdlib_module_names and top not in IMPURE_MODULES
            )
        else:
            is_allowed = top not in CONFINED or is_under(module, *CONFINED[top])
        if not is_allowed:
            problems.append(f"{module}, line {imported.line}: {layer} may not import {target}")
    return problems


def heavy_imports(module: str, sources: Mapping[str, str]) -> list[str]:
    """Return the packages outside LEAN_PACKAGES that importing `module` imports, and by which way.

    `sources` has the text of every module of ours by its name; packages end in `.__init__`.
    """
    problems = []
    ways = {module: module}  # module -> how it was reached
    queue = [module]
    while queue:
        current = queue.pop()
        key = current if current in sources else f"{current}.__init__"
        for imported in imports_in(sources[key], current, is_package=key != current):
            if not imported.is_at_import_time:
                continue
            top = imported.target.partition(".")[0]
            if is_ours(imported.target):
                for reached in _modules_run_by(imported.target, sources):
                    if reached not in ways:
                        ways[reached] = f"{ways[current]} -> {reached}"
                        queue.append(reached)
            elif top not in LEAN_PACKAGES and top not in sys.stdlib_module_names:
                problems.append(f"{ways[current]} -> {imported.target}")
    return problems


def _modules_run_by(target: str, sources: Mapping[str, str]) -> list[str]:
    """Return what importing `target` runs of ours: the module and the packages around it."""
    parts = target.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return [name for name in names if name in sources or f"{name}.__init__" in sources]


def oversized(source: str, module: str) -> list[str]:
    """Return what in `source` is longer than a reader should have to hold in mind."""
    problems = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_MODULE_LINES:
        problems.append(f"{module} has {num_lines} lines, at most {MAX_MODULE_LINES} are allowed")
    for node in ast.walk(ast.parse(source, filename=module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                problems.append(
                    f"{module}.{node.name} has {num_lines} lines, "
                    f"at most {MAX_FUNCTION_LINES} are allowed"
                )
    return problems


def forbidden_text(text: str, name: str) -> list[str]:
    """Return the lines of `text` that name one machine's paths or a package index."""
    return [
        f"{name}:{number}: contains {what}: {found.group()}"
        for number, line in enumerate(text.splitlines(), start=1)
        for what, pattern in FORBIDDEN_TEXT.items()
        if (found := pattern.search(line))
    ]


@cache
def our_sources() -> Mapping[str, str]:
    """Return the text of every module of ours by its dotted name; packages end in `.__init__`."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


# --- the rules, on our own code -----------------------------------------------------------


def test_modules_import_only_what_their_layer_may() -> None:
    problems = []
    for name, source in our_sources().items():
        module = name.removesuffix(".__init__")
        problems += forbidden_imports(source, module, is_package=name != module)

    assert problems == []


def test_core_engines_and_executor_import_with_torch_and_numpy_alone() -> None:
    modules = [name.removesuffix(".__init__") for name in our_sources()]
    problems = {
        problem
        for module in modules
        if is_under(module, *LEAN)
        for problem in heavy_imports(module, our_sources())
    }

    assert sorted(problems) == []


def test_nothing_depends_on_what_is_experimental() -> None:
    importers = [
        name
        for name, source in our_sources().items()
        for imported in imports_in(source, name)
        if is_under(imported.target, *EXPERIMENTAL)
    ]

    assert importers == []


def test_modules_and_functions_stay_short() -> None:
    problems = [p for name, source in our_sources().items() for p in oversized(source, name)]

    assert problems == []


def test_every_folder_of_a_package_is_a_package() -> None:
    """setuptools leaves out folders without an __init__.py."""
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}

    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_names_one_machines_paths_or_a_package_index() -> None:
    # In a worktree of git's, .git is a file that names the main one's path.
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    paths += [path for folder in TEXT_FOLDERS for path in (ROOT / folder).rglob("*")]
    problems = []
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            if b"\0" not in content:  # text
                name = str(path.relative_to(ROOT))
                problems += forbidden_text(content.decode(errors="replace"), name)

    assert problems == []


# --- the checkers, on code that breaks the rules ------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("orchestrator.core.a", "import scipy"),
        ("orchestrator.core.a", "import torch"),
        ("orchestrator.core.a", "import time"),
        ("orchestrator.core.a", "from time import monotonic"),
        ("orchestrator.core.a", "import asyncio"),
        ("orchestrator.core.a", "import threading"),
        ("orchestrator.core.a", "import logging.handlers"),
        ("orchestrator.core.a", "import os.path"),
        ("orchestrator.core.a", "import random"),
        ("orchestrator.core.a", "import socket"),
        ("orchestrator.core.a", "import subprocess"),
        ("orchestrator.core.a", "import math, time"),
        ("orchestrator.core.a", "def f():\n    import time"),
        ("orchestrator.core.a", "class C:\n    async def f(self):\n        import time"),
        (
            "orchestrator.core.a",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os",
        ),
        ("orchestrator.core.a", "try:\n    import os\nexcept ImportError:\n    pass"),
        ("orchestrator.core.a", "importlib.import_module('torch')"),
        ("orchestrator.core.a", "__import__('time')"),
        ("orchestrator.core.a", "from orchestrator import wire"),
        ("orchestrator.core.a", "import orchestrator.wire"),
        ("orchestrator.core.a", "from .. import wire"),
        ("orchestrator.core.a", "from ..wire import AddRequest"),
        ("orchestrator.core.a", "from engines.manifest import EngineManifest"),
        ("orchestrator.executor", "import engines"),
        ("orchestrator.executor", "from router import policy"),
        ("orchestrator.executor", "import torch"),
        ("orchestrator.executor", "from orchestrator.command_line import main"),
        ("orchestrator.executor", "from orchestrator.simulation import replay"),
        ("engines.kv_pool", "from orchestrator.wire import AddRequest"),
        ("engines.kv_pool", "from orchestrator import executor"),
        ("engines.kv_pool", "import router"),
        ("engines.kv_pool", "import build_scripts"),
        ("engines.torch_engine.model", "import tensorrt_llm"),
        ("engines.kv_pool", "import tensorrt"),
        ("router.app", "from orchestrator.node_api import create_app"),
        ("router.app", "import orchestrator.executor"),
        ("router.app", "from engines.manifest import EngineManifest"),
        ("router.app", "import torch.nn"),
        ("build_scripts.build_engine", "import router"),
        ("build_scripts.build_engine", "from orchestrator.executor import ExecutorLoop"),
        ("build_scripts.build_engine", "import orchestrator.command_line.main"),
        ("orchestrator.simulation.replay", "from orchestrator.executor import ExecutorLoop"),
        ("orchestrator.simulation.replay", "from router.app import create_app"),
        ("orchestrator.simulation.replay", "import engines.torch_engine"),
        ("orchestrator.command_line.main", "import tensorrt_llm"),
        ("orchestrator.command_line.main", "import torch"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(forbidden_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("orchestrator.core.a", "import math\nimport numpy as np\nfrom orchestrator.core import b"),
        ("orchestrator.core.a", "from . import b\nfrom .b import c"),
        ("orchestrator.executor", "import time, msgspec\nfrom orchestrator import core, wire"),
        ("orchestrator.sampling", "import torch"),
        ("engines.kv_pool", "import torch\nfrom orchestrator.sampling import Sampler"),
        ("engines.trtllm.session", "import tensorrt, tensorrt_llm"),
        ("router.app", "from orchestrator import wire\nfrom orchestrator.yaml_config import M"),
        ("build_scripts.convert", "import torch, tensorrt_llm, engines.manifest"),
        ("orchestrator.simulation.replay", "from engines.simulated import SimulatedEngine"),
        ("orchestrator.simulation.replay", "from router import fleet, policy, routing_config"),
        ("orchestrator.command_line.main", "import engines, router.app, build_scripts.convert"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert forbidden_imports(source, module) == []


def test_a_relative_import_in_a_package_counts_from_the_package() -> None:
    assert imports_in("from . import b", "a", is_package=True)[0].target == "a.b"
    assert imports_in("from . import b", "a.c")[0].target == "a.b"


HEAVY_SOURCES = {
    "engines.__init__": "",
    "engines.direct": "import msgspec",
    "engines.through": "from engines.direct import name",
    "engines.around": "import engines.heavy_package.light",
    "engines.heavy_package.__init__": "import pydantic",
    "engines.heavy_package.light": "",
    "engines.in_a_class": "class C:\n    import pydantic",
    "engines.in_an_else": "if TYPE_CHECKING:\n    pass\nelse:\n    import pydantic",
    "engines.in_a_negation": "if not TYPE_CHECKING:\n    import pydantic",
    "engines.light": (
        "import json, torch.nn, numpy, triton\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import msgspec\n"
        "def load():\n    import safetensors\n"
    ),
}


@pytest.mark.parametrize(
    ("module", "ways"),
    [
        ("engines.direct", ["engines.direct -> msgspec"]),
        ("engines.through", ["engines.through -> engines.direct -> msgspec"]),
        ("engines.around", ["engines.around -> engines.heavy_package -> pydantic"]),
        ("engines.in_a_class", ["engines.in_a_class -> pydantic"]),
        ("engines.in_an_else", ["engines.in_an_else -> pydantic"]),
        ("engines.in_a_negation", ["engines.in_a_negation -> pydantic"]),
        ("engines.light", []),
    ],
)
def test_a_heavy_import_is_found_with_the_way_to_it(module: str, ways: list[str]) -> None:
    assert heavy_imports(module, HEAVY_SOURCES) == ways


def test_a_long_module_is_found() -> None:
    assert oversized("x = 1\n" * MAX_MODULE_LINES, "m") == []
    assert oversized("x = 1\n" * (MAX_MODULE_LINES + 1), "m") == [
        "m has 451 lines, at most 450 are allowed"
    ]


@pytest.mark.parametrize("definition", ["def f():\n", "async def f():\n"])
def test_a_long_function_is_found(definition: str) -> None:
    assert oversized(definition + "    x = 1\n" * (MAX_FUNCTION_LINES - 1), "m") == []
    assert oversized(definition + "    x = 1\n" * MAX_FUNCTION_LINES, "m") == [
        "m.f has 81 lines, at most 80 are allowed"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "engine_dir: /{}/main/var".format("work"),
        "see /{}/.cache".format("root"),
        "/{}/ada/models".format("home"),
        "--extra-index-url https://{}.org/simple".format("pypi"),
        "https://download.{}.org/whl/cpu".format("pytorch"),
    ],
)
def test_forbidden_text_is_found(text: str) -> None:
    assert len(forbidden_text(f"fine\n{text}\n", "a.yaml")) == 1
    assert forbidden_text(f"fine\n{text}\n", "a.yaml")[0].startswith("a.yaml:2: ")


@pytest.mark.parametrize("text", ["var/engines/smollm2", "/v1/generate", "a/work/b", "~/work"])
def test_other_text_is_not_reported(text: str) -> None:
    assert forbidden_text(text, "a.yaml") == []
