"""Changes to a finished adapter: pure functions from its factors to factors of the same shape.

A factor is always multiplied into one of the two matrices. Into both it would act squared.
"""

from collections.abc import Mapping

import torch

from pitstop.workshop.repair.pairs import Pair, Pairs
from pitstop.workshop.repair.parts import Head, Heads, layer_of


def scale(pairs: Pairs, factor: float) -> dict[str, Pair]:
    """Multiply every module's change."""
    return {name: Pair(pair.a, pair.b * factor) for name, pair in pairs.items()}


def scale_modules(pairs: Pairs, factors: Mapping[str, float]) -> dict[str, Pair]:
    """Multiply the changes of these modules; 0 gives a module the base's weights back."""
    return {name: Pair(pair.a, pair.b * factors.get(name, 1.0)) for name, pair in pairs.items()}


def scale_layers(pairs: Pairs, factors: Mapping[int, float]) -> dict[str, Pair]:
    """Multiply the changes of every module of these layers."""
    of_layer = {name: factors.get(layer, 1.0) for name in pairs if (layer := layer_of(name)) is not None}
    return scale_modules(pairs, of_layer)


def scale_heads(pairs: Pairs, factors: Mapping[Head, float], heads: Heads) -> dict[str, Pair]:
    """Multiply what a head asks for and what it says: its rows of q's change and its columns of o's.

    Keys and values belong to all the heads of a group where they are grouped, so they stay.
    """
    edited = dict(pairs)
    for name, pair in pairs.items():
        side = heads.side(name)
        mine = {at: factor for (layer, at), factor in factors.items() if layer == layer_of(name)}
        if side is None or not mine:
            continue
        each = torch.ones(heads.count)
        for at, factor in mine.items():
            each[at] = factor
        spread = each.repeat_interleave(heads.size)
        edited[name] = Pair(pair.a, pair.b * spread[:, None]) if side == "q" else Pair(pair.a * spread, pair.b)
    return edited


def depth_ramp(pairs: Pairs, gamma: float, layers: int) -> dict[str, Pair]:
    """Multiply layer l of L by gamma + (1 - gamma) · (l - 1) / (L - 1): early layers keep the base (LiNeS, 2410.17146).

    Modules outside of layers stay as they are.
    """
    steps = max(layers - 1, 1)
    return scale_layers(pairs, {at: gamma + (1.0 - gamma) * at / steps for at in range(layers)})


def truncate_rank(pairs: Pairs, rank: int) -> dict[str, Pair]:
    """Keep the largest singular values of every B · A; what is left of the factors is zero."""
    return {name: _truncated(pair, rank) for name, pair in pairs.items()}


def _truncated(pair: Pair, rank: int) -> Pair:
    # B A = Qb (Rb Raᵀ) Qaᵀ: the singular values of a small square matrix are those of the large product.
    qb, rb = torch.linalg.qr(pair.b)
    qa, ra = torch.linalg.qr(pair.a.T)
    u, sizes, v = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    a, b = torch.zeros_like(pair.a), torch.zeros_like(pair.b)
    a[:kept] = root[:, None] * (v[:kept] @ qa.T)
    b[:, :kept] = (qb @ u[:, :kept]) * root
    return Pair(a, b)


def project_out(pairs: Pairs, directions: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """Let modules ignore directions of their input: ΔW (I - U Uᵀ), with U's columns orthonormal, shape (in, k)."""
    edited = dict(pairs)
    for name, u in directions.items():
        pair = pairs[name]
        edited[name] = Pair(pair.a - (pair.a @ u) @ u.T, pair.b)
    return edited
