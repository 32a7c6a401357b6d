"""The publisher's signing keys: one Ed25519 key per role, in a folder that no device and no web server ever sees."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pitstop.errors import BrokenInput, MissingExtra, UsageError
from pitstop.files import replacing, storage_error, sync_folder

try:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError as error:
    raise MissingExtra("signing", "publish") from error
from securesystemslib.signer import CryptoSigner

ROLES = ("root", "targets", "snapshot", "timestamp", "channels", "bundles")
PASSPHRASE = "PITSTOP_KEY_PASSPHRASE"  # environment variable; the keys are encrypted when it is set


@dataclass(frozen=True)
class Keys:
    """The keys of a repository, ready to sign."""

    folder: Path
    signers: Mapping[str, CryptoSigner]  # by role


def create(folder: Path) -> None:
    """Make a new key for every role; encrypted if $PITSTOP_KEY_PASSPHRASE is set.

    Raises:
        UsageError: the folder has files already, keys perhaps.
        StorageError: the disk refused; no key was left behind.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            "this folder has something in it already",
            where=folder,
            cure="name a new folder; if these are keys, devices may trust them: keep them",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            fresh = Path(made, "keys")
            fresh.mkdir(mode=0o700)
            for role in ROLES:
                with replacing(_file(fresh, role), mode=0o600) as file:
                    file.write(_new_key())
            # All keys appear at once; renaming onto a folder works only while that is missing or empty.
            fresh.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, folder) from error


def load(folder: Path) -> Keys:
    """Read the keys of every role.

    Raises:
        UsageError: a key is missing, or the passphrase is.
        BrokenInput: a file is no Ed25519 key, or the passphrase is wrong.
    """
    missing = [role for role in ROLES if not _file(folder, role).is_file()]
    if missing:
        raise UsageError(
            f"no key for: {', '.join(missing)}",
            where=folder,
            cure=f"name the folder the repository was made with, or make keys: pitstop keys create {folder}",
        )
    return Keys(folder, {role: CryptoSigner(_read(_file(folder, role))) for role in ROLES})


def _file(folder: Path, role: str) -> Path:
    return folder / f"{role}.pem"


def _passphrase() -> bytes | None:
    return os.environ.get(PASSPHRASE, "").encode() or None


def _new_key() -> bytes:
    passphrase = _passphrase()
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption(),
    )


def _read(path: Path) -> Ed25519PrivateKey:
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise BrokenInput(f"cannot read the key {path.name}: {error.strerror}", where=path) from error
    encrypted = b"ENCRYPTED" in pem
    if encrypted and _passphrase() is None:
        raise UsageError("this key needs its passphrase", where=path, cure=f"set {PASSPHRASE} and run it again")
    try:
        key = serialization.load_pem_private_key(pem, _passphrase() if encrypted else None)
    except (ValueError, TypeError) as error:
        cure = f"check {PASSPHRASE}, then the file" if encrypted else "restore the file from your backup"
        raise BrokenInput("the key cannot be read", where=path, cure=cure) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BrokenInput("the key is not an Ed25519 key", where=path, cure="use keys made by `pitstop keys create`")
    return key
