"""Tiny random models whose tokenizer is a SentencePiece model, as those of Gemma, Mistral and Phi are."""

import argparse
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaTokenizer,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
)

VOCABULARY = 1024
START, END = "<start_of_turn>", "<end_of_turn>"
TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message.role }}\n{{ message.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 6,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 6}, head_dim=32, query_pre_attn_scalar=32, sliding_window=16
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=32, sliding_window=None),
    "phi3": Phi3Config(**SHAPE, original_max_position_embeddings=512, sliding_window=512),
}
TOKENIZERS = {"gemma3": GemmaTokenizer}
LINEAR = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}


def save_model(name: str, folder: Path) -> Path:
    """Save a random model of one of `CONFIGS` as its makers publish it, and return the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    model.save_pretrained(folder)
    train_tokenizer(folder / "tokenizer")
    settings = {
        "bos_token": "<bos>",
        "eos_token": END,
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": False,
        "add_prefix_space": name == "phi3",
        "legacy": name == "phi3",
        "extra_special_tokens": [START],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = TOKENIZERS.get(name, LlamaTokenizer).from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(prefix: Path) -> None:
    """Write ``prefix``.model, of some English and some code, with Gemma's special tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(argparse.__file__).read_text().splitlines()),
        model_prefix=str(prefix),
        vocab_size=VOCABULARY,
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
        minloglevel=2,
    )
