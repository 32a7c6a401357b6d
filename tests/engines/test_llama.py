"""What only the llama engine has: sessions, the gate before the loader, llama.cpp's own voice, quantization."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.bundle.formats import read_gguf
from pitstop.demo.smollm2 import SHA256
from pitstop.engines.base import PLAIN_BASE, Piece, Sampling, Usage, Use
from pitstop.engines.llama import LlamaEngine, quantize
from pitstop.engines.llama.lanes import Lane
from pitstop.engines.llama.native import Model
from pitstop.errors import Busy, FormatError, MissingExtra, NotFinite, StorageError, Untrusted, UsageError
from pitstop.files import sha256_file

Make = Callable[..., Path]
ROUNDING = 0.1  # as in test_contract: what evaluation in other portions may move a logit by
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTIONS = ("Name three colours.", "What is the capital of France?", "Count to five.")


class Recording(LlamaEngine):
    """Keeps the logits that every token was chosen from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[np.ndarray] = []

    def _say(self, stream: Any, row: np.ndarray) -> Piece:
        self.rows.append(row.copy())
        return super()._say(stream, row)


def prompt(question: str) -> str:
    return f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def ask(engine: LlamaEngine, text: str, use: Use = PLAIN_BASE, usage: Usage | None = None, steps: int = 5) -> list[int]:
    sampling = Sampling(max_tokens=steps)
    return [piece.token for piece in engine.generate(engine.tokenize(text), use, sampling, usage)]


def conversation(engine: Recording, order: list[Use]) -> dict[Use, list[np.ndarray]]:
    """Ask two questions under every use, the second after all first ones; return the logits of each use."""
    rows: dict[Use, list[np.ndarray]] = {use: [] for use in order}
    history = {use: engine.tokenize(prompt(QUESTIONS[0])) for use in order}
    for question in QUESTIONS[1:]:
        for use in order:
            engine.rows = []
            made = [piece.token for piece in engine.generate(history[use], use, Sampling(max_tokens=5))]
            rows[use] += engine.rows
            history[use] += [*made, *engine.tokenize(f"<|im_end|>\n{prompt(question).removeprefix(SYSTEM)}")]
            engine.settle()  # in the middle of it, conversations may move to a context of their own
    return rows


def assert_uncontaminated(open_llama: Callable[..., Any], files: dict[str, Path], own_lanes: int = 0) -> None:
    """Conversations that alternate between adapters compute what a fresh engine with one adapter computes."""
    order = [PLAIN_BASE, *map(Use, files)]
    shared = open_llama(Recording, own_lanes=own_lanes)
    for name, file in files.items():
        shared.load_adapter(name, file)
    mixed = conversation(shared, order)
    for use in order:
        alone = open_llama(Recording, sequences=1)
        if use.adapter:
            alone.load_adapter(use.adapter, files[use.adapter])
        for found, expected in zip(mixed[use], conversation(alone, [use])[use], strict=True):
            assert np.abs(found - expected).max() <= 1e-3
        alone.close()
    shared.close()


@pytest.mark.parametrize("own_lanes", [0, 1, 2])
def test_alternating_conversations_do_not_contaminate_each_other(
    open_llama: Any, gguf_adapter: Make, own_lanes: int
) -> None:
    assert_uncontaminated(open_llama, {"one": gguf_adapter(seed=1), "two": gguf_adapter(seed=2)}, own_lanes)


@pytest.mark.usefixtures("kv_found_by_tokens_only")
def test_the_contamination_test_can_fail(open_llama: Any, gguf_adapter: Make) -> None:
    with pytest.raises(AssertionError):
        assert_uncontaminated(open_llama, {"one": gguf_adapter(seed=1), "two": gguf_adapter(seed=2)})


@pytest.fixture(scope="module")
def pair(open_llama: Any, gguf_adapter: Make) -> Recording:
    engine = open_llama(Recording, sequences=2, own_lanes=1)
    engine.load_adapter("one", gguf_adapter(seed=1))
    engine.load_adapter("two", gguf_adapter(seed=2))
    return engine


@pytest.fixture(scope="module")
def cold_row(pair: Recording) -> Callable[[tuple[int, ...], Use], np.ndarray]:
    """Return the logits after some tokens by an evaluation from nothing."""
    return lru_cache(maxsize=None)(lambda tokens, use: pair.logits(tokens, use, first=len(tokens) - 1)[0])


REQUESTS = st.tuples(
    st.sampled_from([PLAIN_BASE, Use("one"), Use("two"), Use("one", 0.5), Use("two", 0.0)]),
    st.sampled_from([(1, 4093, 198), (1, 4093, 198, 1780), (1, 4093, 198, 1780, 314), (1, 520), (9, 9, 9)]),
    st.integers(1, 3),  # tokens asked for
    st.integers(0, 3),  # steps until it is closed
)


