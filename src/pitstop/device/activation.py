"""Which state of a device may follow which: pure rules, no disk.

    install      a release goes on trial, beside the good one that keeps serving
    begin        one try is used up, written down before anything is loaded
    confirm      the release on trial becomes the good one
    reject       it failed: it is bad, and is never installed again
    untried      it could not be tried for a reason of the machine: the try is given back
    roll_back    the owner goes back: from the trial to the good one, from the good one to the one before

A power cut or a crash can come between any two: a release that takes the machine down with it uses up its tries.
"""

from dataclasses import dataclass, replace

from pitstop.errors import Refused, UsageError

TRIES = 3
BAD_KEPT = 64  # newest bad releases remembered


@dataclass(frozen=True)
class State:
    """What is installed; a release goes by the SHA-256 of its file."""

    good: str | None = None  # proven here; it serves
    trial: str | None = None  # installed and not yet proven
    tries: int = 0  # left for the trial
    previous: str | None = None  # good before `good`
    bad: tuple[str, ...] = ()  # failed or rolled back here, oldest first

    @property
    def releases(self) -> frozenset[str]:
        """Every release whose files must stay."""
        return frozenset(release for release in (self.good, self.trial, self.previous) if release)


def install(state: State, release: str) -> State:
    """Put a release on trial; the good one offered again only ends a trial.

    Raises:
        Refused: it failed or was rolled back here before.
    """
    if release in state.bad:
        raise Refused(
            f"release {release[:12]} failed or was rolled back on this device before",
            cure="publish a repaired bundle with a higher counter; the installed release stays",
        )
    if release == state.trial:
        return state
    if release == state.good:
        return replace(state, trial=None, tries=0)
    return replace(state, trial=release, tries=TRIES)


def begin(state: State) -> State:
    """Use up one try of the trial; without a try left the trial is bad.

    Raises:
        UsageError: nothing is on trial.
    """
    _require_trial(state)
    if state.tries == 0:
        return reject(state)
    return replace(state, tries=state.tries - 1)


def untried(state: State) -> State:
    """Give back the try that was begun.

    Raises:
        UsageError: nothing is on trial.
    """
    _require_trial(state)
    return replace(state, tries=min(state.tries + 1, TRIES))


def confirm(state: State) -> State:
    """Make the trial the good release.

    Raises:
        UsageError: nothing is on trial.
    """
    return replace(state, good=_require_trial(state), trial=None, tries=0, previous=state.good)


def reject(state: State) -> State:
    """Mark the trial bad; the good release stays.

    Raises:
        UsageError: nothing is on trial.
    """
    failed = _require_trial(state)
    previous = None if state.previous == failed else state.previous
    return replace(state, trial=None, tries=0, previous=previous, bad=_with(state.bad, failed))


def roll_back(state: State) -> State:
    """Leave the newest release: the one on trial, or else the good one for the one before it.

    Raises:
        UsageError: there is nothing to go back to.
    """
    if state.trial:
        return reject(state)
    if state.good is None or state.previous is None:
        raise UsageError("there is no release to go back to", cure="run `pitstop update` to install what is offered")
    return replace(state, good=state.previous, previous=None, bad=_with(state.bad, state.good))


def _require_trial(state: State) -> str:
    if state.trial is None:
        raise UsageError("no release is on trial", cure="run `pitstop update` to install one")
    return state.trial


def _with(bad: tuple[str, ...], release: str) -> tuple[str, ...]:
    return (*(known for known in bad if known != release), release)[-BAD_KEPT:]
