"""The ONNX engine beside onnxruntime-genai used as its documentation shows, and beside the trained adapter.

    python tools/bench_onnx.py [--quick] [--threads N] [--json FILE]

The peer of swaps opens a generator for each request and gives it an adapter; of decoding it runs the same graph
without room for adapters; of logits it is PEFT in 32-bit floats. Runs alternate, in one process.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_material as material
import onnxruntime_genai as og
import torch
from material import prompt
from measured import Row, header, parser, report, row
from transformers import AutoModelForCausalLM, AutoTokenizer

from pitstop.device.memory import give_back_freed_memory, held
from pitstop.engines.base import PLAIN_BASE, Sampling, Usage, Use, divergence
from pitstop.engines.onnx import OnnxEngine
from pitstop.engines.torch import TorchEngine
from pitstop.files import sha256_file

CONTEXT = 2048  # tokens of a conversation: what a device has by default
SHORT = 36  # tokens of a prompt
LONG = 512  # of a conversation that comes back
QUESTION = 8  # that it comes back with
ANSWER = 48  # tokens made
SWAPS = 1000
MB = 1e6
NAMES = ("one", "two")
TEXTS = (
    "The river rises in the mountains and reaches the sea after three hundred miles of quiet meadows and old towns.",
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError\n    return width * height\n",
    "<|im_start|>user\nTurn on the light in the kitchen, please.<|im_end|>\n<|im_start|>assistant\n",
    "A prime number has no divisors but one and itself; Euclid showed that there is no largest one among them.",
)


class Peer:
    """onnxruntime-genai by itself: a generator for each request.

    Its threads spin by default, which on a busy machine makes two of them slower than one: ``spinning`` leaves that as
    it is, else they wait as the engine's do, and what is compared is the work alone.
    """

    def __init__(self, folder: Path, threads: int, *, spinning: bool = False) -> None:
        config = og.Config(str(folder))
        options: dict[str, object] = {"intra_op_num_threads": threads, "log_severity_level": 3}
        if not spinning:
            options["session.intra_op.allow_spinning"] = "0"
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._adapters = og.Adapters(self._model)

    def load(self, name: str, path: Path) -> None:
        self._adapters.load(str(path), name)

    def begin(self, tokens: list[int], adapter: str | None) -> og.Generator:
        """Return a generator that has said one token."""
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        generator = og.Generator(self._model, params)
        if adapter is not None:
            generator.set_active_adapter(self._adapters, adapter)
        generator.append_tokens(np.array(tokens, np.int32))
        generator.generate_next_token()
        return generator


def main() -> None:
    """Measure, and print the table."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    runs = 8 if chosen.quick else 24
    adapters = {name: material.adapter("int8", number) for number, name in enumerate(NAMES)}
    peer, spinning = (Peer(material.graph("int8").parent, chosen.threads, spinning=each) for each in (False, True))
    for name, path in adapters.items():
        peer.load(name, path)
        spinning.load(name, path)
    rows = [
        _swap(adapters, peer, chosen.threads, runs),
        _swap(adapters, spinning, chosen.threads, runs, ", the peer's threads as they are"),
        _swap_back(adapters, peer, chosen.threads, runs),
        *_decode(chosen.threads, runs // 2),
        _flat(adapters, peer, chosen.threads, SWAPS // 4 if chosen.quick else SWAPS),
        *_logits(chosen.threads),
    ]
    packages = ["onnxruntime", "onnxruntime-genai", "torch", "peft"]
    report(header(packages, threads=chosen.threads, context=CONTEXT), rows, chosen.json)


def _open(adapters: dict[str, Path], threads: int, sequences: int, precision: str = "int8") -> OnnxEngine:
    graph = material.graph(precision)
    options = {"context_length": CONTEXT, "sequences": sequences, "threads": threads}
    engine = OnnxEngine(graph, base_sha256=sha256_file(graph), **options)
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    return engine


def _milliseconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def _first_token(engine: OnnxEngine, tokens: list[int], use: Use) -> Usage:
    usage = Usage()
    stream = engine.start(tokens, use, Sampling(max_tokens=ANSWER), usage)
    while not usage.completion_tokens:
        engine.advance([stream])
    stream.close()
    return usage


def _swap(adapters: dict[str, Path], peer: Peer, threads: int, runs: int, peers: str = "") -> Row:
    """Let two adapters answer new prompts in turn, where only one conversation fits in memory."""
    ours, theirs = [], []
    with _open(adapters, threads, 1) as engine:
        for number in range(runs + 2):
            name, tokens = NAMES[number % 2], prompt(SHORT, number)
            ours.append(_milliseconds(lambda tokens=tokens, name=name: _first_token(engine, tokens, Use(name))))
            theirs.append(_milliseconds(lambda tokens=tokens, name=name: peer.begin(tokens, name)))
    return row(
        f"another adapter, new prompt of {SHORT} tokens: first token{peers}", ours[2:], theirs[2:], "ms", "<= 0.85"
    )


def _swap_back(adapters: dict[str, Path], peer: Peer, threads: int, runs: int) -> Row:
    """Go on with two long conversations in turn, each under its adapter."""
    ours, theirs = [], []
    documents = {name: prompt(LONG, number) for number, name in enumerate(NAMES)}
    with _open(adapters, threads, 2) as engine:
        for name, tokens in documents.items():
            _first_token(engine, tokens, Use(name))
        for number in range(runs):
            name = NAMES[number % 2]
            tokens = [*documents[name], *prompt(QUESTION, 1000 + number)]
            ours.append(_milliseconds(lambda tokens=tokens, name=name: _first_token(engine, tokens, Use(name))))
            theirs.append(_milliseconds(lambda tokens=tokens, name=name: peer.begin(tokens, name)))
    what = f"back to a conversation of {LONG} tokens, {QUESTION} more: first token"
    return row(what, ours[1:], theirs[1:], "ms", "<= 0.1")


def _decode(threads: int, runs: int) -> list[Row]:
    """Let answers be made with an adapter, without one, and on the graphs that have no room for any."""
    speeds: dict[tuple[str, str], list[float]] = {}
    engines = {kind: _open({NAMES[0]: material.adapter(kind, 0)}, threads, 1, kind) for kind in ("int8", "int8-fused")}
    peers = {kind: Peer(material.without_sites(kind), threads) for kind in engines}
    for number in range(runs + 1):
        tokens = prompt(SHORT, number)
        for kind, engine in engines.items():
            for how, use in (("with an adapter of rank 8", Use(NAMES[0])), ("without an adapter", PLAIN_BASE)):
                speeds.setdefault((kind, how), []).append(_speed(engine, tokens, use))
            generator = peers[kind].begin(tokens, None)
            begun = time.perf_counter()
            for _ in range(ANSWER):
                generator.generate_next_token()
            speeds.setdefault((kind, "peer"), []).append(ANSWER / (time.perf_counter() - begun))
    for engine in engines.values():
        engine.close()
    return [
        row(
            f"decode, {ours} {how} ÷ {theirs} without room",
            speeds[ours, how][1:],
            speeds[theirs, "peer"][1:],
            "tokens/s",
            wanted,
        )
        for ours, how, theirs, wanted in (
            ("int8", "with an adapter of rank 8", "int8", ">= 0.85"),
            ("int8-fused", "with an adapter of rank 8", "int8", ""),
            ("int8-fused", "with an adapter of rank 8", "int8-fused", ""),
            ("int8", "without an adapter", "int8", ""),
        )
    ]


def _speed(engine: OnnxEngine, tokens: list[int], use: Use) -> float:
    """Return the tokens made in a second after the first; those that would end the answer are kept away."""
    ends = tuple((token, -1e9) for token in sorted(engine._model.end_tokens))
    stream = engine.start(tokens, use, Sampling(max_tokens=ANSWER + 1, logit_bias=ends), Usage())
    while not stream.usage.completion_tokens:
        engine.advance([stream])
    begun = time.perf_counter()
    while not stream.finished:
        engine.advance([stream])
    return ANSWER / (time.perf_counter() - begun)


def _flat(adapters: dict[str, Path], peer: Peer, threads: int, swaps: int) -> Row:
    """Swap many times and see what memory that leaves behind, after a tenth as many to warm up.

    The prompts are always the same few: a new word touches its row of the embedding, which is a mapped file.
    """
    with _open(adapters, threads, 1) as engine:
        grown = _growth(swaps, lambda number: _first_token(engine, prompt(4, number % 8), Use(NAMES[number % 2])))
    theirs = _growth(swaps, lambda number: peer.begin(prompt(4, number % 8), NAMES[number % 2]))
    ratio = grown / theirs if theirs else math.nan
    return Row(f"memory after {swaps:,} swaps, more than before", grown, theirs, ratio, "MB", 1, "ours <= 2 MB")


def _growth(swaps: int, swap: Callable[[int], object]) -> float:
    for number in range(swaps // 10):
        swap(number)
    give_back_freed_memory()
    before = held()
    for number in range(swaps):
        swap(number)
    return held().since(before) / MB


def _logits(threads: int) -> list[Row]:
    """Compare with PEFT: the largest difference of a logit in 32-bit floats, and KL(PEFT || ONNX) in 8 bits."""
    hf = material.hugging_face()
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    expected, moved = [], []
    with TorchEngine(model, tokenizer, base_sha256="", context_length=CONTEXT) as trained:
        trained.base_sha256 = sha256_file(material.graph("fp32"))
        _bind(material.trained(0), trained.base_sha256)
        trained.load_adapter("one", material.trained(0))
        for tokens in texts:
            expected.append(trained.logits(tokens, Use("one")))
            moved.append(divergence(expected[-1], trained.logits(tokens)))
    found = {}
    for precision in ("fp32", "int8"):
        with _open({"one": material.adapter(precision, 0)}, threads, 1, precision) as engine:
            found[precision] = [engine.logits(tokens, Use("one")) for tokens in texts]
    apart = max(float(np.abs(one - other).max()) for one, other in zip(expected, found["fp32"], strict=True))
    kl = np.concatenate([divergence(one, other) for one, other in zip(expected, found["int8"], strict=True)])
    far = float(np.concatenate(moved).mean())
    return [
        Row("fp32 + adapter, PEFT: largest difference of a logit", 1e3 * apart, 0.0, math.nan, "1e-3", 1, "ours <= 2"),
        Row("KL(PEFT || int8 + adapter), ours; KL(PEFT || base), peer", 1e3 * float(kl.mean()), 1e3 * far,
            float(kl.mean()) / far, "1e-3 nats", 1, "ours <= 10"),
    ]  # fmt: skip


def _bind(folder: Path, base_sha256: str) -> None:
    (folder / "pitstop.json").write_text(f'{{"base_sha256": "{base_sha256}", "name": "random"}}')


if __name__ == "__main__":
    main()
