"""Many recipes to bundles: here or on a cluster, and whatever happens to one of them, the others are built."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pitstop.errors import RecordError, UsageError
from pitstop.retention import suite as suites
from pitstop.retention.suite import TextItem
from pitstop.workshop.adapter import load_identity
from pitstop.workshop.build import Built, build
from pitstop.workshop.recipe import load
from workbench import TEXTS, Project

Write = Callable[..., Path]


@pytest.fixture
def write(project: Project) -> Write:
    """Write recipes whose task is learned in seconds: to say yes."""
    rows = [
        {"prompt": f"{place} {at}", "completion": "yes", "group": f"{at}"} for at in range(60) for place in ("hall",)
    ]
    project.rows("yes.jsonl", rows)
    items = [TextItem(f"{at}", f"{at}", f"Number {at}: {TEXTS[at % len(TEXTS)]}") for at in range(60)]
    mine = suites.make("mine", "text", items, license="CC0-1.0", source="made here", description="for a test")
    suites.save(mine, Path("suites", "mine"))

    def write(name: str, *, allowed: float = 9.0, **tables: Any) -> Path:
        check = {"rows": 20, "max_new_tokens": 4, "metric": "text", "margins": {"bits_per_byte": allowed}}
        train = {"steps": 40, "learning_rate": 1e-2, "checkpoint_every": 5, **tables.pop("train", {})}
        settings = {"check": check, "train": train, "export": {"parity_kl": 5.0}, "data": {"train": "yes.jsonl"}}
        return project.recipe(f"{name}.toml", name=name, **{**settings, **tables})

    return write


def test_problems_of_all_recipes_are_told_before_anything_is_done(project: Project) -> None:
    first, second = project.recipe("one.toml"), project.recipe("two.toml")
    with pytest.raises(RecordError, match="both write to runs/lights"):
        build([first, second])
    bad = project.recipe("bad.toml", name="BAD", train={"steps": 0})
    with pytest.raises(RecordError) as told:
        build([bad])
    assert len(told.value.problems) == 2
    with pytest.raises(UsageError, match="no recipe"):
        build([Path("missing.toml")])
    assert not Path("runs").exists()


def test_one_that_is_refused_or_broken_does_not_stop_the_others(project: Project, write: Write) -> None:
    project.rows("broken.jsonl", [{"prompt": "no completion"}])
    recipes = [
        write("forgets", allowed=1e-6),
        write("broken", data={"train": "broken.jsonl"}),
        write("good"),
    ]
    told: list[Built] = []
    forgets, broken, good = build(recipes, repairing=False, done=told.append)
    assert told == [forgets, broken, good]
    assert (forgets.outcome, forgets.stage) == ("refused", "pack")
    assert "verdict" in forgets.said
    assert (broken.outcome, broken.stage) == ("broken", "train")
    assert "completion" in broken.said
    assert (good.outcome, good.exact, good.said) == ("packed", 1.0, "")
    assert good.bundle is not None
    assert json.loads((good.bundle / "bundle.json").read_text())["name"] == "good"
    before = load_identity(load(recipes[2])).seconds
    (again,) = build([recipes[2]])
    assert again.outcome == "packed"
    assert load_identity(load(recipes[2])).seconds == before, "what is complete is not done again"


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A real Ray cluster of two nodes with a core each, on this machine."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_an_adapter_whose_node_is_lost_goes_on_elsewhere_from_its_checkpoint(cluster: Any, write: Write) -> None:
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    logs = Path(cluster.head_node.get_logs_dir_path())
    recipes = [write(name, train={"steps": 300}) for name in ("one", "two")]
    lost: list[str] = []

    def lose_a_node() -> None:
        marks = [Path("runs", name, "checkpoints").resolve() for name in ("one", "two")]
        while not all(list(mark.glob("checkpoint-*/trainer_state.json")) for mark in marks):
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)
        lost.append("second")

    threading.Thread(target=lose_a_node, daemon=True).start()
    results = build(recipes, on=cluster.address)
    assert lost
    assert [built.outcome for built in results] == ["packed", "packed"]
    said = "".join(log.read_text(errors="replace") for log in logs.glob("worker-*.err"))
    assert "goes on from step" in said


@pytest.mark.slow
def test_a_cluster_that_cannot_do_it_says_so(cluster: Any, write: Write) -> None:
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    with pytest.raises(UsageError, match="no node of the cluster has 3 cores"):
        build([write("one")], on=cluster.address, cpus=3)


def test_no_cluster_there(write: Write) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    with pytest.raises(UsageError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        build([write("one")], on="127.0.0.1:1")
