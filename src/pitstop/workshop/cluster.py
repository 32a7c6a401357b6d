"""Recipes on a Ray cluster: one task per adapter, results as they come, and another node when one fails.

A task that loses its node is given to another one and goes on from the adapter's newest checkpoint, for a run folder is
all that a stage leaves. So every node must see this folder at the same path: a shared disk, or one machine.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pitstop.errors import MissingExtra, UsageError
from pitstop.progress import say
from pitstop.workshop.build import Built, build_one
from pitstop.workshop.runs import exclusive

try:
    import ray
    from ray.exceptions import RayError
except ImportError as missing:
    raise MissingExtra("building on a cluster", "ray") from missing

HERE = "ray"  # as an address: a cluster of this machine, for this build
RETRIES = 5  # of a task whose node is lost
CONNECT = 10.0  # seconds to reach a cluster
MARK = Path("runs", ".build")  # what a node must see to be in the same folder


def spread(paths: Sequence[Path], address: str, *, cpus: float, gpus: float, repairing: bool) -> Iterator[Built]:
    """Build recipes on a cluster, and yield each as it ends.

    Raises:
        UsageError: no cluster there, one that has no node for such a task, or nodes that do not see this folder.
    """
    _connect(address)
    try:
        _refuse_too_small(cpus, gpus)
        with exclusive(MARK):
            mark = f"{os.getpid()} {time.time_ns()}"
            (MARK / "mark").write_text(mark)
            task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_on_a_node)
            waiting = {task.remote(str(path), str(Path.cwd()), mark, repairing): path for path in paths}
            while waiting:
                ready, _ = ray.wait(list(waiting))
                for one in ready:
                    yield _result(one, waiting.pop(one))
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    settings |= {"include_dashboard": False} if address == HERE else {"address": address}
    try:
        if address != HERE:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT).close()  # Ray itself tries for minutes
        ray.init(**settings)
    except (RayError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster at {address}: {str(error).splitlines()[0]}",
            cure="start one (ray start --head), or build on this machine: --on ray",
        ) from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    say(f"cluster: {len(nodes)} nodes, {total.get('CPU', 0):g} cores, {total.get('GPU', 0):g} GPUs")


def _refuse_too_small(cpus: float, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UsageError(
            f"no node of the cluster has {cpus:g} cores and {gpus:g} GPUs", cure="ask for less: --cpus N --gpus N"
        )


def _on_a_node(path: str, folder: str, mark: str, repairing: bool) -> Built:
    """Build one recipe in a worker; Ray has set its threads and GPUs."""
    try:
        os.chdir(folder)
        seen = (MARK / "mark").read_text()
    except OSError:
        seen = ""
    if seen != mark:
        raise UsageError(f"{os.uname().nodename} does not see {folder}", cure="put it on a disk that all nodes share")
    return build_one(Path(path), repairing=repairing)


def _result(reference: Any, path: Path) -> Built:
    try:
        built: Built = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UsageError):
            raise UsageError(error.cause.what, cure=error.cause.cure) from error
        raise
    except RayError as error:
        raise UsageError(
            f"{path} was lost {RETRIES + 1} times: {str(error).splitlines()[0]}",
            cure="look at the nodes (ray status), then run the same command again: what is complete is kept",
        ) from error
    return built
