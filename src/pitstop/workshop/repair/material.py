"""What a repair measures on: items the search may look at, and items only the verdict sees.

The parts never share a group. The search works with figures that vary smoothly, so it needs fewer items of a suite than
the verdict, which counts right answers; of the task's rows each gets half.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import BaseRef
from pitstop.errors import UsageError
from pitstop.retention.overlap import trained_on
from pitstop.retention.suite import ChatItem, ChoiceItem, Suite, TextItem
from pitstop.retention.task import TaskRow
from pitstop.workshop.check import load_suites, training_texts
from pitstop.workshop.dataset import Example, encode, encode_general, load_split, spread
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.task import task_prompting, task_rows
from pitstop.workshop.training.material import invocation_tokens

SUITE_SHARE = 1 / 3  # of a suite's groups that the search may see
SEARCH_GROUPS = 120  # of a suite, at most: a search measures them for every candidate
VERDICT_GROUPS = 400  # of a suite that the verdict on a repair sees, at most; `check` measures all
TASK_SHARE = 1 / 2  # of the task's groups
SCREEN_ROWS = 32  # of general text
SCREEN_TASK_ROWS = 16  # of those the adapter was trained on
SCREEN_TOKENS = 64  # of a general row
REPLAY_FILE = "replay.jsonl"  # made by `pitstop suites build` beside the suites; no suite holds any of it


class _Grouped(Protocol):
    @property
    def group(self) -> str: ...


Grouped = TypeVar("Grouped", bound=_Grouped)


@dataclass(frozen=True)
class Part:
    """Items that are measured together."""

    suites: tuple[Suite, ...]
    rows: tuple[TaskRow, ...]

    def ids(self) -> dict[str, frozenset[str]]:
        """Return the ids of the items by suite."""
        return {suite.name: frozenset(item.id for item in suite.items) for suite in self.suites}

    def answers(self) -> dict[tuple[str, str], int]:
        """Return which option is right, by suite and item."""
        return {(suite.name, item.id): item.answer for suite in self.suites for item in suite.of(ChoiceItem)}


@dataclass(frozen=True)
class Screen:
    """Rows to learn from where to look: none of them is in any suite, or among the task's held-out rows."""

    general: tuple[Example, ...]
    task: tuple[Example, ...]


@dataclass(frozen=True)
class Material:
    """Everything a repair measures on."""

    whole: Part  # all that is measured: the items of search and verdict, none of which was trained on
    search: Part
    verdict: Part
    screen: Screen


def gather(recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Read suites, task and general rows, and split what is measured.

    Raises:
        UsageError: there are no suites, or one of too few groups.
        DatasetError: suites or rows that cannot be used.
    """
    found = load_suites(recipe)
    aside = trained_on(found, training_texts(recipe))
    suites = [_only(suite, [item for item in suite.items if item.id not in aside[suite.name]]) for suite in found]
    rows = task_rows(recipe, ref)
    divided = {suite.name: divide(suite.items, SUITE_SHARE, SEARCH_GROUPS) for suite in suites}
    seen_rows, sealed_rows = divide(rows, TASK_SHARE)
    search = tuple(_only(suite, divided[suite.name][0]) for suite in suites)
    verdict = tuple(_only(suite, divide(divided[suite.name][1], 1.0, VERDICT_GROUPS)[0]) for suite in suites)
    parts = Part(search, tuple(seen_rows)), Part(verdict, tuple(sealed_rows))
    for part in parts:
        _refuse_empty(part)
    whole = tuple(_only(one, one.items + other.items) for one, other in zip(search, verdict, strict=True))
    return Material(
        Part(whole, tuple(rows)),
        *parts,
        Screen(_general(recipe, ref, tokenizer, search), _task(recipe, ref, tokenizer)),
    )


def divide(items: Sequence[Grouped], share: float, most: int | None = None) -> tuple[list[Grouped], list[Grouped]]:
    """Split items by a hash of their group: the first part has this share of the groups, the other one the rest.

    Args:
        most: groups that the first part has at most.
    """
    groups = sorted({item.group for item in items}, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    first = set(groups[: min(round(len(groups) * share), most or len(groups))])
    return [item for item in items if item.group in first], [item for item in items if item.group not in first]


def _refuse_empty(part: Part) -> None:
    empty = [suite.name for suite in part.suites if suite.record.purpose == "retention" and not suite.items]
    if all(suite.record.kind == "answer" for suite in part.suites if suite.record.purpose == "retention"):
        raise UsageError(
            "the suites have generated answers only, and a search needs likelihoods",
            cure="build text or choice suites beside them: pitstop suites build",
        )
    if empty or not part.rows:
        what = f"suite {empty[0]}" if empty else "task's held-out rows"
        raise UsageError(
            f"the {what} cannot be split: a search and its verdict need groups of their own",
            cure="measure larger suites (pitstop suites build), or hold out rows of more groups",
        )


def _only(suite: Suite, items: Sequence[Any]) -> Suite:
    # The record stays the whole suite's: figures of a part are compared with figures of the same suite only.
    return Suite(suite.record, tuple(items))


def _task(recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, ...]:
    training, _ = load_split(recipe.data)
    chosen = spread(training, 4 * SCREEN_TASK_ROWS)
    return encode(chosen, tokenizer, task_prompting(recipe, ref), recipe.data.max_tokens).examples[:SCREEN_TASK_ROWS]


def _general(
    recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase, search: Sequence[Suite]
) -> tuple[Example, ...]:
    """Return general rows: those of the recipe, else those that come with the suites, else the search's drift texts."""
    invocation = invocation_tokens(recipe, tokenizer)
    rows = recipe.retain.rows or recipe.check.suites / REPLAY_FILE
    if rows.is_file():
        found = encode_general(rows, tokenizer, ref.prompting, SCREEN_TOKENS, invocation)
        # From end to end: such files hold one source after another.
        return tuple(found[at * len(found) // SCREEN_ROWS] for at in range(min(SCREEN_ROWS, len(found))))
    texts = [text for suite in search if suite.record.purpose == "drift" for text in _texts(suite)]
    texts = texts or [text for suite in search if suite.record.kind == "text" for text in _texts(suite)]
    if not texts:
        raise UsageError(
            "there is no general text to look at",
            where=recipe.check.suites,
            cure="name general rows in the recipe ([retain] rows), or build the suites: pitstop suites build",
        )
    encoded = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[:SCREEN_ROWS])
    cut = ((*invocation, *tokens)[: len(invocation) + SCREEN_TOKENS] for tokens in encoded)
    return tuple(Example(tokens, len(invocation) + 1) for tokens in cut if len(tokens) > len(invocation) + 1)


def _texts(suite: Suite) -> list[str]:
    texts = [item.text for item in suite.items if isinstance(item, TextItem)]
    return texts + [f"{item.prompt} {item.reply}" for item in suite.items if isinstance(item, ChatItem)]
