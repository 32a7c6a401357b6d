"""Activated LoRAs: before their invocation the plain base computes, and all of them share what it has read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.engines.base import PLAIN_BASE, Engine, Sampling, Usage, Use
from pitstop.engines.invocation import NEVER, active_from, with_invocation
from pitstop.errors import UsageError

Make = Callable[..., Path]
ROUNDING = 0.1  # as in test_contract: what evaluation in other portions may move a logit by
INVOCATION = "<|im_start|>assistant\n"
TEXT = "<|im_start|>user\nName three colours.<|im_end|>\n" * 8
PROMPT = TEXT + INVOCATION
ONE, TWO, PLAIN = Use("one"), Use("two"), Use("plain")


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_it_acts_from_the_last_occurrence_on(tokens: list[int], invocation: list[int]) -> None:
    places = [at for at in range(len(tokens)) if tokens[at : at + len(invocation)] == invocation]
    assert active_from(tokens, invocation) == max(places, default=NEVER)
    assert active_from(tokens, ()) == 0
    assert active_from(with_invocation(tokens, invocation), invocation) < NEVER
    assert with_invocation(tokens, ()) == tuple(tokens)


@pytest.fixture
def activated(engine: Engine, adapter: Make) -> Engine:
    """An engine with two activated adapters."""
    for name, seed in (("one", 1), ("two", 2)):
        engine.load_adapter(name, adapter(seed=seed, size=2.0, invocation=engine.tokenize(INVOCATION)))
    return engine


def test_an_engine_knows_the_invocation(activated: Engine) -> None:
    assert activated.invocation("one") == tuple(activated.tokenize(INVOCATION))
    with pytest.raises(UsageError, match="none"):
        activated.invocation("none")


def test_it_acts_from_its_invocation_on_and_not_before(activated: Engine) -> None:
    tokens = activated.tokenize(PROMPT + "red, green")
    start = len(activated.tokenize(TEXT))
    base, adapted = activated.logits(tokens), activated.logits(tokens, ONE)
    assert np.abs(base[:start] - adapted[:start]).max() < ROUNDING
    assert np.abs(base[start:] - adapted[start:]).max(axis=-1).min() > 1


def test_without_its_invocation_the_base_answers(activated: Engine) -> None:
    tokens = activated.tokenize(TEXT)
    assert np.abs(activated.logits(tokens, ONE) - activated.logits(tokens)).max() < 1e-3


def test_answers_made_together_are_those_made_alone(activated: Engine) -> None:
    texts = (f"Hi. {INVOCATION}", f"Hello, you. {INVOCATION}", "Hi.", INVOCATION)
    prompts = [activated.tokenize(text) for text in texts]
    sampling = Sampling(max_tokens=4)
    alone = ["".join(piece.text for piece in activated.generate(prompt, ONE, sampling)) for prompt in prompts]
    assert activated.generate_batch(prompts, ONE, sampling) == alone
    assert alone[0] != "".join(piece.text for piece in activated.generate(prompts[0], PLAIN_BASE, sampling))


@pytest.mark.slow
def test_both_engines_and_peft_compute_the_same(
    torch_parts: tuple[Any, Any], torch_engine: Engine, llama: Engine, peft_adapter: Make, gguf_adapter: Make
) -> None:
    import torch
    from peft import PeftModel

    tokens = llama.tokenize(PROMPT + "red, green")
    invocation = llama.tokenize(INVOCATION)
    folder = peft_adapter(invocation=invocation)
    torch_engine.load_adapter("one", folder)
    llama.load_adapter("one", gguf_adapter(invocation=invocation))
    found = torch_engine.logits(tokens, ONE)
    assert np.abs(found - llama.logits(tokens, ONE)).max() < 0.5  # f32 weights beside f16: as in test_contract
    torch_engine.unload_adapter("one")
    whole = PeftModel.from_pretrained(torch_parts[0], str(folder)).eval()
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([tokens])).logits[0].numpy()
    whole.unload()
    assert np.abs(found - expected).max() < 1e-2


@pytest.fixture
def shared(llama: Any, gguf_adapter: Make) -> Any:
    """A llama engine with two activated adapters and one that acts everywhere."""
    for name, seed in (("one", 1), ("two", 2)):
        llama.load_adapter(name, gguf_adapter(seed=seed, invocation=llama.tokenize(INVOCATION)))
    llama.load_adapter("plain", gguf_adapter(seed=3))
    return llama


def ask(engine: Engine, text: str, use: Use) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many tokens of the prompt were there already."""
    usage = Usage()
    pieces = engine.generate(engine.tokenize(text), use, Sampling(max_tokens=4), usage)
    return [piece.token for piece in pieces], usage.reused_tokens


@pytest.mark.parametrize("order", [(PLAIN_BASE, ONE, TWO), (ONE, TWO, PLAIN_BASE), (TWO, PLAIN_BASE, ONE)])
def test_what_stands_before_the_invocation_is_read_once_for_all(shared: Any, order: tuple[Use, ...]) -> None:
    text = f"{order} {PROMPT}"  # of which nothing is known yet
    before = len(shared.tokenize(text)) - len(shared.tokenize(INVOCATION))
    cold = {use: shared.logits(shared.tokenize(text), use)[-1].argmax() for use in order}
    for number, use in enumerate(order):
        tokens, reused = ask(shared, text, use)
        assert reused >= before if number else reused < before
        assert tokens[0] == cold[use]
    assert ask(shared, text, PLAIN)[1] == 0  # it acts everywhere: nothing of that is its own


def test_a_conversation_goes_on_behind_a_second_invocation(shared: Any) -> None:
    first, _ = ask(shared, PROMPT, ONE)
    text = PROMPT + shared.detokenize(first) + "<|im_end|>\n" + PROMPT
    cold = shared.logits(shared.tokenize(text), ONE)[-1].argmax()
    tokens, reused = ask(shared, text, ONE)
    assert tokens[0] == cold
    # The first answer was made by the adapter; before a later invocation it is for the base to read.
    assert reused == len(shared.tokenize(TEXT))


def test_it_is_not_stacked(shared: Any) -> None:
    with pytest.raises(UsageError, match="one is an activated adapter"):
        ask(shared, PROMPT, Use("one", also=(("plain", 1.0),)))
