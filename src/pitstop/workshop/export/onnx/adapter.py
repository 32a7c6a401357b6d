"""A PEFT LoRA to an `.onnx_adapter` file that does exactly the same, and says which base it belongs to."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from transformers import AutoConfig, PretrainedConfig

from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.formats.onnx_adapter import note
from pitstop.bundle.onnx import sites
from pitstop.errors import RecordError
from pitstop.files import write_bytes
from pitstop.workshop.export.lora import load_folded, module_of
from pitstop.workshop.export.onnx.architecture import GROUPS, projections

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]  # A of (inputs, rank) and B of (rank, outputs), as the graph multiplies them
TYPES = {"f32": np.float32, "f16": np.float16}

_MODULE = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)")


def export_onnx(adapter: Path, base: Path, graph: Path, base_sha256: str, target: Path, *, precision: str) -> None:
    """Write ``target`` from the PEFT folder ``adapter``.

    Args:
        base: the base's Hugging Face folder.
        graph: the base's ONNX graph, as `build_base` made it.
        precision: of its tensors: "f32", which engines take as it is, or "f16": half as large.

    Raises:
        RecordError: the adapter has what an adapter file cannot express, or changes what the graph has no room for.
        StorageError: the disk refuses; ``target`` is as it was.
    """
    config = AutoConfig.from_pretrained(base)
    lora, tensors = load_folded(adapter)
    names = sorted({module_of(name) for name in tensors})
    modules = {}
    for module in names:
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].numpy() for half in "AB")
        modules[module] = a.T, b.T
    header = read_onnx_graph(graph)
    parameters = place(modules, set(sites(header)), config, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "adapter")
        _write(parameters, made, TYPES[precision])
        write_bytes(target, made.read_bytes() + note(base_sha256, tuple(lora.alora_invocation_tokens or ())))


def place(modules: Mapping[str, Pair], known: set[str], config: PretrainedConfig, adapter: Path) -> dict[str, Array]:
    """Return what to feed for an adapter's modules: an A and a B by the names of the graph's inputs.

    Raises:
        RecordError: it changes modules that the graph has no room for.
    """
    found: dict[str, Pair] = {}
    unknown = []
    for module, pair in modules.items():
        named = _MODULE.fullmatch(module)
        if named is None:
            unknown.append(module)
            continue
        name = f"{named[2].removeprefix('self_')}.{named[3]}"
        found |= {f"lora.{named[1]}.{part}": piece for part, piece in _split(name, pair, config).items()}
    found = _join(found, known, config)
    unknown += sorted(found.keys() - known)
    if unknown:
        raise RecordError(
            [f"it changes {module}, for which the ONNX graph has no room" for module in unknown[:5]],
            where=adapter,
            cure="train the projections of attention and feed-forward layers only, or ship it merged: pitstop merge R",
        )
    return {f"{site}.{half}": array for site, pair in found.items() for half, array in zip("AB", pair, strict=True)}


def _split(name: str, pair: Pair, config: PretrainedConfig) -> dict[str, Pair]:
    """Return the pairs of single projections: a group's share one A."""
    members = GROUPS.get(name)
    if members is None:
        return {name: pair}
    a, b = pair
    widths = [projections(config)[member][1] for member in members]
    return {m: (a, part) for m, part in zip(members, np.split(b, np.cumsum(widths)[:-1], axis=1), strict=True)}


def _join(found: dict[str, Pair], known: set[str], config: PretrainedConfig) -> dict[str, Pair]:
    """Return the pairs with those of a group that is one matrix in the graph as one: A side by side, B in blocks."""
    joined = dict(found)
    for site in known:
        prefix, layer, group = site.split(".", 2)
        members = GROUPS.get(group, ())
        parts = {m: joined.pop(f"{prefix}.{layer}.{m}", None) for m in members}
        if any(part is not None for part in parts.values()):
            joined[site] = _block(parts, projections(config))
    return joined


def _block(parts: Mapping[str, Pair | None], shapes: Mapping[str, tuple[int, int]]) -> Pair:
    rank = sum(part[0].shape[1] for part in parts.values() if part is not None)
    a, b = [], np.zeros((rank, sum(shapes[name][1] for name in parts)), np.float32)
    row = column = 0
    for name, part in parts.items():
        if part is not None:
            a.append(part[0])
            b[row : row + part[1].shape[0], column : column + shapes[name][1]] = part[1]
            row += part[1].shape[0]
        column += shapes[name][1]
    return np.concatenate(a, axis=1), b


def _write(parameters: Mapping[str, Array], path: Path, kind: type) -> None:
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    values: dict[str, Array] = {name: np.ascontiguousarray(array, kind) for name, array in sorted(parameters.items())}
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    file.export_adapter(str(path))
