"""The order is the seed's; every row has its turn; only what should count is scored."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pitstop.workshop.dataset import Example
from pitstop.workshop.recipe import Retain, Train
from pitstop.workshop.training.batches import Batches

PAD = 9_999  # no token of a row


def examples(count: int, first: int = 0) -> list[Example]:
    """Return rows of different lengths; the first token tells them apart."""
    return [
        Example((first + number, *range(1000, 1003 + number % 7)), 2 + number % 3) for number in range(1, count + 1)
    ]


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [row[row != PAD].tolist() for row in batch["input_ids"]]


def make(count: int, train: Train, general: int = 0, share: float = 0.5) -> Batches:
    return Batches(examples(count), examples(general, 500), train, Retain(share=share), pad=PAD)


def test_the_same_seed_gives_the_same_batches() -> None:
    train = Train(steps=40, batch=4, seed=3)
    one, other = make(23, train, general=5), make(23, train, general=5)
    for index in range(40):
        assert all(torch.equal(one[index][key], other[index][key]) for key in one[index])
    another = make(23, Train(steps=40, batch=4, seed=4), general=5)
    assert [rows_of(one[index]) for index in range(40)] != [rows_of(another[index]) for index in range(40)]


@given(count=st.integers(1, 40), batch=st.integers(1, 9), steps=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_row_has_its_turn_once_an_epoch(count: int, batch: int, steps: int, seed: int) -> None:
    batches = make(count, Train(steps=steps, batch=batch, seed=seed))
    seen = Counter(row[0] for index in range(steps) for row in rows_of(batches[index]))
    whole, rest = divmod(batch * steps, count)
    assert Counter(seen.values()) == +Counter({whole + 1: rest, whole: count - rest if whole else 0})


def test_an_epoch_is_over_before_the_next_begins() -> None:
    """Rows are sorted by length within a window of batches, so epochs mix within one window and no further."""
    batches = make(64 * 4, Train(steps=128, batch=4))
    first = [row[0] for index in range(64) for row in rows_of(batches[index])]
    assert len(set(first)) == 64 * 4


@pytest.mark.parametrize("general", [0, 6])
def test_exactly_the_answers_are_scored(general: int) -> None:
    train = Train(steps=12, batch=4)
    batches = make(9, train, general=general)
    known = {row.tokens[0]: row for row in [*examples(9), *examples(general, 500)]}
    for index in range(len(batches)):
        batch = batches[index]
        assert len(batch["input_ids"]) == (6 if general else 4)
        for at, tokens in enumerate(rows_of(batch)):
            row = known[tokens[0]]
            assert tuple(tokens) == row.tokens
            kind, other = ("scored", "scored_general") if at < 4 else ("scored_general", "scored")
            # A position is scored by what it predicts: the token after it.
            predicted = [position + 1 for position in batch[kind][at].nonzero()[:, 0].tolist()]
            assert predicted == list(range(row.answer_start, len(row.tokens)))
            assert not batch[other][at].any()


def test_padding_is_right_of_the_row_and_counts_for_nothing() -> None:
    batches = make(20, Train(steps=10, batch=5), general=5)
    for index, tokens in enumerate(batches.tokens_per_step):
        batch = batches[index]
        padding = batch["input_ids"] == PAD
        lengths = (~padding).sum(dim=1)
        assert all(not row[:length].any() for row, length in zip(padding, lengths, strict=True))
        assert not (batch["scored"] | batch["scored_general"])[padding].any()
        assert tokens == int(lengths.sum())
    assert batches.tokens == sum(batches.tokens_per_step)


def test_no_general_rows_when_their_share_is_none() -> None:
    batches = make(8, Train(steps=3, batch=4), general=5, share=0.0)
    assert all(len(batches[index]["input_ids"]) == 4 for index in range(3))


def test_a_share_below_one_row_a_step_is_spread_over_the_steps() -> None:
    batches = make(8, Train(steps=12, batch=4), general=5, share=0.125)
    assert [len(batches[index]["input_ids"]) for index in range(12)] == [4, 5] * 6
