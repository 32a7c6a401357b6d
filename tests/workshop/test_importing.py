"""A LoRA of another tool becomes a run of ours: whatever names it uses, and nothing that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pitstop.errors import BrokenInput, FormatError, RecordError, UsageError
from pitstop.workshop import adapter as adapters
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import WEIGHTS_FILE
from pitstop.workshop.export.export import export
from pitstop.workshop.foreign import base_words
from pitstop.workshop.importing import import_adapter
from pitstop.workshop.train import train
from workbench import Project

TOKENS = torch.tensor([[11, 402, 7, 950, 33, 5]])
CONFIG = "adapter_config.json"


@pytest.fixture
def made(project: Project) -> Path:
    """A PEFT folder as PEFT writes it, of the project's base, with matrices that change its answers."""
    return peft_folder(project.folder / "made")


def peft_folder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained("bases/tiny/hf", dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **changes}))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained("bases/tiny/hf", dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder))(TOKENS).logits


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


CONVENTIONS: dict[str, Callable[[str], str]] = {
    "peft": lambda name: name,
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "named adapter": lambda name: name.replace(".weight", ".default.weight"),
    "of a vision model": lambda name: name.replace(".model.model.", ".model.model.language_model."),
    "wrapped twice": lambda name: f"base_model.model.{name}",
    "bare": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("change", CONVENTIONS.values(), ids=CONVENTIONS)
def test_every_tools_names_give_the_same_model(project: Project, made: Path, change: Callable[[str], str]) -> None:
    expected = logits(made)
    rename(made, change)
    folder = import_adapter(project.recipe(), str(made))
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
        {"target_modules": "all-linear"},
    ],
    ids=["rslora", "patterns", "one layer", "expression", "all"],
)
def test_every_scaling_and_choice_of_modules_survives(project: Project, settings: dict[str, Any]) -> None:
    made = peft_folder(project.folder / "made", **settings)
    expected = logits(made)
    assert torch.equal(logits(import_adapter(project.recipe(), str(made))), expected)


def test_it_goes_on_as_a_run(project: Project, made: Path) -> None:
    configure(made, base_model_name_or_path="unsloth/Tiny-unsloth-bnb-4bit")
    recipe = project.recipe()
    import_adapter(recipe, str(made))
    identity = adapters.load_identity(recipes.load(recipe))
    assert identity.origin == adapters.Origin(str(made), "unsloth/Tiny-unsloth-bnb-4bit")
    assert identity.precision == "nf4"
    assert export(recipe).base_sha256 == identity.base_sha256


def test_the_same_is_not_imported_twice_and_another_not_over_it(project: Project, made: Path) -> None:
    recipe = project.recipe()
    weights = import_adapter(recipe, str(made)) / WEIGHTS_FILE
    before = weights.stat().st_mtime_ns
    import_adapter(recipe, str(made))
    assert weights.stat().st_mtime_ns == before
    other = peft_folder(project.folder / "other", r=2)
    with pytest.raises(UsageError, match="holds another adapter"):
        import_adapter(recipe, str(other))
    import_adapter(recipe, str(other), force=True)
    assert load_file(weights)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 2


def test_training_does_not_replace_it(project: Project, made: Path) -> None:
    recipe = project.recipe()
    import_adapter(recipe, str(made))
    with pytest.raises(UsageError, match="imported from"):
        train(recipe)


def test_another_model_is_refused_unless_it_is_said_to_be_the_same(project: Project, made: Path) -> None:
    configure(made, base_model_name_or_path="someone/Other-7B")
    with pytest.raises(BrokenInput, match="trained on someone/Other-7B"):
        import_adapter(project.recipe(), str(made))
    import_adapter(project.recipe(), str(made), trained_on="someone/Other-7B")


def test_a_base_named_by_its_files_is_known_by_their_digest(project: Project, made: Path) -> None:
    configure(made, base_model_name_or_path=str(project.folder / "bases" / "tiny" / "hf"))
    (project.folder / "elsewhere").mkdir()
    (project.folder / "elsewhere" / "model.safetensors").write_bytes(b"another model")
    import_adapter(project.recipe(), str(made))
    configure(made, base_model_name_or_path=str(project.folder / "elsewhere"))
    with pytest.raises(BrokenInput, match="trained on"):
        import_adapter(project.recipe(), str(made), force=True)


