"""What a smaller scale would forget and unlearn."""

import itertools

import numpy as np
import pytest

from forgetting import BigramEngine, chats, choices, inverted, noise, probe
from pitstop.bundle.manifest import Prompting
from pitstop.engines.base import Use
from pitstop.retention.drift import SCALES, drift, scale_curve
from pitstop.retention.suite import Suite
from pitstop.retention.task import TaskRow

PROMPTING = Prompting("{% for m in messages %}{{ m.content }}{% endfor %}:", "", "")
SUITES: list[Suite] = [choices(), probe(), chats()]


def test_it_begins_at_the_base_exactly_and_ends_at_the_adapter() -> None:
    engine = BigramEngine()
    use = engine.add("home", noise(0.5))
    curve = scale_curve(engine, SUITES, use, PROMPTING)
    assert tuple(point.scale for point in curve) == SCALES
    assert curve[0].kl == 0.0
    assert [point.kl for point in curve] == sorted(point.kl for point in curve)
    documents = [document.kl for found in drift(engine, SUITES, use, PROMPTING) for document in found.documents]
    assert curve[-1].kl == pytest.approx(np.mean(documents)), "both probes are shorter than a part"
    assert curve[0].task is None


def test_it_is_along_the_way_to_the_scale_that_is_used() -> None:
    engine = BigramEngine()
    engine.add("home", noise(0.5))
    half = scale_curve(engine, SUITES, Use("home", 0.5), PROMPTING)
    assert half[-1].kl == pytest.approx(scale_curve(engine, SUITES, Use("home"), PROMPTING)[2].kl)


def test_it_shows_what_is_unlearned() -> None:
    engine = BigramEngine()
    rows = [TaskRow(str(at), str(at), "the c", "at sat") for at in range(3)]
    losses = [point.task for point in scale_curve(engine, SUITES, engine.add("bad", inverted(engine)), PROMPTING, rows)]
    assert losses == sorted(losses, key=lambda loss: loss or 0.0), "this one makes the likely unlikely"
    tokens = [*b"the c", *b"at sat"]
    scores = engine.table - np.log(np.exp(engine.table).sum(axis=1, keepdims=True))
    expected = -np.mean([scores[before, after] for before, after in itertools.pairwise(tokens[4:])])
    assert losses[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_null_adapter_changes_nothing_anywhere() -> None:
    engine = BigramEngine()
    curve = scale_curve(engine, SUITES, engine.add("null", noise(0.0)), PROMPTING)
    assert [point.kl for point in curve] == [0.0] * len(SCALES)
