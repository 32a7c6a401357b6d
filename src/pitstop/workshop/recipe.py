"""The recipe: the only list of knobs, with what each does, its unit and its default.

Paths are relative to the folder pitstop is run in, so a recipe and the copy kept in the run folder mean the same.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pitstop import records
from pitstop.errors import RecordError, UsageError
from pitstop.files import write_bytes
from pitstop.retention.margins import Margins, check_margins
from pitstop.retention.task import Metric
from pitstop.workshop import tables
from pitstop.workshop.sources import is_hub
from pitstop.workshop.tables import Table

RUNS = Path("runs")
RECIPE_FILE = "recipe.toml"
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROW_PARTS = ("prompt", "completion", "messages", "group", "id")
PRESETS = {
    "all-linear": LINEAR_MODULES,
    "attention": LINEAR_MODULES[:4],
    "mlp": LINEAR_MODULES[4:],
    "qv": ("q_proj", "v_proj"),
}


@dataclass(frozen=True)
class BaseChoice:
    """Which base, and which of its weights the adapter is trained on."""

    folder: Path  # a prepared base: bases/<name>, made by `pitstop base`
    precision: Literal["shipped", "nf4", "bf16"] = "shipped"  # shipped: the very weights the device runs; nf4: QLoRA
    artifact: str = "q8_0"  # the base artifact the device runs
    kept: Literal["auto", "dequantized", "blocks"] = "auto"  # in memory; blocks: a quarter, and slower


@dataclass(frozen=True)
class Data:
    """The rows: prompt and completion, or chat messages; the loss counts the assistant's words, of every turn.

    A source is a JSONL, CSV or Parquet file, or `hub:owner/name`, then `:config`, `@revision`, `#split` as needed.
    """

    train: Path
    test: Path | None = None  # held out; without it a share of the groups in `train` is held out
    test_share: float = 0.1  # of the groups, when `test` is not given
    columns: dict[str, str] = field(default_factory=dict)  # prompt, completion, messages, group, id -> the data's name
    system: str | None = None  # system message put before every row, and before every request on the device
    max_tokens: int = 256  # rows longer than this are left out, and counted in the report
    table: Table | None = None  # the source is a table: its rows become sentences
    balance: bool = False  # every group has its turn before any comes again: large groups do not drown small ones


@dataclass(frozen=True)
class Train:
    """How the adapter is trained."""

    steps: int = 300  # optimizer steps
    batch: int = 8  # rows a step
    micro_batch: int | None = None  # of them at once; halved when memory runs out, which changes no gradient
    gradient_checkpointing: bool = False  # less memory for activations, about a third more time
    optimizer: Literal["adamw_torch", "paged_adamw_8bit"] = "adamw_torch"  # paged: GPU only
    learning_rate: float = 5e-4
    warmup_steps: int = 10
    weight_decay: float = 0.0  # of A and B
    rank: int = 16  # doubling it about doubles the bundle
    alpha: float = 32.0  # the adapter's effect is multiplied by alpha / rank
    rslora: bool = False  # alpha / sqrt(rank) instead
    budget_mib: float | None = None  # of the exported adapter: takes the largest rank within, alpha in proportion
    rank_pattern: dict[str, int] = field(default_factory=dict)  # module -> another rank, as PEFT matches names
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: Literal["default", "gaussian", "orthogonal", "loftq", "pissa", "olora"] = (
        "default"  # the last two double the file
    )
    dora: bool = False  # ships merged only
    save_modules: tuple[str, ...] = ()  # norms trained whole; ships merged only
    dropout: float = 0.0
    modules: tuple[str, ...] = ("all-linear",)  # presets or projection names
    first_layer: int = 0  # layers before this one keep the base's weights: faster, and forgets less
    invocation: str | None = None  # text from which on the adapter acts (aLoRA): before it, all share the base's KV
    seed: int = 0
    checkpoint_every: int = 50  # steps; what a killed training loses at most


@dataclass(frozen=True)
class Retain:
    """What holds the adapter near the base while it learns the task."""

    rows: Path | None = None  # general rows (text, or prompt and completion); none: nothing holds it
    share: float = 0.5  # general rows a task row
    kl: float = 1.0  # weight of KL(base || adapted) on the general rows, in nats per token
    replay: float = 0.0  # weight of the ordinary loss on the general rows
    max_tokens: int = 64  # of its own that a general row is cut to


@dataclass(frozen=True)
class Check:
    """What the adapter must show before it may be packed."""

    suites: Path = Path("suites")  # made by `pitstop suites build`
    metric: Metric = "json"  # how a test answer is compared with the expected one; class: by likelihood
    tolerance: float = 0.0  # how far a right answer may be off, in its own unit; only where the metric is "number"
    rows: int = 150  # test rows to generate for, spread over the groups
    max_new_tokens: int = 128  # longest answer
    margins: Margins = field(default_factory=Margins)


@dataclass(frozen=True)
class Export:
    """What is shipped."""

    delivery: Literal["attached", "merged"] = "attached"  # merged: a whole model, faster, and as large as the base
    # f16+f32: of its A and its B; ONNX has f32 and f16; auto: the smallest that costs at most a tenth of parity_kl
    precision: Literal["auto", "f32", "f16", "f16+f32", "q8_0"] = "f16"
    also: tuple[str, ...] = ()  # further artifacts of the base to make it for, such as "int8", which is ONNX
    parity_kl: float = 0.01  # nats per token: the exported adapter may differ this much from the trained one


@dataclass(frozen=True)
class Recipe:
    """One adapter, from data to bundle."""

    name: str  # of the adapter: the model name clients ask for
    base: BaseChoice
    data: Data
    version: str = "1.0.0"
    license: str = "Apache-2.0"  # of the adapter
    scale: float = 1.0  # multiplier of the finished adapter; below 1 it forgets less and does less
    folder: Path | None = None  # its run folder, if not runs/<name>; a repaired adapter keeps its name in another one
    train: Train = field(default_factory=Train)
    retain: Retain = field(default_factory=Retain)
    check: Check = field(default_factory=Check)
    export: Export = field(default_factory=Export)

    @property
    def run(self) -> Path:
        """The folder everything made from this recipe goes to."""
        return self.folder or RUNS / self.name


def load(path: Path) -> Recipe:
    """Read a recipe file, or the recipe of a run folder, and check everything that can be checked without the base.

    Raises:
        UsageError: no such file.
        RecordError: every problem of the recipe at once.
    """
    file = path / RECIPE_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"no recipe at {path}", cure="name a recipe file or a run folder; `pitstop init` writes a recipe to start"
        )
    try:
        recipe = records.load_toml(Recipe, file)
    except RecordError as error:
        readable = records.readable_part(Recipe, file)
        more = _problems(readable) if readable else []
        raise RecordError([*error.problems, *more], where=file) from error
    if problems := _problems(recipe):
        raise RecordError(problems, where=file)
    return recipe


def keep(path: Path, run: Path) -> None:
    """Copy a recipe into its run folder.

    Raises:
        StorageError: the disk refuses.
    """
    source = path / RECIPE_FILE if path.is_dir() else path
    if source.resolve() != (run / RECIPE_FILE).resolve():
        write_bytes(run / RECIPE_FILE, source.read_bytes())


def module_names(modules: tuple[str, ...]) -> tuple[str, ...]:
    """Expand presets to projection names, in a fixed order, each once."""
    names = [name for module in modules for name in PRESETS.get(module, (module,))]
    return tuple(dict.fromkeys(names))


def _problems(recipe: Recipe) -> list[str]:
    found = []
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", recipe.name):
        found.append(f"name: {recipe.name!r} must be a-z, 0-9, '.', '_', '-', at most 64")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}", recipe.version):
        found.append(f"version: {recipe.version!r} must be numbers with dots, such as 1.0.2")
    for key, path in (
        ("data.train", recipe.data.train),
        ("data.test", recipe.data.test),
        ("retain.rows", recipe.retain.rows),
    ):
        if path is not None and not is_hub(path) and not path.is_file():
            found.append(f"{key}: no file {path} (looked from {Path.cwd()})")
    found += [
        f"data.columns.{name}: rows have no such part; they have {', '.join(ROW_PARTS)}"
        for name in recipe.data.columns
        if name not in ROW_PARTS
    ]
    found += _table_problems(recipe)
    if not (recipe.base.folder / "base.json").is_file():
        found.append(f"base.folder: {recipe.base.folder} holds no base.json; `pitstop base` makes one")
    positive = {
        "train.steps": recipe.train.steps,
        "train.batch": recipe.train.batch,
        "train.micro_batch": 1 if recipe.train.micro_batch is None else recipe.train.micro_batch,
        "train.learning_rate": recipe.train.learning_rate,
        "train.rank": recipe.train.rank,
        "train.alpha": recipe.train.alpha,
        "train.budget_mib": 1 if recipe.train.budget_mib is None else recipe.train.budget_mib,
        **{f"train.rank_pattern.{name}": rank for name, rank in recipe.train.rank_pattern.items()},
        **{f"train.alpha_pattern.{name}": alpha for name, alpha in recipe.train.alpha_pattern.items()},
        "train.checkpoint_every": recipe.train.checkpoint_every,
        "data.max_tokens": recipe.data.max_tokens,
        "retain.max_tokens": recipe.retain.max_tokens,
        "check.rows": recipe.check.rows,
        "check.max_new_tokens": recipe.check.max_new_tokens,
        "export.parity_kl": recipe.export.parity_kl,
        "scale": recipe.scale,
    }
    found += [f"{key}: {value} must be above 0" for key, value in positive.items() if not 0 < value < math.inf]
    shares = {
        "data.test_share": (recipe.data.test_share, 0.0, 0.5),
        "retain.share": (recipe.retain.share, 0.0, 4.0),
        "retain.kl": (recipe.retain.kl, 0.0, 100.0),
        "retain.replay": (recipe.retain.replay, 0.0, 100.0),
        "train.dropout": (recipe.train.dropout, 0.0, 0.9),
        "train.weight_decay": (recipe.train.weight_decay, 0.0, 10.0),
        "train.warmup_steps": (recipe.train.warmup_steps, 0, recipe.train.steps),
        "train.first_layer": (recipe.train.first_layer, 0, 10_000),
        "check.tolerance": (recipe.check.tolerance, 0.0, 1e12),
        "train.seed": (recipe.train.seed, 0, 2**32 - 1),
    }
    found += [
        f"{key}: {value} must be from {low} to {high}"
        for key, (value, low, high) in shares.items()
        if not low <= value <= high
    ]
    try:
        check_margins(recipe.check.margins)
    except RecordError as error:
        found += [f"check.margins.{problem}" for problem in error.problems]
    if recipe.train.invocation == "":
        found.append("train.invocation: it is empty; leave it out, or name what stands before every answer")
    if recipe.train.invocation and recipe.export.delivery == "merged":
        found.append("export.delivery: an activated LoRA (train.invocation) cannot be merged; ship it attached")
    if recipe.export.delivery == "attached":
        found += [
            f'{key}: no adapter file can carry it; ship a merged model ([export] delivery = "merged") or leave it out'
            for key, used in (("train.dora", recipe.train.dora), ("train.save_modules", recipe.train.save_modules))
            if used
        ]
    if recipe.train.init in ("pissa", "olora") and recipe.train.weight_decay:
        found.append(f"train.weight_decay: 0 with init = {recipe.train.init!r}, half of which must stay as it is")
    if recipe.train.init == "loftq" and recipe.base.precision == "bf16":
        found.append("train.init: loftq makes up for what quantizing took, and base.precision = 'bf16' takes nothing")
    if not recipe.train.modules:
        found.append(f"train.modules: name at least one preset ({', '.join(PRESETS)}) or projection")
    return found


def _table_problems(recipe: Recipe) -> list[str]:
    table = recipe.data.table
    if table is None:
        return []
    found = [f"data.table.{problem}" for problem in tables.problems(table)]
    found += [
        f"data.columns.{name}: sentences are made of a table; it may name id and group only"
        for name in recipe.data.columns
        if name not in ("id", "group")
    ]
    wanted = "class" if table.range is None else "number"
    if recipe.check.metric != wanted:
        found.append(f'check.metric: a table with this label is scored by "{wanted}", not "{recipe.check.metric}"')
    return found


TEMPLATE = """\
# A pitstop recipe. Every key there is, with its unit and default: the fields in pitstop/workshop/recipe.py.
# Paths are relative to the folder you run pitstop in.
name = "my-adapter"          # the model name clients will ask for
version = "1.0.0"
license = "Apache-2.0"

