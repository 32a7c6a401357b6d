"""What came out of trying an adapter on several artifacts of its base, and which of them is to ship."""

from collections.abc import Sequence
from dataclasses import dataclass

from pitstop.profiles import DeviceProfile
from pitstop.workshop.parity import TaskScore

MIB = 1 << 20


@dataclass(frozen=True)
class Option:
    """The adapter on one artifact of the base."""

    base: str  # precision of the base artifact
    format: str
    base_bytes: int  # all files of it
    adapter_bytes: int
    kl_nats_per_token: float  # mean KL(trained || this) over the answers of held-out rows
    top1_agreement: float
    score: TaskScore
    prefill_tokens_per_s: float  # on this machine
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Trade:
    """`export/trade.json`: every artifact the adapter was exported for, and the one to ship."""

    inputs: str
    name: str
    adapter_sha256: str  # of the trained weights
    allowed_kl: float  # nats per token
    profile: str | None  # the board it had to fit
    options: tuple[Option, ...]
    chosen: str | None  # precision of the base artifact; None: none is near enough and fits
    reasons: tuple[str, ...]  # why the others are not


def choose(
    options: Sequence[Option], allowed_kl: float, profile: DeviceProfile | None
) -> tuple[str | None, tuple[str, ...]]:
    """Return the fastest that is near enough to what was trained and fits the board, and why others are not chosen."""
    reasons, left = [], []
    for one in options:
        if not one.kl_nats_per_token <= allowed_kl:
            reasons.append(
                f"{one.base} differs by {one.kl_nats_per_token:.4f} nats per token, {allowed_kl} are allowed"
            )
        elif profile is not None and (why := _unfit(one, profile)):
            reasons.append(why)
        else:
            left.append(one)
    if not left:
        return None, tuple(reasons)
    best = max(left, key=lambda one: (one.decode_tokens_per_s, -one.base_bytes))
    reasons += [
        f"{one.base} decodes {one.decode_tokens_per_s:.1f} tokens/s here, {best.base} {best.decode_tokens_per_s:.1f}"
        for one in left
        if one is not best
    ]
    return best.base, tuple(reasons)


def _unfit(one: Option, profile: DeviceProfile) -> str | None:
    if one.format not in profile.formats:
        return f"{one.base} is {one.format}, which {profile.name} does not run"
    room = (profile.budget_mib - profile.adapter_budget_mib) * MIB
    if one.base_bytes > room:
        return f"{one.base} takes {one.base_bytes / 1e6:,.0f} MB, {profile.name} has {room / 1e6:,.0f} MB for a base"
    return None


def cells(one: Option) -> tuple[str, ...]:
    """Return the figures of a row as they are read."""
    return (
        f"{one.base} ({one.format})",
        f"{one.base_bytes / 1e6:,.1f}",
        f"{one.adapter_bytes / 1e6:,.1f}",
        f"{one.kl_nats_per_token:.4f}",
        f"{one.top1_agreement:.1%}",
        f"{one.score.exact:.1%}",
        f"{one.prefill_tokens_per_s:,.0f}",
        f"{one.decode_tokens_per_s:,.1f}",
    )


HEADS = ("base", "MB", "adapter MB", "KL", "same first", "exact", "read tok/s", "answer tok/s")
