"""An adapter file of ours beside the one that Olive makes of the same PEFT adapter: size, load, logits.

    python tools/bench_onnx_adapter.py [--quick] [--json FILE]

Olive is installed once, into an environment of its own in the cache, over the packages that are here. Both files are
run by plain ONNX Runtime on one graph; Olive's tensors go by other names, and are fed under those of the graph.
"""

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_material as material
import onnxruntime as ort
import torch
from material import folder
from measured import Row, header, parser, report, row
from peer_packages import environment
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from pitstop.bundle.formats import read_onnx_graph
from pitstop.files import sha256_file
from pitstop.workshop.export.onnx import export_onnx

OLIVE = "0.13.0"
TEXT = "The river rises in the mountains and reaches the sea after three hundred miles of quiet meadows and old towns."
NAME = re.compile(r"model\.layers\.(\d+)\.(?:self_)?(attn|mlp)\.(\w+)\.lora_([AB])\.weight")
MB = 1e6
PRECISIONS = {"f32": "float32", "f16": "float16"}  # ours -> Olive's

Feeds = dict[str, np.ndarray]


def olive() -> Path:
    """Return Olive's program."""
    return environment("olive", [f"olive-ai=={OLIVE}"]) / "bin" / "olive"


def theirs(peft: Path, precision: str) -> Path:
    """Let Olive convert a PEFT adapter."""
    target = folder() / f"olive-{precision}.onnx_adapter"
    command = [olive(), "convert-adapters", "--adapter_path", peft, "--output_path", target.with_suffix("")]
    subprocess.run([*command, "--dtype", PRECISIONS[precision]], check=True, stdout=sys.stderr)
    return target


def ours(peft: Path, precision: str, graph: Path) -> Path:
    """Convert it for a graph."""
    target = folder() / f"ours-{precision}.onnx_adapter"
    export_onnx(peft, material.hugging_face(), graph, sha256_file(graph), target, precision=precision)
    return target


def tensors(path: Path) -> Feeds:
    """Return what is in an adapter file, under the names of the graph, in 32-bit floats."""
    found = {}
    for name, value in ort.AdapterFormat.read_adapter(str(path)).get_parameters().items():
        named = NAME.fullmatch(name)
        key = "lora.{}.{}.{}.{}".format(*named.groups()) if named else name
        found[key] = value.numpy().astype(np.float32)
    return found


class Runner:
    """The graph in plain ONNX Runtime."""

    def __init__(self, graph: Path, config: PretrainedConfig) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of every input that has a default
        self._session = ort.InferenceSession(str(graph), options)
        size = config.hidden_size // config.num_attention_heads
        nothing = np.zeros((1, config.num_key_value_heads, 0, size), np.float32)
        names = [one.name for one in self._session.get_inputs()]
        self._past = {name: nothing for name in names if name.startswith("past_key_values")}

    def logits(self, tokens: list[int], adapter: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return logits, shape (tokens, vocabulary)."""
        ids = np.array([tokens], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **self._past, **adapter}
        found: np.ndarray = self._session.run(["logits"], feeds)[0][0]
        return found


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def load(path: Path) -> None:
    """Load an adapter as an app does."""
    adapter = ort.LoraAdapter()
    adapter.Load(str(path))


def main() -> None:
    """Convert on both sides, compare, print."""
    options = parser(__doc__).parse_args()
    runs = 5 if options.quick else 25
    peft, graph = material.trained(0), material.graph("fp32")
    tokens = AutoTokenizer.from_pretrained(material.hugging_face())(TEXT, add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(material.hugging_face(), dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, peft)(torch.tensor([tokens])).logits[0].numpy()
    runner = Runner(graph, model.config)
    assert set(read_onnx_graph(graph).inputs) >= tensors(theirs(peft, "f32")).keys(), "Olive names its tensors anew"
    rows: list[Row] = []
    for precision in PRECISIONS:
        files = ours(peft, precision, graph), theirs(peft, precision)
        sizes = [file.stat().st_size / MB for file in files]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(runs):
            for series, file in zip(times, files, strict=True):
                series.append(milliseconds(lambda file=file: load(file)))  # type: ignore[misc]
        apart = [1e3 * float(np.abs(runner.logits(tokens, tensors(file)) - expected).max()) for file in files]
        rows += [
            Row(f"{precision}: size", *sizes, sizes[0] / sizes[1], "MB", 1, "<= 1"),
            row(f"{precision}: load", *times, "ms", "<= 1"),
            Row(f"{precision}: largest difference of a logit to PEFT's", *apart,
                apart[0] / apart[1] if apart[1] else math.nan, "1e-3", 1, "<= 1"),
        ]  # fmt: skip
    report(header(["onnxruntime", "peft", "torch"], olive=OLIVE), rows, options.json)


if __name__ == "__main__":
    main()
