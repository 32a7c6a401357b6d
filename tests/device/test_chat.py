"""The terminal chat, with lines from a pipe and the real model."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pitstop.device.chat import Conversation, chat, converse
from pitstop.device.runtime import Limits, Runtime, UnknownModel
from pitstop.engines.base import Sampling
from serving import ALPHA, BASE, LIMITS, QUESTIONS, SAMPLING, Board


@pytest.fixture
def runtime(board: Board) -> Iterator[Runtime]:
    with Runtime.from_release(board.release, LIMITS) as runtime:
        yield runtime


def test_swap_keeps_a_history_per_model(board: Board, runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(runtime, BASE, SAMPLING)
    converse(
        conversation, [QUESTIONS[0], "/swap alpha", "", QUESTIONS[0], "/adapters", "/swap smollm2", "/quit", "never"]
    )
    said = capsys.readouterr().out
    assert said == "\n".join(
        [
            board.expected[BASE, QUESTIONS[0]],
            "now alpha",
            board.expected[ALPHA, QUESTIONS[0]],
            "  smollm2 1.0.0 (base)",
            "* alpha 1.0.0",
            "  beta 1.0.0",
            "now smollm2",
            "",
        ]
    )
    assert {name: len(history) for name, history in conversation.histories.items()} == {BASE: 2, ALPHA: 2}


def test_mistakes_are_said_and_the_chat_goes_on(
    board: Board, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(runtime, BASE, SAMPLING)
    converse(conversation, ["/swap gamma", "/help", "word " * 600, QUESTIONS[0]])
    captured = capsys.readouterr()
    for words in ("there is no model 'gamma'", "'/help' is not known here", "the prompt has"):
        assert words in captured.err
    assert captured.out.strip() == board.expected[BASE, QUESTIONS[0]]


def test_full_conversation_forgets_its_oldest_question(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    with Runtime.from_release(board.release, Limits(context_length=64, sequences=1, threads=1)) as runtime:
        conversation = Conversation(runtime, BASE, Sampling(max_tokens=4))
        converse(conversation, [QUESTIONS[0]] * 6)
    captured = capsys.readouterr()
    assert "the oldest question was forgotten" in captured.err
    assert len(captured.out.splitlines()) == 6
    assert len(conversation.histories[BASE]) < 12


def test_stats_say_what_an_answer_cost(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(runtime, ALPHA, replace(SAMPLING, max_tokens=5))
    converse(conversation, ["/stats", QUESTIONS[0], QUESTIONS[1], "/stats"])
    said = capsys.readouterr().out
    assert said.startswith("nothing was answered yet\nadapters in memory: none\n")
    assert re.search(r"\nthe last answer: 5 tokens, [0-9,.]+ tokens/s, the first after [0-9,]+ ms\n", said)
    assert (counts := re.search(r"\nits prompt: ([0-9]+) tokens, ([0-9]+) of them from", said))
    assert 0 < int(counts[2]) < int(counts[1])
    assert re.search(r"\nadapters in memory: alpha \([0-9.]+ MB\)\n$", said)


def test_interrupted_answer_stays_in_the_history(runtime: Runtime) -> None:
    conversation = Conversation(runtime, BASE, SAMPLING)
    answer = conversation.say(QUESTIONS[0])
    first = next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert conversation.histories[BASE][1] == {"role": "assistant", "content": first}


def test_chat_works_in_a_pipe(board: Board) -> None:
    code = (
        "import sys; from pathlib import Path; from pitstop.device.chat import chat; chat(Path(sys.argv[1]), 'alpha')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(board.root)],
        input="/adapters\n/quit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "* alpha" in done.stdout
    assert done.stderr == ""


def test_unknown_model_is_said(board: Board) -> None:
    with pytest.raises(UnknownModel):
        chat(board.root, "gamma", limits=LIMITS)
