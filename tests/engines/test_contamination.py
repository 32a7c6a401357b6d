"""Whatever requests come in whatever order: each is answered from what was computed under its own adapters.

hypothesis draws interleavings of requests over the base, three adapters of different ranks and targets, an activated
one, a merged one, scales and a stack, with shared beginnings, cancels, evictions, moves to contexts of their own,
parking, and reloads of a name with other weights. Every row of logits that a token is chosen from is compared with that
of an engine that evaluates the same tokens from nothing. The two evaluate in portions of different shapes, which alone
moves a logit by up to 0.13, where one portion has 64 tokens and the other has not (see `native.Context`); a row of
other adapters differs by 1 and more.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pitstop.engines.base import PLAIN_BASE, Engine, Piece, Sampling, Stream, Usage, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.onnx import OnnxEngine
from pitstop.engines.parking import Parking

ROUNDING = 0.3  # see above
SEQUENCES = 3
CONVERSATION = 256 * 46_080  # bytes, of 256 tokens in the ONNX graph
INVOCATION = (4093, 198)  # of the activated adapter
ADAPTERS = {  # name -> rank, modules, seeds and invocation: a name is reloaded with the weights of its other seed
    "one": (4, ("attn_q",), (1, 2), ()),
    "two": (8, ("attn_v", "ffn_down"), (3, 4), ()),
    "three": (16, ("attn_q", "attn_v", "ffn_down"), (5, 6), ()),
    "four": (8, ("attn_q", "ffn_down"), (7, 8), INVOCATION),
    "five": (8, ("attn_q", "attn_v"), (9, 10), ()),
}
MERGED = "five"  # is no adapter but a model of its own, on llama.cpp
USES = (
    PLAIN_BASE,
    *map(Use, ADAPTERS),
    Use("one", 0.5),
    Use("two", 0.0),
    Use("one", 1.0, (("two", 0.5),)),
)
SYSTEM = tuple(range(4000, 4060))  # what many conversations begin with: more than is copied rather than evaluated
PROMPTS = (
    SYSTEM,
    (*SYSTEM, 1, 4093, 198),
    (*SYSTEM, 1, 4093, 198, 1780, 314),
    (*SYSTEM[:50], 9, 9, 9),
    (1, 4093, 198),
    (1, 4093, 198, 1780),
    (*SYSTEM, 1, 4093, 198, 1780, 314, 4093, 198),
    (1, 520),
)


def recording(kind: type[Any]) -> type[Any]:
    """Return the engine that keeps the logits that the tokens of a step were chosen from."""

    class Recording(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.rows: dict[Stream, np.ndarray] = {}

        def _say(self, stream: Any, row: np.ndarray) -> Piece:
            self.rows[stream] = row.copy()
            return super()._say(stream, row)

    return Recording


Cold = Callable[[tuple[int, ...], Use], np.ndarray]


@pytest.fixture(scope="module", params=["llama", "onnx"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every engine that keeps KV between requests."""
    return request.param


@pytest.fixture(scope="module")
def open_engine(kind: str, request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.getfixturevalue(f"open_{kind}")


@pytest.fixture(scope="module")
def weights(
    kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, int], Path]]:
    """The files of every name and seed."""
    make = request.getfixturevalue("gguf_adapter" if kind == "llama" else "onnx_adapter")
    files = {
        (name, seed): make(rank=rank, modules=modules, seed=seed, invocation=invocation)
        for name, (rank, modules, seeds, invocation) in ADAPTERS.items()
        for seed in seeds
    }
    if kind == "onnx":
        yield files
        return
    merge_gguf = request.getfixturevalue("merge_gguf")
    folder = tmp_path_factory.mktemp("merged")
    merged = {key: merge_gguf(path, folder / f"{key[1]}.gguf") for key, path in files.items() if key[0] == MERGED}
    yield files | merged
    for path in merged.values():
        path.unlink()


@pytest.fixture(scope="module")
def cold(open_engine: Callable[..., Any], weights: dict[tuple[str, int], Path]) -> Cold:
    """Return the logits after tokens by an evaluation from nothing; names are those of `seeded`."""
    engine = open_engine(sequences=1)
    for (name, seed), path in weights.items():
        engine.load_adapter(f"{name}{seed}", path)
    known: dict[tuple[tuple[int, ...], Use], np.ndarray] = {}

    def row(tokens: tuple[int, ...], use: Use) -> np.ndarray:
        if (tokens, use) not in known:
            known[tokens, use] = engine.logits(tokens, use, first=len(tokens) - 1)[0]
        return known[tokens, use]

    return row


def seeded(use: Use, seeds: dict[str, int]) -> Use:
    """Return a use by the names of weights that do not change."""
    also = tuple((f"{name}{seeds[name]}", scale) for name, scale in use.also)
    return Use(use.adapter and f"{use.adapter}{seeds[use.adapter]}", use.scale, also)


