"""What only the ONNX engine has to see to: files it must refuse, tensors it composes, generators it keeps clean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_files import write_onnx_adapter
from pitstop.bundle.formats import read_onnx_graph
from pitstop.bundle.onnx import CONFIG_FILE
from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Usage, Use
from pitstop.engines.onnx import OnnxEngine
from pitstop.engines.onnx.adapters import COMPOSED
from pitstop.engines.onnx.native import CHANGES
from pitstop.errors import Busy, FormatError, Untrusted, UsageError
from pitstop.files import sha256_file

Make = Callable[..., Path]
SHORT = Sampling(max_tokens=4)
SITE = "lora.3.attn.q_proj"
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"room": {"enum": ["kitchen", "hall"]}, "level": {"type": "integer", "maximum": 9}},
        "required": ["room", "level"],
        "additionalProperties": False,
    }
)
CHAT = "<|im_start|>user\nDim the light in the hall.<|im_end|>\n<|im_start|>assistant\n"


def row(engine: Engine, tokens: list[int], use: Use = PLAIN_BASE) -> np.ndarray:
    return engine.logits(tokens, use, first=len(tokens) - 1)[0]


def answer(engine: Engine, prompt: list[int], use: Use = PLAIN_BASE, sampling: Sampling = SHORT) -> tuple[str, Usage]:
    usage = Usage()
    return "".join(piece.text for piece in engine.generate(prompt, use, sampling, usage)), usage


def pair(rank: int = 2, fill: float = 0.1) -> dict[str, np.ndarray]:
    return {f"{SITE}.A": np.full((576, rank), fill, np.float32), f"{SITE}.B": np.full((rank, 576), fill, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": np.zeros((1, 4), np.float32)}, "'input_ids', which is nothing an adapter"),
        ({"past_key_values.0.key": np.zeros((1, 3, 4, 64), np.float32)}, "which is nothing an adapter"),
        ({**pair(), "lora.99.attn.q_proj.A": np.zeros((576, 2), np.float32)}, "lora.99"),
        ({f"{SITE}.A": pair()[f"{SITE}.A"]}, "only one half"),
        ({**pair(), f"{SITE}.A": np.zeros((576, 3), np.float32)}, r"\(576, rank\)"),
        ({**pair(), f"{SITE}.B": np.zeros((2, 192), np.float32)}, r"\(576, rank\)"),
        ({**pair(), f"{SITE}.B": np.zeros((2, 576, 1), np.float32)}, r"\(576, rank\)"),
        ({**pair(), f"{SITE}.B": np.full((2, 576), np.nan, np.float32)}, "not finite"),
        ({**pair(), f"{SITE}.A": np.full((576, 2), np.inf, np.float32)}, "not finite"),
        (pair(fill=3e19), "not finite"),
        ({name: value.astype(np.float64) for name, value in pair().items()}, "the type 11"),
        (pair(rank=0), "changes nothing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    onnx: Engine, onnx_graph: Path, tmp_path: Path, tensors: dict[str, np.ndarray], message: str
) -> None:
    path = write_onnx_adapter(tmp_path / "bad.onnx_adapter", tensors, sha256_file(onnx_graph))
    with pytest.raises(FormatError, match=message) as caught:
        onnx.load_adapter("bad", path)
    assert str(path) in str(caught.value)
    assert onnx.adapters == ()


def test_a_file_with_another_digest_is_refused(onnx: Engine, onnx_adapter: Make) -> None:
    path = onnx_adapter()
    onnx.load_adapter("one", path, sha256=sha256_file(path))
    with pytest.raises(Untrusted, match="not what was verified"):
        onnx.load_adapter("two", path, sha256="0" * 64)


def test_half_floats_compute_what_they_say(onnx: Engine, onnx_adapter: Make) -> None:
    onnx.load_adapter("half", onnx_adapter(kind=np.float16))
    onnx.load_adapter("full", onnx_adapter())
    tokens = onnx.tokenize(CHAT)
    half, full = row(onnx, tokens, Use("half")), row(onnx, tokens, Use("full"))
    assert 0 < np.abs(half - full).max() < 0.1 < np.abs(full - row(onnx, tokens)).max()


def test_it_computes_what_the_torch_engine_does(onnx: Engine, onnx_adapter: Make, request: Any) -> None:
    torch_engine, peft_adapter = (request.getfixturevalue(name) for name in ("torch_engine", "peft_adapter"))
    tokens = onnx.tokenize(CHAT)
    assert tokens == torch_engine.tokenize(CHAT)
    for name, rank, seed in (("one", 4, 1), ("two", 16, 2)):
        onnx.load_adapter(name, onnx_adapter(rank=rank, seed=seed))
        torch_engine.load_adapter(name, peft_adapter(rank=rank, seed=seed))
    for use in (PLAIN_BASE, Use("one"), Use("two"), Use("two", 0.5), Use("one", -1.0)):
        assert np.abs(onnx.logits(tokens, use) - torch_engine.logits(tokens, use)).max() < 2e-3
        scores = (engine.score(tokens[:8], tokens[8:], use) for engine in (onnx, torch_engine))
        assert np.abs(np.subtract(*scores)).max() < 1e-3


def test_adapters_together_add_up(onnx: Engine, onnx_adapter: Make, onnx_graph: Path, tmp_path: Path) -> None:
    for name, seed, modules in (("one", 1, ("attn_q", "attn_v")), ("two", 2, ("attn_v", "ffn_down"))):
        onnx.load_adapter(name, onnx_adapter(seed=seed, modules=modules))
    tokens = onnx.tokenize(CHAT)
    together = row(onnx, tokens, Use("one", 1.0, (("two", 0.5),)))
    assert np.abs(together - row(onnx, tokens, Use("two", 0.5, (("one", 1.0),)))).max() < 1e-3
    assert np.abs(together - row(onnx, tokens, Use("one"))).max() > 0.5
    # Twice the same at half the scale is once at the whole.
    path = onnx_adapter(seed=1, modules=("attn_q", "attn_v"))
    onnx.load_adapter("again", path)
    halves = row(onnx, tokens, Use("one", 0.5, (("again", 0.5),)))
    assert np.abs(halves - row(onnx, tokens, Use("one"))).max() < 1e-3


def test_many_changes_in_one_generator_stay_clean(open_onnx: Callable[..., Any], onnx_adapter: Make) -> None:
    engine = open_onnx(sequences=1)
    engine.load_adapter("all", onnx_adapter(seed=1))
    engine.load_adapter("few", onnx_adapter(seed=2, modules=("attn_v",)))
    tokens = engine.tokenize(CHAT)
    uses = (PLAIN_BASE, Use("all"), Use("few"), Use("all", 0.5))
    expected = {use: answer(open_cold(open_onnx, engine, onnx_adapter), tokens, use)[0] for use in uses}
    assert len(set(expected.values())) > 2
    for number in range(3 * CHANGES):
        use = uses[number * 7 % 4]
        assert answer(engine, tokens, use)[0] == expected[use]
        assert max(len(each.given) for each in engine._conversations.values()) <= CHANGES
    engine.close()


def open_cold(open_onnx: Callable[..., Any], engine: Engine, onnx_adapter: Make) -> Engine:
    cold = open_onnx(sequences=1)
    cold.load_adapter("all", onnx_adapter(seed=1))
    cold.load_adapter("few", onnx_adapter(seed=2, modules=("attn_v",)))
    return cold


def test_a_conversation_that_comes_back_is_not_read_again(onnx: Engine, onnx_adapter: Make) -> None:
    onnx.load_adapter("one", onnx_adapter())
    # Of rooms that no other test here asks the base for: it would rightly know them.
    first, second = (onnx.tokenize(CHAT.replace("hall", room)) for room in ("porch", "attic"))
    said, usage = answer(onnx, first, Use("one"))
    assert usage.reused_tokens == 0
    answer(onnx, second)
    further = [*first, *onnx.tokenize(said + " And")]
    assert answer(onnx, further, Use("one"))[1].reused_tokens >= len(first)
    assert answer(onnx, further)[1].reused_tokens < len(first)  # of the base: that is another's KV


def test_conversations_leave_for_others_and_more_stay_where_there_is_memory(
    open_onnx: Callable[..., Any], onnx_graph: Path
) -> None:
    for warm, stay in ((0, 1), (1, 1), (2, 3)):
        engine = open_onnx(sequences=1, warm=warm * 256 * 46_080 - (warm == 1))
        prompts = [engine.tokenize(f"{number} bottles stand on the wall.") for number in range(4)]
        for prompt in prompts:
            answer(engine, prompt)
        assert len(engine._conversations) == stay
        reused = [answer(engine, prompt)[1].reused_tokens > 1 for prompt in reversed(prompts)]
        assert sum(reused) == stay
        engine.close()


def test_no_more_answers_at_once_than_said(open_onnx: Callable[..., Any]) -> None:
    engine = open_onnx(sequences=2, warm=10 * 256 * 46_080)
    streams = [engine.start([1, 520 + number], PLAIN_BASE, SHORT, Usage()) for number in range(2)]
    with pytest.raises(Busy, match="all 2 conversations"):
        engine.start([1], PLAIN_BASE, SHORT, Usage())
    streams[0].close()
    engine.start([1], PLAIN_BASE, SHORT, Usage()).close()
    engine.close()


def test_sets_for_other_scales_are_given_back(onnx: Engine, onnx_adapter: Make) -> None:
    onnx.load_adapter("one", onnx_adapter())
    adapters: Any = onnx._adapters  # type: ignore[attr-defined]
    for number in range(3 * COMPOSED):
        onnx.logits([1, 2], Use("one", 1 + number / 100))
    # Those that live generators were given stay with them.
    assert len(adapters._native) <= 2 + COMPOSED + (1 + 3) * CHANGES
    onnx.unload_adapter("one")
    assert set(adapters._native) <= {()}
    assert not adapters.doomed


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_a_schema(onnx: Engine, onnx_adapter: Make, temperature: float) -> None:
    onnx.load_adapter("one", onnx_adapter())
    prompt = onnx.tokenize(CHAT)
    said = set()
    for seed, use in enumerate((PLAIN_BASE, Use("one"), PLAIN_BASE, Use("one"))):
        sampling = Sampling(max_tokens=40, json_schema=SCHEMA, temperature=temperature, seed=seed)
        text, usage = answer(onnx, prompt, use, sampling)
        found = json.loads(text)
        assert set(found) == {"room", "level"}
        assert found["room"] in ("kitchen", "hall")
        assert usage.finish_reason == "stop"
        said.add(text)
    assert len(said) > 1 or temperature == 0
    assert not answer(onnx, prompt)[0].startswith("{")  # what follows is free again


def test_what_cannot_be_followed_is_refused(onnx: Engine) -> None:
    for sampling, message in (
        (Sampling(grammar='root ::= "a"'), "not GBNF"),
        (Sampling(json_schema="{"), "cannot be followed"),
        (Sampling(json_schema="[]"), "no object"),
        (Sampling(json_schema='{"type": 5}'), "cannot be followed"),
        (Sampling(json_schema='{"type": "string", "pattern": "(["}'), "cannot be followed"),
        (Sampling(json_schema=json.dumps({"description": "x" * (1 << 18)})), "longer than"),
    ):
        with pytest.raises(UsageError, match=message):
            onnx.start([1, 2], PLAIN_BASE, sampling, Usage())
    assert answer(onnx, [1, 2])[1].completion_tokens > 0


def test_penalties_bias_and_likeliest_tokens(onnx: Engine) -> None:
    prompt = onnx.tokenize("one two one two one two one")
    plain = [piece.token for piece in onnx.generate(prompt, sampling=Sampling(max_tokens=6))]
    assert len(set(plain)) < 6
    kept_away = tuple((token, -100.0) for token in set(plain))
    for sampling in (
        Sampling(max_tokens=6, repeat_penalty=50.0),
        Sampling(max_tokens=6, presence_penalty=50.0),
        Sampling(max_tokens=6, frequency_penalty=50.0),
    ):
        assert len({piece.token for piece in onnx.generate(prompt, sampling=sampling)}) == 6
    biased = [piece.token for piece in onnx.generate(prompt, sampling=Sampling(max_tokens=6, logit_bias=kept_away))]
    assert not set(biased) & set(plain)
    piece = next(onnx.generate(prompt, sampling=Sampling(max_tokens=1, logprobs=3)))
    assert piece.likeliest[0] == (piece.token, piece.logprob)
    assert len(piece.likeliest) == 3
    narrow = [Sampling(max_tokens=6, temperature=9.0, seed=seed, min_p=1.0) for seed in range(3)]
    assert all([piece.token for piece in onnx.generate(prompt, sampling=one)] == plain for one in narrow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"]["decoder"]["session_options"].update(custom_ops_library="x.so"), "custom_ops_library"),
        (lambda s: s["model"]["decoder"]["session_options"].update(provider_options=[{"cuda": {}}]), "other hardware"),
        (lambda s: s["model"].update(vision={"filename": "v.onnx"}), "vision"),
        (lambda s: s["model"]["decoder"].update(filename="../model.onnx"), "file name"),
        (lambda s: s["model"].update(vocab_size=-1), "numbers"),
        (lambda s: s["model"].pop("decoder"), "cannot be read"),
    ],
)
def test_settings_that_reach_beyond_the_model_are_refused(
    onnx_graph: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    for name in read_onnx_graph(onnx_graph).files:
        (tmp_path / name).symlink_to(onnx_graph.parent / name)
    settings = json.loads((onnx_graph.parent / CONFIG_FILE).read_text())
    change(settings)
    (tmp_path / CONFIG_FILE).unlink()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
    (tmp_path / "model.onnx").write_bytes(onnx_graph.read_bytes())
    with pytest.raises(FormatError, match=message):
        OnnxEngine(tmp_path / "model.onnx", base_sha256=sha256_file(onnx_graph), context_length=64, threads=1)


def test_a_model_with_a_file_missing_or_cut_is_refused(onnx_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_graph.read_bytes())
    options = {"base_sha256": sha256_file(onnx_graph), "context_length": 64, "threads": 1}
    with pytest.raises(FormatError, match="not beside it"):
        OnnxEngine(tmp_path / "model.onnx", **options)  # type: ignore[arg-type]
    for name in read_onnx_graph(onnx_graph).files:
        (tmp_path / name).symlink_to(onnx_graph.parent / name)
    (tmp_path / "model.onnx.data").unlink()
    (tmp_path / "model.onnx.data").write_bytes(bytes(1000))
    with pytest.raises(FormatError, match="weights beyond the end"):
        OnnxEngine(tmp_path / "model.onnx", **options)  # type: ignore[arg-type]


def test_contexts_that_cannot_be_are_refused(onnx_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"context_length": 0}, "1 or more"),
        ({"context_length": 100_000}, "trained for 8192"),
        ({"context_length": 8192, "sequences": 100_000}, "are free"),
    ):
        with pytest.raises(UsageError, match=message):
            OnnxEngine(onnx_graph, base_sha256="0" * 64, threads=1, **changes)  # type: ignore[arg-type]


def test_a_closed_engine_says_so(open_onnx: Callable[..., Any]) -> None:
    engine = open_onnx(sequences=1)
    engine.close()
    for call in (lambda: engine.tokenize("a"), lambda: engine.logits([1]), lambda: engine.generate([1])):
        with pytest.raises(UsageError, match="closed"):
            call()
    engine.close()
