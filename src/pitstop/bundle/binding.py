"""Does this file run with this base? What a base must never be given, by the headers alone.

An adapter and a merged model name the very base file they were made from; llama.cpp takes any that has the right
shapes, and some that have not.
"""

import math
import re
from collections.abc import Mapping
from typing import NoReturn

from pitstop.bundle.formats import MAX_DIMENSIONS, GgufHeader, SkippedArray, TensorInfo
from pitstop.errors import BaseMismatch, FormatError

BASE_KEY = "pitstop.base_sha256"  # in an adapter or a merged model: the base file it was made from
INVOCATION_KEY = "adapter.alora.invocation_tokens"
MAX_INVOCATION = 64  # tokens
TOKENIZER_KEYS = ("model", "pre", "tokens", "merges", "scores", "token_type", "bos_token_id", "eos_token_id")

_FLOAT32 = 6  # GGUF's code of a value's type

# What llama.cpp multiplies with, and so what an adapter can change. Norms, embeddings, biases and routers are not here.
_PROJECTION = re.compile(
    r"(output|blk\.\d+\.("
    r"attn_(q|k|v|qkv|output|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)"
    r"|ffn_(gate|up|down)(_exps|_shexp|_chexps)?|ffn_gate_up_exps"
    r"|ssm_(in|out|x|dt)"
    r"))\.weight"
)
_ADAPTER_TYPES = ("F32", "F16", "BF16", "Q8_0")


def check_fits(made: GgufHeader, base: GgufHeader, base_sha256: str) -> None:
    """Refuse what is neither a LoRA adapter for this very base nor this base with one merged into it.

    Raises:
        FormatError: it is none of them, or a tensor of it does not fit.
        BaseMismatch: it was made from another base file, or does not say from which.
    """
    (check_merged if is_merged(made) else check_adapter)(made, base, base_sha256)


def is_merged(made: GgufHeader) -> bool:
    """Tell whether this is a whole model, which needs no base to run."""
    return made.text("general.type") == "model"


def check_merged(merged: GgufHeader, base: GgufHeader, base_sha256: str) -> None:
    """Refuse a model that is not this very base with other weights: its tokens and conversations must mean the same.

    Raises:
        FormatError: it is no model, or has another vocabulary, other settings or other tensors than the base.
        BaseMismatch: it was made from another base file, or does not say from which.
    """
    if not is_merged(merged):
        _refuse(merged, f"is a {merged.text('general.type') or 'file without general.type'}, not a model")
    check_base_sha256(merged.metadata.get(BASE_KEY), base_sha256, where=merged.path)
    architecture = base.text("general.architecture")
    settings = {"general.architecture", *(f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS)}
    # What only one of them says is a default that the other one spells out.
    settings |= {key for key in base.metadata if key.startswith(f"{architecture}.") and key in merged.metadata}
    for key in sorted(settings):
        if merged.metadata.get(key) != base.metadata.get(key):
            _refuse(merged, f"has another {key} than the base it was made from")
    shapes, expected = ({tensor.name: tensor.shape for tensor in header.tensors} for header in (merged, base))
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            _refuse(merged, f"has {name} in the shape {shapes.get(name)}, the base has {expected.get(name)}")


def check_adapter(adapter: GgufHeader, base: GgufHeader, base_sha256: str) -> None:
    """Refuse a GGUF adapter that is no LoRA for this very base.

    Raises:
        FormatError: it is no LoRA adapter, or a tensor of it does not fit the base tensor it names.
        BaseMismatch: it names another base file, or none, or is for another architecture.
    """
    kind, method = adapter.text("general.type"), adapter.text("adapter.type")
    if kind != "adapter" or method != "lora":
        _refuse(adapter, f"is a {kind or 'file without general.type'} of the type {method}, not a LoRA adapter")
    check_base_sha256(adapter.metadata.get(BASE_KEY), base_sha256, where=adapter.path)
    names = adapter.text("general.architecture"), base.text("general.architecture")
    if names[0] is None or names[0] != names[1]:
        raise BaseMismatch(
            f"{adapter.path.name} is for the architecture {names[0]}, the base is {names[1]}",
            where=adapter.path,
            cure="use the base it was trained on, or train it for this one",
        )
    alpha = adapter.metadata.get("adapter.lora.alpha", 0.0)
    # llama.cpp aborts the process on an alpha of another type.
    if adapter.types.get("adapter.lora.alpha", _FLOAT32) != _FLOAT32 or not math.isfinite(alpha):  # type: ignore[arg-type]
        _refuse(adapter, f"has adapter.lora.alpha {alpha!r}, it must be a finite 32-bit number")
    _check_invocation(adapter, base)
    _check_pairs(adapter, {tensor.name: tensor for tensor in base.tensors})


