from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from engines.torch_engine import cpu_library
from tests.engine_dirs import smollm2_engine_dir
from tests.engines.contract_engines import EngineKind, EngineMaker, engine_maker


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return smollm2_engine_dir()


KINDS: Mapping[str, tuple[EngineKind, ...]] = {
    "make_engine": ("simulated", "torch", "torch-int8", "trtllm"),
    "make_model_engine": ("torch", "torch-int8", "trtllm"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests of the contract on every kind of engine, or on that of `--trtllm-engine` alone."""
    is_live = metafunc.config.getoption("--trtllm-engine") is not None
    for fixture, kinds in KINDS.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, ("live",) if is_live else kinds, indirect=True)


@pytest.fixture
def live_engine_dir(request: pytest.FixtureRequest) -> Path:
    """The engine directory of `--trtllm-engine`."""
    directory: Path | None = request.config.getoption("--trtllm-engine")
    if directory is None:
        pytest.skip("needs a TensorRT-LLM engine: --trtllm-engine DIR")
    return directory


@pytest.fixture
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineMaker]:
    """Makes engines of each kind in turn."""
    yield from _maker(request, tmp_path)


@pytest.fixture
def make_model_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineMaker]:
    """Makes engines of each kind that computes tokens from a model in turn."""
    yield from _maker(request, tmp_path)


def skip_without_cpu_kernels() -> None:
    """Skip the test that calls it where the CPU kernels cannot run."""
    if (obstacle := cpu_library.obstacle()) is not None:
        pytest.skip(f"needs the CPU kernels: {obstacle}")


def _instruction_sets() -> Iterator[str]:
    """What the CPU kernels can be compiled for here."""
    if "avx512_vnni" in cpu_library.cpu_flags():
        yield "AVX-512"
    yield "AVX2"


@pytest.fixture(params=_instruction_sets())
def cpu_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that need the CPU kernels: with each instruction set that this machine has."""
    skip_without_cpu_kernels()
    if request.param == "AVX2" and "avx512f" in cpu_library.cpu_flags():
        monkeypatch.setattr(
            cpu_library, "COMPILER_FLAGS", (*cpu_library.COMPILER_FLAGS, "-mno-avx512f")
        )
    cpu_library.load_library.cache_clear()
    yield
    cpu_library.load_library.cache_clear()


@pytest.fixture
def best_cpu_kernels() -> None:
    """For tests that need the CPU kernels, as a user has them."""
    skip_without_cpu_kernels()


def _maker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineMaker]:
    is_live = request.param == "live"
    if request.param == "torch-int8":
        skip_without_cpu_kernels()
    folder = request.getfixturevalue("live_engine_dir") if is_live else tmp_path
    with engine_maker(request.param, folder) as maker:
        yield maker
