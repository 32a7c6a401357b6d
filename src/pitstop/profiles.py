"""DeviceProfile: what a board is and what it can afford, read from devices/<board>/profile.toml."""

import difflib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from pitstop.errors import RecordError, UsageError
from pitstop.records import load_toml

Architecture = Literal["aarch64", "x86_64", "wasm32"]
Source = Literal["datasheet", "measured", "chosen"]

FILENAME = "profile.toml"


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of board: figures to plan with until it was measured."""

    name: str
    description: str
    architecture: Architecture
    isa: tuple[str, ...]  # instruction-set extensions, as the kernel or the browser names them
    cores: int
    threads: int  # to run an engine with
    memory_mib: int  # of the board
    budget_mib: int  # of it, for base, adapters and KV together
    adapter_budget_mib: int  # of the budget, for adapters
    context_length: int  # tokens of one conversation
    formats: tuple[str, ...]  # of artifacts it runs
    quantizations: tuple[str, ...]  # of a base, the preferred one first
    sources: dict[str, Source]  # figure -> where it comes from
    measured: dict[str, float] = field(default_factory=dict)  # figure with its unit in the name -> value


SIZES = ("cores", "threads", "memory_mib", "budget_mib", "adapter_budget_mib", "context_length")
LISTS = ("formats", "quantizations")
FIGURES = ("isa", *SIZES, "quantizations")  # each says where it comes from


def names() -> tuple[str, ...]:
    """Return the names of the known boards, sorted."""
    return tuple(sorted(path.parent.name for path in _folder().glob(f"*/{FILENAME}")))


def load(name: str) -> DeviceProfile:
    """Return the profile of a board by name.

    Raises:
        UsageError: no such board, with the nearest name.
        RecordError: its file is not a sound profile; everything wrong with it at once.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
        raise UsageError(f"no device profile is named {name!r}", cure=hint)
    return read(_folder() / name / FILENAME)


def read(path: Path) -> DeviceProfile:
    """Read a profile from a file, a board of your own included; its folder bears its name.

    Raises:
        BrokenInput: the file cannot be read.
        RecordError: it is not a sound profile; everything wrong with it at once.
    """
    profile = load_toml(DeviceProfile, path)
    problems = _problems(profile)
    if profile.name != path.parent.name:
        problems.insert(0, f"name: {profile.name!r} is not the folder's name {path.parent.name!r}")
    if problems:
        raise RecordError(problems, where=path)
    return profile


def _problems(profile: DeviceProfile) -> list[str]:
    problems = [
        f"{figure}: {getattr(profile, figure)} must be 1 or more" for figure in SIZES if getattr(profile, figure) < 1
    ]
    for part, whole in (("threads", "cores"), ("budget_mib", "memory_mib"), ("adapter_budget_mib", "budget_mib")):
        small, large = getattr(profile, part), getattr(profile, whole)
        if small > large:
            problems.append(f"{part}: {small} is more than {whole} ({large})")
    problems += [f"{figure}: at least one is needed" for figure in LISTS if not getattr(profile, figure)]
    problems += [f"sources.{figure}: missing" for figure in FIGURES if figure not in profile.sources]
    problems += [f"sources.{figure}: no such figure" for figure in sorted(profile.sources.keys() - set(FIGURES))]
    return problems


@cache
def _folder() -> Path:
    """Find devices/: inside the package when installed from a wheel, beside src/ in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "devices", here.parents[1] / "devices"):
        if any(folder.glob(f"*/{FILENAME}")):
            return folder
    raise UsageError("the device profiles are not installed with pitstop", cure="install pitstop again")
