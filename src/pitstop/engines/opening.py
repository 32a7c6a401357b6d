"""Which engine runs a base: the one for its format. Only the library of that one need be installed."""

from typing import Any, Literal

from pitstop.bundle.manifest import Artifact
from pitstop.errors import FormatError

EngineName = Literal["llama", "onnx"]  # also the part of pitstop that it comes with
ENGINES: dict[str, EngineName] = {"gguf": "llama", "onnx": "onnx"}  # by the format of a base


def engine_for(base: Artifact) -> EngineName:
    """Return the name of the engine that runs a base.

    Raises:
        FormatError: this version of pitstop has none for its format.
    """
    if base.format not in ENGINES:
        raise FormatError(f"{base.name} is {base.format!r}: this version of pitstop runs {' and '.join(ENGINES)}")
    return ENGINES[base.format]


def engine_class(name: EngineName) -> Any:
    """Import an engine.

    Raises:
        MissingExtra: its library is not installed, if it needs that to be imported.
    """
    if name == "onnx":
        from pitstop.engines.onnx import OnnxEngine

        return OnnxEngine
    from pitstop.engines.llama import LlamaEngine

    return LlamaEngine
