"""Surgery on a built graph: at every projection, room for a LoRA of any rank.

    y = MatMul(x, W)   becomes   y = MatMul(x, W) + MatMul(MatMul(x, A), B)

A and B are inputs with a default of rank 0, which adds nothing; their rank is a symbol of their own. So one graph runs
without an adapter, and with any adapter, whatever its rank and whichever projections it changes.
"""

import re

import numpy as np
import onnx_ir as ir
from transformers import PretrainedConfig

from pitstop.workshop.export.onnx.architecture import GROUPS, n_layers, projections, unsupported

_PROJECTION = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+_proj)/MatMul(_Q\d)?")


def add_sites(graph: ir.Graph, config: PretrainedConfig) -> None:
    """Give every projection of the graph its pair of inputs, `lora.<layer>.<attn|mlp>.<projection>.A` and `.B`.

    Raises:
        BrokenInput: the graph has other projections than the architecture.
    """
    found = {}
    for node in list(graph):
        named = _PROJECTION.fullmatch(node.name or "")
        if named and node.op_type in ("MatMul", "MatMulNBits"):
            site = f"lora.{named[1]}.{named[2]}.{named[3]}"
            found[site] = _shape(node)
            _add_site(graph, node, site, *found[site])
    _check(found, config)


def _shape(node: ir.Node) -> tuple[int, int]:
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    inputs, outputs = weight.shape.numpy()
    return inputs, outputs


def _add_site(graph: ir.Graph, node: ir.Node, site: str, inputs: int, outputs: int) -> None:
    rank = f"{site}.rank"
    a = _optional(graph, f"{site}.A", [inputs, rank], (inputs, 0))
    b = _optional(graph, f"{site}.B", [rank, outputs], (0, outputs))
    plain = node.outputs[0]
    uses = list(plain.uses())
    down = ir.node("MatMul", [node.inputs[0], a], name=f"{site}/down", outputs=[ir.Value(name=f"{site}.down")])
    up = ir.node("MatMul", [down.outputs[0], b], name=f"{site}/up", outputs=[ir.Value(name=f"{site}.up")])
    adapted = ir.Value(name=f"{site}.adapted", type=plain.type, shape=plain.shape)
    graph.insert_after(node, [down, up, ir.node("Add", [plain, up.outputs[0]], name=f"{site}/add", outputs=[adapted])])
    for user, index in uses:
        user.replace_input_with(index, adapted)


def _optional(graph: ir.Graph, name: str, shape: list[int | str], default: tuple[int, int]) -> ir.Value:
    """Add an input that has a default: both input and initializer."""
    empty = ir.tensor(np.zeros(default, np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=empty)
    graph.inputs.append(value)
    graph.initializers[name] = value
    return value


def _check(found: dict[str, tuple[int, int]], config: PretrainedConfig) -> None:
    """Refuse a graph in which a projection is missing, unknown or of another shape than the config says."""
    single = projections(config)
    expected = {f"lora.{layer}.{name}": shape for layer in range(n_layers(config)) for name, shape in single.items()}
    for layer in range(n_layers(config)):
        for group, members in GROUPS.items():
            if f"lora.{layer}.{group}" in found:
                shapes = [expected.pop(f"lora.{layer}.{name}") for name in members]
                expected[f"lora.{layer}.{group}"] = shapes[0][0], sum(outputs for _, outputs in shapes)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        has, should = found.get(wrong[0]), expected.get(wrong[0])
        raise unsupported(
            config,
            f"{len(wrong)} of {len(expected)} projections are not where they are expected in the built graph: "
            f"{wrong[0]} is {has or 'missing'}, its config says {should or 'there is none'}",
        )
