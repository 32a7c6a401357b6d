import pytest

from forgetting import accuracy
from pitstop.retention.flips import flips


def test_flips_count_what_the_drop_hides() -> None:
    found = flips(accuracy("words", items=200, lost=30, gained=30, right=0.75, chance=0.25))
    assert (found.forgotten, found.gained, found.churn) == (0.15, 0.15, 0.3)
    # k = 4: (1 - .75) / 3 are right by luck, and stay wrong with probability 1 - .75.
    assert found.by_chance == pytest.approx(0.25 / 3 * 0.25)
    assert found.truly_forgotten == pytest.approx(0.15 - 0.25 / 12)
    assert found.ceiling == pytest.approx((4 * 0.75 - 1) / 3)


def test_without_flips_nothing_is_forgotten() -> None:
    found = flips(accuracy("words", items=200, right=0.6, chance=0.5))
    assert (found.forgotten, found.gained, found.truly_forgotten) == (0.0, 0.0, 0.0)


def test_guessing_forgets_nothing_beyond_chance() -> None:
    found = flips(accuracy("guessed", items=400, lost=80, gained=80, right=0.5, chance=0.5))
    assert found.ceiling == 0.0
    assert found.by_chance == pytest.approx(0.25)
    assert found.truly_forgotten == 0.0
