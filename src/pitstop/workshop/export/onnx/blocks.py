"""Matrices in 8-bit blocks, each with a scale of its own: the very values that GGUF's Q8_0 holds.

The builder's own 8 bits scale a block by its largest value / 128, Q8_0 by / 127. So weights out of a Q8_0 file would be
rounded anew; here they are kept as they are, and an adapter trained on them runs on the weights it knows. The builder
also leaves the embedding in float32, which is 40 % of a small model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

BLOCK = 32  # values along the inputs that share a scale
ZERO = 128  # stored values are unsigned
DOMAIN = "com.microsoft"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Blocks:
    """One matrix of (outputs, inputs), as the nodes take it in."""

    values: ir.Value  # (outputs, blocks, BLOCK), uint8
    scales: ir.Value  # (outputs, blocks), float32


def quantize(graph: ir.Graph) -> None:
    """Replace every constant matrix of the graph, and its embedding, by 8-bit blocks."""
    made = []
    for node in list(graph):
        if node.op_type == "MatMul" and (weight := _constant(node, 1)) is not None and weight.ndim == 2:
            blocks = _add_blocks(graph, node, weight.T)
            made.append((weight.T, blocks))
            _replace(graph, node, [_matmul(node, weight.shape, blocks)])
    for node in list(graph):
        table = _table(node)
        if table is not None and table.shape[1] % BLOCK == 0:
            tied = next((blocks for weight, blocks in made if np.array_equal(weight, table)), None)
            _replace(graph, node, _gather(graph, node, table.shape, tied or _add_blocks(graph, node, table)))
    graph.opset_imports[DOMAIN] = 1
    graph.remove([node for node in graph if node.op_type == "Transpose" and not node.outputs[0].uses()], safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def to_blocks(matrix: Array) -> tuple[Array, Array]:
    """Return a matrix as values of (outputs, blocks, BLOCK) in uint8, and scales of (outputs, blocks) in float16."""
    outputs, inputs = matrix.shape
    blocks = np.pad(matrix.astype(np.float32), ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    scales = (np.abs(blocks).max(axis=-1) / 127).astype(np.float16)
    steps = np.where(scales == 0, np.inf, scales.astype(np.float32))
    values = np.clip(np.round(blocks / steps[:, :, None]), -127, 127)
    return (values + ZERO).astype(np.uint8), scales


def _constant(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _table(node: ir.Node) -> Array | None:
    """Return the constant matrix a node looks rows up in; tied to the head, it is that one transposed."""
    source = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
    if source is not None and source.op_type == "Transpose":
        weight = _constant(source, 0)
        return None if weight is None else weight.T
    table = _constant(node, 0) if node.op_type == "Gather" else None
    return table if table is not None and table.ndim == 2 else None


def _add_blocks(graph: ir.Graph, node: ir.Node, matrix: Array) -> _Blocks:
    values, scales = to_blocks(matrix)
    # ONNX Runtime wants float32, and makes it once while it loads: in the file they are exact at half the size.
    stored = _initializer(graph, f"{node.name}/scales_f16", scales)
    widened = _node("Cast", f"{node.name}/scales", [stored], to=ir.DataType.FLOAT)
    graph.insert_before(node, widened)
    return _Blocks(_initializer(graph, f"{node.name}/values", values), widened.outputs[0])


def _matmul(node: ir.Node, shape: tuple[int, ...], blocks: _Blocks) -> ir.Node:
    inputs = [node.inputs[0], blocks.values, blocks.scales]
    sizes = {"K": shape[0], "N": shape[1], "bits": 8, "block_size": BLOCK}
    # 4: inputs are rounded to 8 bits as well, which is what makes it fast.
    return _node("MatMulNBits", f"{node.name}_Q8", inputs, DOMAIN, **sizes, accuracy_level=4)


def _gather(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...], blocks: _Blocks) -> list[ir.Node]:
    """Return the nodes that look rows up in blocks; in their own shape, or the head could not share the values."""
    column = _initializer(graph, f"{node.name}/column", np.array([0, 0, 1]))
    scales = _node("Reshape", f"{node.name}/scales_of_blocks", [blocks.scales, column])
    inputs = [blocks.values, node.inputs[1], scales.outputs[0]]
    sizes = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 2}
    rows = _node("GatherBlockQuantized", f"{node.name}_Q8", inputs, DOMAIN, **sizes)
    whole = _initializer(graph, f"{node.name}/row", np.array([0, 0, shape[1]]))
    return [scales, rows, _node("Reshape", f"{node.name}/rows", [rows.outputs[0], whole])]


def _node(kind: str, name: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Node:
    return ir.node(kind, inputs, attributes, domain=domain, name=name, outputs=[ir.Value(name=f"{name}/output")])


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
