"""Data of Debian packages, on a machine that has none of them installed: fetched by apt, unpacked without root."""

import subprocess
import tempfile
from pathlib import Path

from pitstop.errors import BrokenInput
from pitstop.files import place_folder
from pitstop.packages import cache_folder


def unpacked(package: str, holds: str) -> Path:
    """Return the folder of a package's files, fetching it once.

    Args:
        holds: a file it must hold, such as ``usr/share/wordnet/data.noun``.

    Raises:
        BrokenInput: this system cannot fetch it, or it holds no such file.
    """
    target = cache_folder() / package
    if not (target / holds).is_file():
        _download(package, holds, target)
    return target


def _download(package: str, holds: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # apt checks the package against the signed list of the distribution.
        _run(["apt-get", "download", "--quiet", package], package, folder)
        found = next(Path(folder).glob("*.deb"), None)
        if found is None:
            raise BrokenInput(f"apt-get fetched no {package} package")
        _run(["dpkg-deb", "-x", found.name, "unpacked"], package, folder)
        if not (Path(folder) / "unpacked" / holds).is_file():
            raise BrokenInput(f"the {package} package holds no {Path(holds).name}")
        place_folder(Path(folder) / "unpacked", target)


def _run(command: list[str], package: str, folder: str) -> None:
    cure = f"install the Debian package {package}, or do without this suite"
    what = f"{package} is not installed, and {command[0]} cannot fetch it"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokenInput(f"{what}: {error}", cure=cure) from error
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no reason given"]
        raise BrokenInput(f"{what}: {words[-1]}", cure=cure)
