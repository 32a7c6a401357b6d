"""The page's engine: the installed llama.cpp's own sources and our glue, compiled to wasm with Debian's emscripten.

Two builds: `mt` with threads, `st` without. They land where tsc writes (src/pitstop/device/web/dist/engine); what was
compiled stays in the user's cache folder, so that a second call only compiles what has changed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.packages import cache_folder
from pitstop.workshop.export import llamacpp

WEB = Path(__file__).parents[1] / "src" / "pitstop" / "device" / "web"
SOURCES = WEB / "engine"
TARGET = WEB / "dist" / "engine"
KERNELS = "ggml/src/ggml-cpu/arch/wasm/quants"
PARTS = ("CMakeLists.txt", "LICENSE", "cmake/", "common/", "ggml/", "include/", "src/", "vendor/")
VARIANTS = ("mt", "st")
NEEDED = {"em++": "emscripten", "cmake": "cmake", "ninja": "ninja-build", "patch": "patch"}  # program -> Debian package


def build(variant: str, target: Path = TARGET, program: str = "engine") -> Path:
    """Compile one variant and return its .js, with the .wasm beside it.

    Args:
        program: "engine", or "unrounded" for the kernels without our patch.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
        UsageError: a compiler is missing.
        BrokenInput: the sources cannot be had, or do not compile.
    """
    if missing := missing_packages():
        raise UsageError(
            f"{', '.join(missing)} needed to compile the page's engine",
            cure=f"apt-get install {' '.join(missing)} (on Debian), then again",
        )
    sources = patched_sources()
    # CMake keeps paths: another checkout has a folder of its own.
    checkout = hashlib.sha256(str(SOURCES).encode()).hexdigest()[:6]
    built = sources.with_name(f"{sources.name}-{variant}-{checkout}")
    _run("emcmake", "cmake", "-G", "Ninja", "-S", SOURCES, "-B", built, f"-DLLAMA={sources}",
         f"-DVARIANT={variant}", "-DEMSCRIPTEN_SYSTEM_PROCESSOR=wasm32")  # fmt: skip
    _run("ninja", "-C", built, "-j", len(os.sched_getaffinity(0)), program)
    target.mkdir(parents=True, exist_ok=True)
    for file in built.glob(f"{program}-{variant}.*"):
        if not (target / file.name).is_file() or sha256_file(target / file.name) != sha256_file(file):
            shutil.copyfile(file, target / file.name)
    return target / f"{program}-{variant}.js"


def missing_packages() -> list[str]:
    """Return the Debian packages that are needed and not installed."""
    return [package for program, package in NEEDED.items() if shutil.which(program) is None]


def patched_sources() -> Path:
    """Return the folder of llama.cpp's sources with our patch, unpacked once for each state of the patch."""
    patch = SOURCES / "rounding.patch"
    folder = cache_folder() / f"web-engine-{llamacpp.installed_version()}-{sha256_file(patch)[:8]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            sources = llamacpp.unpack(Path(scratch, "llama.cpp"), PARTS)
            shutil.copyfile(sources / f"{KERNELS}.c", sources / f"{KERNELS}.unrounded.c")
            _run("patch", "--directory", sources, "--strip=1", "--input", patch)
            sources.rename(folder)
    return folder


def _run(*command: object) -> None:
    # Debian's emscripten finds acorn there only if told so; an EM_CACHE would hide its ready-made libraries.
    settings = {name: value for name, value in os.environ.items() if name != "EM_CACHE"}
    settings["NODE_PATH"] = "/usr/share/nodejs"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=settings)
    if done.returncode != 0:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BrokenInput(f"the page's engine does not build:\n{end}", cure="the last lines say what is missing")


def main() -> None:
    """Build the variants that are named, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], help="mt, st; both by default")
    for variant in parser.parse_args().variants or VARIANTS:
        print(build(variant))


if __name__ == "__main__":
    main()
