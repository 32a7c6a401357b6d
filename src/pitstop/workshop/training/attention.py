"""Causal attention for training on a processor: fast backwards, and no square of probabilities kept.

torch's fused kernel is quick forwards and slow backwards there, and the plain way keeps every head's probabilities
until then: at 1,024 tokens a row more than all the rest. Here the fused kernel runs forwards, and backwards the
probabilities are made again from its log-sums, some rows at a time.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pitstop"
QUERIES = 128  # at once: the keys after them are not looked at
SCORES_AT_ONCE = 1 << 18  # query-key pairs: 1 MB of float32, which stays in the processor's cache


def use(model: PreTrainedModel) -> None:
    """Let a model on the processor attend this way in training; one that caps its scores keeps the plain way."""
    if model.device.type != "cpu":
        return
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if capped or not model._supports_sdpa else NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it; query (rows, heads, tokens, width), key and value with fewer heads."""
    plain = attention_mask is None and not dropout and others.get("position_bias") is None
    same_width = query.shape[-1] == value.shape[-1]
    if not (plain and same_width and query.shape[2] == key.shape[2] and query.requires_grad):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: torch.Tensor = _Causal.apply(query, key, value, scale)
    return result.transpose(1, 2), None


class _Causal(torch.autograd.Function):
    """softmax(scale · Q Kᵀ, causal) V, its backward as in FlashAttention (arXiv:2205.14135, appendix B.2)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        wide = [part.repeat_interleave(groups, 1) if groups > 1 else part for part in (k, v)]
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, *wide, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.scale = scale
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        q, k, v, y, sums = ctx.saved_tensors
        rows, heads, tokens, width = q.shape
        keys = k.shape[1]
        # Heads that share a key become queries of one product: (rows · keys, group, tokens, width).
        groups = (rows * keys, heads // keys, tokens, -1)
        dots = (upstream * y).sum(-1, keepdim=True, dtype=torch.float32).view(groups)
        queries, upstream, sums = q.reshape(groups), upstream.reshape(groups), sums.reshape(groups)
        k, v = k.reshape(rows * keys, tokens, width), v.reshape(rows * keys, tokens, width)
        d_q, d_k, d_v = torch.empty_like(queries), torch.zeros_like(k), torch.zeros_like(v)
        future = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=q.device).triu_(1)
        for begin in range(0, tokens, QUERIES):
            end = min(begin + QUERIES, tokens)
            at_once = max(1, SCORES_AT_ONCE // (heads // keys * QUERIES * end))
            for first in range(0, rows * keys, at_once):
                part = slice(first, first + at_once)
                ours = [x[part, :, begin:end].flatten(1, 2) for x in (queries, upstream, dots, sums)]
                hidden = future[: end - begin, : end - begin]
                found = _backward(ours, k[part, :end], v[part, :end], hidden, ctx.scale)
                d_q[part, :, begin:end] = found[0].view(-1, groups[1], end - begin, width)
                d_k[part, :end] += found[1]
                d_v[part, :end] += found[2]
        return d_q.view(q.shape), d_k.view(rows, keys, tokens, width), d_v.view(rows, keys, tokens, width), None


def _backward(
    queries: list[torch.Tensor], k: torch.Tensor, v: torch.Tensor, future: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v for some queries, the last of which see all keys.

    Args:
        queries: q, the gradient of the result, its sum with the result, and the log-sums, each of the same rows.
        future: keys that are hidden from a query, shape (queries of a head, the last keys).
    """
    q, upstream, dots, sums = queries
    weights = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale).sub_(sums).exp_()
    size = len(future)
    weights.view(len(q), -1, size, weights.shape[-1])[..., -size:].masked_fill_(future, 0.0)
    d_scores = torch.bmm(upstream, v.transpose(1, 2)).float().sub_(dots).mul_(weights).mul_(scale).to(q.dtype)
    weights = weights.to(q.dtype)
    d_v = torch.bmm(weights.transpose(1, 2), upstream)
    d_k = torch.bmm(d_scores.transpose(1, 2), q)
    return torch.bmm(d_scores, k), d_k, d_v


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
