"""What a training learns from: rows and general rows as tokens, and what is to be known of them."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import BaseRef
from pitstop.errors import together
from pitstop.progress import say
from pitstop.workshop.dataset import (
    Encoded,
    Example,
    Lengths,
    Split,
    check_invocation,
    encode,
    encode_general,
    load_split,
    spread,
)
from pitstop.workshop.recipe import Recipe

REPORT_FILE = "data.json"


@dataclass(frozen=True)
class DataReport:
    """`runs/<name>/data.json`: what became of the rows."""

    train_rows: int
    test_rows: int
    duplicates: int  # left out: they stood there before, word for word
    conflicting: int  # prompts with several answers among the training rows
    too_long: int  # left out, never cut
    max_tokens: int
    lengths: Lengths
    general_rows: int


@dataclass(frozen=True)
class Material:
    """Everything a training reads."""

    examples: tuple[Example, ...]
    general: tuple[Example, ...]
    invocation: tuple[int, ...]  # of an activated LoRA; none: it acts everywhere
    report: DataReport


def load(recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Read and encode the rows of a recipe.

    Raises:
        UsageError, BrokenInput: what is wrong with the rows and with the general rows, both at once.
    """
    invocation = invocation_tokens(recipe, tokenizer)
    with together() as attempt:
        task = attempt(_task, recipe, ref, tokenizer, invocation)
        general = attempt(_general, recipe, ref, tokenizer, invocation)
    rows, encoded = task
    report = DataReport(
        train_rows=len(rows.train),
        test_rows=len(rows.test),
        duplicates=rows.duplicates,
        conflicting=rows.conflicting,
        too_long=encoded.too_long,
        max_tokens=recipe.data.max_tokens,
        lengths=encoded.lengths,
        general_rows=len(general),
    )
    return Material(encoded.examples, general, invocation, report)


def invocation_tokens(recipe: Recipe, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of the recipe's invocation; none for an adapter that acts everywhere."""
    text = recipe.train.invocation
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def tell(report: DataReport) -> None:
    """Say what became of the rows."""
    lengths = report.lengths
    say(
        f"data: {report.train_rows} rows to learn, {report.test_rows} held out, {report.general_rows} general; "
        f"tokens a row: median {lengths.median}, 95 % {lengths.p95}, longest {lengths.longest}; "
        f"{lengths.answers:.0%} of them are answers"
    )
    if report.too_long:
        say(f"data: {report.too_long} rows over {report.max_tokens} tokens are left out ([data] max_tokens)")
    if report.duplicates:
        say(f"data: {report.duplicates} rows that stood there before are left out")
    if report.conflicting:
        say(f"data: {report.conflicting} prompts have several answers; an adapter can learn only one of them")


def _task(
    recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase, invocation: tuple[int, ...]
) -> tuple[Split, Encoded]:
    rows = load_split(recipe.data)
    chosen = rows.train
    if recipe.data.balance:
        chosen = spread(chosen, recipe.train.batch * recipe.train.steps, recipe.train.seed)
    prompting = replace(ref.prompting, system=recipe.data.system)
    # An activated adapter acts from the last invocation on: an answer before it would be the base's own.
    encoded = encode(chosen, tokenizer, prompting, recipe.data.max_tokens, one_answer=bool(invocation))
    check_invocation(encoded.examples, invocation, recipe.train.invocation or "")
    return rows, encoded


def _general(
    recipe: Recipe, ref: BaseRef, tokenizer: PreTrainedTokenizerBase, invocation: tuple[int, ...]
) -> tuple[Example, ...]:
    retain = recipe.retain
    if retain.rows is None or not retain.share:
        return ()
    return tuple(encode_general(retain.rows, tokenizer, ref.prompting, retain.max_tokens, invocation))
