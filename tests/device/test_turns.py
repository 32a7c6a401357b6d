"""Turns: everybody comes to theirs, first words soon, and a change pays for itself."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.device.turns import LONGEST, SHARE, Turns


@dataclass
class Asked:
    """A request, as turns see it."""

    use: str
    begun: bool = True
    place: object = None


def test_one_after_another() -> None:
    live = [Asked("a"), Asked("b"), Asked("c"), Asked("a")]
    turns = Turns()
    assert [turns.choose(live) for _ in range(6)] == [["a"], ["b"], ["c"], ["a"], ["b"], ["c"]]


def test_who_has_no_first_word_goes_first_but_not_twice_in_a_row() -> None:
    turns = Turns()
    live = [Asked("a"), Asked("b"), Asked("c", begun=False)]
    chosen = [turns.choose(live) for _ in range(4)]
    assert chosen == [["c"], ["a"], ["c"], ["b"]]


def test_those_in_different_places_go_together() -> None:
    turns = Turns()
    live = [Asked("a", place=1), Asked("b", place=2), Asked("c", place=1), Asked("d", place=3), Asked("e")]
    chosen = [turns.choose(live, 2) for _ in range(4)]
    assert chosen == [["a", "b"], ["c", "d"], ["e"], ["a", "b"]]


def test_a_prompt_is_read_alone() -> None:
    live = [Asked("a", place=1), Asked("b", begun=False, place=2), Asked("c", place=3)]
    turns = Turns()
    assert [turns.choose(live, 3) for _ in range(3)] == [["b"], ["a", "c"], ["b"]]


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=6), min_size=1))
def test_nobody_starves(rounds: list[list[tuple[str, bool]]]) -> None:
    """Whatever comes and goes, a request that stays is chosen within two turns for every other use."""
    turns, waited = Turns(), 0
    for number, others in enumerate(rounds * 3):
        live = [Asked("z", place="z"), *(Asked(use, begun, place=use) for use, begun in others)]
        waited = 0 if "z" in turns.choose(live, 1 + number % 3) else waited + 1
        assert waited <= 2 * 4 + 1


def test_a_turn_is_as_long_as_the_change_to_it_asks_for() -> None:
    turns = Turns()
    assert turns.steps == 1, "nothing is known yet"
    for _ in range(50):
        turns.took(0.010, changed=False)
        turns.took(0.014, changed=True)
    assert turns.steps == pytest.approx(0.004 / (SHARE * 0.010), abs=1)
    for _ in range(50):
        turns.took(10.0, changed=True)
    assert turns.steps == LONGEST


def test_a_change_that_costs_nothing_needs_no_long_turns() -> None:
    turns = Turns()
    for changed in (False, True) * 20:
        turns.took(0.010, changed=changed)
    assert turns.steps == 1
