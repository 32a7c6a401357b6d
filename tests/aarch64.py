"""A board's Debian without the board: aarch64 programs under qemu's user mode, with what the device side needs there.

llama.cpp is compiled here for the other processor, from the sources of the very release that is installed; Python comes
from Debian, all else from the index's own aarch64 wheels. Made once and kept. Nothing is booted and no root is changed:
qemu looks files up in the folder first. Its speed says nothing about a board.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pitstop.files import place_folder
from pitstop.packages import cache_folder
from pitstop.workshop.export.llamacpp import installed_version, unpack
from pitstop.workshop.runs import exclusive

PROJECT = Path(__file__).resolve().parents[1]
PROCESSOR = "cortex-a72"  # of a Raspberry Pi 4: ARMv8.0, without dot products and 16-bit floats
TOOLS = ("qemu-aarch64-static", "debootstrap", "aarch64-linux-gnu-g++", "cmake", "dpkg-deb")
NEEDED = "it needs Debian's qemu-user-static, debootstrap, g++-aarch64-linux-gnu and cmake: make test-boards"
DEBIAN = "bookworm"  # its Python is 3.11
WHEELS = (
    "cattrs", "diskcache", "httptools", "jinja2", "numpy", "packaging", "rich", "securesystemslib[crypto]", "starlette",
    "tuf", "typer", "typing-extensions", "urllib3", "uvicorn", "uvloop", "onnxruntime", "onnxruntime-genai",
)  # fmt: skip
OPTIONS = (
    "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_TYPE=Release", "CMAKE_SYSTEM_NAME=Linux", "CMAKE_SYSTEM_PROCESSOR=aarch64",
    "CMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "GGML_NATIVE=OFF",
    "GGML_OPENMP=OFF", "GGML_CPU_ARM_ARCH=armv8-a", "LLAMA_CURL=OFF", "LLAMA_BUILD_COMMON=OFF",
    "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_TOOLS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF",
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON", "CMAKE_INSTALL_RPATH=$ORIGIN",
)  # fmt: skip
# ONNX Runtime asks Linux which processor this is, by files that qemu would show of the host.
PROCESSOR_FILES = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
}


@dataclass(frozen=True)
class Machine:
    """An aarch64 Debian with Python, and pitstop's device side installed."""

    folder: Path

    @property
    def python(self) -> Path:
        """A script that runs the other processor's Python, for programs that start further ones too."""
        return self.folder / "python"

    def environment(self) -> dict[str, str]:
        """Return what its Python finds: the packages, and pitstop as it is in this checkout."""
        path = os.pathsep.join([str(PROJECT / "src"), str(self.folder / "site")])
        return {**os.environ, "PYTHONPATH": path, "MACHINE_PYTHON": str(self.python), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str | Path, seconds: float = 900) -> subprocess.CompletedProcess[str]:
        """Run Python there, to its end."""
        command = [self.python, *arguments]
        return subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=False, timeout=seconds
        )

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start Python there."""
        command = [self.python, *arguments]
        return subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


@pytest.fixture(scope="session")
def machine() -> Machine:
    """An aarch64 machine; skips where it cannot be made."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}; {NEEDED}")
    constraints = PROJECT / "tools" / "constraints.txt"
    key = hashlib.sha256(Path(__file__).read_bytes() + constraints.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / "tests" / f"aarch64-{installed_version()}-{key}"
    with exclusive(folder.parent, wait=True):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch, "machine")
                _make(made, folder, constraints)
                place_folder(made, folder)
    return Machine(folder)


def _make(folder: Path, place: Path, constraints: Path) -> None:
    """Make the machine in a folder that will be moved to another place."""
    site = folder / "site"
    _debian(folder / "root")
    _wheels(site, constraints)
    _llama_cpp(site)
    # qemu hands a program that is to be started over to the host, which cannot run it; but it can run a script.
    (site / "sitecustomize.py").write_text('import os, sys\nsys.executable = os.environ["MACHINE_PYTHON"]\n')
    emulator = f"qemu-aarch64-static -cpu {PROCESSOR} -L '{place}/root'"
    (folder / "python").write_text(f"#!/bin/sh\nexec {emulator} '{place}/root/usr/bin/python3.11' \"$@\"\n")
    (folder / "python").chmod(0o755)


def _debian(root: Path) -> None:
    """Unpack a minimal Debian; its packages are not configured, which needs its own processor."""
    packages = "--include=python3,libstdc++6"
    _run("debootstrap", "--foreign", "--arch=arm64", "--variant=minbase", packages, DEBIAN, root)
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        _run("dpkg-deb", "-x", package, root)
        package.unlink()
    for name, text in PROCESSOR_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def _wheels(site: Path, constraints: Path) -> None:
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    python = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none"]
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", f"--constraint={constraints}"]
    _run(sys.executable, "-m", "pip", "install", f"--target={site}", *options, *platforms, *python, *WHEELS)


def _llama_cpp(site: Path) -> None:
    """Compile llama.cpp for the machine, and lay it where the Python files of llama-cpp-python look for it."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    package = site / "llama_cpp"
    shutil.copytree(Path(spec.origin).parent, package, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    installed = importlib.metadata.distribution("llama-cpp-python")
    facts = f"llama_cpp_python-{installed.version}.dist-info"
    shutil.copytree(str(installed.locate_file(facts)), site / facts)
    with tempfile.TemporaryDirectory() as scratch:
        sources, build = unpack(Path(scratch, "llama.cpp")), Path(scratch, "build")
        _run("cmake", "-S", sources, "-B", build, *(f"-D{option}" for option in OPTIONS))
        _run("cmake", "--build", build, "--target", "llama", "-j", "2")
        (package / "lib").mkdir(exist_ok=True)
        for library in build.rglob("lib*.so*"):  # under every name that one asks another by
            shutil.copyfile(library, package / "lib" / library.name)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}; {NEEDED}")
