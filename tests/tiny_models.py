"""Random models with SmolLM2's words, small enough to evaluate a thousand times, and adapters for them."""

from pathlib import Path

import gguf
import numpy as np

from pitstop.bundle.binding import BASE_KEY
from pitstop.files import sha256_file

WIDTH, INNER, LAYERS, HEADS, SHARED_HEADS = 64, 160, 2, 4, 2
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH // 2, WIDTH),
    "attn_v": (WIDTH // 2, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}  # rows, columns


def tiny_base(words: Path, path: Path) -> Path:
    """Write a random llama in Q8_0 with the vocabulary of another GGUF."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    source = gguf.GGUFReader(words)
    for key, field in source.fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    size = len(source.fields["tokenizer.ggml.tokens"].data)
    _add(writer, "token_embd.weight", random.normal(size=(size, WIDTH)))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name, (rows, columns) in SHAPES.items():
            _add(writer, f"blk.{layer}.{name}.weight", random.normal(size=(rows, columns)) / columns**0.5)
    _finish(writer)
    return path


def tiny_adapter(base: Path, path: Path, seed: int, base_sha256: str | None = None, rank: int = 4) -> Path:
    """Write a random LoRA on every linear layer of the tiny base, strong enough to change every answer."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_string(BASE_KEY, base_sha256 or sha256_file(base))
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            a, b = random.normal(size=(rank, columns)) / columns**0.5, random.normal(size=(rows, rank)) * 0.3
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a.astype(np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b.astype(np.float32))
    _finish(writer)
    return path


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
