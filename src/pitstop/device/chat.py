"""Talk to the active release in the terminal, in this process, without a server."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pitstop.device.memory import give_back_freed_memory
from pitstop.device.request import Finished, Limits, PromptTooLong
from pitstop.device.runtime import Runtime, active_release
from pitstop.engines.base import Sampling
from pitstop.errors import PitstopError, UsageError

HELP = (
    "/swap NAME asks another model · /adapters lists them · /stats says what it costs · /quit ends "
    "(Ctrl-C stops an answer)"
)


@dataclass
class Conversation:
    """Conversations with the models of a runtime, one history each."""

    runtime: Runtime
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    histories: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    finished: Finished | None = None  # of the last answer that came to its end

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer of the model that listens now; what was answered joins the history, even if cut short.

        Raises:
            PitstopError: it cannot answer; the history is as it was.
        """
        history = self.histories.setdefault(self.model, [])
        spoken: list[str] = []
        try:
            for piece in self._answer([*history, {"role": "user", "content": text}]):
                spoken.append(piece)
                yield piece
        finally:
            if spoken:
                history += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(spoken)}]

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        with self.runtime.ask(self.model, messages, self.sampling) as answer:
            yield from answer
            self.finished = answer.finished

    def swap(self, name: str) -> None:
        """Let another model listen; each remembers its own conversation.

        Raises:
            UnknownModel: it is not served.
        """
        self.model = self.runtime.model(name).name

    def forget_oldest(self) -> bool:
        """Drop the first question and answer; tell whether there was one."""
        history = self.histories.get(self.model, [])
        dropped = bool(history)
        del history[:2]
        return dropped


def chat(root: Path, model: str | None = None, *, limits: Limits | None = None, max_tokens: int = 512) -> None:
    """Talk to a model of the active release: lines from stdin, answers on stdout as they come.

    Raises:
        UsageError: no release is active, or it has no such model.
        BrokenInput: the release cannot be loaded.
    """
    release = active_release(root)
    give_back_freed_memory()
    with Runtime.from_release(release, limits) as runtime:
        name = runtime.model(model or release.base.name).name
        conversation = Conversation(runtime, name, Sampling(max_tokens=max_tokens))
        terminal = sys.stdin.isatty()
        if terminal:
            print(HELP)
        converse(conversation, _typed(conversation) if terminal else sys.stdin)


def converse(conversation: Conversation, lines: Iterable[str]) -> None:
    """Answer lines until they end or one says /quit; an error is shown and the next line taken."""
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _command(conversation, line)
            elif line:
                _reply(conversation, line)
        except PitstopError as error:
            print(error, file=sys.stderr)


def _command(conversation: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/swap" and rest:
        conversation.swap(rest.strip())
        print(f"now {conversation.model}")
    elif name == "/adapters":
        for model in conversation.runtime.models:
            mark = "*" if model.name == conversation.model else " "
            print(f"{mark} {model.name} {model.bundle.version}" + ("" if model.path else " (base)"))
    elif name == "/stats":
        print("\n".join(_stats(conversation)))
    else:
        raise UsageError(f"{line!r} is not known here", cure=HELP)


def _stats(conversation: Conversation) -> Iterator[str]:
    """Yield what the last answer cost, and what is in memory."""
    if conversation.finished is None:
        yield "nothing was answered yet"
    else:
        cost = conversation.finished.usage
        seconds = conversation.finished.seconds - cost.first_token_seconds
        speed = f"{(cost.completion_tokens - 1) / seconds:,.1f} tokens/s, " if seconds > 0 else ""
        first = f"the first after {cost.first_token_seconds * 1000:,.0f} ms"
        yield f"the last answer: {cost.completion_tokens} tokens, {speed}{first}"
        yield f"its prompt: {cost.prompt_tokens} tokens, {cost.reused_tokens} of them from the conversation before"
    inside = conversation.runtime.resident_bytes
    yield "adapters in memory: " + (
        ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in inside.items()) or "none"
    )


def _reply(conversation: Conversation, text: str) -> None:
    try:
        for piece in conversation.say(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except PromptTooLong:
        if not conversation.forget_oldest():
            raise
        print("(the oldest question was forgotten: the conversation is full)", file=sys.stderr)
        _reply(conversation, text)
        return
    print(flush=True)


def _typed(conversation: Conversation) -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing where Python has it)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(f"{conversation.model}> ")
