"""What the benchmarks run on: a real small model in any precision, random adapters for it, and devices with both.

Made once and kept in the user's cache folder, one folder for each version of llama.cpp, whose quantizer it is.
"""

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

from pitstop import records
from pitstop.bundle.binding import BASE_KEY
from pitstop.bundle.formats import read_gguf
from pitstop.bundle.manifest import Artifact, Bundle, BundleKind, Prompting
from pitstop.demo import smollm2
from pitstop.device.store import Store
from pitstop.engines.llama.quantize import quantize
from pitstop.files import CHUNK, sha256_file
from pitstop.packages import cache_folder
from pitstop.workshop.export import llamacpp

BASE = "smollm2"
RANK = 16
KINDS = {"f16": (np.float16, np.float16), "f32": (np.float32, np.float32), "f16+f32": (np.float16, np.float32)}  # A, B
ADAPTERS = 4  # of a device
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CONTEXT = 2048  # tokens
ENDS = ("0", "2")  # tokens that end an answer: <|endoftext|>, <|im_end|>
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_digest = lru_cache(sha256_file)


def folder() -> Path:
    """Return the folder all of it is in."""
    path = cache_folder() / f"bench-{llamacpp.installed_version()}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def base(precision: str) -> Path:
    """Return SmolLM2-135M-Instruct as GGUF in a precision ("q8_0", "q4_0" …)."""
    path = folder() / f"{BASE}.{precision}.gguf"
    if not path.is_file():
        quantize(smollm2.fetch_gguf(folder()), path, precision)
    return path


def adapter(precision: str, number: int, kind: str = "f16", rank: int = RANK) -> Path:
    """Return a random LoRA on every linear layer of a base, its tensors in one of KINDS."""
    on = base(precision)
    path = folder() / f"{precision}-{number}-r{rank}.{kind}.gguf"
    if path.is_file():
        return path
    random = np.random.default_rng(number)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_string(BASE_KEY, _digest(on))
    types = KINDS[kind]
    for tensor in read_gguf(on).tensors:
        if any(f".{module}." in tensor.name for module in LINEAR):
            columns, rows = tensor.shape
            a, b = random.normal(size=(rank, columns)) / columns**0.5, random.normal(size=(rows, rank)) * 0.5
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(types[0]))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(types[1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)
    return path


def adapter_name(number: int) -> str:
    """Return the name a device of `device` serves an adapter under."""
    return f"adapter-{number}"


def device(precision: str) -> Path:
    """Return a device root that serves a base with the first ADAPTERS of its adapters."""
    root = folder() / f"device-{precision}"
    if root.is_dir():
        return root
    unfinished = root.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    files = {adapter_name(number): adapter(precision, number) for number in range(ADAPTERS)}
    _install(Store(unfinished), base(precision), files)
    unfinished.rename(root)
    return root


def _install(store: Store, base_file: Path, adapters: Mapping[str, Path]) -> None:
    digest = _digest(base_file)
    files = {BASE: base_file, **adapters}
    bundles = {name: _bundle("base" if name == BASE else "adapter", name, file, digest) for name, file in files.items()}
    with store.locked():
        release = store.release({name: records.to_json(bundle) for name, bundle in bundles.items()})
        for name, file in files.items():
            incoming = store.add_blob(bundles[name].artifacts[0])
            with file.open("rb") as source:
                while chunk := source.read(CHUNK):
                    incoming.append(chunk)
            incoming.finish()
        store.install(release)
        store.activate()
        store.confirm()


def _bundle(kind: BundleKind, name: str, file: Path, base_sha256: str) -> Bundle:
    return Bundle(
        kind=kind,
        name=name,
        version="1.0.0",
        counter=1,
        license=smollm2.LICENSE,
        base_name=BASE,
        base_sha256=base_sha256,
        prompting=Prompting(TEMPLATE, "<|im_start|>", "<|im_end|>"),
        context_length=CONTEXT,
        artifacts=(Artifact(kind, "gguf", "", file.name, _digest(file), file.stat().st_size),),
    )


def prompt(length: int, number: int) -> list[int]:
    """Return random ordinary words of that many tokens: no two numbers have a beginning in common."""
    words: list[int] = np.random.default_rng(number).integers(1000, 40000, size=length).tolist()
    return words
