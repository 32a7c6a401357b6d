"""Which words of a rendered conversation are the assistant's: what the loss may count.

A template says so itself where it has `{% generation %}` blocks. Of another, each answer is what its message adds to
the render that ends where the assistant begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pitstop.bundle.manifest import Prompting
from pitstop.engines.template import Message, generated, render


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation."""

    text: str
    answer: bool  # the assistant's own words and what ends its turn


def conversations(
    prompting: Prompting, messages: Sequence[Message], *, one_answer: bool = False
) -> Iterator[list[Piece]]:
    """Yield the pieces of what a row teaches: one render with all its answers where that is possible.

    A template that words earlier turns another way than it worded them when they were generated (Qwen 3 drops what was
    thought) makes one render an answer, each with the past it has on the device; so does ``one_answer``.

    Raises:
        UsageError: the template refuses these messages.
    """
    asked = next(at for at, message in enumerate(messages) if message["role"] == "user")
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at > asked]
    if not one_answer:
        whole = _as_the_template_says(prompting, messages) or _differences(prompting, messages, answers)
        if whole:
            yield whole
            return
    for at in answers:
        yield _one(prompting, messages[: at + 1])


def _as_the_template_says(prompting: Prompting, messages: Sequence[Message]) -> list[Piece]:
    text, spans = generated(prompting, messages)
    return _cut(text, spans)


def _differences(prompting: Prompting, messages: Sequence[Message], answers: Sequence[int]) -> list[Piece]:
    """Return the pieces of one render; none if an answer's render is no part of it."""
    whole = render(prompting, messages, add_generation_prompt=False)
    spans = []
    for at in answers:
        before = render(prompting, messages[:at])
        until = render(prompting, messages[: at + 1], add_generation_prompt=False)
        if not until.startswith(before) or not whole.startswith(until):
            return []
        answer = _ended(until[len(before) :], messages[at]["content"], prompting)
        if not whole.startswith(before + answer):
            return []
        spans.append((len(before), len(before) + len(answer)))
    return _cut(whole, spans)


def _one(prompting: Prompting, messages: Sequence[Message]) -> list[Piece]:
    before, content = render(prompting, messages[:-1]), messages[-1]["content"]
    until = render(prompting, messages, add_generation_prompt=False)
    added = until.removeprefix(before) if until.startswith(before) else content
    return [Piece(before, False), Piece(_ended(added, content, prompting), True)]


def _ended(added: str, content: str, prompting: Prompting) -> str:
    """Return an answer with what ends its turn, but not the line breaks that follow: nobody waits for those."""
    if added.startswith(content):
        end = added[len(content) :].rstrip()
        return content + (end or prompting.eos_token)
    end = added.rstrip()
    return end + prompting.eos_token if end == content.strip() else end


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces, end = [], 0
    for begin, until in spans:
        pieces += [Piece(text[end:begin], False), Piece(text[begin:until], True)]
        end = until
    return [piece for piece in pieces if piece.text]
