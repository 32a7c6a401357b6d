"""What a channel offers: which bundles, by the digest of their manifests.

Another key signs it than signs the bundles: neither alone can put a file on a device.
"""

import re
from dataclasses import dataclass

from pitstop.bundle.manifest import Bundle, is_sha256
from pitstop.errors import BaseMismatch, RecordError

_CHANNEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_MANIFEST = re.compile(r"bundles/[a-z0-9_-]{1,64}/([a-z0-9][a-z0-9._-]{0,63})/[0-9.]{1,27}\.json")


@dataclass(frozen=True)
class Pin:
    """One bundle a channel offers."""

    path: str  # of the manifest in the repository: "bundles/adapter/home/1.0.2.json"
    sha256: str  # of the manifest's bytes
    counter: int  # as in the manifest; it only ever rises for a name


@dataclass(frozen=True)
class Channel:
    """`channels/<name>.json`: one base and the adapters that run on it."""

    name: str
    bundles: dict[str, Pin]  # by bundle name


def check_channel(channel: Channel, *, where: object = None) -> Channel:
    """Return the channel if every name, path and digest in it is well formed.

    Raises:
        RecordError: everything that is not, at once.
    """
    problems = [] if is_channel_name(channel.name) else [f"name: {channel.name!r} must be a-z, 0-9, '_', '-'"]
    for name, pin in channel.bundles.items():
        path = _MANIFEST.fullmatch(pin.path)
        if path is None or path[1] != name:
            problems.append(f"bundles.{name}.path: {pin.path!r} is no manifest of {name!r}")
        if not is_sha256(pin.sha256):
            problems.append(f"bundles.{name}.sha256: {pin.sha256!r} is no SHA-256")
        if pin.counter < 1:
            problems.append(f"bundles.{name}.counter: {pin.counter} must be 1 or more")
    if problems:
        raise RecordError(problems, where=where)
    return channel


def check_release(bundles: dict[str, Bundle], *, where: object = None) -> Bundle:
    """Return the one base bundle among those a device is to run together.

    Raises:
        RecordError: no base, or more than one.
        BaseMismatch: an adapter made for another base file.
    """
    bases = [bundle for bundle in bundles.values() if bundle.kind == "base"]
    if len(bases) != 1:
        names = ", ".join(sorted(base.name for base in bases)) or "none"
        raise RecordError([f"a channel offers exactly one base bundle, this one has: {names}"], where=where)
    base = bases[0]
    problems = [
        f"{bundle.name}: made for base file {bundle.base_sha256} ({bundle.base_name}), "
        f"the channel offers {base.base_sha256} ({base.name})"
        for bundle in bundles.values()
        if bundle.base_sha256 != base.base_sha256
    ]
    if problems:
        raise BaseMismatch(
            "; ".join(problems), where=where, cure="offer the base its adapters were made for, and those adapters only"
        )
    return base


def is_channel_name(name: str) -> bool:
    """Tell whether the text may name a channel, and so a file."""
    return _CHANNEL.fullmatch(name) is not None


def channel_path(name: str) -> str:
    """Return where a repository keeps a channel."""
    return f"channels/{name}.json"


def manifest_path(bundle: Bundle) -> str:
    """Return where a repository keeps a bundle's manifest."""
    return f"bundles/{bundle.kind}/{bundle.name}/{bundle.version}.json"
