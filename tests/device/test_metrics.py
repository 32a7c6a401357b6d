"""Counts in the form Prometheus reads."""

import re
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from pitstop.device.metrics import BUCKETS, Metrics

LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')
LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Read the text form; every line must be a comment or a sample of a name whose type was said."""
    assert text.endswith("\n")
    typed = set()
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
        if line.startswith("# "):
            continue
        found = LINE.fullmatch(line)
        assert found, line
        name, labels, value = found.groups()
        assert re.sub(r"_(bucket|sum|count)$", "", name) in typed
        yield name, dict(LABEL.findall(labels or "")), float(value)


def test_what_was_counted_is_said() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.count("requests", adapter="home", outcome="stop")
    metrics.count("swap_seconds", 0.25, adapter="home")
    said = list(samples(metrics.render(1, 2, {"home": 1000})))
    assert ("pitstop_requests_total", {"adapter": "home", "outcome": "stop"}, 2) in said
    assert ("pitstop_swap_seconds_total", {"adapter": "home"}, 0.25) in said
    assert ("pitstop_requests_live", {}, 1) in said
    assert ("pitstop_requests_waiting", {}, 2) in said
    assert ("pitstop_resident_adapter_bytes", {"adapter": "home"}, 1000) in said


@given(st.lists(st.floats(0, 100)))
def test_the_histogram_is_cumulative(times: list[float]) -> None:
    metrics = Metrics()
    for seconds in times:
        metrics.first_token("home", seconds)
    said = [sample for sample in samples(metrics.render(0, 0, {})) if "first_token" in sample[0]]
    buckets = {labels["le"]: value for name, labels, value in said if name.endswith("_bucket")}
    expected = {str(limit): sum(seconds <= limit for seconds in times) for limit in BUCKETS} | {"+Inf": len(times)}
    assert buckets == (expected if times else {})


@given(st.text())
def test_any_name_is_escaped(name: str) -> None:
    metrics = Metrics()
    metrics.count("swaps", adapter=name)
    ((_, labels, value),) = [one for one in samples(metrics.render(0, 0, {})) if one[0] == "pitstop_swaps_total"]
    assert value == 1
    assert labels["adapter"].count("\n") == 0
