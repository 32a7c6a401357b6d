import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.retention.looks import confidences, part

LOOKS = (0.25, 0.5, 1.0)


def crossings(looks: tuple[float, ...], bounds: list[float], runs: int = 200_000) -> float:
    """Return how often a statistic without drift is beyond its bound at one look or another."""
    random = np.random.default_rng(0)
    steps = np.diff([0.0, *looks])
    sums = np.cumsum(random.normal(size=(runs, len(looks))) * np.sqrt(steps), axis=1)
    return float((sums / np.sqrt(looks) > bounds).any(axis=1).mean())


def quantiles(levels: tuple[float, ...]) -> list[float]:
    random = np.sort(np.random.default_rng(1).normal(size=1_000_000))
    return [float(random[int(level * len(random))]) for level in levels]


@pytest.mark.parametrize("looks", [LOOKS, (0.5, 1.0), (0.1, 0.2, 0.4, 1.0), (1.0,)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_all_looks_together_are_wrong_as_rarely_as_promised(looks: tuple[float, ...], confidence: float) -> None:
    found = crossings(looks, quantiles(confidences(looks, confidence)))
    assert found == pytest.approx(1 - confidence, rel=0.06)


def test_looking_thrice_at_the_full_level_would_be_wrong_more_often() -> None:
    assert crossings(LOOKS, quantiles((0.95,) * 3)) > 0.09


def test_every_look_must_be_surer_than_all_together_and_the_first_the_surest() -> None:
    first, second, last = confidences(LOOKS, 0.95)
    assert first > second > last > 0.95
    assert first == pytest.approx(1 - 0.05 / 4, abs=1e-6)


@given(st.integers(0, 300), st.integers(1, 5), st.sampled_from([LOOKS, (1.0,), (0.3, 1.0)]))
def test_the_looks_see_everything_once(count: int, size: int, looks: tuple[float, ...]) -> None:
    things = list(range(count))
    parts = [part(things, looks, look, group=lambda thing: str(thing // size)) for look in range(1, len(looks) + 1)]
    assert sorted(thing for seen in parts for thing in seen) == things
    assert count == 0 or parts[0]


def test_a_first_look_is_a_random_part_of_a_sorted_suite() -> None:
    things = list(range(1000))
    first = part(things, LOOKS, 1, group=str)
    assert len(first) == 250
    assert 420 < sum(first) / 250 < 580
    assert first == part(things, LOOKS, 1, group=str)


def test_groups_stay_together() -> None:
    first, second = (part(list(range(400)), (0.5, 1.0), look, group=lambda thing: str(thing // 4)) for look in (1, 2))
    assert not {thing // 4 for thing in first} & {thing // 4 for thing in second}


def test_a_look_sees_enough_of_a_small_suite_to_judge_it() -> None:
    for count, sizes in ((30, [30, 0, 0]), (150, [100, 0, 50]), (1000, [250, 250, 500])):
        assert [len(part(list(range(count)), LOOKS, look, group=str)) for look in (1, 2, 3)] == sizes
