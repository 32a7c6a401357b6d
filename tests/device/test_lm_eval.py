"""lm-evaluation-harness itself, over HTTP: what it reads of 50 items is what the engine computes of them."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitstop.device.runtime import Runtime
from pitstop.engines.base import Use
from pitstop.engines.llama import LlamaEngine
from serving import ALPHA, LIMITS, SCALES, Board, running

pytestmark = pytest.mark.slow

CONSTRAINTS = Path(__file__).parents[2] / "tools" / "constraints.txt"
PACKAGES = ("lm-eval[api]==0.4.13", "transformers")  # what nothing else here needs: not in this venv
NEAR = 1e-3  # nats an item
OPPOSITES = ("hot cold", "big small", "old new", "good bad", "up down", "fast slow", "early late", "left right")
TASK = """\
task: local_opposites
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new venv with lm-eval in it, and what this one has."""
    folder = tmp_path_factory.mktemp("lm-eval")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    # The newest python-dateutil is too new for what the harness needs: with it, pip tries dozens of old versions.
    pins = [pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith("python-dateutil")]
    (folder / "constraints.txt").write_text("\n".join(pins))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = [*pip, "install", "-q", "--no-compile", "-c", folder / "constraints.txt", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"lm-eval cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the workshop part is not installed")
    return transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a local task of 50 items, and the tokenizer."""
    folder = tmp_path_factory.mktemp("task")
    pairs = [pair.split() for pair in OPPOSITES]
    items = [
        {"question": f"The opposite of {asked} is", "choices": [right, wrong], "answer": 0}
        for asked, right in pairs
        for _, wrong in pairs
        if wrong != right
    ][:50]
    assert len(items) == 50
    (folder / "rows.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "task.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def url(board: Board) -> Iterator[str]:
    with running(lambda: Runtime.from_release(board.release, LIMITS)) as (url, _):
        yield url


@pytest.fixture(scope="module")
def engine(board: Board) -> Iterator[LlamaEngine]:
    options = {"context_length": LIMITS.context_length, "sequences": 1, "threads": 1}
    with LlamaEngine(board.base, base_sha256=board.release.base.base_sha256, **options) as engine:
        engine.load_adapter(ALPHA, board.adapters[ALPHA])
        yield engine


def test_the_harness_reads_what_the_engine_computes(
    harness: Path, task: Path, url: str, engine: LlamaEngine, tokenizer: Any, tmp_path: Path
) -> None:
    server = {"model": ALPHA, "base_url": f"{url}/v1/completions", "tokenizer": task / "tokenizer", "num_concurrent": 4}
    arguments = ",".join(f"{name}={value}" for name, value in server.items())
    command: list[Any] = [harness, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "local_opposites", "--include_path", task, "--log_samples", "--output_path", tmp_path]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 50
    found, expected = [], []
    for row in rows:
        for argument, response in zip(row["arguments"].values(), row["resps"], strict=True):
            found.append(float(response[0][0]))
            expected.append(score(engine, tokenizer, argument["arg_0"], argument["arg_1"]))
    assert len(set(found)) > 50
    assert np.abs(np.array(found) - np.array(expected)).max() < NEAR


def score(engine: LlamaEngine, tokenizer: Any, context: str, ending: str) -> float:
    """Return ln p of an ending under the adapter, with the tokens parted as the harness parts them."""
    whole = tokenizer(context + ending, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(context, add_special_tokens=False)["input_ids"]
    return float(engine.score(prompt, whole[len(prompt) :], Use(ALPHA, SCALES[ALPHA])).sum())
