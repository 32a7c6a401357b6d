"""What a runtime may use of a board, from its profile and what the base needs of memory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pitstop.bundle.formats import read_gguf, read_onnx_graph
from pitstop.bundle.onnx import CONFIG_FILE, locate, read_settings
from pitstop.device.request import Limits
from pitstop.engines.llama.kv import kv_bytes_per_token, memory_of
from pitstop.errors import UsageError
from pitstop.profiles import DeviceProfile

MIB = 1 << 20


def within(
    profile: DeviceProfile,
    base: Path,
    limits: Limits | None = None,
    *,
    merged: Sequence[int] = (),
    format: str = "gguf",
) -> Limits:
    """Return limits under which base, adapters and conversations fit into a board's budget.

    A budget has room for the base, for all adapters of the profile, for parked conversations, and for a context of as
    many conversations as there can be. What is left goes to merged models, each with a context of its own, all of them
    if there is room and at least the largest one; and then to adapters' own contexts. Merged models and adapters share
    what they have: who was not asked for longest leaves.

    Args:
        base: the GGUF file, or the ONNX graph.
        limits: what was asked for besides; the profile lowers it, and never raises it.
        merged: bytes of the file of each merged model.
        format: of the base.

    Raises:
        UsageError: not even one conversation fits, with what needs how much.
        FormatError: the base is damaged.
    """
    asked = limits or Limits()
    length = min(asked.context_length, profile.context_length)
    size, token = footprint(base, format)
    budget, adapters = profile.budget_mib * MIB, profile.adapter_budget_mib * MIB
    room = budget - size - adapters - asked.parked_memory
    for sequences in range(asked.sequences, 0, -1):
        context = memory_of(sequences, length, token)
        models = [model + context for model in merged]
        left = room - context
        if left >= max([0, *(model - adapters for model in models)]):
            break
    else:
        taken = f"the base takes {size / 1e6:,.0f} MB, adapters may take {adapters / 1e6:,.0f} MB"
        largest = max([0, *(model - adapters for model in models)])
        beside = f", the largest merged model {max(merged) / 1e6:,.0f} MB" if merged else ""
        raise UsageError(
            f"{profile.name} may use {budget / 1e6:,.0f} MB; {taken}, parked conversations "
            f"{asked.parked_memory / 1e6:,.0f} MB{beside}, a context for one conversation of {length:,} tokens "
            f"{context / 1e6:,.0f} MB: {(largest - left) / 1e6:,.0f} MB too much",
            cure="take a smaller quantization of the base, a shorter context_length or fewer adapters in the profile"
            + (", or ship adapters attached, not merged" if merged else ""),
        )
    for_models = min(left, sum(models))
    return dataclasses.replace(
        asked,
        context_length=length,
        sequences=sequences,
        threads=min(asked.threads or profile.threads, profile.threads),
        own_lanes=min(asked.own_lanes, (left - for_models) // context),
        adapter_budget=min(adapters + for_models, asked.adapter_budget or adapters + for_models),
    )


def footprint(base: Path, format: str) -> tuple[int, int]:
    """Return the bytes of a base's files, and of a token of a conversation on it.

    Raises:
        FormatError: the base is damaged.
        UsageError: it does not say how large its conversations are.
    """
    if format == "onnx":
        graph = read_onnx_graph(base)
        files = locate(graph)
        size = base.stat().st_size + sum(path.stat().st_size for path in files.values())
        return size, read_settings(graph, files[CONFIG_FILE]).kv_bytes
    return base.stat().st_size, kv_bytes_per_token(read_gguf(base))
