"""What this device has trusted before, and so never goes below, even when python-tuf's own files are lost.

python-tuf refuses older metadata only while its cache is whole, and it syncs nothing to disk: after a power cut that
leaves a file empty, an attacker could replay an old repository. Pure rules; the updater keeps the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pitstop.errors import Untrusted

_REPLAY = "someone may be replaying an old copy: ask the publisher, or use another address of the repository"


@dataclass(frozen=True)
class Seen:
    """What verified metadata says of itself."""

    root: int  # version
    timestamp: int  # version
    snapshot: int  # version
    keyids: tuple[str, ...]  # of timestamp and snapshot, sorted
    issued: int  # seconds since 1970: when the publisher signed the timestamp
    expires: int  # seconds since 1970: when the timestamp ends


@dataclass(frozen=True)
class Floor:
    """The lowest this device still accepts."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    keyids: tuple[str, ...] = ()
    issued: int = 0  # it is this late at least: seconds since 1970
    counters: dict[str, int] = field(default_factory=dict)  # by bundle name


def rise(floor: Floor, seen: Seen, clock: float) -> Floor:
    """Return the floor after this metadata; ``clock`` is what the device takes for now, in seconds since 1970.

    Raises:
        Untrusted: older than what was seen before, or expired by a time that must have passed.
    """
    if seen.root < floor.root:
        raise Untrusted(f"root.json is version {seen.root}, version {floor.root} was seen before", cure=_REPLAY)
    if seen.root > floor.root and seen.keyids != floor.keyids:
        # New keys start afresh: a stolen one may have signed a version or a time nobody can reach.
        floor = Floor(counters=floor.counters)
    for what in ("timestamp", "snapshot"):
        found, known = getattr(seen, what), getattr(floor, what)
        if found < known:
            raise Untrusted(f"{what}.json is version {found}, version {known} was seen before", cure=_REPLAY)
    if seen.expires <= max(clock, floor.issued):
        raise Untrusted("timestamp.json has expired", cure=EXPIRED_CURE)
    return replace(
        floor,
        root=seen.root,
        timestamp=seen.timestamp,
        snapshot=seen.snapshot,
        keyids=seen.keyids,
        issued=max(floor.issued, min(seen.issued, seen.expires)),
    )


def rise_counters(floor: Floor, counters: Mapping[str, int]) -> Floor:
    """Return the floor after a channel that offers bundles with these counters.

    Raises:
        Untrusted: one is lower than what was offered before.
    """
    for name, counter in counters.items():
        if counter < floor.counters.get(name, 0):
            raise Untrusted(
                f"{name} is offered with counter {counter}, {floor.counters[name]} was offered before", cure=_REPLAY
            )
    return replace(floor, counters={**floor.counters, **counters})


EXPIRED_CURE = (
    "check the clock of this device; if it is right, the publisher has to publish again. "
    "The installed release keeps running"
)
