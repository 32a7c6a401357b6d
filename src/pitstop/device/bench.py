"""What this board does with the release it has: speed, memory and the cost of a swap, measured here and now."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pitstop.device.engine import open_engine
from pitstop.device.limits import footprint
from pitstop.device.memory import give_back_freed_memory, held
from pitstop.device.request import Limits
from pitstop.device.store import Release
from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Stream, Usage, Use
from pitstop.errors import UsageError
from pitstop.progress import progress

PROMPT, ANSWER = 256, 48  # tokens that are read and made
SWAPS = 12
ROUNDS = 3
CONTEXT = 512  # tokens
MB = 1e6
WORTH = 1.15  # times as fast a merged model must be to be worth the memory of a base for each adapter

MEANING = {
    "base_mb": ("base", "MB"),
    "kv_mb_per_thousand_tokens": ("1,000 tokens of a conversation", "MB"),
    "fastest_threads": ("threads that make tokens fastest", ""),
    "base_prefill_tokens_per_second": ("base, prompt read", "tokens/s"),
    "base_decode_tokens_per_second": ("base, answer made", "tokens/s"),
    "attached_prefill_tokens_per_second": ("adapter attached, prompt read", "tokens/s"),
    "attached_decode_tokens_per_second": ("adapter attached, answer made", "tokens/s"),
    "attached_mb": ("adapter attached, file", "MB"),
    "attached_memory_mb": ("adapter attached, memory once loaded", "MB"),
    "attached_load_ms": ("adapter attached, loaded and probed", "ms"),
    "merged_prefill_tokens_per_second": ("merged model, prompt read", "tokens/s"),
    "merged_decode_tokens_per_second": ("merged model, answer made", "tokens/s"),
    "merged_mb": ("merged model, file", "MB"),
    "merged_memory_mb": ("merged model, memory once loaded", "MB"),
    "merged_load_ms": ("merged model, loaded and probed", "ms"),
    "next_token_ms": ("next token of a conversation", "ms"),
    "next_token_after_swap_ms": ("next token after naming another model", "ms"),
}


@dataclass(frozen=True)
class Measured:
    """What `pitstop bench` found."""

    release: str
    attached: str | None  # the adapter that was measured; None: the release has none
    merged: str | None  # the merged model that was
    figures: dict[str, float]  # name, with its unit at the end -> value
    advice: tuple[str, ...]


def bench(release: Release, threads: Sequence[int]) -> Measured:
    """Measure the base of a release, its first attached adapter and its first merged one.

    Args:
        threads: numbers of threads to try; the rest is measured with the one that makes tokens fastest.

    Raises:
        UsageError: no number of threads.
        BrokenInput: the release cannot be loaded.
    """
    if not threads:
        raise UsageError("there is no number of threads to measure with")
    give_back_freed_memory()
    adapters = release.adapters()
    attached = min((name for name, (bundle, _) in adapters.items() if not bundle.merged), default=None)
    merged = min((name for name, (bundle, _) in adapters.items() if bundle.merged), default=None)
    measured = {kind: name for kind, name in (("attached", attached), ("merged", merged)) if name is not None}
    size, token = footprint(release.base_path(), release.base.artifact.format)
    figures = {"base_mb": size / MB, "kv_mb_per_thousand_tokens": 1000 * token / MB}
    with progress("bench", len(threads) + len(measured) + bool(measured), "parts") as advance:
        decode = {}
        for count in threads:
            with _open(release, count) as engine:
                speeds = _speeds(engine, PLAIN_BASE)
            decode[count] = speeds
            figures[f"base_decode_{count}_threads_tokens_per_second"] = speeds[1]
            advance(note=f"{count} threads")
        best = max(decode, key=lambda count: decode[count][1])
        figures |= {"fastest_threads": best}
        keys = ("base_prefill_tokens_per_second", "base_decode_tokens_per_second")
        figures |= dict(zip(keys, decode[best], strict=True))
        for kind, name in measured.items():
            figures |= {f"{kind}_{key}": value for key, value in _adapted(release, name, best).items()}
            advance(note=name)
        if measured:
            figures |= _swap(release, next(iter(measured.values())), best)
            advance(note="swap")
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    return Measured(release.sha256, attached, merged, rounded, tuple(_advice(rounded, len(adapters))))


def thread_counts() -> list[int]:
    """Return 1, 2, 4 … up to all the cores this process may use."""
    from pitstop.engines.machine import cores

    most = cores()
    return sorted({*(1 << power for power in range(most.bit_length())), most})


def _open(release: Release, threads: int, own_lanes: int = 0) -> Engine:
    limits = Limits(CONTEXT, sequences=2, threads=threads, own_lanes=own_lanes, parked_memory=0)
    return open_engine(release.base, release.base_path(), limits)


def _prompt(engine: Engine, number: int, invocation: Sequence[int] = ()) -> list[int]:
    """Return a prompt of PROMPT tokens; no two numbers begin alike, so none finds another's KV."""
    words = engine.tokenize(f"{number} bottles stand on the wall. " * PROMPT)
    return [*words[: PROMPT - len(invocation)], *invocation]