class Requests(RuleBasedStateMachine):
    """One engine, and all that may be asked of it."""

    make: Callable[[], Any]
    examples: int  # that hypothesis draws
    weights: dict[tuple[str, int], Path]
    cold: Cold

    def __init__(self) -> None:
        super().__init__()
        self.engine = type(self).make()
        self.seeds = {name: seeds[0] for name, (_, _, seeds, _) in ADAPTERS.items()}
        for name, seed in self.seeds.items():
            self.engine.load_adapter(name, self.weights[name, seed])
        self.live: dict[Stream, tuple[int, ...]] = {}  # with its tokens until now

    @precondition(lambda self: len(self.live) < SEQUENCES)
    @rule(use=st.sampled_from(USES), prompt=st.sampled_from(PROMPTS), count=st.integers(1, 6), steps=st.integers(0, 6))
    def begin(self, use: Use, prompt: tuple[int, ...], count: int, steps: int) -> None:
        stream = self.engine.start(prompt, use, Sampling(max_tokens=count), Usage())
        self.live[stream] = prompt
        self.go_on({use}, steps)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), steps=st.integers(1, 6))
    def advance(self, data: st.DataObject, steps: int) -> None:
        self.go_on({data.draw(st.sampled_from(sorted({stream.use for stream in self.live}, key=str)))}, steps)

    @precondition(lambda self: len({stream.place for stream in self.live}) > 1)
    @rule(steps=st.integers(1, 6))
    def advance_several_places_at_once(self, steps: int) -> None:
        uses = {stream.place: stream.use for stream in self.live}
        self.go_on(set(uses.values()), steps)

    def go_on(self, uses: set[Use], steps: int) -> None:
        for _ in range(steps):
            group = [stream for stream in self.live if stream.use in uses]
            others = len(group) < len(self.live)
            for stream, piece in zip(group, self.engine.advance(group, others_wait=others), strict=True):
                self.check(stream, piece)

    def check(self, stream: Stream, piece: Piece | None) -> None:
        assert stream.error is None
        if piece is not None:
            expected = type(self).cold(self.live[stream], seeded(stream.use, self.seeds))
            assert np.abs(self.engine.rows[stream] - expected).max() < ROUNDING
            assert expected.max() - expected[piece.token] < ROUNDING  # the likeliest token, but for a tie
            self.live[stream] = (*self.live[stream], piece.token)
        if stream.finished:
            del self.live[stream]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(list(self.live)))
        stream.close()
        del self.live[stream]

    @rule(name=st.sampled_from(list(ADAPTERS)))
    def reload_with_other_weights(self, name: str) -> None:
        for stream in list(self.live):
            if name in (stream.use.adapter, *dict(stream.use.also)):
                stream.close()
                del self.live[stream]
        self.engine.unload_adapter(name)
        first, second = ADAPTERS[name][2]
        self.seeds[name] = second if self.seeds[name] == first else first
        self.engine.load_adapter(name, self.weights[name, self.seeds[name]])

    @rule(use=st.sampled_from(USES), prompt=st.sampled_from(PROMPTS))
    def score(self, use: Use, prompt: tuple[int, ...]) -> None:
        found = self.engine.logits(prompt, use, first=len(prompt) - 1)[0]
        assert np.abs(found - type(self).cold(prompt, seeded(use, self.seeds))).max() <= 1e-3  # portions are the same

    @rule()
    def have_nothing_to_do(self) -> None:
        self.engine.settle()

    def teardown(self) -> None:
        self.engine.close()


@pytest.fixture
def machine(
    kind: str, open_engine: Callable[..., Any], weights: dict[tuple[str, int], Path], cold: Cold
) -> type[Requests]:
    """Requests to llama engines with one lane to give, and room to park; to ONNX engines with room for one more."""

    class Here(Requests):
        pass

    def make() -> Engine:
        if kind == "llama":
            return open_engine(
                recording(LlamaEngine), sequences=SEQUENCES, threads=2, own_lanes=1, parking=Parking(1 << 30)
            )
        return open_engine(recording(OnnxEngine), sequences=SEQUENCES, warm=CONVERSATION)

    Here.make, Here.examples = staticmethod(make), 12 if kind == "llama" else 6  # in 32-bit floats, so slower
    Here.weights, Here.cold = weights, staticmethod(cold)
    return Here


def run(machine: type[Requests], **options: Any) -> None:
    options = {
        "max_examples": machine.examples,
        "stateful_step_count": 40,
        "deadline": None,
        "derandomize": True,
        **options,
    }
    run_state_machine_as_test(machine, settings=settings(**options))


@pytest.mark.slow
def test_no_request_is_answered_from_what_another_computed(machine: type[Requests]) -> None:
    run(machine)


@pytest.mark.slow
@pytest.mark.usefixtures("kv_found_by_tokens_only")
def test_that_test_can_fail(machine: type[Requests]) -> None:
    with pytest.raises(AssertionError):
        run(machine, phases=[Phase.generate])  # the shortest way to the fault is of no interest
