"""Every edit against the dense change it stands for."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from pitstop.errors import BrokenInput, RecordError
from pitstop.workshop.adapter import WEIGHTS_FILE
from pitstop.workshop.repair import edits
from pitstop.workshop.repair.pairs import PREFIX, Pair, read, write
from pitstop.workshop.repair.parts import Heads, layer_of, layers_of, short

LAYERS, HEADS, KV_HEADS, SIZE, WIDTH = 3, 4, 2, 8, 32
Pairs = dict[str, Pair]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
        )
    )


def save_lora(folder: Path, **settings: object) -> Path:
    """Save a LoRA whose every factor is random, B too."""
    targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
    adapted = get_peft_model(model(), LoraConfig(**{"r": 4, "target_modules": targets, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    return read(save_lora(tmp_path / "adapter"))


def dense(pairs: Pairs) -> dict[str, torch.Tensor]:
    return {name: pair.product for name, pair in pairs.items()}


def same_shapes(one: Pairs, other: Pairs) -> bool:
    return all(
        one[name].a.shape == other[name].a.shape and one[name].b.shape == other[name].b.shape for name in one | other
    )


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-4))


def test_a_scale_acts_once(pairs: Pairs) -> None:
    edited = edits.scale(pairs, 0.5)
    assert same_shapes(pairs, edited)
    assert all(close(edited[name].product, 0.5 * whole) for name, whole in dense(pairs).items())


def test_modules_are_scaled_by_name(pairs: Pairs) -> None:
    chosen = "model.layers.1.self_attn.q_proj"
    edited = dense(edits.scale_modules(pairs, {chosen: 0.25}))
    for name, whole in dense(pairs).items():
        assert close(edited[name], 0.25 * whole if name == chosen else whole)


def test_layers_are_scaled_whole(pairs: Pairs) -> None:
    edited = dense(edits.scale_layers(pairs, {2: 0.0}))
    for name, whole in dense(pairs).items():
        assert close(edited[name], whole * (layer_of(name) != 2))
    assert layers_of(pairs) == [0, 1, 2]


@pytest.mark.parametrize("head", range(HEADS))
def test_a_head_is_its_rows_of_q_and_its_columns_of_o(pairs: Pairs, head: int) -> None:
    heads = Heads.of(model().config)
    assert (heads.count, heads.size) == (HEADS, SIZE), "keys and values have fewer heads than that"
    edited, before = dense(edits.scale_heads(pairs, {(1, head): 0.0}, heads)), dense(pairs)
    inside = torch.zeros(HEADS * SIZE, dtype=torch.bool)
    inside[head * SIZE : (head + 1) * SIZE] = True
    q, o = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
    assert close(edited[q], before[q] * ~inside[:, None])
    assert close(edited[o], before[o] * ~inside)
    untouched = [name for name in before if name not in (q, o)]
    assert all(torch.equal(edited[name], before[name]) for name in untouched), "grouped keys among them"


def test_head_width_may_differ_from_hidden_size_over_heads() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    assert Heads.of(config) == Heads(4, 32)


def test_a_ramp_rises_from_gamma_to_one(pairs: Pairs) -> None:
    edited = dense(edits.depth_ramp(pairs, 0.2, LAYERS))
    for name, whole in dense(pairs).items():
        assert close(edited[name], (0.2, 0.6, 1.0)[layer_of(name) or 0] * whole)


def test_a_ramp_of_one_is_no_change(pairs: Pairs) -> None:
    edited = dense(edits.depth_ramp(pairs, 1.0, LAYERS))
    assert all(close(edited[name], whole) for name, whole in dense(pairs).items())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_best_approximation_of_that_rank(pairs: Pairs, rank: int) -> None:
    edited = edits.truncate_rank(pairs, rank)
    assert same_shapes(pairs, edited)
    for name, whole in dense(pairs).items():
        u, sizes, v = torch.linalg.svd(whole, full_matrices=False)
        assert close(edited[name].product, (u[:, :rank] * sizes[:rank]) @ v[:rank])


def test_a_projection_ignores_its_directions_and_no_others(pairs: Pairs) -> None:
    name = "model.layers.0.mlp.down_proj"
    u, _ = torch.linalg.qr(torch.randn(48, 5, generator=torch.Generator().manual_seed(1)))
    edited = edits.project_out(pairs, {name: u})
    assert same_shapes(pairs, edited)
    whole = pairs[name].product
    assert close(edited[name].product, whole @ (torch.eye(48) - u @ u.T))
    assert close(edited[name].product @ u, torch.zeros(WIDTH, 5))
    others = [other for other in pairs if other != name]
    assert all(edited[other] is pairs[other] for other in others)


def test_the_null_adapter_stays_null(pairs: Pairs) -> None:
    null = {name: Pair(pair.a, torch.zeros_like(pair.b)) for name, pair in pairs.items()}
    heads = Heads(HEADS, SIZE)
    for edited in (
        edits.scale(null, 0.5),
        edits.scale_heads(null, {(0, 0): 0.0}, heads),
        edits.depth_ramp(null, 0.0, LAYERS),
        edits.truncate_rank(null, 2),
    ):
        assert all(torch.equal(pair.product, torch.zeros_like(pair.product)) for pair in edited.values())


def test_what_is_written_is_read_again_and_loads_in_peft(tmp_path: Path, pairs: Pairs) -> None:
    from peft import PeftModel

    source = tmp_path / "adapter"
    write(edits.scale(pairs, 0.5), source, tmp_path / "half")
    again = read(tmp_path / "half")
    assert all(close(again[name].product, 0.5 * pair.product) for name, pair in pairs.items())
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model()(tokens).logits
        whole = PeftModel.from_pretrained(model(), str(source)).merge_and_unload().state_dict()
        half = PeftModel.from_pretrained(model(), str(tmp_path / "half")).merge_and_unload().state_dict()
        base = model().state_dict()
    assert plain.isfinite().all()
    changed = [name for name in base if not torch.equal(base[name], whole[name])]
    assert len(changed) == len(pairs)
    for name in changed:
        assert close(half[name] - base[name], (whole[name] - base[name]) / 2), name


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_what_is_more_than_low_rank_is_refused_by_name(tmp_path: Path, settings: dict[str, object], word: str) -> None:
    with pytest.raises(RecordError, match=word):
        read(save_lora(tmp_path / "adapter", **settings))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_lora(tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS_FILE)
    name = f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(BrokenInput, match="not finite"):
        read(folder)


def test_names_of_parts() -> None:
    assert short("model.layers.11.self_attn.q_proj") == "11.q_proj"
    assert (short("lm_head"), layer_of("lm_head")) == ("lm_head", None)
