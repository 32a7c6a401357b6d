"""Surgery on a built graph: the two matrices of a feed-forward layer that take the same input become one.

The builder does so for queries, keys and values, but not here. Fewer and larger steps, an adapter's most of all, whose
matrices are so small that starting them is most of what they cost.
"""

import re

import numpy as np
import onnx_ir as ir

_GATE = re.compile(r"(/model/layers\.\d+/mlp/)gate_proj/MatMul")


def pack_gate_and_up(graph: ir.Graph) -> None:
    """Replace gate and up projections in floats by one matrix of both, split afterwards."""
    nodes = {node.name: node for node in graph}
    for gate in list(graph):
        named = _GATE.fullmatch(gate.name or "")
        up = nodes.get(f"{named[1]}up_proj/MatMul") if named else None
        if named and up is not None and up.inputs[0] is gate.inputs[0]:
            _pack(graph, gate, up, f"{named[1]}gate_up_proj")


def _pack(graph: ir.Graph, gate: ir.Node, up: ir.Node, name: str) -> None:
    weights = [_weight(node) for node in (gate, up)]
    both = np.concatenate(weights, axis=1)
    weight = _constant(graph, f"{name}/weight", both)
    widths = _constant(graph, f"{name}/widths", np.array([one.shape[1] for one in weights]))
    product, *halves = (ir.Value(name=f"{name}/{what}", type=gate.outputs[0].type) for what in ("both", "gate", "up"))
    multiply = ir.node("MatMul", [gate.inputs[0], weight], name=f"{name}/MatMul", outputs=[product])
    split = ir.node("Split", [product, widths], {"axis": -1}, name=f"{name}/Split", outputs=halves)
    graph.insert_before(gate, [multiply, split])
    for node, half in zip((gate, up), halves, strict=True):
        node.outputs[0].replace_all_uses_with(half)
        old = node.inputs[1]
        graph.remove(node, safe=True)
        if old is not None and not old.uses():
            del graph.initializers[str(old.name)]


def _weight(node: ir.Node) -> np.ndarray:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
