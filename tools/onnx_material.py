"""What the ONNX benchmarks run on: the real small model as ONNX graphs and for PEFT, and random adapters for both.

Made once and kept beside what `material` makes.
"""

import hashlib
import re
from pathlib import Path

import onnx
import onnxruntime_genai
import random_peft
from material import folder

from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.onnx import GRAPH_FILE
from pitstop.demo import smollm2
from pitstop.files import sha256_file
from pitstop.workshop import base_model
from pitstop.workshop.export import onnx as exporter
from pitstop.workshop.export.onnx import build_base, export_onnx

STRENGTH = 0.1  # standard deviation of the elements of B, alpha being twice the rank


def hugging_face() -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder."""
    target = _made() / "base"
    if not (target / base_model.BASE_FILE).is_file():
        base_model.prepare(str(smollm2.fetch_gguf(folder())), target, precisions=())
    return target / "hf"


def graph(precision: str) -> Path:
    """Return its graph in a precision ("fp32", "int8", "int8-fused"), with room for adapters."""
    target = _made() / precision
    if not (target / GRAPH_FILE).is_file():
        build_base(hugging_face(), target, precision)
    return target / GRAPH_FILE


def without_sites(precision: str) -> Path:
    """Return the folder of that graph without room for adapters: the same weights, and nothing added to them."""
    source = graph(precision)
    target = _made() / f"{precision}-plain"
    if not (target / GRAPH_FILE).is_file():
        target.mkdir(exist_ok=True)
        for file in read_onnx_graph(source).files:
            (target / file).unlink(missing_ok=True)
            (target / file).hardlink_to(source.parent / file)
        model = onnx.load(source, load_external_data=False)
        _strip(model.graph)
        onnx.save(model, target / GRAPH_FILE)
    return target


def _strip(made: onnx.GraphProto) -> None:
    plain = {node.output[0]: node.input[0] for node in made.node if re.fullmatch(r"lora\..*/add", node.name)}
    for field in (made.node, made.input, made.initializer):
        kept = [one for one in field if not one.name.startswith("lora.")]
        del field[:]
        field.extend(kept)
    for node in made.node:
        for index, name in enumerate(node.input):
            node.input[index] = plain.get(name, name)


def trained(number: int, rank: int = 8) -> Path:
    """Return a PEFT folder with a random LoRA on every projection."""
    target = _made() / f"peft-{rank}-{number}"
    if not target.is_dir():
        random_peft.write(hugging_face(), target, seed=number, rank=rank, strength=STRENGTH)
    return target


def adapter(precision: str, number: int, rank: int = 8) -> Path:
    """Return that LoRA as an adapter file of a graph."""
    on = graph(precision)
    digest = sha256_file(on)
    target = _made() / f"{precision}-{rank}-{number}-{digest[:12]}.onnx_adapter"
    if not target.is_file():
        export_onnx(trained(number, rank), hugging_face(), on, digest, target, precision="f32")
    return target


def _made() -> Path:
    """Return a folder for just this state of what builds graphs."""
    code = b"".join(file.read_bytes() for file in sorted(Path(exporter.__path__[0]).glob("*.py")))
    path = folder() / f"onnx-{onnxruntime_genai.__version__}-{hashlib.sha256(code).hexdigest()[:12]}"
    path.mkdir(exist_ok=True)
    return path
