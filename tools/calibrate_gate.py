"""Measure the zoo and judge the gate by it: how often it is wrong, how often undecided, and what it costs.

    python tools/calibrate_gate.py measure bases/smollm2-135m-instruct --results FILE --whole   # hours; may be stopped
    python tools/calibrate_gate.py displace bases/smollm2-135m-instruct --results FILE          # F_delta, by torch
    python tools/calibrate_gate.py report FILE... --to src/pitstop/retention/CALIBRATION.md

Works in the current folder: bases/ (prepared with `pitstop base`), suites/, data/ and runs/ are made here; each zoo
wants a folder of its own. `pretrain_tiny.py` makes the base of `--zoo tiny-gemma3`. The results
hold every item's outcome, so that a changed gate is judged again without measuring. With --whole every item is
measured: what error rates are told from. Without it, look by look until the verdict is clear, as `pitstop check` does:
that tells whether verdicts on other engines and artifacts agree, and what one costs.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibration_report import LOOKS, MARGINS, judged, report
from tables_as_toml import toml
from zoo import ZOOS, Specimen, build_data

from pitstop.bundle.manifest import BaseRef
from pitstop.engines.base import Engine, Use
from pitstop.engines.llama import LlamaEngine
from pitstop.engines.torch import TorchEngine
from pitstop.files import write_bytes
from pitstop.progress import say
from pitstop.retention import builders
from pitstop.retention.drift import drift
from pitstop.retention.looks import look_at, part
from pitstop.retention.measure import SuiteResult, join, measure
from pitstop.retention.sampling import order
from pitstop.retention.suite import Suite, TextItem, load_all
from pitstop.workshop import base_model
from pitstop.workshop.check import DISPLACED
from pitstop.workshop.displacement import displacement
from pitstop.workshop.export.gguf import export_gguf
from pitstop.workshop.task import CONTEXT
from pitstop.workshop.train import train

# Items of a suite at most, by its kind: what some hours can measure of the whole zoo.
ITEMS = {"choice": 120, "cloze": 80, "text": 24, "answer": 40, "chat": 12}
ANSWERS = 32  # on their way side by side
SUITES, DATA, RUNS = Path("suites"), Path("data"), Path("runs")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="train and measure what is not measured yet")
    measuring.add_argument("--engine", choices=("llama", "torch"), default="llama")
    measuring.add_argument("--whole", action="store_true", help="every item, whatever the verdict")
    measuring.add_argument("--train-only", action="store_true")
    measuring.add_argument("--threads", type=int)
    displacing = commands.add_parser("displace", help="train what is not trained yet, and measure F_delta")
    for command in (measuring, displacing):
        command.add_argument("base", type=Path, help="a prepared base")
        command.add_argument("--results", type=Path, required=True, metavar="FILE")
        command.add_argument("--zoo", choices=ZOOS, default="smollm2-135m")
        command.add_argument("--artifact", default="q8_0", help="of the base")
        command.add_argument("--only", default="", metavar="PATTERN", help="names, as a regular expression")
    reporting = commands.add_parser("report", help="judge the gate by what was measured")
    reporting.add_argument("results", type=Path, nargs="+")
    reporting.add_argument("--to", type=Path, required=True, metavar="FILE")
    given = options.parse_args()
    if given.command == "report":
        given.to.write_text(report(given.results), encoding="utf-8")
        return
    chosen = [specimen for specimen in ZOOS[given.zoo]() if re.search(given.only, specimen.name)]
    if not SUITES.is_dir():
        builders.build(SUITES)
    build_data(DATA, SUITES)
    if given.command == "displace":
        displace_zoo(chosen, given)
    elif given.train_only:
        for specimen in chosen:
            trained(specimen, given.base)
    else:
        measure_zoo(chosen, given)


def trained(specimen: Specimen, base: Path) -> Path:
    """Return the PEFT folder of a specimen's weights; what is trained already is kept."""
    recipe = RUNS / f"{specimen.trained}.toml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(toml(specimen.recipe(base)))
    return train(recipe)


def measure_zoo(specimens: Sequence[Specimen], given: argparse.Namespace) -> None:
    """Measure every specimen that the results do not hold yet, and write them after each."""
    ref = base_model.load_ref(given.base)
    whole = load_all(SUITES)
    suites = [shuffled(suite) for suite in whole]
    described = describe(suites, whole)
    results = read(given)
    if results.setdefault("suites", described) != described:
        sys.exit(f"{given.results} holds results of other suites; name another file")
    label = f"{given.engine} {given.artifact}" + ("" if given.whole else ", by looks")
    measured = results.setdefault("measured", {}).setdefault(label, {})
    # Not kind after kind: a run that is stopped has some of every kind.
    missing = sorted((one for one in specimens if one.name not in measured), key=lambda one: order(one.name))
    with opened(given, ref) as engine:
        if "base" not in measured:
            begun = time.process_time()
            measured["base"] = scored(measure(engine, suites, prompting=ref.prompting))
            measured["base"]["seconds"] = round(time.process_time() - begun, 1)
            save(results, given.results)
        for number, specimen in enumerate(missing, 1):
            say(f"{specimen.name}: {number} of {len(missing)}")
            weights = loadable(given, trained(specimen, given.base), ref)
            engine.load_adapter(specimen.trained, weights)
            if given.whole:
                measured[specimen.name] = observe(engine, suites, specimen, ref)
            else:
                measured[specimen.name] = look(engine, suites, specimen, ref, described, measured["base"])
            engine.unload_adapter(specimen.trained)
            save(results, given.results)


