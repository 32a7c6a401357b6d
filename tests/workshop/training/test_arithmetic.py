"""What is computed with follows the processor; the weights are the same either way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pitstop.workshop import base_model
from pitstop.workshop.training.arithmetic import compute_dtype

PROCESSORS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, torch.float32),
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
    ({"architecture": "aarch64", "neon": True, "bf16": True}, torch.bfloat16),
    ({"architecture": "aarch64", "neon": True}, torch.float32),
]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compute_dtype.cache_clear()
    yield
    compute_dtype.cache_clear()


@pytest.mark.parametrize(("has", "expected"), PROCESSORS)
def test_bfloat16_is_for_those_who_have_it(
    has: dict[str, Any], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert compute_dtype() is expected


@pytest.mark.parametrize("kept", ["dequantized", "blocks"])
def test_every_processor_has_the_same_weights(tiny_base: Path, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, found = base_model.load_ref(tiny_base), []
    for has, expected in PROCESSORS[:2]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        compute_dtype.cache_clear()
        model = base_model.load_weights(tiny_base, ref, precision="shipped", artifact="q8_0", kept=kept)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.dtype is expected
        found.append(weight.float())
    assert torch.equal(*found)
