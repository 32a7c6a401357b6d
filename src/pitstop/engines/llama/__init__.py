"""Run a GGUF base with LoRA adapters on llama.cpp, by the C API of llama-cpp-python; the only place that knows it."""

from pitstop.engines.llama.engine import LlamaEngine
from pitstop.engines.llama.kv import context_bytes
from pitstop.engines.llama.matmul import products
from pitstop.engines.llama.quantize import quantize

__all__ = ["LlamaEngine", "context_bytes", "products", "quantize"]
