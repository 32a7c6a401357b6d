"""The peers of the benchmarks: llama-server and llama-bench out of the sources of the very llama.cpp that pitstop runs.

Built once for each version, with the flags the library itself is built with where it is compiled on this machine: a
release for this very CPU, with OpenMP, as shared libraries. Needs cmake and a C++ compiler; takes some minutes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pitstop.errors import BrokenInput, UsageError
from pitstop.packages import cache_folder
from pitstop.workshop.export import llamacpp

PROGRAMS = ("llama-server", "llama-bench")
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    # The folder of programs and libraries is moved to its place when it is complete.
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
)


def build() -> Path:
    """Return the folder of the peers' programs, built if they are not there yet.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UsageError: there is no cmake.
        BrokenInput: the sources cannot be had, or do not compile.
    """
    folder = cache_folder() / f"llama-cpp-peers-{llamacpp.installed_version()}"
    if all((folder / program).is_file() for program in PROGRAMS):
        return folder
    if shutil.which("cmake") is None:
        raise UsageError("cmake is needed to build the peers", cure="apt-get install cmake (on Debian), then again")
    print(f"building {' and '.join(PROGRAMS)}, once; this takes some minutes", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        sources, built = llamacpp.unpack(Path(scratch, "llama.cpp")), Path(scratch, "build")
        _run("cmake", "-S", sources, "-B", built, *FLAGS)
        _run("cmake", "--build", built, "--target", *PROGRAMS, "-j", len(os.sched_getaffinity(0)))
        shutil.rmtree(folder, ignore_errors=True)
        (built / "bin").rename(folder)
    return folder


def _run(*command: object) -> None:
    done = subprocess.run(["nice", *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BrokenInput(f"the peers do not build:\n{end}", cure="the last lines say what is missing")


if __name__ == "__main__":
    print(build())
