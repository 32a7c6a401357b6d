"""Training beside TRL's SFTTrainer: the same rows, rank, modules, batch, NF4 base and number of steps.

    python tools/bench_train.py [--quick] [--threads N] [--json FILE]

Every training is a process of its own, the sides in turn; peak memory is that of the whole process. TRL runs twice:
without gradient checkpointing, where it is fastest, and with it, as it is by default, where it is leanest.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import Row, header, parser, report, row
from training_sides import Job, Outcome

from pitstop import progress
from pitstop.demo import address, smollm2
from pitstop.packages import cache_folder
from pitstop.workshop import base_model

OURS, TRL, TRL_DEFAULT = "pitstop", "TRL", "TRL, checkpointed"
BATCH, LONG_BATCH = 8, 2
LENGTHS = (128, 512, 1024)  # tokens a row
SIDES = Path(__file__).with_name("training_sides.py")


def main() -> None:
    """Measure, and print the table."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    chosen = options.parse_args()
    progress.be_quiet()
    base = cache_folder() / "bench-train" / smollm2.NAME
    base_model.prepare(str(smollm2.fetch_gguf(base.parent)), base, license=smollm2.LICENSE)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), base, chosen.threads, quick=chosen.quick)
        rows = bench.same_rows() + ([] if chosen.quick else bench.growth())
    packages = ["torch", "transformers", "peft", "trl", "bitsandbytes"]
    report(header(packages, threads=chosen.threads, batch=BATCH, batch_of_long_rows=LONG_BATCH), rows, chosen.json)


class Bench:
    """Runs trainings and keeps what they took."""

    def __init__(self, folder: Path, base: Path, threads: int, *, quick: bool) -> None:
        self._folder, self._base, self._threads, self._quick = folder, base, threads, quick
        address.build(folder / "address")
        self._rows = _read(folder / "address" / "train.jsonl")
        self._test = _write(folder / "test.jsonl", _read(folder / "address" / "test.jsonl")[: 20 if quick else 60])

    def same_rows(self) -> list[Row]:
        """Train on rows of natural length: every side sees each row once, so all see the same tokens."""
        steps, seeds = (6, (0,)) if self._quick else (40, (0, 1, 2))
        rows = _write(self._folder / "rows.jsonl", self._rows[: steps * BATCH])
        found: dict[str, list[Outcome]] = {side: [] for side in (OURS, TRL, TRL_DEFAULT)}
        for seed in seeds:
            for side in (OURS, TRL) if self._quick else (OURS, TRL, TRL_DEFAULT):
                found[side].append(self._train(side, rows, steps, BATCH, 256, seed))
        ours, trl, default = found.values()
        noise = statistics.stdev(one.loss for one in trl) if len(trl) > 1 else float("nan")
        by_default = default and [
            row("real tokens a second, TRL as it is by default", _speeds(ours), _speeds(default), "tokens/s"),
            row("peak memory, TRL as it is by default", _peaks(ours), _peaks(default), "MB"),
        ]
        return [
            row("real tokens a second", _speeds(ours), _speeds(trl), "tokens/s", ">= 1.6"),
            row(
                "the same a second of processor time",
                [one.cpu_speed for one in ours],
                [one.cpu_speed for one in trl],
                "tokens/s",
            ),
            row("peak memory", _peaks(ours), _peaks(trl), "MB", "<= 0.7"),
            row(
                f"held-out loss after {ours[0].tokens:,} and {trl[0].tokens:,} tokens; noise of seeds ±{noise:.3f}",
                [one.loss for one in ours],
                [one.loss for one in trl],
                "nats/token",
                "difference <= noise",
            ),
            *by_default,
        ]

    def growth(self) -> list[Row]:
        """Train on rows of one length, and on longer ones."""
        rows, first = [], {}
        for length in LENGTHS:
            steps = 8 if length == LENGTHS[0] else 4
            file = _write(self._folder / f"{length}.jsonl", self._long(length, steps * LONG_BATCH))
            ours, trl = (
                self._train(side, file, steps, LONG_BATCH, 2 * length, seed=0, exact=length) for side in (OURS, TRL)
            )
            first = first or {"ours": ours, "trl": trl}
            grown = f"{length} tokens a row ({ours.speed / first['ours'].speed:.2f} and "
            rows += [
                row(
                    f"speed at {grown}{trl.speed / first['trl'].speed:.2f} of that at {LENGTHS[0]})",
                    [ours.speed],
                    [trl.speed],
                    "tokens/s",
                ),
                row(
                    f"peak memory at {length} tokens a row ({ours.peak / first['ours'].peak:.2f} and "
                    f"{trl.peak / first['trl'].peak:.2f} times that at {LENGTHS[0]})",
                    [ours.peak],
                    [trl.peak],
                    "MB",
                ),
            ]
        return rows

    def _long(self, length: int, count: int) -> list[dict[str, Any]]:
        """Return rows of several addresses, all of nearly that many tokens."""
        tokenizer = base_model.load_tokenizer(self._base)
        source, made = iter(self._rows * 20), []
        while len(made) < count:
            prompt, answer = "", ""
            while len(tokenizer(prompt + answer)["input_ids"]) < length - 70:  # the template's own, and half a row
                one = next(source)
                prompt, answer = f"{prompt}{one['prompt']}\n", f"{answer}{one['completion']}\n"
            made.append({"prompt": prompt, "completion": answer})
        return made

    def _train(
        self, side: str, rows: Path, steps: int, batch: int, max_tokens: int, seed: int, exact: int = 0
    ) -> Outcome:
        test = "" if exact else str(self._test)
        job = Job(side, str(self._base), str(rows), test, steps, batch, max_tokens, seed)
        print(f"{side}, {rows.stem}, seed {seed}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as work:
            done = subprocess.run(
                [sys.executable, str(SIDES), json.dumps(job.__dict__)],
                cwd=work,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        outcome = Outcome(**json.loads(done.stdout.splitlines()[-1]))
        print(f"  {outcome}", file=sys.stderr, flush=True)
        return outcome


def _speeds(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.speed for one in outcomes]


def _peaks(outcomes: Sequence[Outcome]) -> list[float]:
    return [one.peak for one in outcomes]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    kept = ({key: one[key] for key in ("prompt", "completion")} for one in rows)
    file.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
