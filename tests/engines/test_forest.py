"""Many sequences in one evaluation: each gets what it would get alone, and what they share is evaluated once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.base import PLAIN_BASE, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.llama.forest import OUTPUTS, SEQUENCES, fits, forests
from pitstop.engines.llama.native import BATCH, Context
from pitstop.errors import UsageError

Make = Callable[..., Path]
ROUNDING = 0.1  # as in test_contract: what evaluation in other portions may move a logit by
QUESTION = "Question: what is red and round?\nAnswer:"
OPTIONS = (" a tomato", " a table", " the sea", " a tomato that is not yet ripe", " a tomato")

rows = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(st.lists(st.tuples(rows, st.integers(0, 11)), max_size=200))
def test_every_sequence_is_a_path_and_no_node_is_there_twice(drawn: list[tuple[list[int], int]]) -> None:
    wanted = [(row, min(first, len(row) - 1)) for row, first in drawn]
    found = list(forests(wanted))
    assert sum(len(forest.paths) for forest in found) == len(wanted)
    entries = iter(wanted)
    for forest in found:
        assert len(forest.tokens) <= BATCH
        assert len(forest.paths) <= SEQUENCES
        assert sum(forest.wanted) <= OUTPUTS
        prefixes = set()
        for number, (path, first) in enumerate(zip(forest.paths, forest.firsts, strict=True)):
            row, expected_first = next(entries)
            assert [forest.tokens[node] for node in path] == row
            assert [forest.positions[node] for node in path] == list(range(len(row)))
            assert path == sorted(path), "parents come first"
            assert all(number in forest.members[node] for node in path)
            assert first == expected_first
            assert all(forest.wanted[node] for node in path[first:])
            prefixes |= {tuple(row[: at + 1]) for at in range(len(row))}
        assert len(forest.tokens) == len(prefixes)


def test_what_is_too_long_is_evaluated_by_itself() -> None:
    assert fits([1] * BATCH, BATCH - 1)
    assert not fits([1] * (BATCH + 1), BATCH)
    assert not fits([1] * (OUTPUTS + 1), 0)


def options(engine: LlamaEngine) -> tuple[list[list[int]], list[int]]:
    texts = [f"{QUESTION}{option}" for option in OPTIONS] + ["Once upon a time", f"{QUESTION} no"]
    found = [engine.tokenize(text) for text in texts]
    return found, [0, 3, 5, 7, len(found[4]) - 1, 0, 2]


@pytest.mark.parametrize("use", [PLAIN_BASE, Use("one"), Use("one", 0.5), Use("one", also=(("two", 1.0),))])
def test_each_gets_what_it_would_get_alone(llama: LlamaEngine, gguf_adapter: Make, use: Use) -> None:
    llama.load_adapter("one", gguf_adapter())
    llama.load_adapter("two", gguf_adapter(seed=2))
    sequences, firsts = options(llama)
    for row, first, found in zip(sequences, firsts, llama.logits_batch(sequences, use, firsts=firsts), strict=True):
        alone = llama.logits(row, use, first=first)
        assert found.shape == alone.shape
        assert np.abs(found - alone).max() < ROUNDING
    assert list(llama.logits_batch([], use)) == []


def test_what_is_shared_is_evaluated_once(llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []
    decode = Context.decode_forest

    def count(context: Context, tokens: Any, *rest: Any) -> int:
        evaluated.append(len(tokens))
        return decode(context, tokens, *rest)

    monkeypatch.setattr(Context, "decode_forest", count)
    question = llama.tokenize(QUESTION)
    list(llama.logits_batch([[*question, token] for token in range(40)]))
    assert evaluated == [len(question) + 40]


def test_an_adapter_leaves_nothing_behind(llama: LlamaEngine, gguf_adapter: Make) -> None:
    sequences, _ = options(llama)
    before = list(llama.logits_batch(sequences))
    llama.load_adapter("one", gguf_adapter(size=2.0))
    adapted = list(llama.logits_batch(sequences, Use("one")))
    assert np.abs(adapted[0] - before[0]).max() > 1
    llama.unload_adapter("one")
    for one, other in zip(before, llama.logits_batch(sequences), strict=True):
        assert np.array_equal(one, other)


def test_an_activated_adapter_acts_from_its_invocation_on(llama: LlamaEngine, gguf_adapter: Make) -> None:
    invocation = llama.tokenize("\nAnswer:")
    llama.load_adapter("activated", gguf_adapter(size=2.0, invocation=invocation))
    sequences, _ = options(llama)
    for row, found in zip(sequences, llama.logits_batch(sequences, Use("activated")), strict=True):
        assert np.abs(found - llama.logits(row, Use("activated"))).max() < ROUNDING


def test_a_long_sequence_among_short_ones(llama: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pitstop.engines.llama.forest.OUTPUTS", 16)
    short = llama.tokenize(QUESTION)
    long = short * 2
    assert fits(short, 0)
    assert not fits(long, 0)
    found = list(llama.logits_batch([short, long, short], firsts=[0, 0, 5]))
    assert [len(row) for row in found] == [len(short), len(long), len(short) - 5]
    assert np.array_equal(found[0][5:], found[2])
    with pytest.raises(UsageError, match="first is"):
        list(llama.logits_batch([short], firsts=[len(short)]))
    with pytest.raises(UsageError):
        list(llama.logits_batch([[0] * (llama.context_length + 1)]))


def test_values_that_are_not_finite_do_not_stay(llama: LlamaEngine, gguf_adapter: Make) -> None:
    sequences, _ = options(llama)
    before = list(llama.logits_batch(sequences))
    llama.load_adapter("huge", gguf_adapter())
    assert not np.isfinite(next(iter(llama.logits_batch(sequences, Use("huge", 1e30))))).all()
    for one, other in zip(before, llama.logits_batch(sequences), strict=True):
        assert np.array_equal(one, other)
