"""F_delta: what the adapter adds, beside what goes in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pitstop.engines.torch import TorchEngine
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import WEIGHTS_FILE
from pitstop.workshop.displacement import displacement, displacements
from pitstop.workshop.task import open_trained
from workbench import TEXTS, Project


@pytest.fixture
def engine(exported: Project) -> TorchEngine:
    recipe = recipes.load(exported.recipe())
    found = open_trained(recipe, base_model.load_ref(recipe.base.folder))
    assert isinstance(found, TorchEngine)
    return found


def rows(engine: TorchEngine) -> list[list[int]]:
    return [engine.tokenize(text) for text in TEXTS]


def test_it_is_the_length_of_what_is_added_beside_what_goes_in(engine: TorchEngine) -> None:
    (pair,) = (pair for pair in engine.lora_pairs("lights") if pair.name.endswith("layers.0.self_attn.q_proj"))
    inputs: list[torch.Tensor] = []
    handle = pair.layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].float()))
    for row in rows(engine):
        next(engine.logits_batch([row]))
    handle.remove()
    x = torch.cat(inputs)
    dense = pair.scaling * (pair.b.float() @ pair.a.float())
    expected = ((x @ dense.T).norm(dim=-1) / x.norm(dim=-1)).mean().item()
    assert displacements(engine, "lights", rows(engine))[pair.name] == pytest.approx(expected, rel=0.02)


def test_it_grows_with_the_scale_and_leaves_the_engine_as_it_was(engine: TorchEngine) -> None:
    before = next(engine.logits_batch([rows(engine)[0]]))
    whole = displacement(engine, "lights", rows(engine))
    assert whole > 0
    assert displacement(engine, "lights", rows(engine), 0.5) == pytest.approx(whole / 2)
    assert (next(engine.logits_batch([rows(engine)[0]])) == before).all()


def test_a_null_adapter_moves_nothing(engine: TorchEngine, exported: Project, tmp_path: Path) -> None:
    source = exported.folder / exported.run / "adapter"
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / WEIGHTS_FILE)
    save_file(
        {name: tensor * (0 if ".lora_B." in name else 1) for name, tensor in tensors.items()}, tmp_path / WEIGHTS_FILE
    )
    engine.load_adapter("null", tmp_path)
    assert displacement(engine, "null", rows(engine)) == 0.0
