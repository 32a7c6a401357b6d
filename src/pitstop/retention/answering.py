"""Answer suites: a user's prompt in the base's chat format, an answer generated greedily, a rule it keeps or breaks."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import Engine, Sampling, Use
from pitstop.engines.invocation import with_invocation
from pitstop.engines.template import render
from pitstop.errors import UsageError
from pitstop.retention.checkers import meets
from pitstop.retention.scoring import ChoiceScore
from pitstop.retention.suite import AnswerItem, Suite

TOGETHER = 128  # answers asked for at once: an engine fills the places of those that end with others of them


@dataclass(frozen=True)
class Asked:
    """An item as the tokens of its prompt."""

    item: AnswerItem
    prompt: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens it takes at most, read and written."""
        return len(self.prompt) + self.item.max_tokens


def prepare(
    engine: Engine, suite: Suite, invocation: Sequence[int], prompting: Prompting | None
) -> tuple[tuple[Asked, ...], tuple[str, ...]]:
    """Render a suite's prompts; items that leave no room for an answer are excluded by id.

    Raises:
        UsageError: there is no prompting, or its template refuses a prompt.
    """
    if prompting is None:
        raise UsageError(
            f"suite {suite.name} needs the base's chat template: its answers are generated",
            cure="hand over the base's prompting, or leave this suite out",
        )
    found = []
    for item in suite.of(AnswerItem):
        rendered = render(prompting, [{"role": "user", "content": item.prompt}])
        found.append(Asked(item, with_invocation(engine.tokenize(rendered), invocation)))
    fits = [bool(one.prompt) and one.tokens <= engine.context_length for one in found]
    excluded = tuple(one.item.id for one, fit in zip(found, fits, strict=True) if not fit)
    return tuple(one for one, fit in zip(found, fits, strict=True) if fit), excluded


def answer(engine: Engine, asked: Sequence[Asked], use: Use, advance: Callable[[float], None]) -> list[ChoiceScore]:
    """Let the model answer every prompt, and hold each answer against its rule; in the order of the items.

    Raises:
        UsageError: no such adapter.
    """
    said: dict[str, str] = {}
    # Answers of one length limit go together, and of these prompts of like length.
    ordered = sorted(asked, key=lambda one: (one.item.max_tokens, -len(one.prompt)))
    for limit, alike in itertools.groupby(ordered, key=lambda one: one.item.max_tokens):
        rows = list(alike)
        for begin in range(0, len(rows), TOGETHER):
            batch = rows[begin : begin + TOGETHER]
            texts = engine.generate_batch([one.prompt for one in batch], use, Sampling(max_tokens=limit))
            said.update(zip((one.item.id for one in batch), texts, strict=True))
            advance(sum(one.tokens for one in batch))
    return [_judged(one.item, said[one.item.id]) for one in asked]


def _judged(item: AnswerItem, said: str) -> ChoiceScore:
    right = meets(said, item.checker, item.arguments)
    return ChoiceScore(item.id, item.group, right, 0 if right else -1, 0.0, (), (), said)
