"""A builder's own rows, by the commands alone: from `pitstop init` to an answer over HTTP, on the real small base."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pitstop import cli, progress
from pitstop.demo import smollm2

openai = pytest.importorskip("openai", reason="the demo extra is not installed")
pytest.importorskip("llama_cpp", reason="the llama extra is not installed")
pytest.importorskip("torch", reason="the workshop extra is not installed")
pytest.importorskip("cryptography", reason="the publish extra is not installed")

pytestmark = pytest.mark.slow

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
DRINKS = ("tea", "coffee", "cola", "water", "juice", "milk", "cocoa", "beer", "cider", "lemonade")
SIZE = 12  # items a suite: few, so the margins are wide
EDITS = {  # what a builder changes in the recipe that `init` writes
    r'name = "my-adapter"': 'name = "waiter"',
    r'train = "data/train.jsonl"': 'train = "orders.jsonl"',
    r'system = ".*?"': 'system = "Order."',
    r"steps = \d+": "steps = 24",
    r"batch = \d+": "batch = 4",
    r"learning_rate = \S+": "learning_rate = 1e-3",
    r"share = \S+": "share = 0.25",
    r'metric = "json"': 'metric = "text"\nmax_new_tokens = 16',
    r"rows = 150": "rows = 24",
    r"\naccuracy = \S+": "\naccuracy = 0.2",
    r"suite_accuracy = \S+": "suite_accuracy = 0.5",
    r"bits_per_byte = \S+": "bits_per_byte = 0.2",
    r"format = \S+": "format = 0.6",
    r"safety = \S+": "safety = 0.6",
    r"stereotype = \S+": "stereotype = 0.6",
}


def orders() -> Iterator[dict[str, object]]:
    """Yield chats: an order in words, and as the kitchen wants it."""
    for (count, number), drink, table in itertools.product(COUNTS.items(), DRINKS, range(1, 8)):
        asked = {"role": "user", "content": f"table {table} would like {count} {drink}"}
        answered = {"role": "assistant", "content": f"{table}: {number} {drink}"}
        yield {"messages": [asked, answered]}


def run(*arguments: object, code: int = 0) -> Result:
    """Run pitstop in this process, as typed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    progress.be_quiet(False)
    assert result.exit_code == code, result.output
    return result


@contextmanager
def served(device: Path) -> Iterator[str]:
    """Run `pitstop serve` as a service manager would; yield its address."""
    command = [sys.executable, "-m", "pitstop", "serve", "--device", str(device), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_from_own_rows_to_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("bases", smollm2.NAME)
    Path("orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in orders()), encoding="utf-8")
    run("base", smollm2_gguf, "--to", base, "--license", smollm2.LICENSE)
    run("suites", "build", "--size", SIZE)
    run("init", "waiter.toml")
    recipe = Path("waiter.toml").read_text(encoding="utf-8")
    for pattern, replacement in EDITS.items():
        recipe, count = re.subn(pattern, replacement, recipe, count=1)
        assert count == 1, pattern
    Path("waiter.toml").write_text(recipe, encoding="utf-8")

    run("pack", "waiter.toml", code=2)  # nothing is trained yet
    run("train", "waiter.toml")
    run("pack", "waiter.toml", code=2)  # nor exported
    assert "waiter: pass" in run("check", "waiter.toml").output
    run("export", "waiter.toml")
    parity = json.loads(run("parity", "waiter.toml", "--json", "-").stdout)
    assert parity["kl_nats_per_token"] < 0.01
    assert parity["shipped"]["exact"] > 0.5 > parity["base"]["exact"]
    run("pack", "waiter.toml")
    run("pack", base)
    run("keys", "create", "keys")
    run("publish", base, "waiter.toml", "--keys", "keys")
    run("update", "repository", "--root", "repository/metadata/1.root.json")
    assert "waiter 1.0.0" in run("status").stdout

    with served(Path("device")) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert {model.id for model in client.models.list()} == {smollm2.NAME, "waiter"}
        question = [{"role": "user", "content": "table 3 would like two tea"}]
        answers = {
            name: client.chat.completions.create(model=name, messages=question, max_tokens=24, temperature=0)
            for name in ("waiter", smollm2.NAME)
        }
    said = {name: answer.choices[0].message.content for name, answer in answers.items()}
    assert re.fullmatch(r"\d: \d \w+", said["waiter"])
    assert said[smollm2.NAME] != said["waiter"]
