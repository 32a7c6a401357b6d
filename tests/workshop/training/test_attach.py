"""The adapter is the one the recipe asks for, and what cannot be is told before the first step, all of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pitstop.bundle.formats import read_gguf
from pitstop.errors import RecordError
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop import train as stage
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.merge import merge
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.training.attach import attach
from workbench import Project

TOKENS = torch.arange(24).reshape(2, 12)


def base(project: Project) -> Any:
    ref = base_model.load_ref(Path("bases/tiny"))
    return base_model.load_weights(Path("bases/tiny"), ref, precision="shipped", artifact="q8_0").float()


def header() -> Any:
    return read_gguf(Path("bases/tiny/gguf/q8_0.gguf"))


def recipe_of(project: Project, **train: Any) -> Recipe:
    return recipes.load(project.recipe(train=train))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_every_beginning_changes_nothing_yet(project: Project, init: str) -> None:
    plain = logits(base(project))
    adapted = attach(base(project), recipe_of(project, init=init, rank=4), header())
    torch.testing.assert_close(logits(adapted), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["nf4", "shipped"])
def test_loftq_begins_nearer_to_the_base_as_it_came(project: Project, precision: str) -> None:
    """Of random weights an error has no low rank: at half of the full one, a part of it is gone all the same."""
    ref = base_model.load_ref(Path("bases/tiny"))
    came, frozen = (
        base_model.load_weights(Path("bases/tiny"), ref, precision=kind, artifact="q8_0")
        for kind in ("bf16", precision)
    )
    wanted, before = (model.model.layers[1].mlp.up_proj.weight.float() for model in (came, frozen))
    recipe = recipes.load(project.recipe(base={"precision": precision}, train={"init": "loftq", "rank": 32}))
    layer = attach(frozen, recipe, header()).base_model.model.model.layers[1].mlp.up_proj
    start = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (before + start - wanted).norm() < 0.6 * (before - wanted).norm()
    with pytest.raises(RecordError, match=r"train\.init"):
        recipes.load(project.recipe(base={"precision": "bf16"}, train={"init": "loftq"}))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_half_of_a_doubled_start_learns_from_the_base_and_half_stays(project: Project, init: str, rslora: bool) -> None:
    adapted = attach(base(project), recipe_of(project, init=init, rank=4, alpha=8.0, rslora=rslora), header())
    module = adapted.base_model.model.model.layers[0].mlp.up_proj
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    assert a.shape[0] == 8
    assert module.scaling["default"] == pytest.approx(8 / 4**0.5 if rslora else 2.0)
    start = module.scaling["default"] * b[:, :4] @ a[:4]
    weight = module.base_layer.weight
    assert (weight - start).norm() < 0.97 * weight.norm(), "it begins with a part of the base's weights"
    adapted(input_ids=TOKENS).logits.square().mean().backward()
    assert a.grad[:4].abs().max() > 0
    assert b.grad[:, :4].abs().max() > 0
    assert a.grad[4:].abs().max() == 0
    assert b.grad[:, 4:].abs().max() == 0


def test_a_pissa_adapter_ships_exactly(project: Project) -> None:
    """Its scale, doubled rank and frozen half included: the GGUF is what PEFT computes."""
    recipe = project.recipe(train={"init": "pissa", "steps": 3, "rank": 4, "alpha": 12.0})
    folder = stage.train(recipe)
    weights = load_file(folder / "adapter_model.safetensors")
    export_gguf(folder, Path("bases/tiny/hf"), "0" * 64, Path("pissa.gguf"), precision="f32")
    tensors = {tensor.name: tensor for tensor in read_gguf(Path("pissa.gguf")).tensors}
    assert tensors["blk.0.ffn_up.weight.lora_a"].shape == (64, 8)
    name = next(name for name in weights if "layers.0.mlp.up_proj.lora_A" in name)
    assert weights[name].shape == (8, 64)


def test_patterns_give_modules_ranks_and_alphas_of_their_own(project: Project) -> None:
    chosen = recipe_of(project, rank=4, rank_pattern={"down_proj": 2})
    chosen = replace(chosen, train=replace(chosen.train, alpha_pattern={"layers.1.self_attn.q_proj": 1.0}))
    adapted = attach(base(project), chosen, header())
    layers = adapted.base_model.model.model.layers
    assert layers[0].mlp.down_proj.lora_A["default"].weight.shape[0] == 2
    assert layers[0].mlp.up_proj.lora_A["default"].weight.shape[0] == 4
    assert layers[1].self_attn.q_proj.scaling["default"] == 0.25
    assert layers[0].self_attn.q_proj.scaling["default"] == 2.0


def test_a_budget_chooses_the_largest_rank_within(project: Project) -> None:
    chosen = recipe_of(project, rank=4, alpha=8.0, budget_mib=0.05)
    adapted = attach(base(project), chosen, header())
    config = adapted.peft_config["default"]
    size = sum(2 * p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    assert config.lora_alpha == 2 * config.r
    one = size / config.r
    assert size <= 0.05 * (1 << 20) < size + one
    with pytest.raises(RecordError, match="too little for rank 1"):
        attach(base(project), recipe_of(project, budget_mib=0.001), header())


def test_everything_wrong_with_it_is_told_at_once(project: Project) -> None:
    chosen = recipe_of(
        project,
        modules=["q_proj", "query"],
        first_layer=1,
        rank_pattern={"up_proj": 8},
        alpha_pattern={"q_proj": 8.0},
        save_modules=[],
    )
    chosen = replace(chosen, train=replace(chosen.train, save_modules=("lm_head", "nothing")))
    with pytest.raises(RecordError) as caught:
        attach(base(project), chosen, header())
    said = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(said) == ["train.modules", "train.rank_pattern", "train.save_modules", "train.save_modules"]


def test_a_module_without_a_tensor_of_its_own_cannot_ship(project: Project) -> None:
    found = header()
    fused = tuple(tensor for tensor in found.tensors if tensor.name != "blk.1.attn_k.weight")
    with pytest.raises(RecordError, match=r"layers\.1\.self_attn\.k_proj has no tensor of its own in q8_0\.gguf"):
        attach(base(project), recipe_of(project), replace(found, tensors=fused))


def test_what_only_a_merged_model_carries_is_refused_or_merged(project: Project) -> None:
    train = {"dora": True, "save_modules": ["input_layernorm"], "steps": 3}
    with pytest.raises(RecordError) as caught:
        recipes.load(project.recipe(train=train))
    assert len(caught.value.problems) == 2
    recipe = project.recipe(train=train, export={"delivery": "merged"})
    folder = stage.train(recipe)
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]
    weights = load_file(folder / "adapter_model.safetensors")
    norms = [tensor for name, tensor in weights.items() if name.endswith("input_layernorm.weight")]
    assert len(norms) == 2
    assert all(tensor.dtype == torch.float32 and (tensor != tensor[0]).any() for tensor in norms)
    merged = merge(recipe)
    full = load_file(project.run / "merged" / "hf" / "model.safetensors")
    torch.testing.assert_close(full["model.layers.0.input_layernorm.weight"], norms[0])
    trained = PeftModel.from_pretrained(base(project), str(folder))
    assert not torch.allclose(logits(trained), logits(base(project)))
    assert merged.artifact.size > 0


def test_half_of_a_start_that_must_stay_goes_without_decay(project: Project) -> None:
    with pytest.raises(RecordError, match=r"train\.weight_decay"):
        recipes.load(project.recipe(train={"init": "pissa", "weight_decay": 0.1}))
