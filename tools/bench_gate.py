"""What measuring an adapter for the gate takes: as it ships, beside the same without our products, and on torch.

    python tools/bench_gate.py [--quick] [--threads N] [--json FILE]

The suites are those that come with pitstop, scored under an adapter of rank 16 on every linear layer; the base's own
figures are cached by `pitstop check`, and so not part of it. Every suite is measured by all three in turn.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import random_peft
import torch
from material import folder
from measured import Row, header, parser, report, row

from pitstop.bundle.manifest import BaseRef
from pitstop.demo import smollm2
from pitstop.engines.base import Engine, Use
from pitstop.engines.llama import LlamaEngine, products
from pitstop.engines.torch import TorchEngine
from pitstop.engines.torch.adapter_folder import IDENTITY_FILE
from pitstop.progress import say
from pitstop.retention.looks import look_at
from pitstop.retention.margins import Margins
from pitstop.retention.measure import measure
from pitstop.retention.suite import Suite, default_folder, load_all
from pitstop.workshop import base_model
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.task import CONTEXT

ARTIFACT, NAME = "q8_0", "adapter"
RANK, STRENGTH = 16, 0.02  # STRENGTH: standard deviation of the elements of B
SIDES = ("ours", "llama.cpp", "torch")


def main() -> None:
    """Measure suite after suite, and print the table."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    possible = products() is not None
    suites = [suite for suite in load_all(default_folder()) if suite.record.purpose == "retention"]
    if chosen.quick:
        suites = [look_at(suite, Margins().looks, 1) for suite in suites]
    base = folder() / "gate-base"
    ref = base_model.prepare(str(smollm2.fetch_gguf(folder())), base, precisions=(ARTIFACT,))
    adapter = _adapter(base, ref)
    facts = {"threads": chosen.threads, "items": sum(len(suite.items) for suite in suites), "own_products": possible}
    seconds: dict[str, list[float]] = {suite.name: [] for suite in suites}
    with ExitStack() as stack:
        engines = [stack.enter_context(engine) for engine in _engines(base, ref, adapter, chosen.threads)]
        for suite in suites:
            for side, engine in zip(SIDES, engines, strict=True):
                seconds[suite.name].append(_seconds(engine, suite, ref))
                say(f"{suite.name}, {side}: {seconds[suite.name][-1]:.1f} s")
    report(header(["llama-cpp-python", "torch"], **facts), list(_rows(seconds)), chosen.json)


def _engines(base: Path, ref: BaseRef, adapter: Path, threads: int) -> Iterator[Engine]:
    """Yield the sides, each with the adapter loaded."""
    sha256, gguf = ref.artifact(ARTIFACT).sha256, adapter / "adapter.gguf"
    path = base_model.artifact_path(base, ref, ARTIFACT)
    for own in (True, False):
        engine: Engine = LlamaEngine(
            path, base_sha256=sha256, context_length=CONTEXT, sequences=32, threads=threads, own_products=own
        )
        engine.load_adapter(NAME, gguf)
        yield engine
    model = base_model.load_weights(base, ref, precision="shipped", artifact=ARTIFACT)
    engine = TorchEngine(model, base_model.load_tokenizer(base), base_sha256=sha256, context_length=CONTEXT)
    engine.load_adapter(NAME, adapter)
    yield engine


def _adapter(base: Path, ref: BaseRef) -> Path:
    """Return a PEFT folder with a random LoRA, and the same as GGUF in it."""
    target = base / "adapter"
    if not (target / "adapter.gguf").is_file():
        random_peft.write(base / "hf", target, seed=0, rank=RANK, strength=STRENGTH)
        sha256 = ref.artifact(ARTIFACT).sha256
        (target / IDENTITY_FILE).write_text(json.dumps({"base_sha256": sha256}))
        export_gguf(target, base / "hf", sha256, target / "adapter.gguf", precision="f16")
    return target


def _seconds(engine: Engine, suite: Suite, ref: BaseRef) -> float:
    begun = time.perf_counter()
    measure(engine, [suite], Use(NAME), prompting=ref.prompting)
    return time.perf_counter() - begun


def _rows(seconds: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    columns = list(zip(*seconds.values(), strict=True))
    whole = [[sum(column)] for column in columns]
    for at, goal in ((2, "<= 0.25"), (1, "")):
        yield row(f"all suites, {SIDES[0]} ÷ {SIDES[at]}", whole[0], whole[at], "s", goal)
    for name, (ours, _, peer) in seconds.items():
        yield row(f"{name}, {SIDES[0]} ÷ {SIDES[2]}", [ours], [peer], "s")


if __name__ == "__main__":
    main()
