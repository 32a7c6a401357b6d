import pytest

from pitstop.device.floor import Floor, Seen, rise, rise_counters
from pitstop.errors import Untrusted

SEEN = Seen(root=1, timestamp=5, snapshot=4, keyids=("k",), issued=1_000, expires=2_000)
FLOOR = Floor(root=1, timestamp=5, snapshot=4, keyids=("k",), issued=1_000)


def changed(**values: object) -> Seen:
    return Seen(**{**SEEN.__dict__, **values})  # type: ignore[arg-type]


def test_it_follows_what_was_seen() -> None:
    assert rise(Floor(), SEEN, clock=1_500) == FLOOR
    assert rise(FLOOR, SEEN, clock=1_500) == FLOOR
    newer = changed(timestamp=6, snapshot=5, issued=1_400)
    assert rise(FLOOR, newer, clock=1_500) == Floor(1, 6, 5, ("k",), 1_400)


@pytest.mark.parametrize("older", [{"root": 0}, {"timestamp": 4}, {"snapshot": 3}])
def test_older_is_refused(older: dict[str, int]) -> None:
    with pytest.raises(Untrusted, match="seen before"):
        rise(FLOOR, changed(**older), clock=1_500)


def test_expired_by_the_clock_or_by_what_was_signed_before() -> None:
    with pytest.raises(Untrusted, match="expired"):
        rise(Floor(), SEEN, clock=2_000)
    later = Floor(1, 5, 4, ("k",), issued=2_500)
    with pytest.raises(Untrusted, match="expired"):
        rise(later, SEEN, clock=0)


def test_a_signed_time_counts_no_further_than_its_own_end() -> None:
    assert rise(Floor(), changed(issued=9_999_999), clock=1_500).issued == SEEN.expires


def test_new_keys_start_afresh_after_a_theft() -> None:
    stolen = Floor(1, 2**31, 2**31, ("k",), issued=10**9, counters={"home": 3})
    with pytest.raises(Untrusted):
        rise(stolen, changed(keyids=("new",)), clock=1_500)
    assert rise(stolen, changed(root=2, keyids=("new",)), clock=1_500) == Floor(2, 5, 4, ("new",), 1_000, {"home": 3})
    with pytest.raises(Untrusted):
        rise(stolen, changed(root=2), clock=1_500)


def test_counters_never_fall() -> None:
    floor = rise_counters(FLOOR, {"home": 3})
    assert rise_counters(floor, {"home": 3, "address": 1}).counters == {"home": 3, "address": 1}
    assert rise_counters(floor, {"address": 1}).counters == {"home": 3, "address": 1}
    with pytest.raises(Untrusted, match="home is offered with counter 2"):
        rise_counters(floor, {"home": 2})