def spoil_rank(made: Path) -> None:
    configure(made, r=8)


def spoil_shape(made: Path) -> None:
    tensors = load_file(made / WEIGHTS_FILE)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, made / WEIGHTS_FILE)


def spoil_number(made: Path) -> None:
    tensors = load_file(made / WEIGHTS_FILE)
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, made / WEIGHTS_FILE)


def spoil_pair(made: Path) -> None:
    tensors = load_file(made / WEIGHTS_FILE)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, made / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_rank, "rank 4, but adapter_config.json says 8"),
        (spoil_shape, "this base needs rank x"),
        (spoil_number, "not finite"),
        (spoil_pair, "lora_B is missing"),
        (lambda made: rename(made, lambda name: name.replace("layers.1.", "layers.9.")), "has no such matrix"),
        (lambda made: configure(made, peft_type="LOHA"), "LOHA is no LoRA"),
        (lambda made: configure(made, init_lora_weights="pissa_niter_4"), "took a part out of the base"),
        (lambda made: configure(made, lora_alpha=None), "lora_alpha"),
        (lambda made: configure(made, use_dora=True), "DoRA: its magnitudes fit no adapter file"),
        (lambda made: configure(made, modules_to_save=["lm_head"]), "whole modules saved"),
        (lambda made: configure(made, alora_invocation_tokens=[1, 2]), "train.invocation"),
    ],
)
def test_what_does_not_fit_is_refused(project: Project, made: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(made)
    with pytest.raises(RecordError, match=said):
        import_adapter(project.recipe(), str(made))
    assert not (project.run / "adapter").exists()


def test_all_problems_are_told_at_once(project: Project, made: Path) -> None:
    spoil_number(made)
    configure(made, peft_type="LOHA", layer_replication=[[0, 2]])
    with pytest.raises(RecordError) as told:
        import_adapter(project.recipe(), str(made))
    assert len(told.value.problems) == 3


def test_a_merged_delivery_takes_what_no_adapter_file_can_carry(project: Project) -> None:
    made = peft_folder(project.folder / "made", use_dora=True)
    expected = logits(made)
    folder = import_adapter(project.recipe(export={"delivery": "merged"}), str(made))
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({}, UsageError, "no PEFT folder"),
        ({CONFIG: b"{"}, FormatError, "no JSON"),
        ({CONFIG: b"[]"}, FormatError, "no JSON object"),
        ({CONFIG: b"{}"}, UsageError, WEIGHTS_FILE),
        ({CONFIG: b"{}", "adapter_model.bin": b"\x80"}, UsageError, "is a pickle"),
        ({CONFIG: b"{}", WEIGHTS_FILE: b"\x00" * 20}, FormatError, "cannot be read"),
    ],
)
def test_no_adapter_there(project: Project, files: dict[str, bytes], error: type[Exception], said: str) -> None:
    folder = project.folder / "strange"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=said):
        import_adapter(project.recipe(), str(folder))


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "owner/not-there"])
def test_no_such_source(project: Project, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=f"no folder {source}"):
        import_adapter(project.recipe(), source)


def test_added_tokens_are_refused(project: Project, made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("bases/tiny/hf")
    tokenizer.save_pretrained(made)
    import_adapter(project.recipe(), str(made))
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(made)
    with pytest.raises(RecordError, match=r"1 tokens that the base has not, such as '<\|tool\|>'"):
        import_adapter(project.recipe(), str(made), force=True)


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "unsloth/SmolLM2-135M-Instruct-bnb-4bit",
        "unsloth/smollm2-135m-instruct-unsloth-bnb-4bit",
        "/data/models/SmolLM2-135M-Instruct/",
        "SmolLM2-135M-Instruct.gguf",
    ],
)
def test_the_model_that_a_name_speaks_of(name: str) -> None:
    assert base_words(name) == "smollm2-135m-instruct"
