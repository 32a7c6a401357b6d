"""The ONNX engine: onnxruntime-genai with adapters fed to the graph."""

from pitstop.engines.onnx.engine import OnnxEngine

__all__ = ["OnnxEngine"]
