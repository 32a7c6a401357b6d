"""What an adapter on each preset of modules costs a device: bytes, and the share of the base's speed it leaves.

The share is measured on this machine, once for a base file and a rank; `pitstop bench` measures it on the board.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gguf
import numpy as np

from pitstop import records
from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Usage, Use
from pitstop.errors import RecordError
from pitstop.progress import say
from pitstop.workshop.recipe import PRESETS
from pitstop.workshop.training.frozen import gguf_names

TOKENS, SECONDS, RUNS = 32, 0.5, 3  # of one decoding at most; times each preset has its turn
PROMPT = [1, 2, 3, 4]


@dataclass(frozen=True)
class PresetCost:
    """One preset's cost on the device."""

    preset: str
    mib: float  # of the adapter in f16
    speed: float  # of decoding with it attached ÷ without


@dataclass(frozen=True)
class Costs:
    """`bases/<base>/measured/costs-<rank>.json`."""

    base_sha256: str
    rank: int
    presets: tuple[PresetCost, ...]


def costs(base: Path, base_sha256: str, rank: int, kept: Path) -> Costs:
    """Return the cost of every preset at a rank, measured on first use and kept in the folder ``kept``.

    Raises:
        MissingExtra: llama-cpp-python is not installed.
    """
    file = kept / f"costs-{base_sha256[:12]}-{rank}.json"
    if file.is_file():
        try:
            return records.load_json(Costs, file)
        except RecordError:
            file.unlink()  # of another pitstop version
    found = Costs(base_sha256, rank, tuple(_measured(base, base_sha256, rank)))
    kept.mkdir(exist_ok=True)
    records.save_json(found, file)
    return found


def tell(found: Costs) -> None:
    """Say what the presets cost."""
    for one in found.presets:
        say(
            f"modules {one.preset!r}: {one.mib:,.1f} MiB at rank {found.rank}; decodes at {one.speed:.0%} of the "
            "base's speed here"
        )


def _measured(base: Path, base_sha256: str, rank: int) -> Iterator[PresetCost]:
    from pitstop.engines.llama import LlamaEngine, products

    products()  # can only be loaded before llama.cpp is, and what is trained here may be checked by this process next
    header = read_gguf(base)
    with (
        TemporaryDirectory() as scratch,
        LlamaEngine(base, base_sha256=base_sha256, context_length=64, sequences=len(PRESETS) + 1) as engine,
    ):
        sizes = {}
        for preset in PRESETS:
            path = Path(scratch, f"{preset}.gguf")
            sizes[preset] = _write(path, header, base_sha256, preset, rank)
            engine.load_adapter(preset, path)
        ends = {int(str(value)) for key, value in header.metadata.items() if key.endswith("_token_id")}
        _seconds_a_token(engine, PLAIN_BASE, 4, ends)
        tokens = max(4, min(TOKENS, int(SECONDS / _seconds_a_token(engine, PLAIN_BASE, 4, ends))))
        uses = {"": PLAIN_BASE, **{preset: Use(preset) for preset in PRESETS}}
        times: dict[str, list[float]] = {name: [] for name in uses}
        for _ in range(RUNS):
            for name, use in uses.items():
                times[name].append(_seconds_a_token(engine, use, tokens, ends))
    for preset, size in sizes.items():
        yield PresetCost(preset, round(size / (1 << 20), 4), round(median(times[""]) / median(times[preset]), 3))


def _seconds_a_token(engine: Engine, use: Use, tokens: int, ends: Iterable[int]) -> float:
    never = tuple((end, -1e9) for end in ends)  # an answer that ends early tells little
    stream = engine.start(PROMPT, use, Sampling(max_tokens=tokens, logit_bias=never), Usage())
    while not stream.usage.completion_tokens:
        engine.advance([stream])
    begun, before = time.perf_counter(), stream.usage.completion_tokens
    while not stream.finished:
        engine.advance([stream])
    return (time.perf_counter() - begun) / max(1, stream.usage.completion_tokens - before)


def _write(path: Path, header: GgufHeader, base_sha256: str, preset: str, rank: int) -> int:
    """Write a random adapter of a preset, too weak to change what is said; return its size in bytes."""
    random = np.random.default_rng(0)
    architecture = str(header.metadata["general.architecture"])
    names = gguf_names(architecture, 1)
    found = (names.get(f"model.layers.0.{part}.{name}") for name in PRESETS[preset] for part in ("self_attn", "mlp"))
    wanted = {name.removeprefix("blk.0.") for name in found if name}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_string(BASE_KEY, base_sha256)
    for tensor in header.tensors:
        if tensor.name.removesuffix(".weight").partition("blk.")[2].partition(".")[2] in wanted:
            columns, rows = tensor.shape
            a, b = random.normal(size=(rank, columns)) / columns**0.5, random.normal(size=(rows, rank)) * 1e-2
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size
