"""Device profiles: found by name, sound, and honest about where their figures come from."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pitstop import profiles
from pitstop.errors import BrokenInput, RecordError, UsageError

BOARDS = ("android-termux", "jetson-orin-nano", "linux-x86_64", "phone-browser", "raspberry-pi-4", "raspberry-pi-5")
PROJECT = Path(__file__).resolve().parents[1]


def test_the_known_boards_are_listed() -> None:
    assert profiles.names() == BOARDS


@pytest.mark.parametrize("name", BOARDS)
def test_a_profile_is_sound_and_nothing_is_called_measured_that_was_not(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name
    assert profile.formats[0] == "gguf"
    assert profile.measured == {}
    assert "measured" not in profile.sources.values()
    notes = (PROJECT / "devices" / name / "notes.md").read_text()
    assert "nothing yet" in notes


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'raspberry-pi-5'\?"):
        profiles.load("rasberry-pi5")


@pytest.mark.parametrize("name", ["toaster", "", "../devices/raspberry-pi-5", "."])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="no device profile is named"):
        profiles.load(name)


def own_board(folder: Path, *changes: tuple[str, str]) -> Path:
    """Copy a profile under the name of a new board and change some lines."""
    text = (PROJECT / "devices" / "raspberry-pi-5" / "profile.toml").read_text()
    for old, new in (('"raspberry-pi-5"', '"mine"'), *changes):
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine" / "profile.toml"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_board_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    assert profiles.read(own_board(tmp_path, ("memory_mib = 8192", "memory_mib = 16384"))).memory_mib == 16384


def test_every_contradiction_is_told_at_once(tmp_path: Path) -> None:
    path = own_board(
        tmp_path,
        ('name = "mine"', 'name = "yours"'),
        ("threads = 4", "threads = 8"),
        ("context_length = 4096", "context_length = 0"),
        ("adapter_budget_mib = 512", "adapter_budget_mib = 5000"),
        ('quantizations = ["q4_0", "q8_0", "q4_k_m"]', "quantizations = []"),
        ('isa = "datasheet"', 'colour = "chosen"'),
    )
    with pytest.raises(RecordError) as caught:
        profiles.read(path)
    assert caught.value.problems == (
        "name: 'yours' is not the folder's name 'mine'",
        "context_length: 0 must be 1 or more",
        "threads: 8 is more than cores (4)",
        "adapter_budget_mib: 5000 is more than budget_mib (4096)",
        "quantizations: at least one is needed",
        "sources.isa: missing",
        "sources.colour: no such figure",
    )


def test_an_unknown_architecture_is_told_with_the_known_ones(tmp_path: Path) -> None:
    path = own_board(tmp_path, ('architecture = "aarch64"', 'architecture = "arm"'))
    with pytest.raises(RecordError, match="architecture: expected one of 'aarch64', 'x86_64', 'wasm32', found 'arm'"):
        profiles.read(path)


def test_a_missing_file_is_broken_input(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match=r"cannot read profile\.toml"):
        profiles.read(tmp_path / "profile.toml")


def test_the_wheel_carries_the_profiles_and_finds_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(PROJECT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("pitstop-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # -I -S: nothing of the editable install is in sight, only what the wheel brought and what it depends on.
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import pitstop.profiles as p; print(p.__file__); print(*p.names()); p.load('raspberry-pi-5')"
    )
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(tmp_path / "site"), libraries],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    origin, found = done.stdout.splitlines()
    assert Path(origin).is_relative_to(tmp_path)
    assert tuple(found.split()) == BOARDS
