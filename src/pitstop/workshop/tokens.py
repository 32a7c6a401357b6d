"""A GGUF base must read a conversation as the tokenizer does that adapters are trained with: token for token.

A converter that takes `<start_of_turn>` for letters gives a model that loads and answers, to what it was never taught.
"""

import itertools
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pitstop.bundle.manifest import Prompting
from pitstop.engines.llama.native import Model
from pitstop.engines.template import render
from pitstop.errors import BrokenInput

TEXTS = (
    "Set the heating to 21 degrees, please.",
    '{"heating": 21.5, "room": null}',
    "def area(r):\n    return 3.14159 * r**2  # square metres\n\n\tpass\r\n",
    "It's 3 o'clock; they'll arrive  at 14:05 with 1,234,567 others.",
    "Où est la façade naïve? Größe: 5 µm, 東京, Привет, 🙂",
    " https://example.org/a_b?c=d&e=%20#f",
    "Thank you!",
)


def check_tokens(tokenizer: PreTrainedTokenizerBase, prompting: Prompting, gguf: Path) -> None:
    """Refuse a GGUF model that cuts a conversation into other tokens than ``tokenizer`` does.

    Raises:
        BrokenInput: it does.
    """
    roles = itertools.cycle(("user", "assistant"))
    text = render(prompting, [{"role": role, "content": content} for content, role in zip(TEXTS, roles, strict=False)])
    wanted = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    model = Model(gguf, vocab_only=True)
    try:
        found = model.tokenize(text)
    finally:
        model.free()
    if found != wanted:
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False)))
        there, here = found[same : same + 4], wanted[same : same + 4]
        raise BrokenInput(
            f"{gguf.name} reads text as other tokens than its tokenizer: {there} after {same} tokens, and not {here}, "
            f"which is {tokenizer.decode(here)!r}",
            cure="start from another form of this model: its Hugging Face folder, or a GGUF file of its maker",
        )