@settings(max_examples=25)
@given(st.lists(REQUESTS, min_size=2, max_size=6))
def test_any_order_of_requests_computes_what_a_cold_engine_computes(
    pair: Recording,
    cold_row: Callable[[tuple[int, ...], Use], np.ndarray],
    requests: list[tuple[Use, tuple[int, ...], int, int]],
) -> None:
    for use, tokens, count, steps in requests:
        pair.settle()
        pair.rows = []
        answer: Any = pair.generate(tokens, use, Sampling(max_tokens=count))
        made = tuple(piece.token for _, piece in zip(range(steps), answer, strict=False))
        answer.close()
        assert len(made) <= min(count, steps)
        for at, (token, row) in enumerate(zip(made, pair.rows, strict=True)):
            expected = cold_row((*tokens, *made[:at]), use)
            assert np.abs(row - expected).max() < ROUNDING
            assert expected.max() - expected[token] < ROUNDING


def test_a_conversation_is_continued_without_evaluating_it_again(open_llama: Any, gguf_adapter: Make) -> None:
    engine = open_llama()
    engine.load_adapter("one", gguf_adapter())
    first, usage = engine.tokenize(prompt(QUESTIONS[0])), Usage()
    made = ask(engine, prompt(QUESTIONS[0]), Use("one"), usage)
    assert usage.reused_tokens == 0
    ask(engine, prompt(QUESTIONS[1]), PLAIN_BASE, usage)
    assert usage.reused_tokens == 0
    text = [*first, *made, *engine.tokenize(" and then")]
    list(engine.generate(text, Use("one"), Sampling(max_tokens=1), usage))
    assert usage.reused_tokens == len(first) + len(made) - 1  # the last token made was never evaluated
    list(engine.generate(text, Use("one"), Sampling(max_tokens=1), usage))
    assert usage.reused_tokens == len(text) - 1
    engine.close()


def test_no_conversation_is_taken_while_it_answers(open_llama: Any) -> None:
    engine = open_llama(sequences=2)
    running = [engine.generate([1, 2], sampling=Sampling(max_tokens=9)) for _ in range(3)]
    assert [next(running[0]).token, next(running[1]).token]
    with pytest.raises(Busy, match="all 2 conversations"):
        next(running[2])
    running[0].close()
    assert next(engine.generate([1, 2]))
    engine.close()


def test_prompts_longer_than_a_batch_are_evaluated_whole(smollm2_gguf: Path) -> None:
    with LlamaEngine(smollm2_gguf, base_sha256=SHA256, context_length=700, sequences=1, threads=1) as engine:
        tokens = (engine.tokenize(prompt(QUESTIONS[0])) * 30)[:650]
        rows = engine.logits(tokens, first=300)
        assert rows.shape == (350, engine.vocabulary_size)
        # the plain base on int8 activations is exact whatever the portions
        assert np.abs(engine.logits(tokens[:400], first=399)[0] - rows[99]).max() <= 1e-3
        assert next(engine.generate(tokens)).token == rows[-1].argmax()


def test_a_closed_engine_says_so(open_llama: Any) -> None:
    engine = open_llama()
    running = engine.generate([1, 2])
    next(running)
    engine.close()
    engine.close()
    for call in (lambda: engine.logits([1]), lambda: engine.tokenize("a"), lambda: next(running)):
        with pytest.raises(UsageError, match="closed"):
            call()


@pytest.mark.parametrize("kept", [0, 3, 30, 5_000, 1_785_664, 90_000_000])
def test_a_truncated_base_is_refused_before_it_is_loaded(smollm2_gguf: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as whole:
        path.write_bytes(whole.read(kept))
    with pytest.raises(FormatError, match="cut"):
        LlamaEngine(path, base_sha256=SHA256)


def test_what_llama_cpp_refuses_is_told_in_its_words(
    gguf_adapter: Make, smollm2_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A well-formed file, but no model: the header gate lets it pass, llama.cpp does not.
    with pytest.raises(FormatError, match=r"cannot load .*: .*\w+ .*") as caught:
        LlamaEngine(gguf_adapter(), base_sha256=SHA256)
    assert "no reason" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"context_length": 9_000}, "9000.*8192"), ({"context_length": 0}, "1 or more"), ({"sequences": 0}, "1 or more")],
)
def test_settings_the_model_cannot_have_are_refused(smollm2_gguf: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LlamaEngine(smollm2_gguf, base_sha256=SHA256, **settings)  # type: ignore[arg-type]


def test_an_adapter_of_values_that_are_not_finite_is_refused(llama: LlamaEngine, gguf_adapter: Make) -> None:
    with pytest.raises(FormatError, match="not finite"):
        llama.load_adapter("one", gguf_adapter(size=float("nan")))
    assert llama.adapters == ()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, smollm2_gguf: Path) -> None:
    from pitstop.engines.llama import native

    native.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r"pitstop\[llama\]"):
        LlamaEngine(smollm2_gguf, base_sha256=SHA256)
    monkeypatch.undo()
    native.library.cache_clear()
    native.library()


