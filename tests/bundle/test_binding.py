"""What may be put on a base: adapters and merged models that were made from it, and nothing that is damaged."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headers import ARRAY, F16, F32, F32_VALUE, F64_VALUE, I8, STRING, U32, Tensor, array, gguf_bytes, info, key, text
from pitstop.bundle.binding import BASE_KEY, check_adapter, check_base_sha256, check_fits, check_merged
from pitstop.bundle.formats import GgufHeader, read_gguf
from pitstop.errors import BaseMismatch, FormatError

DIGEST, OTHER = "a" * 64, "b" * 64

WEIGHTS: list[Tensor] = [
    ("token_embd.weight", (8, 100), F32, None),
    ("blk.0.attn_q.weight", (8, 8), F32, None),
    ("blk.0.attn_norm.weight", (8,), F32, None),
    ("blk.0.attn_q.bias", (8,), F32, None),
    ("blk.0.ffn_down.weight", (16, 8), F32, None),
    ("blk.0.ffn_up_exps.weight", (8, 16, 4), F32, None),
]
Q, UP = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def tensor_file(path: Path, metadata: dict[str, tuple[int, bytes]], tensors: list[Tensor]) -> GgufHeader:
    infos, offset = [], 0
    for name, shape, kind, _ in tensors:
        size = {F32: 4, F16: 2, I8: 1}[kind]
        for dimension in shape:
            size *= dimension
        infos.append(info(name, shape, kind, offset))
        offset += -(-size // 32) * 32
    path.write_bytes(gguf_bytes([key(name, *value) for name, value in metadata.items()], infos, data=offset))
    return read_gguf(path)


@pytest.fixture
def base(tmp_path: Path) -> GgufHeader:
    return tensor_file(tmp_path / "base.gguf", {"general.architecture": (STRING, text("llama"))}, WEIGHTS)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., GgufHeader]:
    def make(tensors: list[Tensor] | None = None, **changes: tuple[int, bytes] | None) -> GgufHeader:
        metadata: dict[str, Any] = {
            "general.architecture": (STRING, text("llama")),
            "general.type": (STRING, text("adapter")),
            "adapter.type": (STRING, text("lora")),
            "adapter.lora.alpha": (F32_VALUE, struct.pack("<f", 0.0)),
            BASE_KEY: (STRING, text(DIGEST)),
        } | {name.replace("__", "."): value for name, value in changes.items()}
        kept = {name: value for name, value in metadata.items() if value is not None}
        return tensor_file(tmp_path / "adapter.gguf", kept, tensors if tensors is not None else lora(Q, (8, 4), (4, 8)))

    return make


def lora(stem: str, a: tuple[int, ...], b: tuple[int, ...], kind: int = F32) -> list[Tensor]:
    return [(f"{stem}.lora_a", a, kind, None), (f"{stem}.lora_b", b, kind, None)]


@pytest.mark.parametrize(
    "tensors",
    [
        lora(Q, (8, 4), (4, 8)),
        lora(Q, (8, 4), (4, 8), F16),
        lora(Q, (8, 4), (4, 8)) + lora("blk.0.ffn_down.weight", (16, 2), (2, 8)),
        lora(UP, (8, 2, 4), (2, 16, 4)),
    ],
)
def test_an_adapter_that_fits_passes(base: GgufHeader, make_adapter: Any, tensors: list[Tensor]) -> None:
    check_adapter(make_adapter(tensors), base, DIGEST)


UNFIT = {
    "no tensors": ([], "no tensors"),
    "half a pair": (lora(Q, (8, 4), (4, 8))[:1], "one half"),
    "another tensor": ([*lora(Q, (8, 4), (4, 8)), ("extra.weight", (4,), F32, None)], "extra"),
    "a full weight": ([*lora(Q, (8, 4), (4, 8)), (Q, (8, 8), F32, None)], "no projection"),
    "a norm": (lora("blk.0.attn_norm.weight", (8, 1), (1, 1)), "no projection"),
    "a norm as llama.cpp ignores it": ([*lora(Q, (8, 4), (4, 8)), ("blk.0.attn_norm.weight", (8,), F32, None)], "norm"),
    "a bias": (lora("blk.0.attn_q.bias", (8, 1), (1, 1)), "no projection"),
    "the embeddings": (lora("token_embd.weight", (4, 100), (4, 8)), "no projection"),
    "a tensor the base lacks": (lora("blk.7.attn_q.weight", (8, 4), (4, 8)), "does not have"),
    "wrong rows": (lora(Q, (9, 4), (4, 8)), "do not fit"),
    "wrong columns": (lora(Q, (8, 4), (4, 9)), "do not fit"),
    "two ranks": (lora(Q, (8, 4), (2, 8)), "do not fit"),
    "not transposed": (lora(Q, (4, 8), (8, 4)), "do not fit"),
    "too few experts": (lora(UP, (8, 2, 2), (2, 16, 2)), "do not fit"),
    "experts in one half only": (lora(UP, (8, 2, 4), (2, 16)), "do not fit"),
    "a fourth dimension": (lora(Q, (8, 4, 1, 2), (4, 8, 1, 2)), "do not fit"),
    "whole numbers": (lora(Q, (8, 4), (4, 8), I8), "I8"),
}


@pytest.mark.parametrize(("tensors", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_an_adapter_whose_tensors_do_not_fit_is_refused(
    base: GgufHeader, make_adapter: Any, tensors: list[Tensor], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        check_adapter(make_adapter(tensors), base, DIGEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__type": None}, "not a LoRA adapter"),
        ({"general__type": (STRING, text("model"))}, "not a LoRA adapter"),
        ({"adapter__type": (STRING, text("control_vector"))}, "not a LoRA adapter"),
        ({"adapter__type": (U32, bytes(4))}, "not a LoRA adapter"),
        ({"adapter__lora__alpha": (F32_VALUE, struct.pack("<f", float("nan")))}, "alpha"),
        ({"adapter__lora__alpha": (F32_VALUE, struct.pack("<f", float("inf")))}, "alpha"),
        ({"adapter__lora__alpha": (F64_VALUE, struct.pack("<d", 1.0))}, "alpha"),
        ({"adapter__lora__alpha": (STRING, text("16"))}, "alpha"),
        ({"adapter__alora__invocation_tokens": (U32, bytes(4))}, "must be an array of 1 to 64 tokens"),
        ({"adapter__alora__invocation_tokens": (ARRAY, array(U32, 0, b""))}, "must be an array of 1 to 64 tokens"),
        ({"adapter__alora__invocation_tokens": (ARRAY, array(U32, 65, bytes(260)))}, "must be an array of 1 to 64"),
        ({"adapter__alora__invocation_tokens": (ARRAY, array(F32_VALUE, 1, bytes(4)))}, "not all tokens of the base"),
        ({"adapter__alora__invocation_tokens": (ARRAY, array(U32, 1, b"\xff" * 4))}, "not all tokens of the base"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    base: GgufHeader, make_adapter: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        check_adapter(make_adapter(**changes), base, DIGEST)


def test_an_adapter_without_alpha_passes(base: GgufHeader, make_adapter: Any) -> None:
    check_adapter(make_adapter(adapter__lora__alpha=None), base, DIGEST)


def test_an_adapter_for_another_base_is_refused(base: GgufHeader, make_adapter: Any) -> None:
    with pytest.raises(BaseMismatch, match=r"a{12}….*b{12}…") as caught:
        check_adapter(make_adapter(), base, OTHER)
    assert caught.value.cure
    unbound = make_adapter(**{BASE_KEY.replace(".", "__"): None})
    with pytest.raises(BaseMismatch, match="does not say which base file it was trained on"):
        check_adapter(unbound, base, DIGEST)
    other_kind = make_adapter(general__architecture=(STRING, text("qwen2")))
    with pytest.raises(BaseMismatch, match=r"qwen2.*llama"):
        check_adapter(other_kind, base, DIGEST)


@pytest.mark.parametrize("trained_on", [OTHER, "", 7, ["a" * 64], DIGEST.upper()])
def test_only_the_very_digest_is_the_base(trained_on: object) -> None:
    check_base_sha256(DIGEST, DIGEST, where="here")
    with pytest.raises(BaseMismatch):
        check_base_sha256(trained_on, DIGEST, where="here")


# --- merged models ----------------------------------------------------------------------------------------------------

MERGED = {
    "general.architecture": (STRING, text("llama")),
    "general.type": (STRING, text("model")),
    "llama.block_count": (U32, struct.pack("<I", 1)),
    "tokenizer.ggml.model": (STRING, text("gpt2")),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, 2, text("a") + text("b"))),
}


@pytest.fixture
def whole_base(tmp_path: Path) -> GgufHeader:
    return tensor_file(tmp_path / "base.gguf", {**MERGED, "llama.context_length": (U32, bytes(4))}, WEIGHTS)


@pytest.fixture
def make_merged(tmp_path: Path) -> Callable[..., GgufHeader]:
    def make(tensors: list[Tensor] = WEIGHTS, **changes: tuple[int, bytes] | None) -> GgufHeader:
        metadata: dict[str, Any] = {**MERGED, BASE_KEY: (STRING, text(DIGEST))}
        metadata |= {name.replace("__", "."): value for name, value in changes.items()}
        kept = {name: value for name, value in metadata.items() if value is not None}
        return tensor_file(tmp_path / "merged.gguf", kept, tensors)

    return make


def test_a_merged_model_of_this_base_passes(whole_base: GgufHeader, make_merged: Any) -> None:
    check_merged(make_merged(), whole_base, DIGEST)
    check_fits(make_merged(llama__vocab_size=(U32, bytes(4))), whole_base, DIGEST)
    halved = [(name, shape, F16 if name.endswith("q.weight") else kind, None) for name, shape, kind, _ in WEIGHTS]
    check_fits(make_merged(halved), whole_base, DIGEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": WEIGHTS[:-1]}, r"blk.0.ffn_up_exps.weight in the shape None"),
        ({"tensors": [*WEIGHTS, ("extra.weight", (4,), F32, None)]}, r"extra.weight in the shape \(4,\)"),
        ({"tensors": [("token_embd.weight", (8, 99), F32, None), *WEIGHTS[1:]]}, r"\(8, 99\).*\(8, 100\)"),
        ({"general__type": (STRING, text("adapter"))}, "is a adapter, not a model"),
        ({"general__architecture": (STRING, text("qwen2"))}, "another general.architecture"),
        ({"llama__block_count": (U32, struct.pack("<I", 2))}, "another llama.block_count"),
        ({"tokenizer__ggml__model": (STRING, text("llama"))}, "another tokenizer.ggml.model"),
        (
            {"tokenizer__ggml__tokens": (ARRAY, array(STRING, 1, text("a")))},
            "another tokenizer.ggml.tokens",
        ),
        ({"tokenizer__ggml__tokens": None}, "another tokenizer.ggml.tokens"),
    ],
)
def test_a_model_that_is_not_this_base_with_other_weights_is_refused(
    whole_base: GgufHeader, make_merged: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        check_merged(make_merged(**changes), whole_base, DIGEST)


def test_a_merged_model_of_another_base_is_refused(whole_base: GgufHeader, make_merged: Any) -> None:
    with pytest.raises(BaseMismatch, match=r"a{12}….*b{12}…"):
        check_fits(make_merged(), whole_base, OTHER)
    with pytest.raises(BaseMismatch, match="does not say which base file"):
        check_fits(make_merged(**{BASE_KEY.replace(".", "__"): None}), whole_base, DIGEST)
