"""What counts of a conversation: every answer and what ends it, as the template says or as renders differ."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.template import render
from pitstop.errors import DatasetError, UsageError
from pitstop.workshop import dataset, masks
from pitstop.workshop.dataset import Row
from pitstop.workshop.recipe import Retain, Train
from pitstop.workshop.training.batches import Batches

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Thoughts of all answers but the last are dropped, as Qwen 3 drops them.
FORGETTING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role != 'assistant' else"
    " m.content.split('</think>')[-1] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPENED = (  # opens a thought where the assistant begins, but not in what it said before
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "Welcome."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>hm</think>1 "},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def pieces(template: str, *, one_answer: bool = False) -> list[list[tuple[str, bool]]]:
    prompting = Prompting(chat_template=template, bos_token="", eos_token="</s>")
    found = masks.conversations(prompting, CHAT, one_answer=one_answer)
    return [[(piece.text, piece.answer) for piece in row] for row in found]


def answers(template: str, **settings: Any) -> list[list[str]]:
    return [[text for text, answer in row if answer] for row in pieces(template, **settings)]


def test_every_answer_to_something_counts_with_its_end() -> None:
    assert answers(PLAIN) == [["<think>hm</think>1 </s>", "2</s>"]]
    (row,) = pieces(PLAIN)
    whole = render(Prompting(PLAIN, "", "</s>"), CHAT, add_generation_prompt=False)
    assert "".join(text for text, _ in row) == whole.rstrip(), "the line break after the last turn is nobody's"


def test_the_templates_own_masks_come_first() -> None:
    assert answers(MARKED) == [["Welcome.</s>", "<think>hm</think>1 </s>", "2</s>"]]


def test_a_template_that_rewords_the_past_gives_a_render_an_answer() -> None:
    first, second = pieces(FORGETTING)
    assert [text for text, answer in first if answer] == ["<think>hm</think>1 </s>"]
    assert [text for text, answer in second if answer] == ["2</s>"]
    assert "hm" not in second[0][0], "the past is what the device would have"


def test_a_template_without_an_end_gets_the_tokenizers() -> None:
    assert answers(BARE)[-1][-1] == "2</s>"


def test_an_answer_that_begins_elsewhere_than_the_prompt_ends_is_put_behind_the_prompt() -> None:
    rows = pieces(OPENED)
    assert [row[-1] for row in rows] == [("hm</think>1 </s>", True), ("2</s>", True)]
    assert all(row[0][0].endswith("<|assistant|><think>") for row in rows)


def test_one_answer_a_row_where_only_the_last_can_be_learnt() -> None:
    assert answers(PLAIN, one_answer=True) == [["<think>hm</think>1 </s>"], ["2</s>"]]


def test_a_row_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    strict = Prompting("{{ raise_exception('only two turns') if messages | length > 2 }}ok", "", "</s>")
    rows = [Row("seven", tuple(CHAT), "g"), Row("eight", tuple(CHAT), "g")]
    with pytest.raises(DatasetError) as caught:
        dataset.encode(rows, tokenizer, strict, 100)
    assert "2 rows cannot be rendered" in str(caught.value)
    assert "row eight: the chat template refuses these messages: only two turns" in str(caught.value)
    with pytest.raises(UsageError):
        list(masks.conversations(strict, CHAT))


def test_exactly_the_answers_of_every_turn_are_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    """Also with a tokenizer that pads with its end token: the end of an answer counts, padding does not."""
    prompting = Prompting(PLAIN.replace("</s>", "<|im_end|>"), "", "<|im_end|>")
    short = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    encoded = dataset.encode([Row("1", tuple(CHAT), "g"), Row("2", short, "g")], tokenizer, prompting, 200)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = Batches(encoded.examples, [], Train(steps=1, batch=2), Retain(), pad=end)[0]
    said = [
        tokenizer.decode(row[1:][scored[:-1]]) for row, scored in zip(batch["input_ids"], batch["scored"], strict=True)
    ]
    assert sorted(said) == sorted(["<think>hm</think>1 <|im_end|>2<|im_end|>", "y<|im_end|>"])
    assert encoded.lengths.rows == 2
    assert encoded.lengths.answers == pytest.approx(
        sum(batch["scored"].sum(1).tolist()) / sum(len(example.tokens) for example in encoded.examples), abs=1e-4
    )
