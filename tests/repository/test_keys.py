import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from pitstop.errors import BrokenInput, UsageError
from pitstop.repository import keys


def test_creates_one_private_key_per_role(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys")
    files = sorted((tmp_path / "keys").iterdir())
    assert [path.stem for path in files] == sorted(keys.ROLES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]
    loaded = keys.load(tmp_path / "keys")
    assert len({signer.public_key.keyid for signer in loaded.signers.values()}) == len(keys.ROLES)
    assert {signer.public_key.keytype for signer in loaded.signers.values()} == {"ed25519"}


def test_never_overwrites(tmp_path: Path) -> None:
    keys.create(tmp_path / "keys")
    before = (tmp_path / "keys/root.pem").read_bytes()
    with pytest.raises(UsageError, match="something in it"):
        keys.create(tmp_path / "keys")
    assert (tmp_path / "keys/root.pem").read_bytes() == before


def test_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    keys.create(tmp_path / "keys")
    keys.load(tmp_path / "keys")


def test_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.PASSPHRASE, "correct horse")
    keys.create(tmp_path)
    assert b"ENCRYPTED" in (tmp_path / "root.pem").read_bytes()
    keys.load(tmp_path)
    monkeypatch.setenv(keys.PASSPHRASE, "battery staple")
    with pytest.raises(BrokenInput, match=keys.PASSPHRASE):
        keys.load(tmp_path)
    monkeypatch.delenv(keys.PASSPHRASE)
    with pytest.raises(UsageError, match="passphrase"):
        keys.load(tmp_path)


def test_a_passphrase_does_not_hinder_plain_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create(tmp_path)
    monkeypatch.setenv(keys.PASSPHRASE, "set for others")
    keys.load(tmp_path)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    keys.create(tmp_path)
    (tmp_path / "channels.pem").unlink()
    with pytest.raises(UsageError, match="no key for: channels") as caught:
        keys.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_damaged_and_foreign_keys(tmp_path: Path) -> None:
    keys.create(tmp_path)
    (tmp_path / "root.pem").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(BrokenInput, match="cannot be read"):
        keys.load(tmp_path)
    other = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "root.pem").write_bytes(other)
    with pytest.raises(BrokenInput, match="not an Ed25519 key"):
        keys.load(tmp_path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("mine")
    with pytest.raises(UsageError):
        keys.create(tmp_path / "keys")
    assert (tmp_path / "keys").read_text() == "mine"
