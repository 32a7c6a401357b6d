"""Loading an adapter asks whether it does anything; the base, which stays the same, is not computed each time."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pitstop.engines.base import PLAIN_BASE, Engine, Logits, Use
from pitstop.errors import NoEffect

Make = Callable[..., Path]


@pytest.fixture(params=["llama", "onnx"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine that ships."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Use]:
    """Under what the engine computes logits."""
    found: list[Use] = []
    logits = engine.logits

    def counted(tokens: list[int], use: Use = PLAIN_BASE, *, first: int = 0) -> Logits:
        found.append(use)
        return logits(tokens, use, first=first)

    monkeypatch.setattr(engine, "logits", counted)
    return found


def test_the_base_is_computed_once(engine: Engine, adapter: Make, asked: list[Use]) -> None:
    engine.load_adapter("first", adapter(seed=1))
    asked.clear()
    engine.load_adapter("second", adapter(seed=2))
    assert asked == [Use("second")]


def test_an_adapter_without_effect_is_refused_after_one_with(engine: Engine, adapter: Make, asked: list[Use]) -> None:
    engine.load_adapter("first", adapter(seed=1))
    with pytest.raises(NoEffect):
        engine.load_adapter("none", adapter(seed=2, size=0.0))
    assert asked[-1] == PLAIN_BASE, "compared with what the base computes now"
    assert engine.adapters == ("first",)
