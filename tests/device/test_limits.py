"""What a profile leaves to a runtime: everything within the board's budget, and what does not fit is said."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop import profiles
from pitstop.bundle.formats import read_gguf
from pitstop.device.limits import MIB, within
from pitstop.device.request import Limits
from pitstop.device.runtime import Runtime
from pitstop.engines.llama.kv import WORK, kv_bytes_per_token
from pitstop.errors import UsageError
from serving import ALPHA, QUESTIONS, SAMPLING, Board, ask

KV = 30 * 2 * 3 * 64 * 2  # SmolLM2-135M: layers, keys and values, heads, width, bytes


def test_the_header_says_how_large_a_conversation_is(smollm2_gguf: Path) -> None:
    assert kv_bytes_per_token(read_gguf(smollm2_gguf)) == KV


@given(st.integers(200, 4000), st.integers(1, 16), st.integers(0, 8))
def test_everything_fits_into_the_budget(smollm2_gguf: Path, budget: int, sequences: int, own_lanes: int) -> None:
    board = replace(profiles.load("raspberry-pi-5"), budget_mib=budget, adapter_budget_mib=32, context_length=1024)
    asked = Limits(sequences=sequences, own_lanes=own_lanes)
    try:
        found = within(board, smollm2_gguf, asked)
    except UsageError:
        assert budget < 400
        return
    assert 1 <= found.sequences <= sequences
    assert 0 <= found.own_lanes <= own_lanes
    contexts = (1 + found.own_lanes) * (WORK + (found.sequences + 1) * found.context_length * KV)
    adapters = found.adapter_budget or 0
    assert smollm2_gguf.stat().st_size + adapters + found.parked_memory + contexts <= budget * MIB
    assert (found.context_length, found.threads, adapters) == (1024, board.threads, 32 * MIB)


def test_what_does_not_fit_is_said(smollm2_gguf: Path) -> None:
    board = replace(profiles.load("raspberry-pi-4"), budget_mib=150, adapter_budget_mib=16)
    with pytest.raises(UsageError, match=r"may use 157 MB; the base takes 98 MB.*MB too much") as caught:
        within(board, smollm2_gguf)
    assert "smaller quantization" in str(caught.value)


def test_a_runtime_within_a_profile_answers(board: Board) -> None:
    limits = within(profiles.load("linux-x86_64"), board.base, Limits(threads=1))
    assert (limits.threads, limits.sequences) == (1, 8)
    with Runtime.from_release(board.release, replace(limits, context_length=512, sequences=2)) as runtime:
        assert "".join(runtime.ask(ALPHA, ask(QUESTIONS[0]), SAMPLING)) == board.expected[ALPHA, QUESTIONS[0]]
