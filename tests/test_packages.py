"""Packages: pinned files through the real pip, from an index that is a folder here."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from pitstop import packages
from pitstop.errors import BrokenInput, Untrusted
from pitstop.packages import Pinned

WHEEL = "tyres-1.0-py3-none-any.whl"
SDIST = "tyres-1.0.tar.gz"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path / "cache"))
    return folder


def add_wheel(index: Path, text: str = "soft") -> Pinned:
    """Put a wheel into the index and return the pin of it."""
    info = "Metadata-Version: 2.1\nName: tyres\nVersion: 1.0\n"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr("tyres.txt", text)
        wheel.writestr("tyres-1.0.dist-info/METADATA", info)
        wheel.writestr("tyres-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tyres-1.0.dist-info/RECORD", "")
    return Pinned("tyres==1.0", WHEEL, hashlib.sha256((index / WHEEL).read_bytes()).hexdigest())


def test_a_pinned_file_is_fetched_once_and_kept(index: Path) -> None:
    pinned = add_wheel(index)
    path = packages.fetch(pinned)
    assert path == packages.cache_folder() / "packages" / WHEEL
    (index / WHEEL).unlink()  # a second fetch would fail
    assert packages.fetch(pinned).read_bytes() == path.read_bytes()


def test_other_bytes_than_those_pinned_are_refused_and_not_kept(index: Path) -> None:
    pinned = add_wheel(index)
    add_wheel(index, "hard")
    with pytest.raises(Untrusted, match=f"expected {pinned.sha256}"):
        packages.fetch(pinned)
    assert list((packages.cache_folder() / "packages").iterdir()) == []


def test_a_damaged_copy_is_fetched_again(index: Path) -> None:
    pinned = add_wheel(index)
    packages.fetch(pinned).write_bytes(b"rotten")
    assert packages.fetch(pinned).read_bytes() == (index / WHEEL).read_bytes()


def test_a_package_the_index_does_not_have_is_broken_input(index: Path) -> None:
    with pytest.raises(BrokenInput, match=r"pip could not fetch tyres==1\.0: .*tyres") as caught:
        packages.fetch(Pinned("tyres==1.0", WHEEL, "0" * 64))
    assert WHEEL in (caught.value.cure or "")


def test_another_file_name_is_refused(index: Path) -> None:
    add_wheel(index)
    with pytest.raises(Untrusted, match=f"expected other.whl for tyres==1.0, the index gave: {WHEEL}"):
        packages.fetch(Pinned("tyres==1.0", "other.whl", "0" * 64))


def test_the_cache_moves_with_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITSTOP_CACHE", "/a")
    assert packages.cache_folder() == Path("/a")
    monkeypatch.delenv("PITSTOP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert packages.cache_folder() == Path("/b/pitstop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert packages.cache_folder() == Path.home() / ".cache" / "pitstop"
