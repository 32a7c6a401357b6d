"""A release with a merged model beside its base and an attached adapter: one board serves all of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pitstop import profiles
from pitstop.device.health import probe
from pitstop.device.limits import MIB, within
from pitstop.device.request import Limits
from pitstop.device.runtime import Runtime
from pitstop.device.store import Release
from pitstop.engines import machine
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.template import render
from pitstop.errors import UsageError
from serving import ALPHA, BASE, BETA, LIMITS, QUESTIONS, SAMPLING, Board, ask, install, request, running

QUESTION = QUESTIONS[0]


@pytest.fixture(scope="module")
def merged(board: Board, merge_gguf: Callable[[Path, Path], Path], tmp_path_factory: Any) -> Iterator[Path]:
    """Alpha, merged into the base."""
    path = merge_gguf(board.adapters[ALPHA], tmp_path_factory.mktemp("merged") / "alpha.gguf")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def release(board: Board, merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Alpha merged, beta attached."""
    return install(
        tmp_path_factory.mktemp("board"), board.base, {ALPHA: merged, BETA: board.adapters[BETA]}, merged=[ALPHA]
    )


@pytest.fixture(scope="module")
def expected(board: Board, release: Release, merged: Path) -> dict[str, str]:
    """What each answers to the question; the merged one as an engine of its own does."""
    answers = {name: board.expected[name, QUESTION] for name in (BASE, BETA)}
    options = {"context_length": LIMITS.context_length, "sequences": 1, "threads": 1}
    with LlamaEngine(merged, base_sha256=release.base.base_sha256, **options) as engine:
        prompt = engine.tokenize(render(release.bundles[ALPHA].prompting, ask(QUESTION)))
        answers[ALPHA] = "".join(piece.text for piece in engine.generate(prompt, sampling=SAMPLING))
    assert len(set(answers.values())) == 3
    return answers


def test_base_attached_and_merged_answer_in_turn(release: Release, expected: dict[str, str]) -> None:
    with Runtime.from_release(release, LIMITS) as runtime:
        for name in (ALPHA, BETA, BASE, ALPHA, BASE, BETA):
            assert "".join(runtime.ask(name, ask(QUESTION), SAMPLING)) == expected[name]
        answers = {name: runtime.ask(name, ask(QUESTION), SAMPLING) for name in (ALPHA, BETA, BASE)}
        assert {name: "".join(answer) for name, answer in answers.items()} == expected


def test_a_merged_model_counts_with_its_conversations(release: Release, merged: Path, expected: dict[str, str]) -> None:
    budget = merged.stat().st_size + 200 * MIB  # for either of them, not for both and the conversations
    with Runtime.from_release(release, replace(LIMITS, adapter_budget=budget)) as runtime:
        for name in (ALPHA, BETA, ALPHA):
            assert "".join(runtime.ask(name, ask(QUESTION), SAMPLING)) == expected[name]
        assert merged.stat().st_size < runtime.resident_bytes[ALPHA] <= budget
        runtime.load_adapter(ALPHA, pin=True)
    tight = replace(LIMITS, adapter_budget=merged.stat().st_size)
    with Runtime.from_release(release, tight) as runtime:
        with pytest.raises(UsageError, match=r"alpha need .* MB, all adapters together may have"):
            "".join(runtime.ask(ALPHA, ask(QUESTION), SAMPLING))
        assert "".join(runtime.ask(BETA, ask(QUESTION), SAMPLING)) == expected[BETA]


def test_a_profile_leaves_room_for_the_largest_merged_model(release: Release, merged: Path) -> None:
    size, base = merged.stat().st_size, release.base_path()
    board = replace(profiles.load("raspberry-pi-5"), context_length=512, adapter_budget_mib=32)
    ample = within(replace(board, budget_mib=4000), base, merged=[size, size])
    assert ample.adapter_budget is not None
    assert ample.adapter_budget > 2 * size
    assert ample.own_lanes == Limits().own_lanes
    tight = within(replace(board, budget_mib=900), base, merged=[size, size])
    assert tight.adapter_budget is not None
    assert size < tight.adapter_budget < 2 * size
    assert tight.own_lanes == 0
    assert within(replace(board, budget_mib=900), base).own_lanes > 0
    with pytest.raises(UsageError, match=r"(?s)largest merged model 27\d MB.*too much.*ship adapters attached"):
        within(replace(board, budget_mib=500), base, merged=[size, size])


def test_without_a_budget_adapters_have_half_of_what_is_free(
    release: Release, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 200 * MIB)
    with Runtime.from_release(release, LIMITS) as runtime:
        with pytest.raises(UsageError, match=r"all adapters together may have 104\.9 MB"):
            "".join(runtime.ask(ALPHA, ask(QUESTION), SAMPLING))
        assert "".join(runtime.ask(BETA, ask(QUESTION), SAMPLING)) == expected[BETA]


def test_the_health_check_tries_it(release: Release) -> None:
    tried = {model.name: model for model in probe(release).models}
    assert set(tried) == {BASE, ALPHA, BETA}
    assert tried[ALPHA].change > 1


def test_over_http_it_is_a_model_that_cannot_be_scaled(
    release: Release, board: Board, merged: Path, expected: dict[str, str]
) -> None:
    with running(lambda: Runtime.from_release(release, LIMITS)) as (url, _):
        listed = {model["id"]: model["pitstop"] for model in request(url, "GET", "/v1/models")[2]["data"]}
        assert listed[ALPHA]["delivery"] == "merged"
        assert listed[BETA]["delivery"] == "attached"
        numbers = {entry["pitstop"]["name"]: entry["id"] for entry in request(url, "GET", "/lora-adapters")[2]}
        assert set(numbers) == {BETA}
        body = {"model": ALPHA, "messages": ask(QUESTION), "max_tokens": SAMPLING.max_tokens, "temperature": 0}
        status, _, answer = request(url, "POST", "/v1/chat/completions", body)
        assert (status, answer["choices"][0]["message"]["content"]) == (200, expected[ALPHA])
        scaled = {**body, "lora": [{"id": numbers[BETA], "scale": 0.5}]}
        status, _, answer = request(url, "POST", "/v1/chat/completions", scaled)
        assert status == 400
        assert "alpha is merged into its base" in answer["error"]["message"]
        load = {"lora_name": "mine", "lora_path": str(merged)}
        assert request(url, "POST", "/v1/load_lora_adapter", load)[0] == 200
        status, _, answer = request(url, "POST", "/v1/chat/completions", {**body, "model": "mine"})
        assert (status, len(answer["choices"][0]["message"]["content"]) > 0) == (200, True)