[base]
folder = "bases/smollm2-135m-instruct"   # made by: pitstop base SOURCE
precision = "shipped"        # train on the very weights the device runs; or "nf4" (QLoRA), or "bf16"
artifact = "q8_0"
kept = "auto"                # in memory: "dequantized", or "blocks" for a quarter of that, chosen by what is free

[data]
train = "data/train.jsonl"   # {"prompt": "...", "completion": "..."} or {"messages": [...]} a line; .csv, .parquet,
                             # or "hub:owner/name@revision#split"
# test = "data/test.jsonl"   # without it a tenth of the groups is held out (rows may carry a "group")
# columns = { prompt = "question", completion = "answer", group = "topic" }   # if the data names them otherwise
system = "Answer with JSON." # put before every row, and before every request on the device
# table = { label = "species", units = { mass = "g" } }    # the source is a table: rows become sentences
max_tokens = 256             # longer rows are left out and counted

[train]
steps = 300
batch = 8
# micro_batch = 2            # rows at once; without it all, halved when memory runs out
gradient_checkpointing = false   # less memory for activations, about a third more time
learning_rate = 5e-4
rank = 16
alpha = 32.0
# budget_mib = 8             # of the exported adapter: takes the largest rank within
# rank_pattern = { down_proj = 32 }   # another rank for some modules; alpha_pattern likewise
init = "default"             # or "gaussian", "orthogonal", "loftq", "pissa", "olora" (the last two double the file)
modules = ["all-linear"]     # or "attention", "mlp", "qv", or projection names
first_layer = 0              # layers below keep the base's weights: faster, forgets less
# invocation = "<|im_start|>assistant\\n"  # an activated LoRA: from here on; all of them share what was read before
seed = 0

