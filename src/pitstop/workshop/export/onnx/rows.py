"""Surgery on a built graph: logits of the last tokens only, where nobody asks for the others.

A prompt is read for what follows its last token, but a built graph multiplies every position by the head, which is a
fifth of all the work with a small model and a large vocabulary. Here an input that may be left out says from which
position on logits are computed; the positions before repeat the first of these, since libraries give the output as many
rows as there are tokens.
"""

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from transformers import PretrainedConfig

from pitstop.bundle.onnx import FIRST_ROW
from pitstop.workshop.export.onnx.architecture import unsupported

_HEAD = re.compile(r"/lm_head/MatMul(_Q\d)?")
_END = 1 << 62  # beyond any position


def add_first_row(graph: ir.Graph, config: PretrainedConfig) -> None:
    """Give the graph its input `FIRST_ROW`: 0, the default, for the logits of every token, -1 for those of the last.

    Raises:
        BrokenInput: the graph has no head.
    """
    head = next((node for node in graph if _HEAD.fullmatch(node.name or "")), None)
    if head is None or head.inputs[0] is None:
        raise unsupported(config, "the built graph has no head of this name: /lm_head/MatMul")
    hidden, computed = head.inputs[0], graph.outputs[0]
    first = _constant(graph, FIRST_ROW, 0)
    first.type, first.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    graph.inputs.append(first)
    one = _constant(graph, "logits.one", 1)
    chosen = _node("Slice", "logits.chosen", [hidden, first, _constant(graph, "logits.end", _END), one])
    graph.insert_before(head, chosen)
    head.replace_input_with(0, chosen.outputs[0])

    logits = ir.Value(name=computed.name, type=computed.type, shape=computed.shape)
    computed.name, computed.shape = "logits.computed", None
    count = _node("Shape", "logits.count", [hidden], start=1, end=2)
    shape = _node("Concat", "logits.shape", [one, count.outputs[0], one], axis=0)
    graph.extend(
        [count, shape, ir.node("Expand", [computed, shape.outputs[0]], name="logits.repeated", outputs=[logits])]
    )
    graph.outputs[0] = logits


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array([number], np.int64), name=name))
    graph.register_initializer(value)
    return value


def _node(kind: str, name: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Node:
    return ir.node(kind, inputs, attributes, name=name, outputs=[ir.Value(name=f"{name}/output")])
