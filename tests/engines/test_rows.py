"""How many rows are evaluated at once: learned, and learned again."""

import pytest

from pitstop.engines.llama.rows import AGAIN, KEPT, Rows


def step(rows: Rows, count: int, cost: dict[int, float], threads: int = 1, adapted: bool = False) -> int:
    """Evaluate so many rows as it is said, each number at its cost; return how many were at once."""
    at_once = rows.at_once(count, threads, adapted)
    for _ in range(count // at_once):
        rows.took(at_once, threads, adapted, cost[at_once])
    return at_once


@pytest.mark.parametrize(("cost", "best"), [({1: 6.4, 2: 26.0}, 1), ({1: 5.0, 2: 6.0}, 2)])
def test_the_faster_way_is_found_and_kept(cost: dict[int, float], best: int) -> None:
    rows = Rows()
    chosen = [step(rows, 2, cost) for _ in range(AGAIN - 1)]
    assert set(chosen[:2]) == {1, 2}, "both ways are tried"
    assert set(chosen[2:]) == {best}


def test_what_changes_is_noticed() -> None:
    rows = Rows()
    for _ in range(AGAIN):
        step(rows, 2, {1: 6.4, 2: 26.0})
    chosen = [step(rows, 2, {1: 6.4, 2: 8.0}) for _ in range((KEPT + 1) * AGAIN)]
    assert chosen[-AGAIN:].count(2) == AGAIN - 1


def test_threads_and_adapters_are_told_apart() -> None:
    rows = Rows()
    for _ in range(4):
        step(rows, 2, {1: 6.0, 2: 26.0})
        step(rows, 2, {1: 6.0, 2: 7.0}, threads=2)
        step(rows, 2, {1: 6.0, 2: 7.0}, adapted=True)
    assert step(rows, 2, {1: 6.0, 2: 26.0}) == 1
    assert step(rows, 2, {1: 6.0, 2: 7.0}, threads=2) == 2
    assert step(rows, 2, {1: 6.0, 2: 7.0}, adapted=True) == 2
    assert step(rows, 4, {1: 6.0, 4: 9.0}) == 4, "a number that is new is tried"
