"""Tables as language beside logistic regression, gradient boosting and TabNet: the same rows, 70 % to learn from.

    python tools/bench_tables.py [--quick] [--seeds N] [--sets iris,wine] [--json FILE]

Works in the cache and goes on where it was stopped: hours for five sets and five seeds on two cores, so `make bench`
leaves it out. With the names of the columns shuffled, the same numbers are told under wrong names: what is lost then is
what names gave.
"""

import argparse
import contextlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from measured import Row, header, parser, report, row
from peer_packages import environment
from tables_as_toml import toml

from pitstop.demo import smollm2
from pitstop.engines.base import Use
from pitstop.files import write_bytes
from pitstop.packages import cache_folder
from pitstop.retention import builders
from pitstop.retention.report import RetentionReport
from pitstop.retention.task import TaskResult, measure_task
from pitstop.workshop import base_model
from pitstop.workshop import recipe as recipes
from pitstop.workshop.check import check
from pitstop.workshop.recipe import Recipe
from pitstop.workshop.repair.material import REPLAY_FILE
from pitstop.workshop.task import open_trained, sampling, task_rows
from pitstop.workshop.train import train

PACKAGES = ["scikit-learn==1.9.1", "pytorch-tabnet==4.1.0", "palmerpenguins==0.1.6"]
PEERS = Path(__file__).with_name("table_peers.py")
BASE, RESULTS, SUITES = Path("bases/smollm2"), Path("results.json"), Path("suites")
SEEDS = 5
BATCH = 8
EPOCHS = {"iris": 12, "wine": 8, "breast_cancer": 4, "penguins": 5, "diabetes": 5}
NAMES = {"linear": "linear model", "boosting": "gradient boosting", "tabnet": "TabNet"}


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=SEEDS)
    options.add_argument("--sets", default=",".join(EPOCHS), help="some of them, with commas")
    chosen = options.parse_args()
    target = chosen.json.absolute() if chosen.json else None
    home = cache_folder() / "bench-tables"
    home.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(home):
        run(chosen, target)


def run(chosen: argparse.Namespace, target: Path | None) -> None:
    """Measure in the current folder."""
    seeds, sets = (1, ["iris"]) if chosen.quick else (chosen.seeds, chosen.sets.split(","))
    python = environment("tables", PACKAGES) / "bin" / "python"
    prepare(python)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for seed in range(seeds):
        for name in sets:
            key = f"{name} {seed}"
            if key not in results:
                results[key] = measure(python, name, seed)
                write_bytes(RESULTS, json.dumps(results, indent=1).encode())
    rows = [one for name in sets for one in rows_of(name, [results[f"{name} {seed}"] for seed in range(seeds)])]
    gate = {name: results[f"{name} 0"]["gate"]["outcome"] for name in sets}
    head = header(["torch", "transformers", "peft"], peers=PACKAGES, seeds=seeds, epochs=EPOCHS, gate=gate)
    report(head, rows, target)


def prepare(python: Path) -> None:
    """Make the base, the suites and the sets, once."""
    if not BASE.is_dir():
        base_model.prepare(str(smollm2.fetch_gguf(BASE.parent)), BASE, license=smollm2.LICENSE)
    if not SUITES.is_dir():
        builders.build(SUITES)
    if not Path("sets.json").is_file():
        subprocess.run([python, PEERS, "write", "."], check=True)


