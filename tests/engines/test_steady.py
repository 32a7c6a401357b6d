"""What is measured must not depend on what an engine did before, nor on how fast the machine was meanwhile."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pitstop.engines.base import PLAIN_BASE, Sampling, Use
from pitstop.engines.llama.pace import Pace
from pitstop.engines.llama.rows import Rows
from pitstop.files import sha256_file

QUESTIONS = (
    "What is a river?", "Name three colors.", "Who bakes bread?", "Why is the sky blue?", "What do bees make?",
    "Where do fish live?", "Count to five.", "What is ice?", "Name a tree.", "What does a clock show?",
)  # fmt: skip

MANNERS = ("in one short sentence", "in three words", "with an example")
CHAT = (
    "<|im_start|>system\nYou answer questions {}, as a good teacher would do in school.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.slow
def test_answers_of_a_batch_do_not_depend_on_history_or_speed(
    smollm2_gguf: Path, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = pytest.importorskip("pitstop.engines.llama", reason="the llama part is not installed")
    base = tmp_path / "q8_0.gguf"
    llama.quantize(smollm2_gguf, base, "q8_0")
    some = make_adapter(tmp_path / "some.gguf", 2, strength=0.1, base_sha256=sha256_file(base))
    options = {"context_length": 256, "sequences": 8, "threads": 1, "own_products": True}
    with llama.LlamaEngine(base, base_sha256=sha256_file(base), **options) as engine:
        asked = [engine.tokenize(CHAT.format(manner, question)) for manner in MANNERS for question in QUESTIONS]
        first = engine.generate_batch(asked, PLAIN_BASE, Sampling(max_tokens=24))
        engine.load_adapter("some", some)
        engine.generate_batch(asked[20:], Use("some"), Sampling(max_tokens=7))
        again = engine.generate_batch(asked, PLAIN_BASE, Sampling(max_tokens=24))
        monkeypatch.setattr(Pace, "tokens", 16)  # a slow machine
        monkeypatch.setattr(Rows, "at_once", lambda *_: 1)
        null = engine.generate_batch(asked, Use("some", 0.0), Sampling(max_tokens=24))
    assert [one for one, other in zip(first, again, strict=True) if one != other] == []
    assert [one for one, other in zip(first, null, strict=True) if one != other] == []
