"""A tokenizer as Gemma's, trained on text that is at hand: a SentencePiece model with bytes to fall back on."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

START, END = "<start_of_turn>", "<end_of_turn>"
TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.role }}\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 6}  # as a model's config names them; a turn's end ends all
SETTINGS: dict[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": END,
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "extra_special_tokens": [START],
    "chat_template": TEMPLATE,
}  # of tokenizer_config.json


def train_tokenizer(lines: Iterable[str], folder: Path, size: int) -> None:
    """Write ``tokenizer.model`` of so many words into a folder."""
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=words,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["<mask>", START, END],
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(words.getvalue())
