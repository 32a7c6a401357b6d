"""One long document asked about through several adapters in turn: activated LoRAs beside plain ones.

    python tools/bench_alora.py [--quick] [--threads N] [--json FILE]

The peer is pitstop itself with plain LoRAs: no other runtime here evaluates the base's part once for all adapters.
"""

import time
from pathlib import Path

import gguf
import material
from measured import Row, header, parser, report, row

from pitstop.bundle.binding import INVOCATION_KEY
from pitstop.bundle.formats import read_gguf
from pitstop.engines.base import Sampling, Usage, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.files import sha256_file

DOCUMENT = 1500  # tokens
INVOCATION = (1, 520, 9531, 198)  # <|im_start|>assistant\n
QUESTION = 12  # tokens, of each adapter another one
ADAPTERS = 4


def main() -> None:
    """Measure both kinds in turn, and print the table."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    rows = [
        row_
        for precision in ("q8_0", "q4_0")
        for row_ in _measure(precision, chosen.threads, 1 + 2 * (not chosen.quick))
    ]
    report(header(["llama-cpp-python"], threads=chosen.threads, document=f"{DOCUMENT} tokens"), rows, chosen.json)


def _measure(precision: str, threads: int, runs: int) -> list[Row]:
    base = material.base(precision)
    activated, plain, first = [], [], []
    for run in range(runs):
        with LlamaEngine(
            base, base_sha256=sha256_file(base), context_length=2048, sequences=6, threads=threads
        ) as engine:
            for number in range(ADAPTERS):
                engine.load_adapter(f"plain-{number}", material.adapter(precision, number))
                engine.load_adapter(f"activated-{number}", _activated(precision, number))
            document = material.prompt(DOCUMENT, 100 + run)
            begun = _first_tokens(engine, "activated", document)
            first.append(begun[0])
            activated += begun[1:]
            plain += _first_tokens(engine, "plain", document)[1:]
    asked = f"{precision}: first token, a further adapter on the same {DOCUMENT:,} tokens, aLoRA ÷ LoRA"
    return [
        row(asked, activated, plain, "ms", "<= 0.1"),
        row(f"{precision}: the same, the adapter that reads the document", first, plain, "ms"),
    ]


def _first_tokens(engine: LlamaEngine, kind: str, document: list[int]) -> list[float]:
    """Return how long each adapter takes to its first token, in milliseconds."""
    times = []
    for number in range(ADAPTERS):
        prompt = [*document, *material.prompt(QUESTION, number), *INVOCATION]
        begun = time.perf_counter()
        stream = engine.start(prompt, Use(f"{kind}-{number}"), Sampling(max_tokens=8), Usage())
        while not stream.usage.completion_tokens:
            engine.advance([stream])
        times.append(1e3 * (time.perf_counter() - begun))
        while not stream.finished:
            engine.advance([stream])
    return times


def _activated(precision: str, number: int) -> Path:
    """Return a plain adapter's copy that waits for the invocation."""
    source = material.adapter(precision, number)
    path = source.with_suffix(".activated.gguf")
    if not path.is_file():
        reader, header_ = gguf.GGUFReader(source), read_gguf(source)
        unfinished = path.with_suffix(".unfinished")
        writer = gguf.GGUFWriter(unfinished, "llama")
        for key, value in header_.metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, gguf.GGUFValueType(header_.types[key]))
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        writer.add_key_value(INVOCATION_KEY, list(INVOCATION), kinds[0], sub_type=kinds[1])
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.rename(path)
    return path


if __name__ == "__main__":
    main()
