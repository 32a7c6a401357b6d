"""Files: old or new, never half; and errors of the disk that name the cure."""

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pitstop import files
from pitstop.errors import BrokenInput, StorageError, UsageError


def test_hashing_reads_the_whole_file(tmp_path: Path) -> None:
    data = os.urandom(files.CHUNK + 7)
    (tmp_path / "big").write_bytes(data)
    assert files.sha256_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_hashing_a_missing_file_is_broken_input(tmp_path: Path) -> None:
    with pytest.raises(BrokenInput, match="cannot read gone"):
        files.sha256_file(tmp_path / "gone")


def test_a_folder_that_another_made_first_stays(tmp_path: Path) -> None:
    for name in ("first", "second"):
        made = tmp_path / "scratch" / name
        made.mkdir(parents=True)
        (made / "file").write_text(name)
        files.place_folder(made, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "first"
    with pytest.raises(StorageError):
        files.place_folder(tmp_path / "gone", tmp_path / "nowhere")


def test_a_file_is_replaced_whole_and_keeps_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_private_file_is_private_from_the_first_byte(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "key", mode=0o600) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        file.write(b"secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), UsageError("mine")])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def write_half() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    script = (
        "import os, sys, pathlib\nfrom pitstop import files\n"
        "with files.replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"old"


def test_no_space_is_a_storage_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of files makes a real write fail in the middle, as a full disk does.
    script = (
        "import resource, signal, sys, pathlib\nfrom pitstop import errors, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {before[1]}))\n"
        "try:\n    files.write_bytes(pathlib.Path(sys.argv[1]), bytes(1 << 20))\n"
        "except errors.StorageError as error:\n    print(error); sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert "cannot write file" in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "can be written"),
        (errno.EACCES, "may write"),
        (errno.EPERM, "may write"),
    ],
)
def test_each_refusal_of_the_disk_names_its_cure(code: int, cure: str) -> None:
    error = files.storage_error(OSError(code, os.strerror(code)), Path("x"))
    assert isinstance(error, StorageError)
    assert cure in str(error)
    assert os.strerror(code) in str(error)


def test_a_folder_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot write file"):
        files.write_bytes(tmp_path / "file", b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
