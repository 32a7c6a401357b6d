"""Try a release in a child process before it may serve: a crash, a hang or a hunger for memory ends the child only.

python -m pitstop.device.health     the child: reads one task as JSON from stdin, writes one outcome to stdout
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pitstop import errors, records
from pitstop.bundle.manifest import Bundle, Prompting
from pitstop.device.engine import open_engine
from pitstop.device.memory import peak_bytes
from pitstop.device.request import Limits
from pitstop.device.store import Release
from pitstop.engines.base import Engine, Logits, Sampling, Use
from pitstop.engines.invocation import with_invocation
from pitstop.engines.opening import engine_for
from pitstop.engines.template import render
from pitstop.errors import BrokenInput, PitstopError

QUESTION = "Turn on the light in the kitchen."  # what each model is asked
TOKENS = 8  # of each answer
CONTEXT_LENGTH = 512  # tokens; what a probe needs, not what serves


@dataclass(frozen=True)
class ModelProbe:
    """One model of a release that answered."""

    name: str
    tokens: int  # of its answer
    change: float  # largest difference of a logit to the base on the same prompt; 0 for the base itself
    seconds: float


@dataclass(frozen=True)
class Probe:
    """A release that may serve."""

    models: tuple[ModelProbe, ...]  # the base first
    peak_memory: int  # bytes the child had in memory, the mapped base file included
    seconds: float  # start of the process included


@dataclass(frozen=True)
class _Model:
    name: str
    prompting: Prompting
    path: Path | None  # None: the base as it is
    scale: float


@dataclass(frozen=True)
class _Task:
    base: Bundle
    path: Path  # of the base
    models: tuple[_Model, ...]
    memory: int | None
    cpu_seconds: int


@dataclass(frozen=True)
class _Failure:
    kind: str  # the class in pitstop.errors
    what: str
    where: str | None
    cure: str | None


@dataclass(frozen=True)
class _Outcome:
    models: tuple[ModelProbe, ...] = ()
    peak_memory: int = 0
    failure: _Failure | None = None


def probe(release: Release, *, timeout: float = 300.0, memory: int | None = None) -> Probe:
    """Load a release in a child process and let its base and every adapter answer a fixed question.

    Args:
        timeout: seconds for all of it; generous, for a busy board is no reason to refuse a release.
        memory: bytes the child may allocate; the base file, which is mapped, is not counted. Not enforced on macOS.

    Raises:
        BrokenInput: it crashed, hung, ran out of memory, computed no numbers, or an adapter changed nothing.
        FormatError, BaseMismatch: a file of it cannot be loaded.
        MissingExtra: the engine is not installed.
    """
    begun = time.monotonic()
    task = records.to_json(_task(release, timeout, memory))
    # -P: a folder named pitstop where this happens to run is not what the child shall import.
    command = [sys.executable, "-P", "-m", "pitstop.device.health"]
    # The release that serves may be at work: threads that wait for each other must sleep, not spin on its cores.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, input=task, env=env, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise _unfit(release, f"did not answer within {timeout:g} s") from error
    if done.returncode != 0:
        raise _unfit(release, _why_it_died(done.returncode, done.stderr, memory))
    outcome = records.from_json(_Outcome, done.stdout, where="the answer of the health check")
    if outcome.failure is not None:
        raise _revive(outcome.failure, release)
    return Probe(outcome.models, outcome.peak_memory, time.monotonic() - begun)


def _task(release: Release, timeout: float, memory: int | None) -> _Task:
    base = release.base
    adapters = [
        _Model(name, bundle.prompting, path, bundle.scale) for name, (bundle, path) in release.adapters().items()
    ]
    return _Task(
        base=base,
        path=release.base_path(),
        models=(_Model(base.name, base.prompting, None, 1.0), *adapters),
        memory=memory,
        # Should this process die, nobody waits for the child: it ends by itself.
        cpu_seconds=math.ceil(timeout) * (os.cpu_count() or 1),
    )


def _why_it_died(code: int, words: bytes, memory: int | None) -> str:
    last = words.decode(errors="replace").strip().splitlines()[-1:]
    said = f" (its last words: {last[0][:300]})" if last else ""
    if code == -signal.SIGKILL:
        return f"was killed, most likely because the device has too little memory{said}"
    limit = f", with {memory / 1e6:,.0f} MB of memory allowed" if memory else ""
    if code < 0:
        return f"crashed the engine: {signal.Signals(-code).name}{limit}{said}"
    return f"ended the engine with exit code {code}{limit}{said}"


def _unfit(release: Release, what: str) -> BrokenInput:
    names = ", ".join(release.bundles)
    return BrokenInput(
        f"the release {release.sha256[:12]} ({names}) {what}",
        cure="the release that served before stays active; tell the publisher, and run `pitstop doctor` here",
    )


def _revive(failure: _Failure, release: Release) -> PitstopError:
    kind = getattr(errors, failure.kind, BrokenInput)
    if kind is errors.MissingExtra:
        return errors.MissingExtra("running this release", engine_for(release.base.artifact))
    if kind is errors.RecordError or issubclass(kind, errors.UsageError):
        kind = BrokenInput  # nobody asked for anything wrong here: it is the release that does not run
    revived: PitstopError = kind(failure.what, where=failure.where, cure=failure.cure)
    return revived


# From here on: the child.


def main() -> None:
    """Run the task on stdin; the outcome goes to stdout, and nothing else does."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code that prints must not garble the answer
    task = records.from_json(_Task, sys.stdin.buffer.read())
    _limit(task)
    try:
        outcome = _Outcome(_try_models(task), peak_bytes())
    except PitstopError as error:
        outcome = _Outcome(failure=_Failure(type(error).__name__, error.what, error.where, error.cure))
    except MemoryError:
        outcome = _Outcome(
            failure=_Failure("BrokenInput", "the release needs more memory than it may have", None, None)
        )
    with answer:
        answer.write(json.dumps(asdict(outcome)).encode())


