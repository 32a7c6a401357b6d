"""The model builder of onnxruntime-genai, run as it is in a process of its own: a Hugging Face folder to a graph."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from transformers import PretrainedConfig

from pitstop.errors import MissingExtra, UsageError
from pitstop.workshop.export.onnx.architecture import unsupported

VERSION = "0.18.0"  # of onnxruntime-genai: what the surgery looks for are names inside of its builder's graphs
# Precision -> what the builder is asked for; 8 bits are made afterwards, see `blocks`. Plain int4 damages a small model
# visibly: k_quant_mixed keeps the head and the most sensitive matrices in 8 bits.
_KINDS = {"fp32": ("fp32", ()), "int8": ("fp32", ()), "int4": ("int4", ("algo_config=k_quant_mixed",))}
# Projections of one input as one matrix: an adapter costs less speed then, and its file is larger by a half.
FUSED = "-fused"
PRECISIONS = ("fp32", "int8", "int4", f"fp32{FUSED}", f"int8{FUSED}")


def build(folder: Path, target: Path, kind: str, config: PretrainedConfig, *, fuse_qkv: bool) -> None:
    """Write the graph of a Hugging Face folder, with its tokenizer and settings, into ``target``.

    Args:
        kind: "fp32", "int8" (still in floats) or "int4".

    Raises:
        MissingExtra: the builder is not installed.
        UsageError: another version of it is.
        BrokenInput: it refuses this model, in its own words.
    """
    check_version()
    precision, options = _KINDS[kind]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(target)]
    command += ["-p", precision, "-e", "cpu", "-c", str(target / "cache")]
    command += ["--extra_options", f"fuse_qkv={str(fuse_qkv).lower()}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise unsupported(config, f"the builder says: {words[-1] if words else 'no reason given'}")


def check_version() -> None:
    """Refuse to work with another builder than the one whose graphs are known.

    Raises:
        MissingExtra: it is not installed.
        UsageError: another version is.
    """
    try:
        installed = importlib.metadata.version("onnxruntime-genai")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra("building ONNX graphs", "workshop") from error
    if installed != VERSION:
        raise UsageError(
            f"onnxruntime-genai {installed} is installed, the graphs of {VERSION} are known here",
            cure=f"pip install onnxruntime-genai=={VERSION}",
        )
