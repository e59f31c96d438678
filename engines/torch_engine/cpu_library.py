"""Compiles and loads the CPU kernels in `native/`.

They are compiled by the machine that runs them, for its own processor, and kept in the user's
cache folder: the name of the file follows from sources, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from orchestrator.core.errors import EngineError

SOURCES = Path(__file__).parent / "native"
COMPILER_FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
)
# Vectors of 256 bits, fused products and 16-bit floats. AVX-512 VNNI is used where it is there.
_NEEDED_FLAGS = frozenset({"avx2", "fma", "f16c"})
_CPU_FILE = Path("/proc/cpuinfo")

NUM_LANES = 16
"""Numbers that the kernels take at a time; heads are whole multiples."""


class Matrix(ctypes.Structure):
    """`Matrix` of native/linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("num_outputs", c_int32),
        ("num_inputs", c_int32),
        ("bits", c_int32),
    )


class Layer(ctypes.Structure):
    """One layer's weights; `Layer` of native/decoder.cpp, where `Model`, `Step` and `Workspace`
    are too."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", Matrix),
        ("attention_output", Matrix),
        ("mlp_norm", c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class KVCache(ctypes.Structure):
    """`KVCache` of native/attention.h."""

    _fields_ = (
        ("blocks", c_void_p),
        ("is_bfloat16", c_int32),
        ("num_layers", c_int32),
        ("num_kv_heads", c_int32),
        ("block_size_tokens", c_int32),
        ("head_dim", c_int32),
    )


class Model(ctypes.Structure):
    """Weights and sizes."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("lm_head", Matrix),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("num_heads", c_int32),
        ("rms_norm_eps", c_float),
        ("cache", KVCache),
    )


STEP_ARRAYS = (
    "token_ids",
    "positions",
    "slots",
    "tile_rows",
    "tile_counts",
    "tile_positions",
    "tile_table_starts",
    "tables",
    "sampled_rows",
)
"""Arrays of int32 in `Step`."""


class Step(ctypes.Structure):
    """The arrays of one step."""

    _fields_ = (
        *((name, c_void_p) for name in STEP_ARRAYS),
        ("num_rows", c_int32),
        ("num_tiles", c_int32),
        ("num_sampled", c_int32),
    )


class Activations(ctypes.Structure):
    """`Activations` of native/linear.h."""

    _fields_ = (("codes", c_void_p), ("scales", c_void_p), ("sums", c_void_p))


class Workspace(ctypes.Structure):
    """Memory of a step, with a part for each thread."""

    _fields_ = (
        ("hidden", c_void_p),
        ("qkv", c_void_p),
        ("attention", c_void_p),
        ("product", c_void_p),
        ("activations", Activations),
        ("thread_memory", c_void_p),
        ("thread_bytes", c_int64),
        ("num_threads", c_int32),
    )


def obstacle() -> str | None:
    """Return why this machine cannot run the kernels; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"its processor is {platform.machine()}, not x86-64"
    missing = _NEEDED_FLAGS - cpu_flags()
    if missing:
        return f"its processor lacks {', '.join(sorted(missing))}"
    if _compiler() is None:
        return "it has no C++ compiler; install g++"
    return None


@cache
def load_library() -> ctypes.CDLL:
    """Return the kernels, compiled on first use; that takes some seconds.

    Raises:
        EngineError: they cannot be compiled; or there is an `obstacle`.
    """
    reason = obstacle()
    if reason is not None:
        raise EngineError(f"this machine cannot run the CPU kernels: {reason}")
    # Its OpenMP is the one that PyTorch has loaded: one set of threads for both.
    import torch  # noqa: F401

    library = ctypes.CDLL(str(_compiled_file()))
    library.proserve_thread_bytes.restype = c_int64
    library.proserve_thread_bytes.argtypes = (c_int32, c_int32, c_int32)
    model, step, work = POINTER(Model), POINTER(Step), POINTER(Workspace)
    for name, arguments in (
        ("proserve_embed", (model, step, work)),
        ("proserve_run_layers", (model, step, work, c_int32, c_int32)),
        ("proserve_logits", (model, step, work, c_void_p, c_void_p)),
        ("proserve_linear", (POINTER(Matrix), c_void_p, c_int32, work, c_void_p)),
        ("proserve_draw", (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_void_p)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = None, arguments
    return library


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def cpu_flags() -> frozenset[str]:
    """Return what this machine's processor can do, in Linux's words; nothing elsewhere."""
    try:
        lines = _CPU_FILE.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proserve"
    except RuntimeError as error:  # nobody's home
        raise EngineError(
            f"the CPU kernels have no place to be kept: {error}; set XDG_CACHE_HOME to a folder"
        ) from error


def _compiled_file() -> Path:
    """Return the library's file, and compile it if there is none."""
    compiler = _compiler()
    assert compiler is not None
    sources = sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(repr((COMPILER_FLAGS, version.stdout, sorted(cpu_flags()))).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = _cache_folder()
    target = folder / f"cpu-kernels-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: other processes may be looking for it, or making it.
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / target.name
            units = [source for source in sources if source.suffix == ".cpp"]
            subprocess.run(
                [compiler, *COMPILER_FLAGS, *units, "-o", made],
                check=True,
                capture_output=True,
                text=True,
            )
            made.replace(target)
    except OSError as error:
        raise EngineError(
            f"the CPU kernels cannot be kept in {folder}: {error}; set XDG_CACHE_HOME to a folder "
            "that can be written to"
        ) from error
    except subprocess.CalledProcessError as error:
        raise EngineError(f"{compiler} cannot compile the CPU kernels: {error.stderr}") from error
    return target
