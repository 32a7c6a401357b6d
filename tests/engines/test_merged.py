"""A merged model beside its base: asked for as an adapter is, and nothing of the two mixes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pitstop.demo.smollm2 import SHA256
from pitstop.engines.base import PLAIN_BASE, Sampling, Usage, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.errors import BaseMismatch, FormatError, NoEffect, Untrusted, UsageError

TEXT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
MERGED, ATTACHED = Use("merged"), Use("attached")
ROUNDING = 0.1  # the sum is rounded to 16 bits; the adapter moves logits by more than 5


@pytest.fixture(scope="module")
def adapter(gguf_adapter: Callable[..., Path]) -> Path:
    return gguf_adapter(seed=3, size=2.0)


@pytest.fixture(scope="module")
def merged(adapter: Path, merge_gguf: Callable[[Path, Path], Path], tmp_path_factory: Any) -> Iterator[Path]:
    path = merge_gguf(adapter, tmp_path_factory.mktemp("merged") / "merged.gguf")
    yield path
    path.unlink()


@pytest.fixture
def both(llama: LlamaEngine, adapter: Path, merged: Path) -> LlamaEngine:
    """An engine with the adapter attached and merged."""
    llama.load_adapter("attached", adapter)
    llama.load_adapter("merged", merged)
    return llama


def answer(engine: LlamaEngine, use: Use, text: str = TEXT, usage: Usage | None = None) -> list[int]:
    return [piece.token for piece in engine.generate(engine.tokenize(text), use, Sampling(max_tokens=8), usage)]


def test_it_computes_what_base_and_adapter_do(both: LlamaEngine, merged: Path) -> None:
    tokens = both.tokenize(TEXT)
    base, attached, found = (both.logits(tokens, use) for use in (PLAIN_BASE, ATTACHED, MERGED))
    assert np.abs(attached - base).max() > 5
    assert np.abs(attached - found).max() < ROUNDING
    with LlamaEngine(merged, base_sha256=SHA256, context_length=256, sequences=1, threads=1) as alone:
        assert np.array_equal(alone.logits(tokens), found)
        expected = answer(alone, PLAIN_BASE)
    assert answer(both, MERGED) == expected
    assert np.array_equal(both.logits(tokens), base)


def test_their_conversations_are_their_own(both: LlamaEngine) -> None:
    expected = {use: answer(both, use) for use in (PLAIN_BASE, MERGED)}
    for use, tokens in expected.items():
        usage = Usage()
        assert answer(both, use, usage=usage) == tokens
        assert usage.reused_tokens == usage.prompt_tokens - 1, "its own conversation, whatever came between"
    streams = [both.start(both.tokenize(TEXT), use, Sampling(max_tokens=8), Usage()) for use in expected]
    made: dict[Use, list[int]] = {use: [] for use in expected}
    while not all(stream.finished for stream in streams):
        for stream in streams:
            made[stream.use] += [piece.token for piece in both.advance([stream]) if piece]
    assert made == expected


def test_it_has_one_scale_and_stands_alone(both: LlamaEngine) -> None:
    tokens = both.tokenize(TEXT)
    assert np.array_equal(both.logits(tokens, Use("merged", 0.0)), both.logits(tokens)), "without it the base answers"
    for use in (Use("merged", 0.5), Use("merged", 1.0, (("attached", 1.0),)), Use("attached", 1.0, (("merged", 1.0),))):
        with pytest.raises(UsageError, match="merged is merged into its base"):
            both.logits(tokens, use)


def test_it_leaves_and_comes_back_with_other_weights(
    both: LlamaEngine, gguf_adapter: Callable[..., Path], merge_gguf: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    first = answer(both, MERGED)
    both.unload_adapter("merged")
    with pytest.raises(UsageError, match="no adapter 'merged' is loaded"):
        answer(both, MERGED)
    both.load_adapter("merged", merge_gguf(gguf_adapter(seed=4, size=2.0), tmp_path / "other.gguf"))
    second = answer(both, MERGED)
    assert second != first
    assert len(list(both._lanes)) == 2


def test_what_is_not_this_base_merged_is_refused(
    llama: LlamaEngine,
    merged: Path,
    f16_gguf: Path,
    gguf_adapter: Callable[..., Path],
    merge_gguf: Callable[[Path, Path], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(BaseMismatch, match="does not say which base"):
        llama.load_adapter("merged", f16_gguf)
    with pytest.raises(BaseMismatch, match="0000"):
        llama.load_adapter("merged", merge_gguf(gguf_adapter(base_sha256="0" * 64), tmp_path / "other.gguf"))
    with pytest.raises(NoEffect, match="changes nothing"):
        llama.load_adapter("merged", merge_gguf(gguf_adapter(size=0.0), tmp_path / "zero.gguf"))
    with pytest.raises(FormatError, match="not finite"):
        llama.load_adapter("merged", merge_gguf(gguf_adapter(size=float("nan")), tmp_path / "nan.gguf"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(merged.read_bytes()[:-1000])
    with pytest.raises(FormatError, match=r"ends inside|bytes"):
        llama.load_adapter("merged", cut)
    with pytest.raises(Untrusted, match="not what was verified"):
        llama.load_adapter("merged", merged, sha256="0" * 64)
    assert llama.adapters == ()
    assert len(list(llama._lanes)) == 1
    assert gguf.GGUFReader(merged).tensors  # the file itself is as it was


def test_what_was_hashed_is_what_runs(both: LlamaEngine, merged: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Another file takes the name after the header was read."""
    from pitstop.engines.llama import adapters

    path = tmp_path / "swapped.gguf"
    path.write_bytes(merged.read_bytes())
    check = adapters.check_fits

    def swap(*args: Any) -> None:
        check(*args)
        path.unlink()
        path.write_text("another file")

    monkeypatch.setattr(adapters, "check_fits", swap)
    both.load_adapter("swapped", path)
    assert answer(both, Use("swapped")) == answer(both, MERGED)
