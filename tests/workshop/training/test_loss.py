"""The losses behind the head equal torch's own, value and gradient, whatever the portions."""

import pytest
import torch
from torch.nn import functional

from pitstop.workshop.training.loss import PORTION, Head, cross_entropy, divergence

WIDTH, WORDS = 8, 31


def made(
    positions: int, cap: float | None, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Head]:
    """Return states with a gradient to take, the base's states, the words that follow, and a head."""
    torch.manual_seed(positions)
    embedding = torch.nn.Linear(WIDTH, WORDS, bias=bias).requires_grad_(False)
    embedding.weight *= 5  # far from even probabilities, and into the cap
    states, base = torch.randn(2, positions, WIDTH)
    return states.requires_grad_(), base, torch.randint(WORDS, (positions,)), Head(embedding, cap)


def plain_logits(states: torch.Tensor, head: Head) -> torch.Tensor:
    logits = head.embedding(states)
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


@pytest.mark.parametrize("positions", [1, PORTION, 2 * PORTION + 5])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_entropy_is_torchs(positions: int, cap: float | None, bias: bool) -> None:
    states, _, aims, head = made(positions, cap, bias)
    (expected_gradient,) = torch.autograd.grad(functional.cross_entropy(plain_logits(states, head), aims), states)
    loss = cross_entropy(states, head, aims)
    (gradient,) = torch.autograd.grad(3 * loss, states)
    torch.testing.assert_close(loss, functional.cross_entropy(plain_logits(states, head), aims))
    torch.testing.assert_close(gradient, 3 * expected_gradient)


@pytest.mark.parametrize("positions", [1, 2 * PORTION + 5])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_divergence_is_torchs(positions: int, cap: float | None) -> None:
    states, base, _, head = made(positions, cap)
    reference = plain_logits(base, head).log_softmax(-1)
    expected = functional.kl_div(
        plain_logits(states, head).log_softmax(-1), reference, log_target=True, reduction="batchmean"
    )
    loss = divergence(states, head, base)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, states), torch.autograd.grad(expected, states))


def test_a_model_that_did_not_move_has_no_divergence() -> None:
    states, _, _, head = made(70, None)
    loss = divergence(states, head, states.detach())
    (gradient,) = torch.autograd.grad(loss, states)
    assert abs(loss.item()) < 1e-6
    assert gradient.abs().max() < 1e-6


def test_words_that_are_almost_impossible_have_a_finite_loss() -> None:
    states, _, aims, head = made(4, None)
    loss = cross_entropy(states * 1e3, head, aims)
    torch.testing.assert_close(loss, functional.cross_entropy(plain_logits(states * 1e3, head), aims))
