"""Tiny random models whose tokenizer is a SentencePiece model, as those of Gemma, Mistral and Phi are."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gemma_tokenizer import IDS, SETTINGS, train_tokenizer
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
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    **IDS,
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
    train_tokenizer(Path(argparse.__file__).read_text().splitlines(), folder, VOCABULARY)
    older = name == "phi3"  # begins every text with a space, as Llama 2 did
    settings = SETTINGS | {"add_bos_token": False, "add_prefix_space": older, "legacy": older}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    TOKENIZERS.get(name, LlamaTokenizer).from_pretrained(folder).save_pretrained(folder)
    return folder
