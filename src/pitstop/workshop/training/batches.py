"""Examples to padded batches in an order that the seed fixes, so that a resumed training goes on as it was."""

import itertools
import math
import random
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from pitstop.workshop.dataset import Example
from pitstop.workshop.recipe import Retain, Train

WINDOW = 16  # batches sorted by length together: little padding, and the order stays random


class Batches(Dataset[dict[str, torch.Tensor]]):
    """One entry is one optimizer step's batch: task rows first, general rows below them.

    An entry holds int64 `input_ids` of shape (rows, longest), and bool `scored`, `scored_general` of the same shape:
    True where the position predicts a token that counts. Padding is on the right, where causal attention never looks,
    so no mask is needed and attention takes its fast path.
    """

    def __init__(
        self, examples: Sequence[Example], general: Sequence[Example], train: Train, retain: Retain, *, pad: int
    ) -> None:
        self._pad = pad
        order = random.Random(train.seed)
        task = _batches(examples, train.batch, train.steps, order)
        others = _spread(general, train.batch * retain.share, train.steps, order)
        self._steps = list(zip(task, others, strict=True))

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        task, general = self._steps[step]
        rows = [*task, *general]
        longest = max(len(row.tokens) for row in rows)
        shape = (len(rows), longest)
        tokens = torch.full(shape, self._pad)
        scored = torch.zeros((2, *shape), dtype=torch.bool)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            tokens[index, :length] = torch.tensor(row.tokens)
            for begin, until in row.answers:
                scored[int(index >= len(task)), index, begin - 1 : until - 1] = True
        return {"input_ids": tokens, "scored": scored[0], "scored_general": scored[1]}

    @property
    def tokens_per_step(self) -> list[int]:
        """Real tokens of every step, padding not counted."""
        return [sum(len(row.tokens) for row in (*task, *general)) for task, general in self._steps]

    @property
    def tokens(self) -> int:
        """Real tokens of the whole training."""
        return sum(self.tokens_per_step)


def _batches(examples: Sequence[Example], size: int, count: int, order: random.Random) -> list[list[Example]]:
    """Return ``count`` batches: epochs in random order, rows of similar length together."""
    stream = _epochs(examples, size * count, order)
    batches: list[list[Example]] = []
    for start in range(0, size * count, size * WINDOW):
        window = sorted(stream[start : min(start + size * WINDOW, size * count)], key=lambda row: len(row.tokens))
        group = [window[at : at + size] for at in range(0, len(window), size)]
        order.shuffle(group)
        batches += group
    return batches


def _spread(examples: Sequence[Example], a_step: float, count: int, order: random.Random) -> list[list[Example]]:
    """Return ``count`` groups of ``a_step`` examples on average: below one, some steps have none."""
    ends = [math.floor(a_step * step) for step in range(count + 1)]
    stream = _epochs(examples, ends[-1], order) if examples else []
    return [stream[begin:end] for begin, end in itertools.pairwise(ends)]


def _epochs(examples: Sequence[Example], count: int, order: random.Random) -> list[Example]:
    stream: list[Example] = []
    while len(stream) < count:
        stream += order.sample(list(examples), len(examples))
    return stream
