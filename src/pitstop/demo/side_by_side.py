"""Several recipes through the workshop at once, one process each, and one picture of how far they are."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pitstop.errors import PitstopError

Stages = dict[str, dict[str, Any]]
GRACE = 60.0  # seconds a stopped training has to write its checkpoint
LINE_EVERY = 15.0  # seconds between plain lines where there is no terminal


def run_chains(recipes: Sequence[Path], console: Console) -> dict[str, Stages]:
    """Run the chain of every recipe and return the results of its stages, by recipe and stage.

    Raises:
        PitstopError: a chain failed, in its own words; the others are stopped, and go on from there next time.
    """
    places = places_here()
    running: list[subprocess.Popen[str]] = []
    with _picture(console) as picture, ThreadPoolExecutor(places) as pool:
        work = {recipe.stem: pool.submit(_run, recipe, places, picture, running) for recipe in recipes}
        try:
            wait(work.values(), return_when=FIRST_EXCEPTION)
            return {name: future.result() for name, future in work.items() if _settled(future)}
        except BaseException:
            _stop(list(work.values()), running)
            raise


def places_here() -> int:
    """Return how many chains run at once: one on a GPU, else one for each of two cores or more."""
    gpu = Path("/dev/nvidia0").exists()
    return 1 if gpu else max(1, min(2, len(os.sched_getaffinity(0))))


def _settled(future: Future[Stages]) -> bool:
    return future.done() and not future.cancelled()


def _run(recipe: Path, places: int, picture: "_Picture", running: list[subprocess.Popen[str]]) -> Stages:
    threads = str(max(1, len(os.sched_getaffinity(0)) // places))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PITSTOP_PROGRESS": "events"}
    log = Path(f"{recipe.stem}.log")
    command = [sys.executable, "-m", "pitstop.demo.chain", str(recipe)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stages: Stages = {}
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=environment, **pipes) as child:  # type: ignore[call-overload]
        running.append(child)
        reader = threading.Thread(target=_follow, args=(recipe.stem, child.stderr, picture, file), daemon=True)
        reader.start()
        for line in child.stdout:
            event = json.loads(line)
            stages[event["stage"]] = event["result"]
            picture.finished(recipe.stem, event["stage"])
        reader.join()
    if child.returncode != 0:
        raise _failed(recipe, child.returncode, stages, log)
    return stages


def _failed(recipe: Path, code: int, stages: Stages, log: Path) -> BaseException:
    if code in (130, -signal.SIGINT):
        return KeyboardInterrupt()
    words = stages.get("error", {}).get("message") or f"it ended with {code}; the last lines of {log} say why"
    return PitstopError(f"{recipe.stem}: {words}", where=log.absolute(), cure="mend it and run the demo again")


def _follow(name: str, lines: Iterator[str], picture: "_Picture", log: Any) -> None:
    """Show a child's progress events; whatever else it says goes to its log."""
    for line in lines:
        try:
            event = json.loads(line)
            picture.advance(name, event)
        except (ValueError, KeyError, TypeError):
            log.write(line)
            log.flush()


def _stop(work: Sequence[Future[Stages]], running: Sequence[subprocess.Popen[str]]) -> None:
    """End every chain as Ctrl-C would: a training first writes a checkpoint."""
    for future in work:
        future.cancel()
    for child in running:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
    for child in running:
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()


@dataclass
class _Work:
    begun: float  # seconds of the clock
    first: float  # units done then
    last: float = 0.0  # units done when it was last heard of


class _Picture:
    """One line for each chain: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console, self._bars = console, bars
        self._tasks: dict[str, tuple[str, TaskID]] = {}
        self._shown: dict[str, float] = {}  # chain -> when its last plain line was
        self._begun: dict[str, _Work] = {}
        self._lock = threading.Lock()

    def advance(self, name: str, event: dict[str, Any]) -> None:
        """Show where a chain is."""
        what, done, total = event["progress"], event["done"], event["total"]
        with self._lock:
            if self._bars is None:
                self._line(name, event)
                return
            known = self._tasks.get(name)
            if known is None or known[0] != what:
                if known is not None:
                    self._bars.remove_task(known[1])
                self._tasks[name] = (what, self._bars.add_task(what, total=total, unit=event["unit"], note="", rate=""))
            task = self._tasks[name][1]
            speed = self._bars.tasks[self._bars.task_ids.index(task)].speed
            rate = f"{speed:,.0f} {event['unit']}/s" if speed else ""
            self._bars.update(task, completed=done, note=event["note"], rate=rate)

    def finished(self, name: str, stage: str) -> None:
        """Say that a stage of a chain is complete."""
        with self._lock:
            if stage != "error":
                self._console.print(f"  {name}: {stage} done", highlight=False)

    def _line(self, name: str, event: dict[str, Any]) -> None:
        what, done, total, unit = event["progress"], event["done"], event["total"], event["unit"]
        now = monotonic()
        work = self._begun.get(what)
        if work is None or done < work.last:  # it comes again: its rate counts from its own beginning
            work = self._begun[what] = _Work(now, done)
        work.last = done
        if done < total and now - self._shown.get(name, 0.0) < LINE_EVERY:
            return
        self._shown[name] = now
        rate = (done - work.first) / (now - work.begun) if now > work.begun else 0.0
        left = f", {rate:,.1f} {unit}/s, {(total - done) / rate:,.0f} s left" if rate else ""
        text = f"  {what}: {done:,.0f}/{total:,.0f} {unit}{left}  {event['note']}"
        self._console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _picture(console: Console) -> Iterator[_Picture]:
    if not console.is_terminal:
        yield _Picture(console, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Picture(console, bars)
