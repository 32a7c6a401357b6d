"""The suites that pitstop carries: small, with their licences, and what the builder makes today."""

import zipfile
from pathlib import Path

import pytest

from pitstop.errors import BrokenInput
from pitstop.retention import builders
from pitstop.retention.suite import default_folder, load, load_all

ROOT = Path(__file__).parents[2]


def test_they_can_be_used_as_they_are() -> None:
    found = {suite.name: len(suite.items) for suite in load_all(default_folder())}
    assert found.keys() == builders.DEFAULT_SIZES.keys()
    assert all(count <= builders.DEFAULT_SIZES[name] for name, count in found.items())
    kinds = {(suite.record.kind, suite.record.purpose) for suite in load_all(default_folder())}
    assert {("choice", "retention"), ("text", "retention"), ("text", "drift"), ("chat", "drift")} <= kinds
    assert sum(path.stat().st_size for path in default_folder().rglob("*") if path.is_file()) < 300_000


def test_the_notice_names_every_one_of_them() -> None:
    notice = (default_folder() / "NOTICE").read_text(encoding="utf-8")
    named = {name.strip() for line in notice.splitlines() if line[:1].isalpha() for name in line.split(",")}
    assert builders.DEFAULT_SIZES.keys() <= named
    for words in ("Princeton University", "Porimol Chandro", "OpenAI", "Python Software Foundation", "by-sa/4.0"):
        assert words in notice


def test_they_are_what_the_builder_makes_today(tmp_path: Path) -> None:
    try:
        made = builders.build_default(tmp_path)
    except BrokenInput as error:
        pytest.skip(f"the packages cannot be fetched: {error.what}")
    carried = default_folder()
    for suite in made:
        record = load(carried / suite.name).record
        if suite.name == "code" and suite.record.source != record.source:
            continue  # another Python has other functions
        for name in ("items.jsonl", "suite.json"):
            assert (tmp_path / suite.name / name).read_bytes() == (carried / suite.name / name).read_bytes(), suite.name
    missing = builders.DEFAULT_SIZES.keys() - {suite.name for suite in made}
    if missing:
        pytest.skip(f"these could not be made here: {', '.join(sorted(missing))}")


def test_the_wheel_carries_them(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    for path in default_folder().rglob("*"):
        if path.is_file():
            assert f"pitstop/retention/default/{path.relative_to(default_folder()).as_posix()}" in names
