"""What is installed here, what is missing, and what to type; needs nothing but the base install."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pitstop
from pitstop.packages import cache_folder

EXTRAS = {
    "llama": "run GGUF models with llama.cpp",
    "onnx": "run ONNX models",
    "serve": "serve over HTTP",
    "device": "llama and serve: what a board needs",
    "workshop": "train, check, export and merge adapters",
    "data": "read rows from Parquet and from the hub",
    "ray": "build many adapters on a Ray cluster",
    "publish": "make keys and publish bundles",
    "demo": "`pitstop demo`",
    "dev": "work on pitstop itself",
}
MIB = 1 << 20  # bytes


@dataclass(frozen=True)
class Package:
    """One package an extra needs."""

    name: str
    wanted: str  # ">=5.0"; empty: any version
    found: str | None  # the installed version

    @property
    def fits(self) -> bool:
        """Whether a version that pitstop can use is installed."""
        return self.found is not None and Requirement(self.name + self.wanted).specifier.contains(
            self.found, prereleases=True
        )


@dataclass(frozen=True)
class Extra:
    """One optional part of pitstop."""

    name: str
    purpose: str
    complete: bool
    packages: tuple[Package, ...]
    install: str  # what to type


@dataclass(frozen=True)
class Diagnosis:
    """Everything `pitstop doctor` found out."""

    pitstop: str  # version
    python: str  # version
    machine: str  # such as "Linux x86_64"
    cores: int
    memory_mib: int | None  # of the machine; None: the system does not tell
    disk_free_mib: int  # where the command runs
    base: tuple[Package, ...]
    extras: tuple[Extra, ...]
    compiler: str | None  # path of a C++ compiler; only needed to build llama.cpp
    own_products: str | None  # what keeps `pitstop check` from pitstop's faster products on llama.cpp; None: nothing
    converter: str | None  # llama.cpp release whose converter is ready here; fetched at the first export
    problems: tuple[str, ...]  # what is wrong, each with its cure; a missing extra is not


def examine() -> Diagnosis:
    """Look at this machine and this installation; changes nothing, fetches nothing."""
    wanted = _requirements()
    base = _packages(wanted, "")
    extras = tuple(_extra(name, purpose, _packages(wanted, name)) for name, purpose in EXTRAS.items())
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    return Diagnosis(
        pitstop=pitstop.__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_mib=_memory_mib(),
        disk_free_mib=shutil.disk_usage(Path.cwd()).free // MIB,
        base=base,
        extras=extras,
        compiler=compiler,
        own_products=_own_products(),
        converter=_converter(),
        problems=tuple(_problems(base, extras, compiler)),
    )


def describe(diagnosis: Diagnosis) -> str:
    """Return a diagnosis as text for people: what there is, what is missing, what to type."""
    memory = f"{diagnosis.memory_mib:,} MiB of memory" if diagnosis.memory_mib else "memory unknown"
    lines = [
        f"pitstop {diagnosis.pitstop}, Python {diagnosis.python}, {diagnosis.machine}",
        f"{diagnosis.cores} cores, {memory}, {diagnosis.disk_free_mib:,} MiB free on this disk",
        f"C++ compiler (to install llama.cpp): {diagnosis.compiler or 'none'}",
        f"pitstop's own matrix products (to check GGUF faster): {diagnosis.own_products or 'yes'}",
        f"llama.cpp's converter (for export): {diagnosis.converter or 'not here yet; the first export fetches it'}",
        "",
        "extras:",
    ]
    for extra in diagnosis.extras:
        mark = "installed" if extra.complete else "missing  "
        lines.append(f"  {extra.name:9} {mark}  {extra.purpose}")
        if extra.complete:
            lines.append(f"{'':23}{', '.join(f'{package.name} {package.found}' for package in extra.packages)}")
        else:
            lines.append(f"{'':23}type: {extra.install}")
    lines += ["", *(f"wrong: {problem}" for problem in diagnosis.problems)]
    return "\n".join(lines) + ("" if diagnosis.problems else "nothing is wrong")


def _requirements() -> Mapping[str, tuple[Requirement, ...]]:
    """Read what pitstop's own metadata asks for, by extra; "" is the base install."""
    try:
        requirements = [Requirement(text) for text in metadata.requires("pitstop") or ()]
    except metadata.PackageNotFoundError:
        return {}
    return {extra: tuple(_selected(requirements, extra)) for extra in ("", *EXTRAS)}


def _selected(requirements: list[Requirement], extra: str) -> list[Requirement]:
    found: list[Requirement] = []
    for requirement in requirements:
        marker = requirement.marker
        # A marker that holds without any extra belongs to the base.
        if marker is None or marker.evaluate({"extra": ""}):
            if not extra:
                found.append(requirement)
        elif extra and marker.evaluate({"extra": extra}):
            if canonicalize_name(requirement.name) == "pitstop":
                for other in sorted(requirement.extras):
                    found += _selected(requirements, other)
            else:
                found.append(requirement)
    return found


def _packages(wanted: Mapping[str, tuple[Requirement, ...]], extra: str) -> tuple[Package, ...]:
    requirements = {canonicalize_name(requirement.name): requirement for requirement in wanted.get(extra, ())}
    return tuple(
        Package(name, str(requirement.specifier), _version(name)) for name, requirement in sorted(requirements.items())
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _extra(name: str, purpose: str, packages: tuple[Package, ...]) -> Extra:
    complete = bool(packages) and all(package.fits for package in packages)
    return Extra(name, purpose, complete, packages, _install(name))


def _install(extra: str) -> str:
    """Return the command that adds an extra to this very installation."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        folder = os.path.relpath(checkout)
        return f'{_python()} -m pip install -c {Path(folder) / "tools/constraints.txt"} -e "{folder}[{extra}]"'
    return f'{_python()} -m pip install "pitstop[{extra}]"'


def _python() -> str:
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def _own_products() -> str | None:
    try:
        from pitstop.engines.llama.matmul import hindrance
    except ImportError as error:
        return f"{error.name} is not installed"
    return hindrance()


def _converter() -> str | None:
    version = _version("llama-cpp-python")
    return version if version and (cache_folder() / f"llama-cpp-converters-{version}").is_dir() else None


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    except (OSError, ValueError):
        return None


def _problems(base: tuple[Package, ...], extras: tuple[Extra, ...], compiler: str | None) -> list[str]:
    if not base:
        return [f"pitstop runs without being installed; type: {_install('device')}"]
    # A package in the wrong version breaks what its extra does; one that is missing was just not asked for.
    bad = {package.name: package for package in base if not package.fits}
    bad |= {p.name: p for extra in extras for p in extra.packages if p.found is not None and not p.fits}
    problems = [
        f"{package.name} {package.found or 'is missing'}: pitstop needs {package.wanted or 'any version'}; "
        f'type: {_python()} -m pip install "{package.name}{package.wanted}"'
        for package in bad.values()
    ]
    llama = next(extra for extra in extras if extra.name == "llama")
    if not llama.complete and compiler is None:
        problems.append("no C++ compiler, needed to install llama.cpp; on Debian type: apt-get install g++")
    return problems
