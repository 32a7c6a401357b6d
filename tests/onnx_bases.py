"""Tiny random models of several architectures, PEFT adapters of them, and what ONNX Runtime computes with both."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pitstop.files import sha256_file
from pitstop.workshop.export.onnx import build_base

VOCABULARY = 256
IDS = np.arange(3, 20, dtype=np.int64)[None]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "llama, even": LlamaConfig(**SHAPE | {"intermediate_size": 128}, tie_word_embeddings=False),  # of whole blocks
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False),
    "phi3": Phi3Config(**SHAPE, original_max_position_embeddings=256),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=32, sliding_window=64),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}
LINEAR = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class OnnxBase:
    """A tiny model for training libraries, and the ONNX base made of it."""

    name: str
    folder: Path
    graph: Path

    @cached_property
    def sha256(self) -> str:
        return sha256_file(self.graph)

    @cached_property
    def session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns of every input that has a default
        options.intra_op_num_threads = 1
        return ort.InferenceSession(str(self.graph), options)

    @property
    def linear(self) -> list[str]:
        """The names of all projections, as PEFT targets them."""
        return LINEAR.get(self.name, ALL_LINEAR)

    def logits(self, *adapters: Path, feeds: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return the logits of `IDS` by plain ONNX Runtime, with adapter files as they are."""
        feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **(feeds or {})}
        config = CONFIGS[self.name]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values"):
                feeds[entry.name] = np.zeros((1, config.num_key_value_heads, 0, size), np.float32)
        run = ort.RunOptions()
        loaded = [ort.LoraAdapter() for _ in adapters]
        for one, path in zip(loaded, adapters, strict=True):
            one.Load(str(path))
            run.add_active_adapter(one)
        result: np.ndarray = self.session.run(["logits"], feeds, run)[0]
        return result

    def adapted(self, folder: Path, seed: int = 7, **config: Any) -> PeftModel:
        """Save a PEFT adapter whose A and B are both random, and return the adapted model in float32."""
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": self.linear} | config
        adapted = get_peft_model(model, LoraConfig(**settings))
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.2)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return adapted.eval()


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    """Return the logits of `IDS` by torch."""
    with torch.no_grad():
        result: np.ndarray = model(torch.from_numpy(IDS)).logits.numpy()
    return result


def save_model(name: str, folder: Path) -> Path:
    """Save a random model of one of `CONFIGS` with a tokenizer of numbered words, and return its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t0"))
    special = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t2", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def make_base(name: str, folder: Path, precision: str = "fp32") -> OnnxBase:
    """Make a random model of one of `CONFIGS` and the ONNX base of it."""
    hf = save_model(name, folder / "hf")
    return OnnxBase(name, hf, build_base(hf, folder / precision, precision))
