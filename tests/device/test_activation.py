"""The rules alone, and every walk through them."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pitstop.device import activation
from pitstop.device.activation import TRIES, State
from pitstop.errors import Refused, UsageError


def test_the_first_release() -> None:
    state = activation.install(State(), "a")
    assert state == State(trial="a", tries=TRIES)
    state = activation.begin(state)
    assert state == State(trial="a", tries=TRIES - 1)
    assert activation.confirm(state) == State(good="a")


def test_a_bad_release_leaves_the_good_one() -> None:
    state = activation.reject(activation.begin(activation.install(State(good="a"), "b")))
    assert state == State(good="a", bad=("b",))
    with pytest.raises(Refused):
        activation.install(state, "b")


def test_a_boot_loop_ends_after_three_tries() -> None:
    state = activation.install(State(good="a"), "b")
    for left in (2, 1, 0):
        state = activation.begin(state)
        assert (state.trial, state.tries) == ("b", left)
    assert activation.begin(state) == State(good="a", bad=("b",))


def test_the_good_one_offered_again_ends_a_trial() -> None:
    assert activation.install(activation.install(State(good="a"), "b"), "a") == State(good="a")


def test_the_same_trial_again_gets_no_new_tries() -> None:
    state = activation.begin(activation.install(State(), "a"))
    assert activation.install(state, "a") == state


def test_roll_back() -> None:
    state = activation.confirm(activation.install(State(good="a"), "b"))
    assert state == State(good="b", previous="a")
    assert activation.roll_back(state) == State(good="a", bad=("b",))
    assert activation.roll_back(activation.install(state, "c")) == State(good="b", previous="a", bad=("c",))


def test_nothing_to_go_back_to() -> None:
    for state in (State(), State(good="a")):
        with pytest.raises(UsageError, match="no release to go back to"):
            activation.roll_back(state)
    for change in (activation.begin, activation.confirm, activation.reject, activation.untried):
        with pytest.raises(UsageError, match="no release is on trial"):
            change(State(good="a"))


def test_a_try_that_could_not_be_made_is_given_back() -> None:
    state = activation.install(State(), "a")
    assert activation.untried(activation.begin(state)) == state
    assert activation.untried(state) == state


def test_a_previous_release_that_fails_is_no_way_back() -> None:
    state = activation.confirm(activation.install(State(good="a"), "b"))
    assert activation.reject(activation.install(state, "a")) == State(good="b", bad=("a",))


def test_bad_releases_are_bounded() -> None:
    state = State(good="a")
    for number in range(activation.BAD_KEPT + 5):
        state = activation.reject(activation.install(state, str(number)))
    assert len(state.bad) == activation.BAD_KEPT
    assert state.bad[-1] == str(activation.BAD_KEPT + 4)


class Walk(RuleBasedStateMachine):
    """Any order of changes, against what an owner relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.proven: set[str] = set()  # confirmed at some time
        self.begun = 0  # tries of this trial since it was installed, less those given back

    @rule(release=st.sampled_from("abcdef"))
    def install(self, release: str) -> None:
        before = self.state
        if release in before.bad:
            with pytest.raises(Refused):
                activation.install(before, release)
            return
        self.state = activation.install(before, release)
        assert self.state.good == before.good
        if self.state.trial != before.trial:
            self.begun = 0

    @precondition(lambda self: self.state.trial)
    @rule()
    def begin(self) -> None:
        before = self.state
        self.state = activation.begin(before)
        if self.state.trial:
            self.begun += 1
            assert self.begun <= TRIES
        else:
            assert self.begun == TRIES
            assert before.trial in self.state.bad

    @precondition(lambda self: self.state.trial and self.begun)
    @rule()
    def untried(self) -> None:
        self.state = activation.untried(self.state)
        self.begun -= 1

    @precondition(lambda self: self.state.trial and self.begun)
    @rule()
    def confirm(self) -> None:
        before = self.state
        self.state = activation.confirm(before)
        assert self.state.good == before.trial
        assert self.state.previous == before.good
        self.proven.add(str(before.trial))

    @precondition(lambda self: self.state.trial)
    @rule()
    def reject(self) -> None:
        before = self.state
        self.state = activation.reject(before)
        assert self.state.good == before.good

    @precondition(lambda self: self.state.trial or self.state.previous)
    @rule()
    def roll_back(self) -> None:
        before = self.state
        self.state = activation.roll_back(before)
        assert self.state.good == (before.good if before.trial else before.previous)

    @invariant()
    def only_proven_releases_serve(self) -> None:
        assert self.state.good is None or self.state.good in self.proven

    @invariant()
    def what_serves_is_not_bad(self) -> None:
        assert not self.state.releases & set(self.state.bad)

    @invariant()
    def a_trial_is_no_good_one(self) -> None:
        assert self.state.trial is None or self.state.trial != self.state.good
        assert 0 <= self.state.tries <= TRIES
        assert self.state.trial or not self.state.tries

    @invariant()
    def something_serves_once_something_was_proven(self) -> None:
        assert bool(self.state.good) == bool(self.proven)


TestWalk = Walk.TestCase
