"""Bounded readers of the headers of model files: what they refuse never reaches a native loader.

Adapters and bases are hostile until checked. Nothing here reads tensor data, and nothing trusts a count, a length or an
offset before it is compared with the bytes that are there. Every malformation is a `FormatError`, soon.
"""

from pitstop.bundle.formats.gguf import MAX_DIMENSIONS, GgufHeader, SkippedArray, read_gguf
from pitstop.bundle.formats.onnx_adapter import OnnxAdapterHeader, is_onnx_adapter, read_onnx_adapter
from pitstop.bundle.formats.onnx_graph import OnnxGraphHeader, read_onnx_graph
from pitstop.bundle.formats.safetensors import SafetensorsHeader, read_safetensors
from pitstop.bundle.formats.tensors import TensorInfo

__all__ = [
    "MAX_DIMENSIONS",
    "GgufHeader",
    "OnnxAdapterHeader",
    "OnnxGraphHeader",
    "SafetensorsHeader",
    "SkippedArray",
    "TensorInfo",
    "is_onnx_adapter",
    "read_gguf",
    "read_onnx_adapter",
    "read_onnx_graph",
    "read_safetensors",
]
