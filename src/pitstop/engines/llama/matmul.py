"""Faster products of quantized weights and a batch, in place of llama.cpp's, for what scores and asks much at once.

On a Xeon with AVX-512 VNNI the suites are measured in a third of the time (SmolLM2-135M in Q8_0 with an adapter, by
`tools/bench_gate.py`). `matmul.c` is compiled where it runs, by the C compiler there; without one, on other processors,
or once llama.cpp is loaded, everything is computed by llama.cpp as before. For workshops only: a board loads no code
that its bundle's signature does not stand for.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pitstop.bundle.formats import GgufHeader
from pitstop.packages import cache_folder

NAME = "llama, AVX-512 VNNI"  # the engine's, where this computes: it rounds otherwise, and base and adapter need one
TESTED = ("0.3.36",)  # versions of llama-cpp-python whose product has this signature, and these layouts of blocks
TYPES = ("Q8_0", "Q4_0")  # of weights
_FLAGS = ("-O3", "-shared", "-fPIC")


class Products:
    """The library, loaded before llama.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.pitstop_matmul_runs_here.restype = ctypes.c_bool
        self._library.pitstop_matmul_count.restype = ctypes.c_int64
        self._use: Any = self._library.pitstop_matmul_use
        self._use.argtypes = (ctypes.c_bool,)

    @property
    def runs_here(self) -> bool:
        """Tell whether this processor has the instructions."""
        return bool(self._library.pitstop_matmul_runs_here())

    @property
    def count(self) -> int:
        """Return how many products it has computed."""
        return int(self._library.pitstop_matmul_count())

    def hand_on_to(self, library: ctypes.CDLL) -> None:
        """Name the library whose product computes what this one does not."""
        address = ctypes.cast(library.llamafile_sgemm, ctypes.c_void_p)
        self._library.pitstop_matmul_hand_on_to(address)

    def use(self, on: bool) -> None:
        """Compute from now on, in this process, or hand everything on."""
        self._use(on)


def hindrance() -> str | None:
    """Return why llama.cpp computes everything itself on this machine; None: it does not."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "only for Linux on x86-64"
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        return "this processor has no AVX-512 VNNI"
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        return "llama-cpp-python is not installed"
    if found not in TESTED:
        return f"not tested with llama-cpp-python {found}, only with {', '.join(TESTED)}"
    if _compiler() is None and not _place().is_file():
        return "no C compiler; on Debian type: apt-get install gcc"
    return None


@lru_cache(maxsize=1)
def products() -> Products | None:
    """Compile the library, once for this machine's user, and load it; None: llama.cpp does without it here."""
    if "llama_cpp" in sys.modules or hindrance() is not None:
        return None
    try:
        path = _compiled()
        found = Products(path) if path else None
        if found is None or not found.runs_here:
            return None
        import_module("llama_cpp")
        found.hand_on_to(_loaded("libggml-cpu.so"))
    except (ImportError, OSError, AttributeError):
        return None  # slower, and nothing else
    return found


def _loaded(name: str) -> ctypes.CDLL:
    """Return the one of the package's files of this name that llama.cpp runs.

    A wheel holds no links but copies, and a second copy computes with tables that nobody has filled.
    """
    for path in sorted(files("llama_cpp").joinpath("lib").glob(f"{name}*")):  # type: ignore[attr-defined]
        with suppress(OSError):
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
    raise OSError(f"no {name} is loaded")


def multiplies(header: GgufHeader) -> bool:
    """Tell whether most of a base's values are of types that the library has products for."""
    sizes = [(math.prod(tensor.shape), tensor.type in TYPES) for tensor in header.tensors]
    return sum(size for size, ours in sizes if ours) > sum(size for size, _ in sizes) / 2


def use_products(on: bool) -> None:
    """Let what this process computes next be computed by the library or by llama.cpp; without one, by llama.cpp."""
    if products.cache_info().currsize and (found := products()) is not None:
        found.use(on)


def _compiled() -> Path | None:
    """Return the library of this source, compiled if it is not there; None: the compiler cannot."""
    path, compiler = _place(), _compiler()
    if path.is_file() or compiler is None:
        return path if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder, "matmul.c"), Path(folder, path.name)
        source.write_bytes(_source())
        done = subprocess.run([compiler, *_FLAGS, "-o", made, source], capture_output=True, check=False)
        if done.returncode != 0:
            return None
        made.replace(path)
    return path


def _place() -> Path:
    return cache_folder() / f"matmul-{hashlib.sha256(_source()).hexdigest()[:16]}.so"


def _source() -> bytes:
    return files("pitstop.engines.llama").joinpath("matmul.c").read_bytes()


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")
