"""F_delta: how far an adapter moves what flows through the base, without a label or a suite.

The mean over tokens and adapted matrices of |dW x| / |x|, where x is what the plain base feeds the matrix on general
text and dW x what the adapter adds (CLoRA, arXiv:2410.16801). Beside KL to the base it is the best known predictor of
what an adapter forgets, and like that it warns and does not judge.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from pitstop.engines.base import PLAIN_BASE
from pitstop.engines.torch import LoraPair, TorchEngine

Sums = dict[str, list[float]]


def displacement(engine: TorchEngine, adapter: str, rows: Sequence[Sequence[int]], scale: float = 1.0) -> float:
    """Return F_delta of a loaded adapter over token sequences, a ratio.

    Raises:
        UsageError: no such adapter.
    """
    by_matrix = displacements(engine, adapter, rows)
    return scale * sum(by_matrix.values()) / len(by_matrix)


def displacements(engine: TorchEngine, adapter: str, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return F_delta of each adapted matrix by its name, at scale 1.

    Raises:
        UsageError: no such adapter.
    """
    ratios: Sums = defaultdict(list)
    with ExitStack() as watched:
        for pair in engine.lora_pairs(adapter):
            watched.enter_context(_watching(pair, ratios))
        for row in rows:  # one by one: padding would count
            next(engine.logits_batch([row], PLAIN_BASE, firsts=[len(row) - 1]))
    return {name: sum(values) / len(values) for name, values in ratios.items()}


@contextmanager
def _watching(pair: LoraPair, ratios: Sums) -> Iterator[None]:
    def look(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].to(pair.a.dtype)
        added = pair.scaling * (x @ pair.a.T @ pair.b.T)
        ratio = added.float().norm(dim=-1) / x.float().norm(dim=-1).clamp_min(1e-12)
        ratios[pair.name] += ratio.flatten().tolist()

    handle = pair.layer.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
