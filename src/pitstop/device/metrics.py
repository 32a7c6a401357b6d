"""Counts of what a runtime did, in the text form that Prometheus reads. No dependency, no clock of its own."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# What is counted, and what it means. "adapter" is an adapter's name, several joined by "+", or the base's name.
_COUNTERS = {
    "pitstop_requests_total": "Requests by how they ended: stop, length, cancelled, error or queue_full.",
    "pitstop_prompt_tokens_total": "Tokens of prompts.",
    "pitstop_reused_tokens_total": "Tokens of prompts that were found in a session and not evaluated again.",
    "pitstop_completion_tokens_total": "Tokens of answers.",
    "pitstop_swaps_total": "Turns under other adapters than the turn before.",
    "pitstop_swap_seconds_total": "Seconds those turns took longer for it.",
    "pitstop_adapter_loads_total": "Adapters brought into memory.",
    "pitstop_adapter_load_seconds_total": "Seconds that took, the probe included.",
    "pitstop_evictions_total": "Adapters that left memory to make room.",
    "pitstop_refused_adapters_total": "Adapters that were refused at their load, by reason: no_effect is a no-op.",
}
_GAUGES = {
    "pitstop_requests_live": "Requests being answered.",
    "pitstop_requests_waiting": "Requests that wait.",
    "pitstop_resident_adapter_bytes": "Bytes an adapter in memory takes; a merged model's conversations are its own.",
}
_FIRST_TOKEN = "pitstop_first_token_seconds"

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * len(BUCKETS))  # cumulative, as Prometheus wants them
    count: int = 0
    total: float = 0.0

    def take(self, value: float) -> None:
        self.counts = [count + (value <= limit) for count, limit in zip(self.counts, BUCKETS, strict=True)]
        self.count += 1
        self.total += value


class Metrics:
    """Counters with labels. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in _COUNTERS}
        self._first_token: dict[str, _Histogram] = {}  # by adapter

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter, named as above without "pitstop_" and "_total"."""
        series = self._counters[f"pitstop_{name}_total"]
        key = tuple(sorted(labels.items()))
        with self._lock:
            series[key] = series.get(key, 0) + amount

    def first_token(self, adapter: str, seconds: float) -> None:
        """Note the time from the arrival of a request to its first token."""
        with self._lock:
            self._first_token.setdefault(adapter, _Histogram()).take(seconds)

    def render(self, live: int, waiting: int, resident: Mapping[str, int]) -> str:
        """Return everything counted, and what is the case now: requests, and bytes by adapter in memory."""
        lines = []
        with self._lock:
            for name, words in _COUNTERS.items():
                lines += _block(name, words, "counter", self._counters[name])
            lines += self._render_first_token()
        inside: Mapping[Labels, float] = {(("adapter", name),): size for name, size in resident.items()}
        now: tuple[Mapping[Labels, float], ...] = ({(): live}, {(): waiting}, inside)
        for (name, words), series in zip(_GAUGES.items(), now, strict=True):
            lines += _block(name, words, "gauge", series)
        return "\n".join(lines) + "\n"

    def _render_first_token(self) -> list[str]:
        lines = _header(_FIRST_TOKEN, "Seconds from the arrival of a request to its first token.", "histogram")
        for adapter, histogram in self._first_token.items():
            label = ("adapter", adapter)
            for limit, count in zip((*BUCKETS, "+Inf"), (*histogram.counts, histogram.count), strict=True):
                lines.append(_line(f"{_FIRST_TOKEN}_bucket", (label, ("le", str(limit))), count))
            lines.append(_line(f"{_FIRST_TOKEN}_sum", (label,), histogram.total))
            lines.append(_line(f"{_FIRST_TOKEN}_count", (label,), histogram.count))
        return lines


def _block(name: str, words: str, kind: str, series: Mapping[Labels, float]) -> list[str]:
    return [*_header(name, words, kind), *(_line(name, labels, value) for labels, value in series.items())]


def _header(name: str, words: str, kind: str) -> list[str]:
    return [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{{{written}}} {value!r}" if written else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
