"""A LoRA that another tool trained, into a run folder of ours: checked, renamed, and bound to a base by digest.

Leaves `runs/<name>/adapter/` as `pitstop train` does, so that check, repair, export and pack go on from there.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pitstop import records
from pitstop.bundle.manifest import BaseRef
from pitstop.errors import RecordError, UsageError
from pitstop.files import sha256_file
from pitstop.progress import say
from pitstop.workshop import adapter as adapters
from pitstop.workshop import base_model, foreign
from pitstop.workshop import recipe as recipes
from pitstop.workshop.foreign import CONFIG_FILE, Foreign
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.runs import exclusive, finished, inputs_digest
from pitstop.workshop.training.material import invocation_tokens

WANTED = (CONFIG_FILE, adapters.WEIGHTS_FILE, "tokenizer*.json", "chat_template.jinja", "added_tokens.json")


def import_adapter(path: Path, source: str, *, trained_on: str | None = None, force: bool = False) -> Path:
    """Make a run of a PEFT folder (or hub id) and return its adapter's folder.

    Args:
        path: recipe that names its base, how it is asked, and the rows it is checked with.
        trained_on: another name of the recipe's base, which the adapter may know it by.
        force: replace the adapter that the run holds.

    Raises:
        UsageError: nothing to import there, or the run holds another adapter.
        FormatError: damaged files.
        RecordError: everything that does not fit this base, or that cannot be shipped as the recipe wants.
        BrokenInput: it was trained on another model.
    """
    recipe = recipes.load(path)
    folder = _fetched(source)
    with exclusive(recipe.run):
        ref = base_model.load_ref(recipe.base.folder)
        found = foreign.read(folder, _shapes(recipe.base.folder / "hf"))
        foreign.refuse_other_base(found, (ref.name, ref.source, trained_on or "", *_by_digest(found, ref)), folder)
        if problems := [*_unshippable(found, recipe), *_otherwise_asked(found, folder, recipe, ref)]:
            raise RecordError(problems, where=folder)
        inputs = inputs_digest(folder / CONFIG_FILE, folder / adapters.WEIGHTS_FILE, ref.weights_sha256)
        target = recipe.run / adapters.FOLDER
        if finished(target / adapters.IDENTITY_FILE, adapters.Identity, inputs) and not force:
            return target
        if target.exists() and not force:
            raise UsageError(
                "this run holds another adapter", where=target, cure="name another run in the recipe, or add --force"
            )
        for warning in _warnings(found, folder, recipe, ref):
            say(warning)
        recipes.keep(path, recipe.run)
        _write(found, target, recipe, ref, inputs, source)
        return target


def _fetched(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.count("/") != 1:
        raise UsageError(f"no folder {source}", cure="give a PEFT folder, or a hub id such as owner/name")
    try:
        return Path(snapshot_download(source, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UsageError(
            f"no folder {source}, and the hub does not give it: {str(error).splitlines()[0]}",
            cure="give a PEFT folder, or a hub id (needs internet)",
        ) from error


def _shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every matrix of the base's layers, without loading its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {
        name: (part.out_features, part.in_features)
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and ".layers." in f".{name}"
    }


def _by_digest(found: Foreign, ref: BaseRef) -> Iterator[str]:
    """Yield the name that the adapter gives its base, if it names files here and they are the base's own."""
    named = Path(found.base_name)
    files = [named] if named.is_file() else [named / "model.safetensors"]
    if found.base_name and any(file.is_file() and sha256_file(file) == ref.weights_sha256 for file in files):
        yield found.base_name


def _unshippable(found: Foreign, recipe: Recipe) -> Iterator[str]:
    """Yield what no adapter file can carry, unless the recipe ships a merged model."""
    if recipe.export.delivery == "merged":
        return
    config = found.config
    cure = 'it can be shipped merged: delivery = "merged" under [export]'
    if config.get("use_dora"):
        yield f"DoRA: its magnitudes fit no adapter file; {cure}"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield f"trained biases fit no adapter file; {cure}"
    if config.get("modules_to_save"):
        yield f"whole modules saved with it ({', '.join(config['modules_to_save'])}) fit no adapter file; {cure}"
    if config.get("trainable_token_indices"):
        yield f"trained tokens fit no adapter file; {cure}"


def _otherwise_asked(found: Foreign, folder: Path, recipe: Recipe, ref: BaseRef) -> Iterator[str]:
    """Yield where the adapter was trained on other tokens than the recipe would give it."""
    tokenizer: Any = base_model.load_tokenizer(recipe.base.folder)
    invocation = found.config.get("alora_invocation_tokens")
    wanted = list(invocation_tokens(recipe, tokenizer))
    if list(invocation or ()) != wanted:
        told = repr(tokenizer.decode(invocation)) if invocation else "none"
        yield f"train.invocation: it was trained with {told}; the recipe says {recipe.train.invocation!r}"
    if (folder / "tokenizer.json").is_file() and sha256_file(folder / "tokenizer.json") != ref.tokenizer_sha256:
        own, base = AutoTokenizer.from_pretrained(folder).get_vocab(), tokenizer.get_vocab()
        added = [token for token in own if token not in base]
        if added:
            yield f"its tokenizer has {len(added)} tokens that the base has not, such as {added[0]!r}"
        elif any(base[token] != number for token, number in own.items()):
            yield "its tokenizer numbers tokens otherwise than the base's"


def _warnings(found: Foreign, folder: Path, recipe: Recipe, ref: BaseRef) -> Iterator[str]:
    if not found.base_name:
        yield f"it does not say what it was trained on; its shapes fit {ref.name}, and pitstop check shows if it works"
    if recipe.base.precision != found.precision:
        yield (
            f"it was trained on {_spoken(found.precision)} weights, and the recipe says {recipe.base.precision}: on "
            "other weights than its own an adapter gives much fewer exact answers"
        )
    template = _template(folder)
    if template is not None and template != ref.prompting.chat_template:
        yield "it brings another chat template than the base's; devices will use the base's"


def _spoken(precision: str) -> str:
    return {"nf4": "NF4", "bf16": "unquantized"}[precision]


def _template(folder: Path) -> str | None:
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _write(found: Foreign, target: Path, recipe: Recipe, ref: BaseRef, inputs: str, source: str) -> None:
    """Put the adapter into the run folder; it appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".import-") as scratch:
        made = Path(scratch, adapters.FOLDER)
        made.mkdir()
        config = {**found.config, "base_model_name_or_path": ref.name}
        (made / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in found.tensors.items()}, made / adapters.WEIGHTS_FILE)
        identity = adapters.Identity(
            name=recipe.name,
            base_name=ref.name,
            base_sha256=ref.artifact(recipe.base.artifact).sha256,
            precision=found.precision,
            adapter_sha256=sha256_file(made / adapters.WEIGHTS_FILE),
            inputs=inputs,
            rows=0,
            rows_too_long=0,
            tokens=0,
            seconds=0.0,
            final_loss=None,
            origin=adapters.Origin(source, found.base_name),
        )
        records.save_json(identity, made / adapters.IDENTITY_FILE)
        if target.exists():
            shutil.move(target, Path(scratch, "before"))
        made.rename(target)
