"""Repair the zoo's narrow, forgetful adapters: how much of what was lost comes back, and what the task pays for it.

    python tools/calibrate_repair.py bases/smollm2-135m-instruct --results FILE    # some minutes each; may be stopped

Works in the folder and on the results of `calibrate_gate.py`, whose runs it repairs and whose report tells what came of
it. A search by torch measures dozens of candidates, so it has some texts here; as few choices would let nothing pass.
"""

import argparse
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calibrate_gate import DATA, RUNS, SUITES, read, save, trained
from tables_as_toml import toml
from zoo import ORDERS, ZOOS, Specimen

from pitstop.progress import say
from pitstop.retention import suite as suites
from pitstop.retention.looks import part
from pitstop.retention.suite import Suite
from pitstop.workshop.repair.repair import chosen_methods, repair
from pitstop.workshop.repair.result import Repair
from pitstop.workshop.repair.shapes import Method

SMALL = Path("repair-suites")
ITEMS = {"code": 48, "prose": 48, "foldoc": 48}  # of each suite; a third of them guide the search
ROWS = 32  # of the task, half of which guide the search


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("base", type=Path, help="a prepared base")
    options.add_argument("--results", type=Path, required=True, metavar="FILE")
    options.add_argument("--zoo", choices=ZOOS, default="smollm2-135m")
    options.add_argument("--only", default="", metavar="PATTERN", help="names, as a regular expression")
    options.add_argument("--methods", help="with commas; all by default")
    given = options.parse_args()
    build_suites()
    results = read(given)
    repairs = results.setdefault("repairs", {})
    for specimen in ZOOS[given.zoo]():
        wanted = (specimen.kind, specimen.data, specimen.parent) == ("forgetful", ORDERS, "")
        if wanted and re.search(given.only, specimen.name) and specimen.name not in repairs:
            say(f"{specimen.name}: repair")
            repairs[specimen.name] = summary(repaired(specimen, given.base, chosen_methods(given.methods)))
            save(results, given.results)


def build_suites() -> None:
    """Write the first items of some suites, in the order of the gate's looks, unless they are there."""
    for name, count in ITEMS.items():
        if not (SMALL / name).is_dir():
            suite = suites.load(SUITES / name)
            items = part(suite.items, (1.0,), 1, group=lambda item: item.group)
            record, some = suite.record, tuple(items[:count])
            record = replace(record, items_sha256=suites.digest_of(some), count=len(some))
            suites.save(Suite(record, some), SMALL / name)
    shutil.copy(SUITES / "replay.jsonl", SMALL)


def repaired(specimen: Specimen, base: Path, methods: tuple[Method, ...]) -> Repair:
    """Repair one adapter on the rows it was made for that were held out."""
    trained(specimen, base)
    tables = specimen.recipe(base)
    tables["data"] |= {"test": str(DATA / specimen.data / "test.jsonl")}
    tables["check"] = {"suites": str(SMALL), "metric": "text", "rows": ROWS, "max_new_tokens": 40}
    recipe = RUNS / f"{specimen.name}.repair.toml"
    recipe.write_text(toml(tables))
    return repair(recipe, methods=methods)


def summary(found: Repair) -> dict[str, Any]:
    """Return what the report tells of one repair: shares of what was lost and gained, by its own items."""
    summed: dict[str, Any] = {
        "outcome": found.outcome,
        "reasons": found.reasons,
        "seconds": round(found.seconds, 1),
        "beside_uniform": [
            {"method": one.method, "kept": one.likelihood_kept, **asdict(one.against_uniform)}
            for one in found.candidates
            if one.against_uniform is not None
        ],
    }
    if found.chosen is not None:
        source = found.candidates[0]
        taken = next(
            one
            for one in found.candidates
            if (one.method, one.words, one.scale) == (found.chosen.method, found.chosen.words, found.chosen.scale)
        )
        summed |= {
            "method": taken.method,
            "scale": taken.scale,
            "lost": source.damage,
            "won_back": 1.0 - taken.damage / source.damage,
            "given_up": 1.0 - found.chosen.exact_kept,
            "likelihood_given_up": 1.0 - taken.likelihood_kept,
        }
    return summed


if __name__ == "__main__":
    main()
