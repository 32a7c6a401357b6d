"""What every engine checks before and does with the text of an answer."""

import math
import time
from collections.abc import Callable, Collection, Sequence

from pitstop.engines.base import Sampling, Usage, Use
from pitstop.errors import UsageError

# Tokens that llama.cpp takes as the end of an answer by their text, whatever the model's settings say.
END_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
)  # fmt: skip


def check_use(use: Use, loaded: Collection[str]) -> tuple[tuple[str, float], ...]:
    """Return the adapters that change something, with their scales; ``Use()`` and a scale of 0 are the plain base.

    Raises:
        UsageError: no such adapter, one named twice, or a scale that is no finite number.
    """
    named = ((use.adapter, use.scale), *use.also) if use.adapter is not None else use.also
    for name, scale in named:
        if name not in loaded:
            have = ", ".join(loaded) or "none"
            raise UsageError(f"no adapter {name!r} is loaded", cure=f"load it, or name one of: {have}")
        if not math.isfinite(scale):
            raise UsageError(f"the scale of an adapter must be a finite number, not {scale}")
    if len({name for name, _ in named}) < len(named):
        raise UsageError("an adapter is named twice", cure="name it once, with the sum of its scales")
    return tuple((name, float(scale)) for name, scale in named if scale != 0.0)


def check_merged_alone(named: Sequence[tuple[str, float]], merged: Collection[str]) -> None:
    """Refuse a merged model with others, or with a scale of its own.

    Raises:
        UsageError: one of those named is asked for so.
    """
    for name, scale in named:
        if name in merged and (len(named) > 1 or scale != 1.0):
            what = f"{name} is merged into its base: it has one scale, and cannot be stacked with others"
            raise UsageError(what, cure="name it alone, without a scale")


def check_tokens(tokens: Sequence[int], context_length: int, vocabulary_size: int, *, answer: int = 0) -> None:
    """Refuse a prompt the model cannot take, or that leaves less than ``answer`` tokens of room.

    Raises:
        UsageError: no tokens, more than there is room for, or a number that is no token.
    """
    if not tokens:
        raise UsageError("the prompt is empty", cure="give at least one token")
    if len(tokens) + answer > context_length:
        rest = f", {answer} of them for the answer" if answer else ""
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, the context holds {context_length}{rest}",
            cure="shorten the prompt, or open the engine with a larger context_length",
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary_size:
        raise UsageError(f"a token lies outside of the vocabulary of {vocabulary_size}")


def check_sampling(sampling: Sampling, vocabulary_size: int) -> None:
    """Refuse sampling settings that mean nothing.

    Raises:
        UsageError: everything that is out of its range, at once.
    """
    penalties = (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    wrong = {
        f"temperature must be 0 or more, not {sampling.temperature}": not 0 <= sampling.temperature < math.inf,
        f"top_p must be above 0 and at most 1, not {sampling.top_p}": not 0 < sampling.top_p <= 1,
        f"top_k must be 0 (all tokens) or more, not {sampling.top_k}": sampling.top_k < 0,
        f"min_p must be from 0 to 1, not {sampling.min_p}": not 0 <= sampling.min_p <= 1,
        f"penalties must be finite numbers, that of repetition above 0, not {penalties}": not (
            all(map(math.isfinite, penalties)) and sampling.repeat_penalty > 0
        ),
        "a stop text must not be empty": "" in sampling.stop,
        f"logit_bias must name tokens below {vocabulary_size} and finite numbers": not all(
            0 <= token < vocabulary_size and math.isfinite(bias) for token, bias in sampling.logit_bias
        ),
        f"logprobs must be from 0 to {vocabulary_size}": not 0 <= (sampling.logprobs or 0) <= vocabulary_size,
        "a grammar and a JSON schema cannot both be followed": None not in (sampling.grammar, sampling.json_schema),
    }
    if problems := [words for words, is_wrong in wrong.items() if is_wrong]:
        raise UsageError("; ".join(problems))


class GrowingText:
    """The text of an answer while its tokens come; a character is passed on when all its bytes are there."""

    def __init__(self, detokenize: Callable[[Sequence[int]], str]) -> None:
        self._detokenize = detokenize
        self._tokens: list[int] = []  # those whose text is not all passed on, after one text that is
        self._passed = 0  # of the tokens: their text is

    def feed(self, token: int | None) -> str:
        """Take one more token, or None at the end, and return the text that became certain."""
        if token is not None:
            self._tokens.append(token)
        # Some tokenizers write a token otherwise where a text begins: so one that was passed on stays before.
        before, text = self._detokenize(self._tokens[: self._passed]), self._detokenize(self._tokens)
        if token is not None and text.endswith("\ufffd"):
            return ""
        if len(text) > len(before):
            self._tokens, self._passed = self._tokens[self._passed :], len(self._tokens) - self._passed
        return text[len(before) :]


class StopText:
    """Passes an answer's text on as far as no stop text can begin in it.

    The stop text that is complete first ends the answer, wherever the borders of the tokens lie.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # the end of the text, where a stop text may have begun

    def feed(self, text: str) -> str:
        """Take more text and return what is certain now; nothing after a stop."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [(begin + len(stop), begin) for stop in self._stop if (begin := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return what was held back: no stop text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text are a beginning of the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Wording:
    """Turns the tokens of one answer into its pieces, the same way for every engine, and says why it ended."""

    def __init__(
        self,
        room: int,
        sampling: Sampling,
        usage: Usage,
        text_of: Callable[[int | None], str],
        ends: Callable[[int], bool],
    ) -> None:
        """Begin an answer, now: the time to the first token counts from here.

        Args:
            room: tokens the context still has for the answer.
            text_of: the text that became certain with a token; None: what is left at the end.
            ends: whether a token ends the answer.
        """
        self._begun = time.perf_counter()
        self._limit = min(room, sampling.max_tokens)
        self._usage, self._text_of, self._ends = usage, text_of, ends
        self._stop = StopText(sampling.stop)
        usage.finish_reason = "length" if self._limit < 1 else ""

    @property
    def finished(self) -> bool:
        """Whether no more tokens are wanted."""
        return bool(self._usage.finish_reason)

    def take(self, token: int) -> str:
        """Take the next token and return the text that became certain with it."""
        usage = self._usage
        usage.completion_tokens += 1
        if usage.completion_tokens == 1:
            usage.first_token_seconds = time.perf_counter() - self._begun
        ended = self._ends(token)
        text = "" if ended else self._stop.feed(self._text_of(token))
        if ended or self._stop.stopped:
            usage.finish_reason = "stop"
        elif usage.completion_tokens == self._limit:
            usage.finish_reason = "length"
        if usage.finish_reason:
            text += self._stop.feed(self._text_of(None))
            usage.finish_reason = "stop" if self._stop.stopped else usage.finish_reason
            text += self._stop.finish()
        return text
