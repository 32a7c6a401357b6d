"""How the torch engine words an answer: which token comes, where it ends, and its text while it grows."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.logits_process import LogitsProcessor

from pitstop.engines.answer import END_TEXTS
from pitstop.engines.base import Engine, Sampling


class Filter(LogitsProcessor):
    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return _filtered(scores.float(), self._sampling)


class Stops(StoppingCriteria):
    """Ends a row when a stop text is in its answer."""

    def __init__(self, engine: Engine, stop: Sequence[str], begin: int) -> None:
        self._engine = engine
        self._stop = stop
        self._begin = begin
        # A character takes at most four bytes, and so four tokens; a few more may hold no text.
        self._tail = 4 * max(map(len, stop)) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tails = input_ids[:, max(self._begin, input_ids.shape[1] - self._tail) :].tolist()
        texts = [self._engine.detokenize(tail) for tail in tails]
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)


def _filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Apply top_k, top_p and temperature in llama.cpp's order; what is out is -inf. Any leading shape."""
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        chances = sorted_logits.softmax(dim=-1)
        out = chances.cumsum(dim=-1) - chances >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
    return logits / sampling.temperature


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances = _filtered(logits, sampling).softmax(dim=-1)
    return int(torch.multinomial(chances, 1, generator=generator))


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = set(configured if isinstance(configured, list) else [configured])
    found.add(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    found.update(added.get(text) for text in END_TEXTS)
    return frozenset(token for token in found if token is not None)
