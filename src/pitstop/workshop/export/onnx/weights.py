"""What an ONNX base computes with, as a model that can be trained on: its blocks as plain numbers again."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pitstop.workshop.export.onnx.architecture import GROUPS

Array = npt.NDArray[Any]

_PROJECTION = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul_Q\d")
_BLOCKS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}  # inputs that are values, scales, zero points


def load_shipped(folder: Path, graph: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a Hugging Face folder with the matrices of the ONNX base that was made of it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = dict(model.named_parameters())
    found = dict(_matrices(ir.load(graph).graph))
    with torch.no_grad():
        for name, matrix in _grouped(found, {name: len(weight) for name, weight in names.items()}).items():
            names[name].copy_(torch.from_numpy(matrix))
    model.to(dtype)  # type: ignore[arg-type]
    return model


def _matrices(graph: ir.Graph) -> Iterator[tuple[str, Array]]:
    """Yield every quantized matrix of (outputs, inputs) under the name its parameter has in most models."""
    for node in graph:
        if node.op_type not in _BLOCKS:
            continue
        named = _PROJECTION.fullmatch(node.name or "")
        if named:
            block = "self_attn" if named[2] == "attn" else named[2]
            yield f"model.layers.{named[1]}.{block}.{named[3]}.weight", _dequantize(node)
        elif node.op_type == "GatherBlockQuantized":
            yield "model.embed_tokens.weight", _dequantize(node)
        else:
            yield "lm_head.weight", _dequantize(node)


def _dequantize(node: ir.Node) -> Array:
    stored, scales, zeros = (_array(node, index) for index in _BLOCKS[node.op_type])
    assert stored is not None
    assert scales is not None
    bits = node.attributes["bits"].as_int()
    scales = scales.reshape(len(stored), -1).astype(np.float32)
    values = _unpack(stored.reshape(*scales.shape, -1), bits).astype(np.float32)
    offset: Array = np.float32(1 << (bits - 1)) * np.ones_like(scales)
    if zeros is not None:
        offset = _unpack(zeros.reshape(len(stored), -1), bits)[:, : scales.shape[1]].astype(np.float32)
    matrix: Array = ((values - offset[:, :, None]) * scales[:, :, None]).reshape(len(stored), -1)
    return matrix[:, : node.attributes["K"].as_int()] if "K" in node.attributes else matrix


def _unpack(stored: Array, bits: int) -> Array:
    """Return one value an element; of two in a byte the first is the lower half."""
    if bits == 8:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1)


def _array(node: ir.Node, index: int) -> Array | None:
    """Return a constant input; what lies between changes its type or shape alone."""
    value = node.inputs[index] if index < len(node.inputs) else None
    while value is not None and value.const_value is None:
        source = value.producer()
        assert source is not None
        assert source.op_type in ("Cast", "Reshape")
        value = source.inputs[0]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _grouped(found: dict[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return the matrices by the model's own names: some models have several projections in one, or no head.

    Args:
        sizes: the outputs of the model's matrices, by name.
    """
    found = dict(_apart(found, sizes))
    result = {name: matrix for name, matrix in found.items() if name in sizes}
    for name in sizes:
        parts = _members(name)
        if parts and all(part in found for part in parts):
            result[name] = np.concatenate([found[part] for part in parts])
    return result


def _apart(found: dict[str, Array], sizes: Mapping[str, int]) -> Iterator[tuple[str, Array]]:
    """Yield the matrices, those of a group that the graph has as one and the model has not as several."""
    for name, matrix in found.items():
        parts = _members(name)
        if name not in sizes and parts and all(part in sizes for part in parts):
            ends = np.cumsum([sizes[part] for part in parts])
            yield from zip(parts, np.split(matrix, ends[:-1]), strict=True)
        else:
            yield name, matrix


def _members(name: str) -> list[str]:
    """Return the parameters of a group's projections by the group's own name; none: it names no group."""
    layer, dot, rest = name.removesuffix(".weight").rpartition(".self_attn." if ".self_attn." in name else ".mlp.")
    members = GROUPS.get(f"{dot.strip('.').removeprefix('self_')}.{rest}", ())
    return [f"{layer}{dot}{member.partition('.')[2]}.weight" for member in members]
