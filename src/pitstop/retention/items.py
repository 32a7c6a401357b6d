"""The items of suites, one dataclass for each kind, and what can be wrong with one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from pitstop.retention import checkers

Kind = Literal["choice", "cloze", "answer", "text", "chat"]


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt and its options; each option is scored as prompt + " " + option."""

    id: str
    group: str  # items of one group are resampled together
    prompt: str
    options: tuple[str, ...]
    answer: int  # index of the right option


@dataclass(frozen=True)
class ClozeItem:
    """A prompt and what comes next, after a space: right if the model itself would say so."""

    id: str
    group: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class AnswerItem:
    """A user's prompt, and the rule that the model's answer must keep."""

    id: str
    group: str
    prompt: str
    checker: str  # a name of `checkers.py`
    arguments: tuple[str, ...] = ()  # of the checker
    max_tokens: int = 48  # the answer is cut there, and the rule must be kept by then


@dataclass(frozen=True)
class TextItem:
    """A text whose every token after the first is scored; with something given, every token of it."""

    id: str
    group: str
    text: str
    given: str = ""  # what stands before the text, and is not scored


@dataclass(frozen=True)
class ChatItem:
    """A user's prompt and a reply; only the reply's tokens count."""

    id: str
    group: str
    prompt: str
    reply: str


Item = ChoiceItem | ClozeItem | AnswerItem | TextItem | ChatItem
SomeItem = TypeVar("SomeItem", ChoiceItem, ClozeItem, AnswerItem, TextItem, ChatItem)
ITEM_TYPES: dict[Kind, type[Item]] = {
    "choice": ChoiceItem,
    "cloze": ClozeItem,
    "answer": AnswerItem,
    "text": TextItem,
    "chat": ChatItem,
}


def item_problems(at: str, item: Item) -> Iterator[str]:
    """Yield what is wrong with an item, each with the place given."""
    if not item.id.strip() or not item.group.strip():
        yield f"{at}: id and group must not be empty"
    match item:
        case ChoiceItem():
            if len(item.options) < 2:
                yield f"{at}: a choice needs two options or more, here {len(item.options)}"
            if any(not option.strip() for option in item.options):
                yield f"{at}: an option is empty"
            if len({option.strip() for option in item.options}) < len(item.options):
                yield f"{at}: two options are the same"
            if not 0 <= item.answer < len(item.options):
                yield f"{at}: answer {item.answer} is out of range, options are 0 to {len(item.options) - 1}"
            if not item.prompt.strip():
                yield f"{at}: the prompt is empty"
        case ClozeItem():
            if not item.prompt.strip() or not item.answer.strip():
                yield f"{at}: prompt and answer must not be empty"
        case AnswerItem():
            if not item.prompt.strip():
                yield f"{at}: the prompt is empty"
            if item.max_tokens < 1:
                yield f"{at}: max_tokens is {item.max_tokens}, it must be 1 or more"
            for problem in checkers.problems(item.checker, item.arguments):
                yield f"{at}: {problem}"
        case TextItem():
            if not item.text.strip():
                yield f"{at}: the text is empty"
        case ChatItem():
            if not item.prompt.strip() or not item.reply.strip():
                yield f"{at}: prompt and reply must not be empty"
