"""The page's engine: nothing leaks between adapters, it computes what the device computes, what it refuses and how."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import build_web_engine
import numpy as np
import pytest
from numpy.typing import NDArray

from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import Sampling, Use, divergence
from pitstop.engines.template import render
from pitstop.errors import BrokenInput, UsageError
from pitstop.files import sha256_file
from pitstop.workshop.export import llamacpp
from wasm_engine import PLAIN, EngineRefused, Open, WasmEngine

pytestmark = pytest.mark.web

CONVERSATIONS = ("one", "two", "three")
SWAPS = 1000
DOT = b"\xfd\xba\x01"  # i32x4.dot_i16x8_s
KL = 0.008  # nats, mean
TEXT = (
    "The river rises in the mountains and reaches the sea after three hundred miles. "
    "Bread is made of flour, water, salt and time, and of very little else."
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_download_is_small_and_has_the_kernels(engine_folder: Path) -> None:
    for variant in build_web_engine.VARIANTS:
        wasm = (engine_folder / f"engine-{variant}.wasm").read_bytes()
        script = (engine_folder / f"engine-{variant}.js").read_bytes()
        assert len(gzip.compress(wasm)) + len(gzip.compress(script)) <= 1_100_000
        assert wasm.count(DOT) >= 40


@pytest.mark.slow
def test_a_thousand_swaps_change_no_bit(open_engine: Open, tiny: Path, tiny_adapters: dict[str, Path]) -> None:
    random = np.random.default_rng(7)
    pairs = [(adapter, conversation) for adapter in tiny_adapters for conversation in CONVERSATIONS]
    texts = {pair: random.integers(0, 40000, size=SWAPS).tolist() for pair in pairs}
    ends = dict.fromkeys(pairs, 4)
    swapped = open_engine(tiny, tiny_adapters)
    seen = []
    for number in random.integers(0, len(pairs), size=SWAPS):
        pair = pairs[number]
        # Now and then a conversation goes back, as when an answer is asked for once more.
        ends[pair] = int(random.integers(1, ends[pair] + 1)) if random.random() < 0.1 else ends[pair] + 1
        seen.append((pair, ends[pair], swapped.logits(*pair, texts[pair][: ends[pair]])))
    for pair in pairs:
        alone = open_engine(tiny, {pair[0]: tiny_adapters[pair[0]]})
        for owner, end, row in seen:
            if owner == pair:
                assert np.array_equal(row, alone.logits(*pair, texts[pair][:end]))
    assert len({row.tobytes() for _, _, row in seen}) > SWAPS / 5  # logits that never change would pass too


def _rows(engine: WasmEngine, adapter: str | None, tokens: Sequence[int]) -> NDArray[np.float32]:
    return np.stack([engine.logits(adapter, "text", tokens[: end + 1]) for end in range(len(tokens))])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_it_computes_what_llama_cpp_computes(
    open_engine: Open, precision: str, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    llama = pytest.importorskip("pitstop.engines.llama", reason="the llama part is not installed")
    import material

    base = material.base(precision)
    # As far from the base as a trained one (KL 0.1): one that drowns the base would amplify all rounding.
    adapter = make_adapter(tmp_path / "a.gguf", 1, strength=0.2, base_sha256=sha256_file(base))
    engine = open_engine(base, {"a": adapter})
    with llama.LlamaEngine(base, base_sha256=sha256_file(base), context_length=512, sequences=1, threads=1) as native:
        native.load_adapter("a", adapter)
        tokens = native.tokenize(TEXT)
        assert divergence(native.logits(tokens), native.logits(tokens, Use("a"))).mean() > KL
        for name in (None, "a"):
            expected = native.logits(tokens, Use(name))
            rows = _rows(engine, name, tokens)
            assert divergence(expected, rows).mean() <= KL, name
            assert (expected.argmax(-1) == rows.argmax(-1)).mean() >= 0.9


@pytest.mark.slow
def test_kernels_that_do_not_round_are_found_out(open_engine: Open) -> None:
    llama = pytest.importorskip("pitstop.engines.llama", reason="the llama part is not installed")
    import material

    build_web_engine.build("st", program="unrounded")
    base = material.base("q8_0")
    with llama.LlamaEngine(base, base_sha256=sha256_file(base), context_length=512, sequences=1, threads=1) as native:
        tokens = native.tokenize(TEXT)
        expected = native.logits(tokens)
    assert divergence(expected, _rows(open_engine(base, program="unrounded"), None, tokens)).mean() > KL


def test_an_answer_to_a_schema_is_json_that_follows_it(open_engine: Open, tiny: Path) -> None:
    engine = open_engine(tiny)
    for seed in range(3):
        text, usage = engine.generate("a person", maxTokens=200, schema=SCHEMA, temperature=1.0, seed=seed)
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert isinstance(person["age"], int)
        assert usage["finishReason"] == "stop"


def test_a_character_comes_when_all_its_bytes_are_there(open_engine: Open, tiny: Path) -> None:
    engine = open_engine(tiny)
    said = "Grüße, 你好 🚀"
    ask = {"conversation": "one", "messages": [{"role": "user", "content": "say it"}], "maxTokens": 100}
    answer = engine.call("generate", adapter=None, schema={"const": said}, **ask)
    assert json.loads("".join(answer["pieces"])) == said
    assert not any("\ufffd" in piece for piece in answer["pieces"])


def test_a_schema_that_means_nothing_is_refused(open_engine: Open, tiny: Path) -> None:
    with pytest.raises(EngineRefused, match="the JSON schema cannot be followed"):
        open_engine(tiny).generate("one", schema={"type": "wonder"})


def test_the_same_seed_draws_the_same_answer(open_engine: Open, tiny: Path) -> None:
    engine = open_engine(tiny)
    drawn = [engine.generate("one", temperature=5.0, seed=seed, maxTokens=8)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_more_conversations_than_there_is_room_for(
    open_engine: Open, tiny: Path, tiny_adapters: dict[str, Path]
) -> None:
    engine = open_engine(tiny, tiny_adapters)
    first, _ = engine.generate("one two three", conversation="0")
    for number in range(1, 20):
        engine.generate(f"other {number}", conversation=str(number), maxTokens=2)
    again, usage = engine.generate("one two three", conversation="0")
    assert again == first
    assert usage["reusedTokens"] == 0


def test_a_prompt_longer_than_the_context_is_refused(open_engine: Open, tiny: Path) -> None:
    engine = open_engine(tiny)
    with pytest.raises(EngineRefused, match=r"the conversation has \d+ tokens, it may have 512: begin a new one"):
        engine.generate("word " * 600)
    assert engine.generate("one", maxTokens=2)[1]["completionTokens"] == 2


def test_a_file_that_is_no_model_is_refused(open_engine: Open, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(tiny.read_bytes()[:1_000_000])
    engine = open_engine()
    with pytest.raises(EngineRefused, match="the base cannot be loaded"):
        engine.load(tmp_path / "broken.gguf")
    engine.load(tiny)
    assert engine.generate("one", maxTokens=2)[1]["completionTokens"] == 2


def test_an_adapter_that_is_damaged_is_refused(
    open_engine: Open, tmp_path: Path, tiny: Path, tiny_adapters: dict[str, Path]
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_adapters["red"].read_bytes()[:-5000])
    file = {"path": str(damaged), "sha256": sha256_file(damaged)}
    with pytest.raises(EngineRefused, match="the adapter red cannot be loaded"):
        open_engine(tiny).call("addAdapter", name="red", file=file, scale=1, prompting=asdict(PLAIN))


def test_a_base_that_memory_cannot_hold_is_refused(open_engine: Open, smollm2_gguf: Path, tiny: Path) -> None:
    engine = open_engine(memoryLimit=128 * 1024 * 1024)
    with pytest.raises(EngineRefused, match="not enough memory: 99 MB more are needed"):
        engine.load(smollm2_gguf)
    with pytest.raises(EngineRefused, match="not enough memory"):
        engine.load(tiny, context_length=500_000)


def test_prompts_are_those_of_the_device(open_engine: Open, tmp_path: Path) -> None:
    """All templates that llama.cpp carries as examples, of Qwen, Gemma, Phi, Llama, Mistral, SmolLM and others."""
    engine = open_engine()
    conversations = (
        [{"role": "user", "content": '  Hi <there> & "you"\n'}],
        [
            {"role": "user", "content": "Grüße 🚀"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes "},
            {"role": "user", "content": "And?"},
        ],
    )
    same = 0
    for file in sorted(llamacpp.unpack(tmp_path / "sources", ("models/templates/",)).rglob("*.jinja")):
        for system in (None, "Be brief."):
            prompting = Prompting(file.read_text(encoding="utf-8"), "<s>", "</s>", system=system)
            for messages in conversations:
                try:
                    expected = render(prompting, messages)
                except (BrokenInput, UsageError):
                    continue  # nothing with such a template is ever trained or packed
                assert engine.call("render", prompting=asdict(prompting), messages=messages) == expected, file.name
                same += 1
    assert same > 200


def test_what_a_template_refuses_is_said_in_its_words(open_engine: Open) -> None:
    engine = open_engine()
    for template, why in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% wonder %}", "the chat template refuses these messages"),
    ):
        with pytest.raises(EngineRefused, match=why):
            engine.call("render", prompting=asdict(Prompting(template, "", "")), messages=[])


@pytest.mark.slow
def test_it_says_what_the_device_says(open_engine: Open, smollm2_gguf: Path) -> None:
    llama = pytest.importorskip("pitstop.engines.llama", reason="the llama part is not installed")
    engine = open_engine(smollm2_gguf)
    questions = ("Name three colours.", "What is the capital of France?", "Write a line about rain.")
    same = 0
    digest = sha256_file(smollm2_gguf)
    with llama.LlamaEngine(smollm2_gguf, base_sha256=digest, context_length=512, sequences=1, threads=1) as native:
        for question in questions:
            said = native.generate(native.tokenize(question), sampling=Sampling(max_tokens=8))
            same += "".join(piece.text for piece in said) == engine.generate(question, maxTokens=8)[0]
    assert same >= 2


def test_the_plain_template_of_these_tests_adds_nothing(open_engine: Open) -> None:
    rendered = open_engine().call("render", prompting=asdict(PLAIN), messages=[{"role": "user", "content": "one"}])
    assert rendered == "one"
