"""Losses behind the frozen head: cross-entropy with the words that follow, and KL to what the base would say.

Logits are positions x vocabulary in float32, by far the largest thing of a step. The head is frozen, so nobody needs
them twice: a portion of them is made, its loss and the gradient of the hidden states are taken, and it is dropped. For
both losses the gradient of the logits is p - target: the target is the word as a one-hot row, or the base's
probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PORTION = 64  # positions at once: 64 x 49,152 floats are 12.6 MB, which stay in the processor's cache

# A portion of float32 logits, and which positions it holds -> the sum of their losses; leaves p - target in the logits.
Judge = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Head:
    """A model's frozen output embedding."""

    embedding: torch.nn.Module
    cap: float | None = None  # logits become cap * tanh(logit / cap), as in Gemma 2

    @classmethod
    def of(cls, model: Any) -> "Head":
        """Return the head of a transformers model."""
        return cls(
            model.get_output_embeddings(), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        )

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return float32 logits, shape (positions, vocabulary)."""
        logits: torch.Tensor = self.embedding(states).float()
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def back(self, gradient: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient of the states from that of the logits."""
        if slope is not None:
            gradient *= slope
        weight: Any = self.embedding.weight
        result: torch.Tensor = gradient.to(weight.dtype) @ weight
        return result

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return what the cap does to gradients; None without one."""
        return None if self.cap is None else 1.0 - (logits / self.cap) ** 2


def cross_entropy(states: torch.Tensor, head: Head, aims: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Return the mean of -ln p(aim) in nats per position.

    Args:
        states: last hidden states, shape (positions, width).
        head: of the model.
        aims: the token that follows each position, shape (positions,).
        count: positions of the whole batch, if these are a part of it: the parts' losses add up to its mean.
    """

    def judge(logits: torch.Tensor, places: slice) -> torch.Tensor:
        wanted = aims[places]
        rows = torch.arange(len(wanted), device=wanted.device)
        picked = logits[rows, wanted]
        normal = _to_probabilities(logits)
        logits[rows, wanted] -= 1.0
        return (normal - picked).sum()

    return _mean_loss(states, head, judge, count)


def divergence(
    states: torch.Tensor,
    head: Head,
    base_states: torch.Tensor,
    count: int | None = None,
    *,
    base_head: Head | None = None,
) -> torch.Tensor:
    """Return the mean of KL(base || adapted) over the whole vocabulary, in nats per position.

    Args:
        states, base_states: last hidden states with and without the adapter, shape (positions, width).
        head: of the model.
        count: positions that the mean is over; None: all of these.
        base_head: of the base; None: the same.
    """
    reader = base_head or head

    def judge(logits: torch.Tensor, places: slice) -> torch.Tensor:
        reference = reader.logits(base_states[places]).log_softmax(-1)
        expected = reference.exp()
        # sum of q (ln q - ln p) with ln p = logit - normal; q sums to 1
        cross = (expected * (reference - logits)).sum()
        normal = _to_probabilities(logits)
        logits -= expected
        return cross + normal.sum()

    return _mean_loss(states, head, judge, count)


def _to_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Turn rows of logits into probabilities in place; return the ln of their normals, shape (rows,)."""
    highest = logits.amax(-1, keepdim=True)
    sums = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    logits /= sums
    return (sums.log() + highest).squeeze(-1)


def _mean_loss(states: torch.Tensor, head: Head, judge: Judge, count: int | None) -> torch.Tensor:
    loss: torch.Tensor = _BehindHead.apply(states, head, judge, len(states) if count is None else count)
    return loss


class _BehindHead(torch.autograd.Function):
    """The mean loss, with the gradient of the states taken on the way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, head: Head, judge: Judge, count: int) -> torch.Tensor:
        total = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states)
        for begin in range(0, len(states), PORTION):
            places = slice(begin, min(begin + PORTION, len(states)))
            logits = head.logits(states[places])
            slope = head.slope(logits)
            total += judge(logits, places)
            gradient[places] = head.back(logits, slope)
        ctx.save_for_backward(gradient)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.count), None, None, None
