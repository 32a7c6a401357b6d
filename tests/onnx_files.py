"""ONNX files for tests: the real base as a graph, and adapters of any tensors."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.formats.onnx_adapter import note
from pitstop.bundle.onnx import sites
from pitstop.files import sha256_file


def write_onnx_adapter(
    path: Path, tensors: Mapping[str, np.ndarray], base_sha256: str | None, invocation: Sequence[int] = ()
) -> Path:
    """Write what ONNX Runtime writes, and the note that binds it to its base."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()
    }
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    made.export_adapter(str(path))
    if base_sha256 is not None:
        path.write_bytes(path.read_bytes() + note(base_sha256, tuple(invocation)))
    return path


def random_onnx_adapter(path: Path, graph: Path, seed: int, rank: int = 4, strength: float = 0.5) -> Path:
    """Write a random adapter on the queries and values of a graph."""
    random = np.random.default_rng(seed)
    tensors = {}
    for site, shape in sites(read_onnx_graph(graph)).items():
        if site.endswith(("q_proj", "v_proj")):
            a = random.normal(size=(shape.inputs, rank)) / shape.inputs**0.5
            b = random.normal(size=(rank, shape.outputs)) * strength
            tensors |= {f"{site}.A": a.astype(np.float32), f"{site}.B": b.astype(np.float32)}
    return write_onnx_adapter(path, tensors, sha256_file(graph))


def built_graph(gguf: Path, precision: str, cache: Path) -> Path:
    """Return the graph of a base, built from its GGUF file once for every state of what builds it."""
    import pitstop.workshop.export as export
    from pitstop.workshop.runs import exclusive

    code = sorted((Path(export.__path__[0]) / "onnx").glob("*.py"))
    key = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:16]
    folder = cache / f"onnx-{precision}-{key}"
    with exclusive(cache, wait=True):
        if not (folder / "model.onnx").is_file():  # it comes last
            for old in cache.glob(f"onnx-{precision}-*"):
                shutil.rmtree(old)
            _build(gguf, precision, folder)
    return folder / "model.onnx"


def _build(gguf: Path, precision: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from pitstop.workshop.export.onnx import build_base

    hf = folder / "hf"
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(hf)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(hf)
    del model
    build_base(hf, folder, precision)
    shutil.rmtree(hf)
