"""What a runtime may use of a board, from its profile and what the base needs of memory."""

import dataclasses
from pathlib import Path

from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.device.request import Limits
from pitstop.errors import UsageError
from pitstop.profiles import DeviceProfile

KV_BYTES = 2  # of a value in KV: float16
WORK = 64 << 20  # bytes a context computes in, its logits included: 51 MB with SmolLM2-135M
MIB = 1 << 20


def within(profile: DeviceProfile, base: Path, limits: Limits | None = None) -> Limits:
    """Return limits under which base, adapters and conversations fit into a board's budget.

    A budget has room for the base, for all adapters of the profile, for parked conversations, and for as many contexts
    as are left, of as many conversations as there can be.

    Args:
        base: the GGUF file.
        limits: what was asked for besides; the profile lowers it, and never raises it.

    Raises:
        UsageError: not even one conversation fits, with what needs how much.
        FormatError: the base is damaged.
    """
    asked = limits or Limits()
    length = min(asked.context_length, profile.context_length)
    conversation = length * kv_bytes_per_token(read_gguf(base))
    size = base.stat().st_size
    budget, adapters = profile.budget_mib * MIB, profile.adapter_budget_mib * MIB
    room = budget - size - adapters - asked.parked_memory
    # A context has one sequence more than conversations, for what is evaluated from nothing.
    sequences = min(asked.sequences, (room - WORK) // conversation - 1)
    if sequences < 1:
        needed = (size + adapters + asked.parked_memory + WORK + 2 * conversation - budget) / 1e6
        raise UsageError(
            f"{profile.name} may use {budget / 1e6:,.0f} MB; the base takes {size / 1e6:,.0f} MB, adapters may take "
            f"{adapters / 1e6:,.0f} MB, parked conversations {asked.parked_memory / 1e6:,.0f} MB, a conversation of "
            f"{length:,} tokens {conversation / 1e6:,.0f} MB: {needed:,.0f} MB too much",
            cure="take a smaller quantization of the base, a shorter context_length or fewer adapters in the profile",
        )
    lane = WORK + (sequences + 1) * conversation
    return dataclasses.replace(
        asked,
        context_length=length,
        sequences=sequences,
        threads=min(asked.threads or profile.threads, profile.threads),
        own_lanes=min(asked.own_lanes, room // lane - 1),
        adapter_budget=adapters if asked.adapter_budget is None else min(adapters, asked.adapter_budget),
    )


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Return how many bytes of KV a token of a conversation takes, by the header of a base.

    Raises:
        UsageError: the header does not say it in a way that is known here.
    """
    architecture = header.text("general.architecture") or ""

    def number(key: str, default: int = 0) -> int:
        value = header.metadata.get(f"{architecture}.{key}", default)
        numbers = value if isinstance(value, tuple) else (value,)  # some have one for each layer
        return max((int(each) for each in numbers if isinstance(each, int)), default=default)

    heads = number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    keys, values = number("attention.key_length", width), number("attention.value_length", width)
    bytes_per_token = number("block_count") * number("attention.head_count_kv", heads) * (keys + values) * KV_BYTES
    if not bytes_per_token:
        raise UsageError(f"{header.path.name} does not say how large its conversations are", where=header.path)
    return bytes_per_token
