"""From a row of logits to a token, by numpy: what a request asks for, in llama.cpp's order.

Where an answer has to follow a JSON schema, the library has the last word: it takes the likeliest of the tokens that
the schema allows. So a row that is to be sampled gets its chance before, as noise: the largest of logits with Gumbel
noise is drawn just as the softmax says, among whatever tokens.
"""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pitstop.engines.base import Sampling

Row = NDArray[np.float32]
OUT = np.float32(-1e5)  # added to a token that sampling leaves out: it comes only where a schema allows no other


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed & 0xFFFFFFFF)
        self._said: deque[int] = deque(maxlen=sampling.penalty_tokens)
        self._bias = dict(sampling.logit_bias)
        penalties = (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._penalized = penalties != (1.0, 0.0, 0.0)

    def prepare(self, row: Row) -> Row:
        """Return a row whose largest value is at the token to take."""
        sampling = self._sampling
        if not (self._bias or self._penalized or sampling.temperature > 0):
            return row
        row = row.copy()
        if self._bias:
            row[list(self._bias)] += np.array(list(self._bias.values()), np.float32)
        if self._penalized:
            self._penalize(row)
        if sampling.temperature > 0:
            out = _left_out(row, sampling)
            row /= np.float32(sampling.temperature)
            row += self._random.gumbel(size=row.shape).astype(np.float32)
            row[out] += OUT
        return row

    def accept(self, token: int) -> None:
        """Remember a token that was taken."""
        self._said.append(token)

    def _penalize(self, row: Row) -> None:
        if not self._said:
            return
        tokens, counts = np.unique(np.array(self._said), return_counts=True)
        repeat = np.float32(self._sampling.repeat_penalty)
        found = row[tokens]
        found = np.where(found > 0, found / repeat, found * repeat)
        row[tokens] = found - counts * self._sampling.frequency_penalty - self._sampling.presence_penalty


def _left_out(row: Row, sampling: Sampling) -> NDArray[np.bool_]:
    """Return which tokens top_k, top_p and min_p leave out; the likeliest one always stays."""
    out = np.zeros(row.shape, np.bool_)
    if sampling.top_k and sampling.top_k < len(row):
        out |= row < np.partition(row, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p < 1:
        order = np.argsort(-row)
        chances = np.exp(row[order] - row[order[0]], dtype=np.float64) * ~out[order]
        chances /= chances.sum()
        out[order[np.cumsum(chances) - chances >= sampling.top_p]] = True
    if sampling.min_p > 0:
        out |= row < row.max() + np.log(sampling.min_p)
    return out
