"""A GGUF base must read text as the tokenizer does that adapters are trained with: token for token.

A converter that takes `<start_of_turn>` for letters gives a model that loads and answers, to what it was never taught.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.llama.native import Model
from pitstop.engines.template import render
from pitstop.errors import BrokenInput

CONVERSATION = [
    {"role": "user", "content": "Set the heating to 21 degrees, please."},
    {"role": "assistant", "content": '{"heating": 21.5, "room": null}'},
    {"role": "user", "content": "Thank you!  And  the lights?"},
]
TEXTS = (
    "It's 3 o'clock; they'll arrive at 14:05 with 1,234,567 others.",
    "def area(r):\n    return 3.14159 * r**2  # square metres\n\n\tpass\r\n",
    "Où est la façade naïve? Größe: 5 µm, 東京, Привет, 🙂",
    "https://example.org/a_b?c=d&e=%20#f",
)


def check_tokens(tokenizer: PreTrainedTokenizerBase, prompting: Prompting, gguf: Path) -> None:
    """Refuse a GGUF model that cuts a conversation or plain text into other tokens than ``tokenizer`` does.

    Raises:
        BrokenInput: it does.
    """
    model = Model(gguf, vocab_only=True)
    try:
        for text in _texts(prompting):
            wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            found = model.tokenize(text)
            if found != wanted:
                raise BrokenInput(
                    f"{gguf.name} reads text as other tokens than its tokenizer: {text!r} is {found} and not {wanted}",
                    cure="start from another form of this model: its Hugging Face folder, or a GGUF file of its maker",
                )
    finally:
        model.free()


def _texts(prompting: Prompting) -> Iterator[str]:
    yield render(prompting, CONVERSATION)
    yield from TEXTS