def invocation_of(adapter: GgufHeader) -> tuple[int, ...]:
    """Return the tokens from whose last occurrence on an activated LoRA acts; none for any other adapter."""
    tokens = adapter.metadata.get(INVOCATION_KEY, ())
    return tuple(int(token) for token in tokens) if isinstance(tokens, tuple) else ()


def _check_invocation(adapter: GgufHeader, base: GgufHeader) -> None:
    found = adapter.metadata.get(INVOCATION_KEY)
    if found is None:
        return
    vocabulary = base.metadata.get("tokenizer.ggml.tokens")
    size = vocabulary.count if isinstance(vocabulary, SkippedArray) else len(vocabulary or ())  # type: ignore[arg-type]
    if not isinstance(found, tuple) or not 0 < len(found) <= MAX_INVOCATION:
        _refuse(adapter, f"has {INVOCATION_KEY}, which must be an array of 1 to {MAX_INVOCATION} tokens")
    if not all(type(token) is int and 0 <= token < size for token in found):
        _refuse(adapter, f"has {INVOCATION_KEY} {found}, which are not all tokens of the base")


def _check_pairs(adapter: GgufHeader, base: Mapping[str, TensorInfo]) -> None:
    tensors = {tensor.name: tensor for tensor in adapter.tensors}
    stems = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    if not stems:
        _refuse(adapter, "changes nothing: it has no tensors")
    for stem in sorted(stems):
        a, b, weight = tensors.get(f"{stem}.lora_a"), tensors.get(f"{stem}.lora_b"), base.get(stem)
        if stem in tensors or not _PROJECTION.fullmatch(stem):
            _refuse(adapter, f"has the tensor {stem}, which is no projection an adapter can change at run time")
        if weight is None:
            _refuse(adapter, f"changes {stem}, which the base does not have")
        if a is None or b is None:
            _refuse(adapter, f"has only one half of the pair for {stem}")
        for half in (a, b):
            if half.type not in _ADAPTER_TYPES:
                _refuse(adapter, f"has {half.name} as {half.type}; {', '.join(_ADAPTER_TYPES)} are allowed")
        # All four dimensions: llama.cpp checks two, and a wrong expert count writes out of bounds there.
        rows, columns, *experts = _four(weight)
        rank = _four(a)[1]
        if _four(a) != [rows, rank, *experts] or _four(b) != [rank, columns, *experts]:
            shapes = f"{a.shape} and {b.shape}"
            _refuse(adapter, f"has {shapes} for {stem} of shape {weight.shape}, which do not fit")


def _four(tensor: TensorInfo) -> list[int]:
    return [*tensor.shape, *[1] * (MAX_DIMENSIONS - len(tensor.shape))]


def _refuse(header: GgufHeader, what: str) -> NoReturn:
    cure = "export the adapter again with pitstop export, or ship it merged: [export] delivery"
    if is_merged(header):
        cure = "merge it again: pitstop merge"
    raise FormatError(f"{header.path.name} {what}", where=header.path, cure=cure)


def check_base_sha256(trained_on: object, running: str, *, where: object) -> None:
    """Refuse an adapter whose recorded base digest is not that of the base which runs.

    Raises:
        BaseMismatch: it is another one, or the adapter does not say.
    """
    if trained_on is None:
        raise BaseMismatch(
            f"this adapter does not say which base file it was trained on (the base here is {running[:12]}…)",
            where=where,
            cure="export it again with pitstop export, which records the base",
        )
    if trained_on != running:
        raise BaseMismatch(
            f"this adapter was trained on the base {str(trained_on)[:12]}…, the base here is {running[:12]}…",
            where=where,
            cure="install the base it was trained on, or train and export it again for this one",
        )
