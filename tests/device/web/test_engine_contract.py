"""What every engine of a phone does: the page's on a random model, and a native app's on a fake of llama.rn."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_models import tiny_adapter
from wasm_engine import EngineRefused, Open, WasmEngine

pytestmark = pytest.mark.web

Start = Callable[..., WasmEngine]


@pytest.fixture(params=["page", "native"])
def start(request: pytest.FixtureRequest, open_engine: Open) -> Start:
    return lambda *given: open_engine(*given, native=request.param == "native")


def test_a_swap_and_back_answers_as_if_nothing_had_been_swapped(
    start: Start, tiny: Path, tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters]
    alone = {name: start(tiny, tiny_adapters).generate("one two three", name, maxTokens=6)[0] for name in names}
    swapped = start(tiny, tiny_adapters)
    for name in [*names, *reversed(names), *names]:
        assert swapped.generate("one two three", name, maxTokens=6)[0] == alone[name]
    assert len(set(alone.values())) == len(names)


def test_a_conversation_that_goes_on_is_not_read_anew(start: Start, tiny: Path) -> None:
    engine = start(tiny)
    engine.generate("one two three", maxTokens=2)
    _, usage = engine.generate("one two three four", maxTokens=2)
    assert usage["reusedTokens"] == 3
    assert usage["promptTokens"] == 4


def test_an_answer_ends_at_its_limit(start: Start, tiny: Path) -> None:
    _, usage = start(tiny).generate("one two", maxTokens=5)
    assert (usage["completionTokens"], usage["finishReason"]) == (5, "length")


def test_a_stop_text_ends_an_answer_and_is_not_in_it(start: Start, tiny: Path) -> None:
    engine = start(tiny)
    whole, _ = engine.generate("one two", maxTokens=8)
    stop = whole[len(whole) // 2 :][:4]
    text, usage = engine.generate("one two", maxTokens=8, stop=["never said", stop])
    assert usage["finishReason"] == "stop"
    assert whole.startswith(text)
    assert stop not in text


def test_an_answer_can_be_cancelled(start: Start, tiny: Path) -> None:
    engine = start(tiny)
    _, usage = engine.generate("one two", maxTokens=200, cancelAfter=2)
    assert usage["finishReason"] == "cancelled"
    assert 2 <= usage["completionTokens"] <= 4


def test_an_answer_nobody_reads_on_lets_the_next_one_in(start: Start, tiny: Path) -> None:
    engine = start(tiny)
    whole, _ = engine.generate("one two", maxTokens=5)
    engine.generate("one two", maxTokens=200, leaveAfter=1)
    assert engine.generate("one two", maxTokens=5)[0] == whole


def test_without_a_base_nothing_answers(start: Start) -> None:
    with pytest.raises(EngineRefused, match="no base is loaded"):
        start().generate("one")


def test_an_adapter_that_is_not_loaded_is_refused(start: Start, tiny: Path, tiny_adapters: dict[str, Path]) -> None:
    engine = start(tiny, {"red": tiny_adapters["red"]})
    with pytest.raises(EngineRefused, match="no adapter green is loaded; there are: red"):
        engine.generate("one", "green")
    engine.call("removeAdapter", name="red")
    with pytest.raises(EngineRefused, match="no adapter red is loaded; there are: none"):
        engine.generate("one", "red")


def test_an_adapter_of_another_base_is_refused(start: Start, tiny: Path, tmp_path: Path) -> None:
    other = tiny_adapter(tiny, tmp_path / "other.gguf", 9, base_sha256="ab" * 32)
    engine = start(tiny)
    with pytest.raises(EngineRefused, match=r"trained on the base abababababab…, the base here is .* install the base"):
        engine.add_adapter("other", other)
    with pytest.raises(EngineRefused, match="there are: none"):
        engine.generate("one", "other")


def test_a_name_is_taken_once(start: Start, tiny: Path, tiny_adapters: dict[str, Path]) -> None:
    engine = start(tiny, tiny_adapters)
    with pytest.raises(EngineRefused, match="red is loaded already"):
        engine.add_adapter("red", tiny_adapters["green"])


def test_a_scale_must_be_a_number(start: Start, tiny: Path, tiny_adapters: dict[str, Path]) -> None:
    with pytest.raises(EngineRefused, match="the scale of red must be a finite number"):
        start(tiny).add_adapter("red", tiny_adapters["red"], scale=None)  # type: ignore[arg-type]


def test_an_empty_stop_text_is_refused(start: Start, tiny: Path) -> None:
    with pytest.raises(EngineRefused, match="must not be empty"):
        start(tiny).generate("one", stop=[""])
