"""The adapter a recipe asks for on a frozen model; what cannot be trained or shipped is found before the first step."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from pitstop.bundle.formats import GgufHeader
from pitstop.errors import RecordError
from pitstop.workshop import recipe as recipes
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.training import initial
from pitstop.workshop.training.frozen import gguf_names

MIB = 1 << 20
# A value of A, of B; "auto" is known only after training, and seldom more than f16.
BYTES = {
    "f32": (4.0, 4.0), "f16": (2.0, 2.0), "f16+f32": (2.0, 4.0), "q8_0": (34 / 32, 34 / 32), "auto": (2.0, 2.0),
}  # fmt: skip


def attach(model: PreTrainedModel, recipe: Recipe, artifact: GgufHeader | None = None) -> PeftModel:
    """Put a fresh LoRA on the frozen model, of the largest rank in the recipe's budget if it has one.

    Args:
        artifact: the base file it is to ship beside; every module must have its tensor there.

    Raises:
        RecordError: everything the base does not have, cannot take or cannot ship, at once.
    """
    wanted = recipes.module_names(recipe.train.modules)
    layers = _adapted(model, wanted, recipe.train.first_layer)
    recipe = within_budget(recipe, layers)
    if problems := [*_problems(model, recipe, wanted), *_cannot_ship(recipe, layers, artifact)]:
        raise RecordError(problems, where=recipe.run / recipes.RECIPE_FILE)
    adapted = get_peft_model(model, _config(recipe, wanted, model.config.num_hidden_layers))
    assert isinstance(adapted, PeftModel)
    with _originals(recipe) as original:
        for name, module in adapted.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                initial.start(module, recipe.train.init, original(name))
    for name in recipe.train.save_modules:
        _keep_precision(adapted, name)
    return adapted


@contextmanager
def _originals(recipe: Recipe) -> Iterator[Callable[[str], torch.Tensor | None]]:
    """Give the weights of a layer as the base came, by the layer's name, where the adapter's start needs them."""
    if recipe.train.init != initial.LOFTQ:
        yield lambda name: None
        return
    with safe_open(recipe.base.folder / "hf" / "model.safetensors", "pt") as file:
        yield lambda name: file.get_tensor(f"{name}.weight")


def within_budget(recipe: Recipe, layers: dict[str, torch.nn.Linear]) -> Recipe:
    """Return the recipe with the rank its budget allows; alpha keeps its proportion to it."""
    train = recipe.train
    if train.budget_mib is None:
        return recipe
    rank = int(train.budget_mib * MIB / max(1.0, exported_bytes(layers, 1, recipe)))
    factor = rank / train.rank
    alpha = train.alpha * (factor**0.5 if train.rslora else factor)
    return replace(recipe, train=replace(train, rank=rank, alpha=alpha))


def exported_bytes(layers: dict[str, torch.nn.Linear], rank: int, recipe: Recipe) -> float:
    """Return the size of an adapter of one rank on these layers, as the recipe exports it; some KB of names aside."""
    a, b = BYTES[recipe.export.precision]
    doubled = 2 if recipe.train.init in initial.DOUBLED else 1
    return sum(doubled * rank * (layer.in_features * a + layer.out_features * b) for layer in layers.values())


def _adapted(model: PreTrainedModel, wanted: tuple[str, ...], first_layer: int) -> dict[str, torch.nn.Linear]:
    """Return the layers an adapter of these modules changes, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear)
        and name.rpartition(".")[2] in set(wanted) - {"lm_head"}
        and _layer(name) >= first_layer
    }


def _layer(name: str) -> float:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else math.inf


def _problems(model: PreTrainedModel, recipe: Recipe, wanted: tuple[str, ...]) -> Iterator[str]:
    train, config = recipe.train, model.config
    present = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    for name in wanted:
        if name not in present or name == "lm_head":
            yield f"train.modules: this base has no {name}; it has {', '.join(sorted(present - {'lm_head'}))}"
    if train.first_layer >= config.num_hidden_layers:
        yield f"train.first_layer: {train.first_layer}, but this base has {config.num_hidden_layers} layers"
    if train.rank < 1:
        yield f"train.budget_mib: {train.budget_mib} is too little for rank 1 on these modules; name fewer of them"
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in wanted]
    for key, patterns in (("rank_pattern", train.rank_pattern), ("alpha_pattern", train.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                yield f"train.{key}: {pattern!r} is none of the modules that are trained"
    every = {name.rpartition(".")[2]: part for name, part in model.named_modules()}
    for name in train.save_modules:
        if name not in every:
            yield f"train.save_modules: this base has no {name}"
        elif isinstance(every[name], torch.nn.Linear | torch.nn.Embedding):
            yield f"train.save_modules: {name} stays frozen; only norms can be trained whole"


def _cannot_ship(recipe: Recipe, layers: dict[str, torch.nn.Linear], artifact: GgufHeader | None) -> Iterator[str]:
    if artifact is None or recipe.export.delivery != "attached":
        return
    shapes = {tensor.name: tuple(tensor.shape) for tensor in artifact.tensors}
    count = 1 + max((int(number) for number in map(_layer, layers) if number < math.inf), default=0)
    names = gguf_names(str(artifact.metadata["general.architecture"]), count)
    for name, layer in layers.items():
        tensor = f"{names.get(name, name)}.weight"
        if shapes.get(tensor) != (layer.in_features, layer.out_features):
            yield f"train.modules: {name} has no tensor of its own in {artifact.path.name}, so no adapter can change it"


def _config(recipe: Recipe, wanted: tuple[str, ...], layers: int) -> LoraConfig:
    train = recipe.train
    # The half that takes the start away again doubles the rank; alpha follows, so that the effect stays.
    doubled = 2 if train.init in initial.DOUBLED else 1
    louder = doubled**0.5 if train.rslora else doubled
    return LoraConfig(
        r=train.rank * doubled,
        lora_alpha=train.alpha * louder,  # type: ignore[arg-type]  # PEFT computes with any number
        use_rslora=train.rslora,
        use_dora=train.dora,
        lora_dropout=train.dropout,
        rank_pattern={name: rank * doubled for name, rank in train.rank_pattern.items()},
        alpha_pattern={name: alpha * louder for name, alpha in train.alpha_pattern.items()},
        init_lora_weights=train.init if train.init in initial.OF_PEFT else True,  # type: ignore[arg-type]
        target_modules=list(wanted),
        modules_to_save=list(train.save_modules) or None,
        layers_to_transform=list(range(train.first_layer, layers)) if train.first_layer else None,
        task_type="CAUSAL_LM",
    )


def _keep_precision(adapted: PeftModel, name: str) -> None:
    """Train a whole module in float32, for a step is smaller than what bfloat16 tells apart."""
    for path, module in adapted.named_modules():
        if path.endswith(f"{name}.modules_to_save.default"):
            module.float()
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
