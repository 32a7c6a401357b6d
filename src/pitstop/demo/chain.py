"""One recipe through all of the workshop, in a process of its own: train, check, export, parity, pack.

The demo runs several of these side by side, one core each: two trainings with one thread each are faster than one after
another with two. Prints one JSON line per finished stage on standard output; progress goes to standard error.
"""

import json
import sys
from pathlib import Path

from pitstop import records
from pitstop.errors import PitstopError
from pitstop.retention.report import RetentionReport
from pitstop.workshop import recipe as recipes
from pitstop.workshop.adapter import load_identity
from pitstop.workshop.check import check
from pitstop.workshop.export.export import export
from pitstop.workshop.pack import pack
from pitstop.workshop.parity import parity
from pitstop.workshop.train import train


def run(recipe: Path) -> None:
    """Take a recipe as far as its verdict allows.

    Raises:
        PitstopError: a stage failed or refused.
    """
    train(recipe)
    _tell("train", records.to_mapping(load_identity(recipes.load(recipe))))
    report = check(recipe)
    _tell("check", _figures(report))
    if report.verdict.outcome != "pass":
        return  # the gate refused it: nothing of it is shipped
    _tell("export", {"megabytes": round(export(recipe).artifact.size / 1e6, 2)})
    _tell("parity", records.to_mapping(parity(recipe)))
    _tell("pack", {"bundle": str(pack(recipe))})


def _figures(report: RetentionReport) -> dict[str, object]:
    drift = {f"{probe.suite.replace('-', '_')}_nats_per_token": round(probe.mean, 4) for probe in report.drift}
    task = report.task
    scores = {"exact": round(task.adapted.exact, 4), "base_exact": round(task.baseline.exact, 4)} if task else {}
    return {"outcome": report.verdict.outcome, "reasons": report.verdict.reasons, **scores, **drift}


def _tell(stage: str, result: object) -> None:
    print(json.dumps({"stage": stage, "result": result}), flush=True)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except PitstopError as error:
        print(json.dumps({"stage": "error", "result": {"message": str(error)}}), flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
