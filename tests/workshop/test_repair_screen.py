"""What the screen says of parts and directions, against what happens without them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from pitstop.workshop.dataset import Example
from pitstop.workshop.repair import edits, shapes
from pitstop.workshop.repair.material import Screen
from pitstop.workshop.repair.pairs import Pair, read
from pitstop.workshop.repair.parts import Head, Heads
from pitstop.workshop.repair.screen import Losses, Probe, Slopes
from pitstop.workshop.repair.search import Aim, matched
from workbench import TinyModel

WORDS = random.Random(0)
GENERAL = tuple(Example(tuple(WORDS.choices(range(5, 900), k=24 - 3 * at)), 1) for at in range(4))
TASK = tuple(Example((7, 11, 13 + at, 900, 901), 3) for at in range(3))
# Losses are of every second row: each twice, so that they are of the same rows as slopes and moments.
ROWS = Screen(*(tuple(row for row in rows for _ in range(2)) for rows in (GENERAL, TASK)))
HEADS = Heads(4, 16)
EPSILON = 0.05


@pytest.fixture(scope="module")
def base(tiny_llama: TinyModel) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "adapter"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    optimizer = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=5e-3)
    tokens = torch.tensor([row.tokens for row in TASK])
    for _ in range(40):
        optimizer.zero_grad()
        logits = adapted(input_ids=tokens).logits[:, 2:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 3:].flatten()).backward()
        optimizer.step()
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture
def probe(base: PreTrainedModel, adapter: Path) -> Iterator[Probe]:
    made = Probe(base, adapter, ROWS, read(adapter), 1.0)
    yield made
    made.close()


def slope(probe: Probe, more: dict[str, Pair], less: dict[str, Pair]) -> Slopes:
    high, low = probe.losses(more), probe.losses(less)
    return Slopes((high.general - low.general) / (2 * EPSILON), (high.task - low.task) / (2 * EPSILON))


def near(one: Slopes, other: Slopes) -> bool:
    values = (one.general - other.general, one.task - other.task)
    return max(map(abs, values)) < 0.02 * max(map(abs, (one.general, one.task, 0.05)))


def test_slopes_of_modules_are_those_of_the_loss(probe: Probe, adapter: Path) -> None:
    pairs = read(adapter)
    found = probe.slopes(pairs, HEADS)
    for name in pairs:
        if HEADS.side(name) is None:
            (one,) = found[name]
            more, less = (edits.scale_modules(pairs, {name: 1 + sign * EPSILON}) for sign in (1, -1))
            assert near(one, slope(probe, more, less)), name


@pytest.mark.parametrize("head", [(0, 0), (1, 3)])
def test_slopes_of_heads_are_those_of_the_loss(probe: Probe, adapter: Path, head: Head) -> None:
    pairs = read(adapter)
    found = probe.slopes(pairs, HEADS)
    mine = [found[f"model.layers.{head[0]}.self_attn.{name}"][head[1]] for name in ("q_proj", "o_proj")]
    both = Slopes(sum(one.general for one in mine), sum(one.task for one in mine))
    more, less = (edits.scale_heads(pairs, {head: 1 + sign * EPSILON}, HEADS) for sign in (1, -1))
    assert near(both, slope(probe, more, less))


def test_moments_are_those_of_the_plain_bases_inputs(probe: Probe, adapter: Path, base: PreTrainedModel) -> None:
    pairs = read(adapter)
    moments = {name: moment for modules, moment in probe.covariances() for name in modules}
    assert sorted(moments) == sorted(pairs), "every module once"
    plain = AutoModelForCausalLM.from_pretrained(base.config._name_or_path, dtype=torch.float32)
    inputs: list[torch.Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    plain.get_submodule(name).register_forward_pre_hook(lambda _, given: inputs.append(given[0][0, 1:]))
    with torch.no_grad():
        for row in GENERAL:
            plain(input_ids=torch.tensor([row.tokens]))
    seen = torch.cat(inputs)
    assert torch.allclose(moments[name], 2 * seen.T @ seen, rtol=1e-3, atol=1e-4), "but for each row's first position"


def test_without_every_direction_of_general_text_a_module_does_nothing_there(probe: Probe, adapter: Path) -> None:
    pairs = read(adapter)
    for modules, moment in probe.covariances():
        sizes, directions = torch.linalg.eigh(moment)
        u = directions[:, sizes > sizes[-1] * 1e-6]
        removed = edits.project_out(pairs, dict.fromkeys(modules, u))
        for name in modules:
            before, after = ((pair.product @ moment).norm() for pair in (pairs[name], removed[name]))
            assert after < 1e-3 * before, name


def test_modules_with_one_input_share_its_moment(probe: Probe) -> None:
    groups = [modules for modules, _ in probe.covariances()]
    assert ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"] in groups
    assert len(groups) == 8


def test_more_energy_means_more_directions(probe: Probe, adapter: Path) -> None:
    pairs = read(adapter)
    made = shapes.null_spaces(pairs, probe)
    counts = [shape.steps[0].parameters["directions"] for shape in made]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert all("general text" in shape.words() for shape in made)


def test_the_funnel_gives_up_first_what_wins_most_for_what_it_costs(adapter: Path) -> None:
    pairs = read(adapter)
    names = sorted(pairs)
    slopes = {name: [Slopes(-1.0, -1.0)] for name in names}
    slopes[names[3]] = [Slopes(0.1, -0.2)]
    slopes[names[5]] = [Slopes(0.1, -0.1)]
    slopes[names[7]] = [Slopes(0.1, 0.3)]
    (funnel,) = shapes.funnels(pairs, slopes, Heads(1, 64), ["modules"])
    assert funnel.parts == tuple(map(shapes.short, (names[7], names[5], names[3]))), "those that win nothing stay"
    shape = funnel.without(2)
    gone = {name for name in names if not shape.pairs[name].b.any()}
    assert gone == {names[7], names[5]}
    assert shape.words() == f"without 2 modules ({shapes.short(names[7])}, {shapes.short(names[5])})"


def test_a_shape_is_brought_to_the_aims_task_loss(probe: Probe, adapter: Path) -> None:
    pairs = read(adapter)
    whole = shapes.plain(pairs)
    losses = probe.losses(whole.scaled(0.5))
    slope = (probe.losses(whole.scaled(0.55)).task - losses.task) / 0.05
    assert slope < 0
    found = matched(probe, shapes.Shape("rank", (), edits.scale(pairs, 0.8)), Aim(0.5, losses, slope))
    assert found is not None
    assert found.scale * 0.8 == pytest.approx(0.5, abs=0.05), "the same adapter, so the same size of it"
    impossible = Aim(0.5, Losses(losses.general, losses.task - 10.0), -1.0)
    assert matched(probe, whole, impossible) is None


def test_the_model_is_given_back_as_it_was(base: PreTrainedModel, adapter: Path) -> None:
    tokens = torch.tensor([GENERAL[0].tokens])
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        probe = Probe(base, adapter, ROWS, read(adapter), 1.0)
        assert (base(input_ids=tokens).logits - before).abs().max() > 1e-3
        plain = probe.close()
        assert torch.equal(plain(input_ids=tokens).logits, before)