def observe(engine: Engine, suites: Sequence[Suite], specimen: Specimen, ref: BaseRef) -> dict[str, Any]:
    """Measure one specimen on every item."""
    use = Use(specimen.trained, specimen.scale)
    begun = time.process_time()
    results = measure(engine, suites, use, prompting=ref.prompting)
    seconds = time.process_time() - begun
    moved = drift(engine, suites, use, ref.prompting)
    return {
        "kind": specimen.kind,
        **scored(results),
        "kl": {probe.suite: round(probe.mean, 6) for probe in moved},
        "seconds": round(seconds, 1),
    }


def displace_zoo(specimens: Sequence[Specimen], given: argparse.Namespace) -> None:
    """Measure F_delta of every specimen on the texts that `pitstop check` takes, and write the results after each."""
    results = read(given)
    moved = results.setdefault("displacement", {})
    texts = [item.text for suite in load_all(SUITES) if suite.record.purpose == "drift" for item in suite.of(TextItem)]
    by_weights: dict[str, list[Specimen]] = {}
    for specimen in specimens:
        if specimen.name not in moved:
            by_weights.setdefault(specimen.trained, []).append(specimen)
    with opened_torch(given, base_model.load_ref(given.base)) as engine:
        rows = [engine.tokenize(text)[:CONTEXT] for text in texts[:DISPLACED]]
        for number, (name, same) in enumerate(by_weights.items(), 1):
            say(f"{name}: {number} of {len(by_weights)}")
            engine.load_adapter(name, trained(same[0], given.base))
            moves = displacement(engine, name, rows)
            moved |= {specimen.name: round(specimen.scale * moves, 6) for specimen in same}
            engine.unload_adapter(name)
            save(results, given.results)


def look(
    engine: Engine,
    suites: Sequence[Suite],
    specimen: Specimen,
    ref: BaseRef,
    described: dict[str, Any],
    base: dict[str, Any],
) -> dict[str, Any]:
    """Measure one specimen look by look until its verdict is clear, as `pitstop check` does."""
    use = Use(specimen.trained, specimen.scale)
    found: tuple[SuiteResult, ...] = ()
    begun = time.process_time()
    for number in range(1, LOOKS + 1):
        parts = [seen for suite in suites if (seen := look_at(suite, MARGINS.looks, number)).items]
        found = join(found, measure(engine, parts, use, prompting=ref.prompting))
        entry = {"kind": specimen.kind, "looks": number, **scored(found)}
        if judged(described, base, entry, number).outcome != "inconclusive":
            break
    return entry | {"seconds": round(time.process_time() - begun, 1)}


def shuffled(suite: Suite) -> Suite:
    """Return a part of the suite, in the order that the gate's looks see it in."""
    items = part(suite.items, (1.0,), 1, group=lambda item: item.group)
    return Suite(suite.record, tuple(items[: ITEMS[suite.record.kind]]))


def describe(suites: Sequence[Suite], whole: Sequence[Suite]) -> dict[str, Any]:
    """Return what a verdict needs to know of suites besides the outcomes, and how many items they really have."""
    found = {}
    for suite, full in zip(suites, whole, strict=True):
        groups = [item.group for item in suite.items]
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        record = suite.record
        found[suite.name] = {
            "digest": suite.digest,
            "kind": record.kind,
            "purpose": record.purpose,
            "guards": record.guards,
            "chance": record.chance,
            "items": len(suite.items),
            "whole": len(full.items),
            "groups": [numbers[group] for group in groups] if len(numbers) < len(groups) else None,
        }
    return found


def scored(results: Sequence[SuiteResult]) -> dict[str, Any]:
    """Return the outcomes: of choices a bit per item, of texts nats and bytes."""
    found: dict[str, Any] = {"right": {}, "texts": {}}
    for result in results:
        if result.choices:
            bits = "".join("1" if choice.correct else "0" for choice in result.choices)
            found["right"][result.suite] = f"{int('1' + bits, 2):x}"  # the leading 1 keeps the zeros after it
        else:
            found["texts"][result.suite] = [[round(text.nats, 3), text.bytes] for text in result.texts]
    return found


@contextmanager
def opened(given: argparse.Namespace, ref: BaseRef) -> Iterator[Engine]:
    if given.engine == "torch":
        with opened_torch(given, ref) as torch_engine:
            yield torch_engine
        return
    path = base_model.artifact_path(given.base, ref, given.artifact)
    sha256, length = ref.artifact(given.artifact).sha256, min(ref.context_length, CONTEXT)
    options = {"sequences": ANSWERS, "threads": given.threads, "own_products": True}
    with LlamaEngine(path, base_sha256=sha256, context_length=length, **options) as engine:
        yield engine


def opened_torch(given: argparse.Namespace, ref: BaseRef) -> TorchEngine:
    model = base_model.load_weights(given.base, ref, precision="shipped", artifact=given.artifact)
    sha256, length = ref.artifact(given.artifact).sha256, min(ref.context_length, CONTEXT)
    return TorchEngine(model, base_model.load_tokenizer(given.base), base_sha256=sha256, context_length=length)


def loadable(given: argparse.Namespace, weights: Path, ref: BaseRef) -> Path:
    """Return the adapter as the engine loads it, bound to the base it is measured on."""
    if given.engine == "torch":
        return weights
    target = weights.parent / f"{given.artifact}.gguf"
    if not target.is_file():
        export_gguf(weights, given.base / "hf", ref.artifact(given.artifact).sha256, target, precision="f16")
    return target


def read(given: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results.is_file() else {}
    if results.setdefault("zoo", given.zoo) != given.zoo:
        sys.exit(f"{given.results} holds results of the zoo {results['zoo']}; name another file")
    return results


def save(results: dict[str, Any], file: Path) -> None:
    write_bytes(file, json.dumps(results, separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    main()
