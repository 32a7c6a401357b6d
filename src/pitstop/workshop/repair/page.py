"""The repair as one HTML page: retention against task, with every candidate, in the style of the retention report."""

import math
from collections.abc import Callable, Sequence
from html import escape

from pitstop.retention.gate import Criterion
from pitstop.retention.page import MARKS, STYLE
from pitstop.retention.wording import amount
from pitstop.workshop.repair.result import Candidate, Look, Repair, is_retention

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 86, 20, 16, 48  # of the plot, for its labels
AIR = 0.08  # of the range of each axis, beyond the outermost points
TICKS = (0.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, -0.001, -0.002, -0.005, -0.01, -0.02, -0.05)
COLORS = {
    "scale": "#1f5fa8",
    "modules": "#b3261e",
    "layers": "#8a5a00",
    "heads": "#00796b",
    "ramp": "#7b3fa0",
    "rank": "#5c6670",
    "null-space": "#c2548b",
}
MORE_STYLE = """
svg.plot{width:100%;height:auto;display:block}svg.plot text{font-size:13px;fill:var(--soft)}
svg.plot text.pass{fill:var(--pass)}
.key{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin:0 .3rem 0 .9rem;vertical-align:-.05rem}
"""


def page(result: Repair) -> str:
    """Return the result as an HTML page that needs nothing else."""
    title = f"{escape(result.name)}: repaired"
    sections = [_summary(result), _curve(result), _looks(result), _table(result), _about(result)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}{MORE_STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _summary(result: Repair) -> str:
    lines = "".join(f"<li>{escape(reason)}</li>" for reason in result.reasons)
    return (
        f"<h1>Repair of <code>{escape(result.name)}</code></h1>"
        f'<div class="verdict pass"><b>{MARKS["pass"]} Repaired</b><span>A smaller change of the base, made from the '
        "finished adapter without training: it still does its task, and the gate passes what the base kept."
        f"</span></div><ul>{lines}</ul>"
        "<p>That was a part of the items. Before it ships, the whole check: "
        f"<code>pitstop check {escape(result.run or '')}</code></p>"
    )


class _Axes:
    """From figures to places in the drawing; candidates that lost most of the task are left out of it.

    Both axes have a root scale: what is near to no loss is what there is to choose from, and lies close together.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        able = [one.likelihood_kept for one in candidates if one.keeps_task]
        least = min(able) - max(0.1, 1.0 - min(able))
        self.shown = [one for one in candidates if one.likelihood_kept >= least]
        self._x = _range([_root(one.likelihood_kept - 1.0) for one in self.shown])
        self._y = _range([0.0, *(_root(one.damage) for one in self.shown)])

    def at(self, candidate: Candidate) -> tuple[float, float]:
        """Return where a candidate stands."""
        return self.across(candidate.likelihood_kept), self.down(candidate.damage)

    def across(self, kept: float) -> float:
        """Return how far to the right a share of the task stands."""
        low, high = self._x
        return LEFT + (_root(kept - 1.0) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(self, damage: float) -> float:
        """Return how far down a damage stands."""
        low, high = self._y
        return TOP + (high - _root(damage)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = (high - low) * AIR or 0.01
    return low - air, high + air


def _curve(result: Repair) -> str:
    axes = _Axes(result.candidates)
    uniform = sorted((one for one in axes.shown if one.method == "scale"), key=lambda one: one.scale)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(axes.at, uniform))
    drawn = [
        *_grid(axes),
        f'<polyline points="{line}" fill="none" stroke="{COLORS["scale"]}" stroke-width="2"/>',
        *(_dot(one, axes) for one in axes.shown),
        *_mark(result, axes),
    ]
    methods = dict.fromkeys(one.method for one in result.candidates)
    key = "".join(f'<span class="key" style="background:{COLORS[method]}"></span>{method}' for method in methods)
    left_out = len(result.candidates) - len(axes.shown)
    note = f" {left_out} that lost more of it than fits here are only in the table." if left_out else ""
    return (
        "<h2>Retention against task</h2>"
        "<p class=soft>Each point is one candidate. Further right it does more of the task, further down the base lost "
        "less; the untouched adapter is the point at 100%. The line is uniform scaling, which every other method must "
        "surely beat at the same task score to be chosen. Both axes are stretched near to no loss. Hollow points lose "
        "more of the exact answers than allowed."
        f"{note}</p><p>{key}</p>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="damage to the base against the share '
        f'of the task that is kept, {len(axes.shown)} candidates">{"".join(drawn)}</svg>'
    )


def _grid(axes: _Axes) -> list[str]:
    drawn = []
    for lost, x in _ticks(lambda lost: axes.across(1.0 - lost), (LEFT, WIDTH - RIGHT), apart=56):
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>')
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{100 - lost * 100:g}%</text>')
    for damage, y in _ticks(axes.down, (TOP, HEIGHT - BOTTOM), apart=22):
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{damage:+g}</text>'.replace("+0<", "0<"))
    aside = f'transform="translate(14 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" text-anchor="middle"'
    drawn.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">share of the task that is kept</text>')
    drawn.append(f"<text {aside}>bits per byte more than the base</text>")
    return drawn


def _ticks(place: Callable[[float], float], inside: tuple[float, float], *, apart: float) -> list[tuple[float, float]]:
    """Return round values with their places: none outside, none too near to another one, nought first of all."""
    ticks: list[tuple[float, float]] = []
    for value in TICKS:
        at = place(value)
        if inside[0] <= at <= inside[1] and all(abs(at - other) >= apart for _, other in ticks):
            ticks.append((value, at))
    return ticks


def _dot(one: Candidate, axes: _Axes) -> str:
    x, y = axes.at(one)
    color = COLORS[one.method]
    fill = color if one.keeps_task else "var(--paper)"
    what = f"{one.method}, {one.words or 'all of it'}, scale {one.scale:.3f}"
    said = f"{what}: {one.likelihood_kept:.1%} kept, {one.damage:+.3f}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{color}" stroke-width="2">'
        f"<title>{escape(said)}</title></circle>"
    )


def _mark(result: Repair, axes: _Axes) -> list[str]:
    """Ring what was chosen."""
    chosen = result.chosen
    if chosen is None:
        return []
    what = (chosen.method, chosen.words, chosen.scale)
    rings = []
    for one in axes.shown:
        if (one.method, one.words, one.scale) == what:
            x, y = axes.at(one)
            rings.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="none" stroke="var(--pass)" stroke-width="3"/>'
            )
            rings.append(f'<text x="{x - 14:.1f}" y="{y - 14:.1f}" text-anchor="end" class="pass">chosen</text>')
    return rings


def _looks(result: Repair) -> str:
    rows = "".join(_look(look, chosen=look == result.chosen) for look in result.looks)
    return (
        "<h2>On items the search has not seen</h2>"
        f"<p class=soft>{result.verdict_items:,} items of the suites and {result.verdict_rows} rows of the task. The "
        "safest candidate is tried first, then ones that change the adapter less, for as long as retention passes.</p>"
        f"<div class=scroll><table><tr><th>scale<th>gate<th>exact answers<th>gain kept<th>retention</tr>{rows}</table>"
        "</div>"
    )


def _look(look: Look, *, chosen: bool) -> str:
    gate = "pass" if look.passes else "fail"
    word = ("chosen" if chosen else "passes") if look.passes else "does not pass"
    kept = "<br>".join(_criterion(one) for one in look.criteria if is_retention(one))
    return (
        f'<tr><td class=n>{look.scale:.3f}<td><span class="{gate}">{MARKS[gate]} {word}</span>'
        f"<td class=n>{look.exact:.1%}<td class=n>{look.exact_kept:.1%}<td>{kept}</tr>"
    )


def _criterion(one: Criterion) -> str:
    upper, margin = amount(one.upper, one.unit), amount(one.margin, one.unit, sign=False)
    return f'<span class="{one.outcome}">{MARKS[one.outcome]}</span> {escape(one.name)}: below {upper}, margin {margin}'


def _table(result: Repair) -> str:
    rows = "".join(_row(one) for one in sorted(result.candidates, key=lambda one: (one.method != "scale", one.damage)))
    return (
        f"<h2>Everything that was tried</h2><p class=soft>On {result.search_items:,} items of the suites and "
        f"{result.search_rows} rows of the task. Damage: bits per byte more than the base needs for the suites' texts "
        "and right answers. Beside uniform: its damage less that of the uniform scale which does the task as well, "
        "with the one-sided bound; below zero this one keeps more.</p><div class=scroll><table>"
        "<tr><th>method<th>scale<th>task kept<th>exact<th>damage<th>bounds<th>KL<th>beside uniform<th>what</tr>"
        f"{rows}</table></div>"
    )


def _row(one: Candidate) -> str:
    figures = [
        f"{one.scale:.3f}",
        f"{one.likelihood_kept:.1%}",
        f"{one.exact:.1%}",
        f"{one.damage:+.3f}",
        f"{_number(one.damage_lower)} to {_number(one.damage_upper)}",
        "" if one.kl is None else f"{one.kl:.4f}",
    ]
    beside = ""
    if one.against_uniform is not None:
        beside = "task not matched"
        if one.against_uniform.matched:
            beside = f"{one.against_uniform.difference:+.3f}, at most {_number(one.against_uniform.upper)}"
    cells = "".join(f"<td class=n>{figure}" for figure in (*figures, beside))
    return f"<tr><td>{one.method}{cells}<td>{escape(one.words)}</tr>"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"


def _about(result: Repair) -> str:
    facts = [
        ("from", f"<code>{escape(result.source)}</code>, weights <code>{result.source_sha256}</code>"),
        ("to", f"<code>{escape(result.run or '')}</code>, weights <code>{result.adapter_sha256}</code>"),
        ("task", f"{result.keep:.0%} of the gain in exact answers had to be left, from {result.base_exact:.1%} to "
         f"{result.source_exact:.1%} on the search's rows"),
        ("same task score", f"within {result.tolerance:.0%} of the gain in the answers' likelihood, and as many exact"),
        ("time", f"{result.seconds:,.0f} seconds"),
    ]  # fmt: skip
    rows = "".join(f"<tr><th>{name}<td>{value}</tr>" for name, value in facts)
    return f"<h2>On what</h2><div class=scroll><table>{rows}</table></div>"