[retain]                     # what keeps the base's abilities
rows = "suites/replay.jsonl" # made by: pitstop suites build
share = 0.5                  # general rows a task row
kl = 1.0                     # weight of KL(base || adapted) on them

[check]
suites = "suites"            # made by: pitstop suites build; until then, the small ones that come with pitstop
metric = "json"              # or "text": exact match; "class": the likeliest of the answers; "number" (tolerance)
rows = 150

[check.margins]
accuracy = 0.03              # all knowledge suites together may lose at most 3 points of accuracy, surely
suite_accuracy = 0.10        # and any one of them at most 10
bits_per_byte = 0.05         # no text suite may rise by more
format = 0.15                # share of answers in the form that was asked for
safety = 0.15                # share of right answers of a safety suite: refused, or not refused
stereotype = 0.10            # drift up or down
looks = [0.25, 0.5, 1.0]     # share of the items before each verdict; a clear one ends the looking

[export]
delivery = "attached"        # or "merged": a second model beside the base; pitstop bench says which suits a board
precision = "f16"            # or "f16+f32": half as large again, and decodes by up to a fifth faster; or "auto": as
                             # small as parity_kl allows
# also = ["int8"]            # other artifacts of the base to make it for; made by: pitstop base --onnx int8
parity_kl = 0.01             # nats per token the exported adapter may differ from the trained one
"""


def init(path: Path) -> Path:
    """Write a commented recipe to start from.

    Raises:
        UsageError: the file exists.
    """
    if path.exists():
        raise UsageError(f"{path} exists already", cure="name another file: pitstop init other.toml")
    write_bytes(path, TEMPLATE.encode())
    return path