def _limit(task: _Task) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, task.cpu_seconds)
    if task.memory is not None:
        # Not RLIMIT_AS: that would count the mapped base file, which costs no memory the system could not take back.
        _lower(resource.RLIMIT_DATA, task.memory)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (limit, limit))


def _try_models(task: _Task) -> tuple[ModelProbe, ...]:
    limits = Limits(CONTEXT_LENGTH, sequences=1, own_lanes=0, parked_memory=0)
    with open_engine(task.base, task.path, limits) as engine:  # loading its library counts as well
        return tuple(_try_model(engine, model) for model in task.models)


def _try_model(engine: Engine, model: _Model) -> ModelProbe:
    begun = time.monotonic()
    prompt = engine.tokenize(render(model.prompting, [{"role": "user", "content": QUESTION}]))
    use = Use()
    if model.path is not None:
        engine.load_adapter(model.name, model.path)
        use = Use(model.name, model.scale)
        prompt = list(with_invocation(prompt, engine.invocation(model.name)))
    logits = _finite_logits(engine, prompt, use, model)
    change = 0.0 if model.path is None else _change(engine, prompt, logits, model)
    answer = [piece.token for piece in engine.generate(prompt, use, Sampling(max_tokens=TOKENS))]
    _finite_logits(engine, [*prompt, *answer], use, model)
    if model.path is not None:
        engine.unload_adapter(model.name)  # a board that serves few at a time need not hold them all
    return ModelProbe(model.name, len(answer), change, time.monotonic() - begun)


def _change(engine: Engine, prompt: list[int], adapted: Logits, model: _Model) -> float:
    """Return how far the adapter moves a logit; what the base alone differs from run to run does not count."""
    base = engine.logits(prompt)
    noise = float(np.abs(engine.logits(prompt) - base).max())
    change = float(np.abs(adapted - base).max())
    if change <= 2 * noise:
        raise BrokenInput(
            f"the adapter {model.name} loads but changes nothing", where=model.path, cure="export and publish it again"
        )
    return change


def _finite_logits(engine: Engine, tokens: list[int], use: Use, model: _Model) -> Logits:
    logits = engine.logits(tokens, use)
    if not np.isfinite(logits).all():
        raise BrokenInput(
            f"{model.name} computes values that are no numbers", where=model.path, cure="export and publish it again"
        )
    return logits


if __name__ == "__main__":
    main()
