"""How fast the runtime is, beside llama-server and llama-bench of the same llama.cpp.

`pitstop serve` is held against llama-server, the engine in process against llama-bench: the same files, the same number
of threads, one after the other in every round. Speeds of streams count from the first token on.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import llamacpp_peers
import material
from measured import Row, header, parser, report, row
from servers import LlamaServer, Pitstop, Server, cold_start, running

from pitstop.engines.base import PLAIN_BASE, Sampling, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.files import sha256_file

ANSWER = 128  # tokens
SHORT, LONG = 64, 512  # tokens of a prompt
SLOTS = 8  # conversations at once, of either server
CLIENTS = 8
FURTHER = 4  # adapters whose memory is measured
IDLE = 2.0  # seconds a server gets to make ready what it does between requests
PRECISIONS = ("q8_0", "q4_0")
TOKENS, MS, SECONDS = "tokens/s", "ms", "s"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    threads: int
    rounds: int
    crowds: int
    swaps: int  # requests in a row of the swap's figures
    own_lanes: int

    @property
    def serve(self) -> list[str]:
        """Options of `pitstop serve`."""
        return ["--threads", str(self.threads), "--own-lanes", str(self.own_lanes)]

    @property
    def llama_server(self) -> list[str]:
        """Options of llama-server: as many conversations, as long."""
        sizes = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * material.CONTEXT)]
        return ["--threads", str(self.threads), *sizes]


@contextlib.contextmanager
def both(precision: str, plan: Plan) -> Iterator[tuple[Server, Server]]:
    """Run pitstop and llama-server over the same base and adapters."""
    files = [material.adapter(precision, number) for number in range(material.ADAPTERS)]
    ours = Pitstop(material.device(precision), plan.serve)
    peer = LlamaServer(material.base(precision), files, plan.llama_server)
    with running(ours) as one, running(peer) as other:
        yield one, other


def open_engine(precision: str, threads: int) -> LlamaEngine:
    """Open the engine as `pitstop serve` does."""
    base = material.base(precision)
    return LlamaEngine(base, base_sha256=sha256_file(base), context_length=material.CONTEXT, threads=threads)


def measure_base(precision: str, plan: Plan) -> list[Row]:
    """One stream of the plain base: in process, by llama-bench, and over HTTP."""
    inside, bench, http = [], [], []
    command = Pitstop(material.device(precision), plan.serve)
    with open_engine(precision, plan.threads) as engine, running(command) as server:
        for _ in range(plan.rounds + 1):
            bench.append(_llama_bench(precision, plan.threads))
            inside.append(_decode_warm(engine, PLAIN_BASE))
            http.append(server.stream([1], None, ANSWER).rate)
    name = precision.upper()
    return [
        row(f"decode, base, one stream, {name} ÷ llama-bench tg{ANSWER}", inside[1:], bench[1:], TOKENS, "≥ 0.97"),
        row(f"HTTP streaming, base, {name} ÷ engine in process", http[1:], inside[1:], TOKENS, "≥ 0.95"),
    ]


def _llama_bench(precision: str, threads: int) -> float:
    """Return tokens a second; every run warms itself up."""
    program = str(llamacpp_peers.build() / "llama-bench")
    sizes = ["-p", "0", "-n", str(ANSWER), "-t", str(threads), "-r", "1"]
    command = [program, "-m", str(material.base(precision)), *sizes, "-o", "json"]
    done = subprocess.run(command, capture_output=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def _decode(engine: LlamaEngine, use: Use) -> float:
    """Return tokens a second of one stream from an empty context, as llama-bench counts them."""
    sampling = Sampling(max_tokens=ANSWER, logit_bias=tuple((int(token), -100.0) for token in material.ENDS))
    begun = time.perf_counter()
    pieces = sum(1 for _ in engine.generate([1], use, sampling))
    assert pieces == ANSWER
    return pieces / (time.perf_counter() - begun)


def _decode_warm(engine: LlamaEngine, use: Use) -> float:
    """Do the same after a token that does not count, as llama-bench does; a change of adapters is another figure."""
    next(iter(engine.generate([1], use)))
    return _decode(engine, use)


def measure_adapter(precision: str, ours: Server, peer: Server, plan: Plan) -> list[Row]:
    """One stream under an adapter."""
    rates: tuple[list[float], list[float]] = ([], [])
    for number in range(plan.rounds + 1):
        tokens = material.prompt(SHORT, number)
        for server, seen in zip((ours, peer), rates, strict=True):
            seen.append(server.stream(tokens, 0, ANSWER).rate)
    figure = f"decode, adapter attached, one stream, {precision.upper()} ÷ llama-server"
    return [row(figure, rates[0][1:], rates[1][1:], TOKENS, "≥ 1.15")]


def measure_swap(precision: str, ours: Server, peer: Server, plan: Plan) -> list[Row]:
    """The next token of warm conversations under two adapters: in turn, and of the same one again and again."""
    swapped: tuple[list[float], list[float]] = ([], [])
    again: tuple[list[float], list[float]] = ([], [])
    for server in (ours, peer):
        for adapter in (0, 1, 0, 1):  # warm; and each once more, for what is made ready between two requests
            _next_tokens(server, [adapter])
            time.sleep(IDLE)
    for _ in range(plan.rounds):
        for server, swaps, stays in zip((ours, peer), swapped, again, strict=True):
            swaps += _next_tokens(server, [0, 1] * (plan.swaps // 2))[1:]
            stays += _next_tokens(server, [0] * plan.swaps)[1:]
    name = precision.upper()
    return [
        row(f"next token after a swap between warm conversations, {name} ÷ llama-server", *swapped, MS, "≤ 0.6"),
        row(f"the same without a swap, {name} ÷ llama-server", *again, MS),
        row(f"next token after a swap, {name} ÷ without a swap", swapped[0], again[0], MS, "≤ 1.1"),
    ]


def _next_tokens(server: Server, adapters: Sequence[int]) -> list[float]:
    """Return the milliseconds each request took, of one client that names one adapter after the other."""
    taken = []
    with server.client() as client:
        for adapter in adapters:
            body = server.request(material.prompt(LONG, 1000 + adapter), adapter, 1, stream=False)
            begun = time.perf_counter()
            server.post(client, body)
            taken.append((time.perf_counter() - begun) * 1000)
    return taken


def measure_crowd(precision: str, ours: Server, peer: Server, plan: Plan) -> list[Row]:
    """Many clients at once, spread over some adapters."""
    rates: tuple[list[float], list[float]] = ([], [])
    slowest: tuple[list[float], list[float]] = ([], [])
    adapters = [client % material.ADAPTERS for client in range(CLIENTS)]
    for number in range(plan.crowds + 1):
        prompts = [material.prompt(SHORT, 2000 + 100 * number + client) for client in range(CLIENTS)]
        for server, rate, wait in zip((ours, peer), rates, slowest, strict=True):
            answers = server.crowd(prompts, adapters, ANSWER)
            seconds = max(one.said[-1] for one in answers) - min(one.asked for one in answers)
            rate.append(CLIENTS * ANSWER / seconds)
            wait.append(max(one.first for one in answers))
    name = f"{CLIENTS} clients over {material.ADAPTERS} adapters, {precision.upper()}"
    return [
        row(f"{name}: all tokens ÷ llama-server", rates[0][1:], rates[1][1:], TOKENS, "≥ 1.5"),
        row(f"{name}: slowest first token ÷ llama-server", slowest[0][1:], slowest[1][1:], SECONDS, "≤ 0.15"),
    ]


def measure_attached(precision: str, plan: Plan) -> list[Row]:
    """What an adapter costs one stream, by the type of its tensors and the number of threads."""
    rows = []
    for threads in sorted({1, plan.threads}, reverse=True):
        with open_engine(precision, threads) as engine:
            for kind in material.KINDS:
                engine.load_adapter(kind, material.adapter(precision, 0, kind))
            seen: dict[Use, list[float]] = {use: [] for use in (PLAIN_BASE, *map(Use, material.KINDS))}
            for _ in range(plan.rounds + 1):
                for use, rates in seen.items():
                    rates.append(_decode_warm(engine, use))
        for kind in material.KINDS:
            figure = f"attached ÷ base decode, {kind} adapter, {precision.upper()}, {_threads(threads)}"
            rows.append(row(figure, seen[Use(kind)][1:], seen[PLAIN_BASE][1:], TOKENS, "≥ 0.80"))
    return rows


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def measure_memory(precision: str, plan: Plan) -> list[Row]:
    """Resident memory of each adapter more than a device came with, once it has answered."""
    first = material.ADAPTERS
    files = [material.adapter(precision, number) for number in range(first, first + FURTHER)]
    with running(Pitstop(material.device(precision), plan.serve)) as server, server.client() as client:
        for number in range(first):
            server.post(client, server.request(material.prompt(8, 7), number, 1, stream=False))
        time.sleep(IDLE)  # contexts that adapters get in idle moments are not the size of an adapter
        resident = [server.resident / 1e6]
        for number, file in enumerate(files, first):
            body = {"lora_name": material.adapter_name(number), "lora_path": str(file)}
            server.post(client, json.dumps(body).encode(), "/v1/load_lora_adapter")
            server.post(client, server.request(material.prompt(8, 7), number, 1, stream=False))
            resident.append(server.resident / 1e6)
    grown = [after - before for before, after in itertools.pairwise(resident)]
    sizes = [file.stat().st_size / 1e6 for file in files]
    return [row("resident memory of a further adapter ÷ its file", grown, sizes, "MB", "≤ 1.15")]


def measure_cold_start(precision: str, plan: Plan) -> list[Row]:
    """From the start of the process to the first token under an adapter; the files are in the system's cache."""
    ours = Pitstop(material.device(precision), plan.serve)
    peer = LlamaServer(material.base(precision), [material.adapter(precision, 0)], [*plan.llama_server, "--no-warmup"])
    tokens = material.prompt(SHORT, 0)
    seen: tuple[list[float], list[float]] = ([], [])
    for _ in range(plan.rounds + 1):
        for command, seconds in zip((ours, peer), seen, strict=True):
            seconds.append(cold_start(command, tokens, 0))
    name = f"cold start with an adapter, {precision.upper()} ÷ llama-server"
    return [row(name, seen[0][1:], seen[1][1:], SECONDS, "≤ 1.0")]