def _next_token(engine: Engine, stream: Stream) -> None:
    before = stream.usage.completion_tokens
    while not stream.finished and stream.usage.completion_tokens == before:
        engine.advance([stream])


def _speeds(engine: Engine, use: Use, invocation: Sequence[int] = ()) -> tuple[float, float]:
    """Return tokens per second read and made, medians; the first round warms up and does not count."""
    read, made = [], []
    for number in range(ROUNDS + 1):
        usage = Usage()
        begun = time.perf_counter()
        stream = engine.start(_prompt(engine, number, invocation), use, Sampling(max_tokens=ANSWER + 1), usage)
        _next_token(engine, stream)
        middle = time.perf_counter()
        while not stream.finished:
            _next_token(engine, stream)
        made.append((usage.completion_tokens - 1) / (time.perf_counter() - middle))
        read.append(PROMPT / (middle - begun))
    return statistics.median(read[1:]), statistics.median(made[1:])


def _adapted(release: Release, name: str, threads: int) -> dict[str, float]:
    bundle, path = release.adapters()[name]
    with _open(release, threads) as engine:
        _speeds(engine, PLAIN_BASE)  # what the base takes of memory is taken before
        before, begun = held(), time.perf_counter()
        engine.load_adapter(name, path)
        loaded = 1e3 * (time.perf_counter() - begun)
        read, made = _speeds(engine, Use(name, bundle.scale), engine.invocation(name))
        taken = held().since(before)
    return {
        "prefill_tokens_per_second": read,
        "decode_tokens_per_second": made,
        "mb": bundle.size / MB,
        "memory_mb": taken / MB,
        "load_ms": loaded,
    }


def _swap(release: Release, name: str, threads: int) -> dict[str, float]:
    """Let the adapter and the base speak in turn, two tokens each, as `pitstop serve` lets them."""
    bundle, path = release.adapters()[name]
    after: list[float] = []
    same: list[float] = []
    with _open(release, threads, own_lanes=1) as engine:
        engine.load_adapter(name, path)
        uses = (PLAIN_BASE, Use(name, bundle.scale))
        prompts = [_prompt(engine, number, engine.invocation(name)) for number in range(2)]
        for use, prompt in zip(uses, prompts, strict=True):
            list(engine.generate(prompt, use, Sampling(max_tokens=1)))
        while engine.settle():
            pass
        sampling = Sampling(max_tokens=2 * SWAPS + 2)
        streams = [engine.start(prompt, use, sampling, Usage()) for use, prompt in zip(uses, prompts, strict=True)]
        for _ in range(SWAPS):
            for stream in streams:
                for times in (after, same):
                    begun = time.perf_counter()
                    _next_token(engine, stream)
                    times.append(1e3 * (time.perf_counter() - begun))
        for stream in streams:
            stream.close()
    return {"next_token_ms": statistics.median(same[2:]), "next_token_after_swap_ms": statistics.median(after[2:])}


def _advice(figures: dict[str, float], adapters: int) -> list[str]:
    threads = int(figures["fastest_threads"])
    found = [f"serve with --threads {threads}, which make most tokens per second"]
    if not adapters:
        return found
    base = figures["base_decode_tokens_per_second"]
    merged = figures.get("merged_decode_tokens_per_second", base)  # without one: it computes what the base does
    if "attached_decode_tokens_per_second" not in figures:
        what = "an attached adapter takes less memory, and is measured here once the release has one"
        return [*found, f"merged models make {merged / base:.2f} times the tokens of the base; {what}"]
    faster = merged / figures["attached_decode_tokens_per_second"]
    size = figures.get("merged_mb", figures["base_mb"])
    memory = f"{size:,.0f} MB merged beside {figures['attached_mb']:,.1f} MB attached, each"
    if faster < WORTH:
        return [*found, f"attached: a merged model makes {faster:.2f} times as many tokens, and takes {memory}"]
    return [
        *found,
        f"merged ([export] delivery), where the memory allows it: {faster:.2f} times as many tokens as attached, "
        f"for {memory}; attached, where it does not",
    ]


def describe(measured: Measured) -> None:
    """Print the figures as a table, the advice, and the lines for the board's profile."""
    console = Console()
    names = " · ".join(name for name in (measured.attached, measured.merged) if name)
    table = Table("figure", "unit", title=names or "base only", title_justify="left")
    table.add_column("median", justify="right")
    for key, value in measured.figures.items():
        threads = key.removeprefix("base_decode_").removesuffix("_threads_tokens_per_second")
        words, unit = MEANING.get(key, (f"base, answer made, threads: {threads}", "tokens/s"))
        table.add_row(words, unit, f"{value:,g}")
    console.print(table)
    for line in measured.advice:
        console.print(f"→ {line}", highlight=False, markup=False)
    console.print("\n[dim]for the board's profile.toml:[/dim]\n\\[measured]", highlight=False)
    for key, value in measured.figures.items():
        console.print(f"{key} = {value:g}", highlight=False)
