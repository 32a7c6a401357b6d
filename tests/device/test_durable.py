from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.device.activation import State
from pitstop.device.durable import Disk, TwoCopies
from pitstop.errors import StorageError


def copies(folder: Path) -> TwoCopies[State]:
    return TwoCopies(Disk(), folder / "state", State, State())


def test_nothing_was_ever_written(tmp_path: Path) -> None:
    assert copies(tmp_path / "none").read() == State()
    assert copies(tmp_path).read_all() == ()


def test_the_newest_counts(tmp_path: Path) -> None:
    for number in range(5):
        copies(tmp_path).write(State(good=str(number)))
        assert copies(tmp_path).read() == State(good=str(number))
    assert [state.good for state in copies(tmp_path).read_all()] == ["4", "3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.a", "state.b"]


def test_any_flipped_bit_and_any_cut_leaves_the_copy_before(tmp_path: Path) -> None:
    copies(tmp_path).write(State(good="old"))
    copies(tmp_path).write(State(good="new"))
    newest = tmp_path / "state.b"
    data = newest.read_bytes()
    assert b"new" in data
    for index in range(len(data)):
        newest.write_bytes(data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :])
        assert copies(tmp_path).read().good in ("old", "new")
        if index < len(data) - 1:
            assert copies(tmp_path).read().good == "old", index
            newest.write_bytes(data[:index])
            assert copies(tmp_path).read().good == "old", index
    copies(tmp_path).write(State(good="newer"))
    assert copies(tmp_path).read().good == "newer"


def test_a_torn_first_write_is_nothing_written(tmp_path: Path) -> None:
    (tmp_path / "state.a").write_bytes(b"0000")
    assert copies(tmp_path).read() == State()
    copies(tmp_path).write(State(good="a"))
    assert copies(tmp_path).read() == State(good="a")


def test_two_damaged_copies_are_said(tmp_path: Path) -> None:
    for name in ("state.a", "state.b"):
        (tmp_path / name).write_bytes(b"\0" * 40)
    with pytest.raises(StorageError, match="both damaged") as caught:
        copies(tmp_path).read()
    assert "remove both files" in str(caught.value)


@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_record(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("copies")
    (folder / "state.a").write_bytes(data)
    assert copies(folder).read() == State()


def test_a_symbolic_link_is_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(outside)
    for write in (Disk().write, Disk().append):
        with pytest.raises(StorageError, match="symbolic link"):
            write(link, b"planted")
    Disk().replace(link, b"replaced")
    assert outside.read_text() == "mine"
    assert link.read_bytes() == b"replaced"


def test_folders_are_made_whole(tmp_path: Path) -> None:
    Disk().make_folder(tmp_path / "a/b/c")
    Disk().make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        Disk().make_folder(tmp_path / "file/folder")