def measure(plan: Plan) -> list[Row]:
    """Measure everything."""
    rows = []
    for precision in PRECISIONS:
        rows += _told(f"base, {precision}", partial(measure_base, precision, plan))
        with both(precision, plan) as (ours, peer):
            rows += _told(f"adapter, {precision}", partial(measure_adapter, precision, ours, peer, plan))
            rows += _told(f"swap, {precision}", partial(measure_swap, precision, ours, peer, plan))
            if precision == "q4_0":
                rows += _told("crowd", partial(measure_crowd, precision, ours, peer, plan))
    rows += _told("attached", partial(measure_attached, "q4_0", plan))
    rows += _told("memory", partial(measure_memory, "q8_0", plan))
    rows += _told("cold start", partial(measure_cold_start, "q8_0", plan))
    return rows


def _told(what: str, work: Callable[[], list[Row]]) -> list[Row]:
    begun = time.monotonic()
    rows = work()
    print(f"{what}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either side [all cores]")
    options.add_argument("--own-lanes", type=int, default=4, help="of pitstop serve [4, as it has itself]")
    given = options.parse_args()
    rounds, crowds, swaps = (3, 2, 16) if given.quick else (11, 5, 40)
    plan = Plan(given.threads, rounds, crowds, swaps, given.own_lanes)
    rows = measure(plan)
    head = header(
        ["llama-cpp-python", "uvicorn", "starlette"],
        threads=plan.threads,
        pitstop_serve=" ".join(plan.serve),
        llama_server=" ".join(plan.llama_server) + " (cold start: --no-warmup too)",
        adapters=f"r={material.RANK}, every linear layer, f16 where nothing else is said",
    )
    report(head, rows, given.json)


if __name__ == "__main__":
    main()