def test_importing_the_engine_does_not_import_the_library() -> None:
    code = "import sys, pitstop.engines.llama; sys.exit('llama_cpp' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_quantized_again(smollm2_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "made" / "q8.gguf"
    quantize(smollm2_gguf, target, "q8_0")
    types = {tensor.type for tensor in read_gguf(target).tensors}
    assert types == {"Q8_0", "F32"}
    assert [path.name for path in target.parent.iterdir()] == ["q8.gguf"]
    with LlamaEngine(target, base_sha256=SHA256, context_length=64, sequences=1, threads=1) as engine:
        assert engine.detokenize(ask(engine, prompt(QUESTIONS[1]), steps=6)).startswith("The capital of France")
    assert capfd.readouterr() == ("", "")


def test_a_quantization_that_cannot_be_leaves_nothing(smollm2_gguf: Path, gguf_adapter: Make, tmp_path: Path) -> None:
    target = tmp_path / "made.gguf"
    with pytest.raises(UsageError, match=r"q3_x(.|\n)*q8_0"):
        quantize(smollm2_gguf, target, "q3_x")
    with pytest.raises(FormatError, match="cannot quantize"):
        quantize(gguf_adapter(), target, "q8_0")
    with pytest.raises(FormatError, match="cannot read"):
        quantize(tmp_path / "nothing.gguf", target, "q8_0")
    with pytest.raises(StorageError):
        quantize(smollm2_gguf, Path("/proc/made.gguf"), "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_the_file_that_was_hashed_is_the_one_that_is_loaded(
    open_llama: Any, gguf_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, path = open_llama(), tmp_path / "adapter.gguf"
    shutil.copy(gguf_adapter(seed=1), path)
    load = Model.load_adapter

    def swapped(model: Model, name: Path, file: Any) -> Any:
        shutil.copy(gguf_adapter(seed=2), tmp_path / "other.gguf")
        (tmp_path / "other.gguf").replace(path)  # between the check and the load the name gets another file
        return load(model, name, file)

    monkeypatch.setattr(Model, "load_adapter", swapped)
    engine.load_adapter("one", path, sha256=sha256_file(path))
    monkeypatch.undo()
    engine.load_adapter("same", gguf_adapter(seed=1))
    tokens = engine.tokenize(prompt(QUESTIONS[0]))
    assert np.array_equal(engine.logits(tokens, Use("one")), engine.logits(tokens, Use("same")))
    engine.close()


def test_a_file_with_another_digest_is_not_loaded(llama: LlamaEngine, gguf_adapter: Make) -> None:
    with pytest.raises(Untrusted, match="not what was verified"):
        llama.load_adapter("one", gguf_adapter(seed=1), sha256="0" * 64)
    assert llama.adapters == ()


HUGE = Use("one", 1e38)  # under it the model computes NaN


def test_values_that_are_not_finite_reach_nobody_else(open_llama: Any, gguf_adapter: Make) -> None:
    engine, tokens = open_llama(sequences=1), list(range(100, 240))
    engine.load_adapter("one", gguf_adapter())
    cold = engine.logits(tokens[:80])
    assert np.isnan(engine.logits(tokens, HUGE)[-1]).all()
    assert np.array_equal(engine.logits(tokens[:80]), cold)

    expected = ask(engine, QUESTIONS[0])
    with pytest.raises(NotFinite, match="smaller scale"):
        ask(engine, prompt(QUESTIONS[0]), HUGE)
    assert ask(engine, QUESTIONS[0]) == expected

    long = engine.tokenize(prompt(" ".join(QUESTIONS * 6)))
    unread = engine.start(long, HUGE, Sampling(), Usage())
    blocks = engine.logits_blocks(long, HUGE, first=len(long) - 1)
    next(blocks)
    blocks.close()  # before its last row was looked at by anybody
    unread.close()
    assert np.array_equal(engine.logits(tokens[:80]), cold)
    assert ask(engine, QUESTIONS[0]) == expected
    engine.close()


def test_that_test_can_fail(open_llama: Any, gguf_adapter: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lane, "heal", Lane.empty)  # as if masked values did no harm
    with pytest.raises(AssertionError):
        test_values_that_are_not_finite_reach_nobody_else(open_llama, gguf_adapter)