def measure(python: Path, name: str, seed: int) -> dict[str, Any]:
    """Let everybody learn one split of a set."""
    about = json.loads(Path("sets.json").read_text())[name]
    folder = Path("splits", f"{name}-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    asked = [python, PEERS, "score", f"{name}.csv", about["label"], str(seed), folder]
    found: dict[str, Any] = json.loads(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout)
    recipe = write_recipe(name, about, folder, seed, shuffled=False)
    span = about["range"][1] - about["range"][0] if about["range"] else 0.0
    found["ours"] = score(learn(recipe), span)
    if seed == 0:
        found["gate"] = judged(check(recipe))
    found["shuffled"] = score(learn(write_recipe(name, about, folder, seed, shuffled=True)), span)
    return found


def write_recipe(name: str, about: dict[str, Any], folder: Path, seed: int, *, shuffled: bool) -> Path:
    """Write the recipe of one training, and with shuffled names the tables too."""
    parts = {part: folder / f"{part}.csv" for part in ("train", "test")}
    if shuffled:
        parts = {part: rename(path, about["label"], seed) for part, path in parts.items()}
    numbers = about["range"] is not None
    rows = len(parts["train"].read_text().splitlines()) - 1
    table = {"label": about["label"], **({"range": about["range"]} if numbers else {})}
    path = folder / ("shuffled.toml" if shuffled else "recipe.toml")
    written = {
        "name": f"{name}-{seed}{'-shuffled' if shuffled else ''}".replace("_", "-"),
        "base": {"folder": str(BASE)},
        "data": {"train": str(parts["train"]), "test": str(parts["test"]), "max_tokens": 256, "table": table},
        "train": {"steps": max(20, rows * EPOCHS[name] // BATCH), "batch": BATCH, "seed": seed, "learning_rate": 5e-4},
        "retain": {"rows": str(SUITES / REPLAY_FILE), "share": 0.5, "kl": 1.0, "max_tokens": 32},
        "check": {
            "metric": "number" if numbers else "class",
            "tolerance": 0.1 * (about["range"][1] - about["range"][0]) if numbers else 0.0,
            "rows": 1000,
            "max_new_tokens": 8,
        },
    }
    path.write_text(toml(written))
    return path


def rename(path: Path, label: str, seed: int) -> Path:
    """Write a table again with the names of its columns shuffled, the label's kept."""
    header_line, *lines = path.read_text().splitlines()
    names = header_line.split(",")
    others = [name for name in names if name != label]
    mixed = iter(random.Random(seed).sample(others, len(others)))
    target = path.with_name(f"shuffled-{path.name}")
    target.write_text("\n".join([",".join(name if name == label else next(mixed) for name in names), *lines]) + "\n")
    return target


def learn(path: Path) -> TaskResult:
    """Train, and answer every row that was held out."""
    recipe: Recipe = recipes.load(path)
    train(path)
    ref = base_model.load_ref(recipe.base.folder)
    with open_trained(recipe, ref) as engine:
        use = Use(recipe.name, recipe.scale)
        return measure_task(engine, task_rows(recipe, ref), use, metric=recipe.check.metric, sampling=sampling(recipe))


def score(result: TaskResult, span: float) -> dict[str, float]:
    """Return what is compared with the peers: the share of right answers, or the mean absolute error.

    Args:
        span: from the least to the greatest number there is; 0 for classes.
    """
    off = [answer.off for answer in result.answers if answer.off is not None]
    if result.metric == "number":
        silent = len(result.answers) - len(off)  # what is no number is as far off as can be
        error = (sum(off) + silent * span) / len(result.answers)
        return {"error": error, "numbers": result.parse_rate}
    return {"right": result.exact, "calibration error": result.calibration_error or 0.0}


def judged(report: RetentionReport) -> dict[str, Any]:
    """Return what the gate said of the first split's adapter."""
    failed = [one.name for one in report.verdict.criteria if one.outcome == "fail"]
    return {"outcome": report.verdict.outcome, "failed": failed}


def rows_of(name: str, found: list[dict[str, Any]]) -> list[Row]:
    """Return the rows of one set."""
    numbers = "error" in found[0]["ours"]
    key, unit = ("error", "mean absolute error") if numbers else ("right", "% right")
    scale = 1.0 if numbers else 100.0
    ours = [scale * one["ours"][key] for one in found]
    peers = {said: [scale * one[peer] for one in found] for peer, said in NAMES.items()}
    peers["names shuffled"] = [scale * one["shuffled"][key] for one in found]
    return [row(f"{name}: ours ÷ {said}", ours, theirs, unit) for said, theirs in peers.items()]


if __name__ == "__main__":
    main()
