"""ONNX: one quantized graph that takes any adapter, and adapters for it."""

from pitstop.workshop.export.onnx.adapter import export_onnx
from pitstop.workshop.export.onnx.base import build_base
from pitstop.workshop.export.onnx.builder import PRECISIONS
from pitstop.workshop.export.onnx.weights import load_shipped

__all__ = ["PRECISIONS", "build_base", "export_onnx", "load_shipped"]
