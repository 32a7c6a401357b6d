"""Environments of their own for peers whose packages pitstop does not need: over those that are here, kept in cache."""

import hashlib
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from pitstop.packages import cache_folder


def environment(name: str, packages: Sequence[str]) -> Path:
    """Return an environment's folder; what it installs is pinned by the caller, and installed once."""
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:8]
    home = cache_folder() / "peers" / f"{name}-{digest}"
    if home.is_dir():
        return home
    unfinished = home.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    venv.create(unfinished, with_pip=True, symlinks=True)
    inside = sysconfig.get_path("purelib", vars={"base": str(unfinished)})
    Path(inside, "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = unfinished / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    unfinished.rename(home)
    return home
