"""The retention report as one HTML page: no script, no request, readable on a phone, dark or light."""

from __future__ import annotations

import itertools
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from pitstop.retention.gate import Criterion
from pitstop.retention.tripwire import level
from pitstop.retention.wording import TASK, TASK_SCORE, amount, looked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pitstop.retention.drift import Drift, ScalePoint
    from pitstop.retention.report import RetentionReport, SuiteSummary, TaskSummary

# The forest plot's axis, in margins: 0 is "no change", 1 is "as much as may be lost".
LEFT, RIGHT = -1.0, 2.0
HEADLINES = {
    "pass": (
        "Passed",
        "It learned its task, and what the base could do before it surely still can, within the margins.",
    ),
    "fail": ("Refused", "It made the base surely worse than the margins allow."),
    "inconclusive": ("Not decided", "The figures prove neither that it kept enough nor that it lost too much."),
}
MARKS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "blind": "○"}

STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#5c6670;--line:#d7dce1;--band:#e6f1ee;--pass:#00695c;--fail:#b3261e;
--inconclusive:#8a5a00;--blind:#6b7480;--base:#8d99a6;--adapted:#1f5fa8}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e8ebee;--soft:#a2adb8;--line:#333b44;--band:#16302c;
--pass:#5cc9b5;--fail:#ff8a7f;--inconclusive:#f0b94d;--blind:#8f9aa6;--base:#7d8995;--adapted:#77aef0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 .6rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}small,.soft{color:var(--soft)}ul{padding-left:1.2rem;margin:.4rem 0}
.verdict{border-left:.5rem solid currentColor;padding:.4rem .9rem;margin:.8rem 0}
.verdict b{font-size:1.6rem;display:block;line-height:1.2}.verdict span{color:var(--ink)}
.pass{color:var(--pass)}.fail{color:var(--fail)}.inconclusive{color:var(--inconclusive)}.blind{color:var(--blind)}
.row{display:grid;grid-template-columns:11rem 1fr 12rem;gap:.2rem .8rem;align-items:center;padding:.35rem 0;
border-top:1px solid var(--line)}
.row svg{width:100%;height:30px;display:block;overflow:visible}
.row .figures{font-variant-numeric:tabular-nums;font-size:.88rem}
.axis{font-size:.8rem;color:var(--soft)}.axis svg{height:20px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:.3rem .6rem .3rem 0;border-top:1px solid var(--line);vertical-align:top}
td.n{font-variant-numeric:tabular-nums}th,td.n,td:first-child,td code{white-space:nowrap}code{font-size:.85em}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:1.5rem}figure{margin:.5rem 0}
figure svg{width:100%;height:9rem;overflow:visible;padding:0 .5rem;box-sizing:border-box}
@media(max-width:40rem){.plots{grid-template-columns:1fr}}
@media(max-width:40rem){.row{grid-template-columns:1fr}.row .name{font-weight:600}}
"""


def page(report: RetentionReport) -> str:
    """Return the report as an HTML page."""
    title = f"{escape(report.adapter)}: {HEADLINES[report.verdict.outcome][0].lower()}"
    sections = [_verdict(report), _forest(report), _task(report.task), _drift(report), _suites(report), _about(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _verdict(report: RetentionReport) -> str:
    verdict = report.verdict
    word, sentence = HEADLINES[verdict.outcome]
    if verdict.outcome == "inconclusive" and all(criterion.outcome != "fail" for criterion in _kept(report)):
        sentence += " That is not a pass."
    if report.look:
        sentence += f" {looked(report.look, report.margins)}."
    lists = _list("What stands in the way", verdict.reasons) + _list("Look at this", verdict.warnings)
    return (
        f"<h1>Retention of <code>{escape(report.adapter)}</code></h1>"
        f'<div class="verdict {verdict.outcome}"><b>{MARKS[verdict.outcome]} {word}</b><span>{sentence}</span></div>'
        f"{lists}{_list('What to do next', verdict.advice)}"
    )


def _list(title: str, lines: tuple[str, ...]) -> str:
    if not lines:
        return ""
    return f"<p><b>{title}</b></p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _kept(report: RetentionReport) -> list[Criterion]:
    return [criterion for criterion in report.verdict.criteria if criterion.name not in (TASK, TASK_SCORE)]


def _forest(report: RetentionReport) -> str:
    rows = "".join(_forest_row(criterion) for criterion in _kept(report))
    axis = (
        '<div class="row axis"><span></span><svg role="presentation">'
        f"{_label(0.0, 'no change')}{_label(1.0, 'margin')}</svg><span></span></div>"
    )
    confidence = f"{report.verdict.confidence:.1%}"
    return (
        "<h2>What the base lost</h2>"
        "<p class=soft>The point is the measured drop, the line its one-sided "
        f"{confidence} bounds, in shares of what may be lost. A criterion passes when its whole line is left of the "
        f"margin, and fails when it is right of it.</p>{rows}{axis}"
    )


def _forest_row(criterion: Criterion) -> str:
    if criterion.unit == "accuracy":
        scores = f"{criterion.baseline:.1%} → {criterion.adapted:.1%}"
    else:
        scores = f"{criterion.baseline:.3f} → {criterion.adapted:.3f} bits per byte"
    bounds = f"{amount(criterion.lower, criterion.unit)} to {amount(criterion.upper, criterion.unit)}"
    figures = f"{scores}<br><small>{bounds}<br>margin {amount(criterion.margin, criterion.unit, sign=False)}</small>"
    name = f'<span class="{criterion.outcome}">{MARKS[criterion.outcome]} {criterion.outcome}</span>'
    return (
        f'<div class="row"><span class="name">{escape(criterion.name)}<br>{name}</span>'
        f'{_interval(criterion)}<span class="figures">{figures}</span></div>'
    )


def _interval(criterion: Criterion) -> str:
    """Draw one line of the forest plot; what leaves the axis ends in an arrow."""
    low, middle, high = (
        None if value is None else value / criterion.margin
        for value in (criterion.lower, criterion.drop, criterion.upper)
    )
    drawn = [f'<rect x="0" y="0" width="{_x(1.0)}" height="30" fill="var(--band)"/>', _tick(0.0, "3 3"), _tick(1.0)]
    color = f"var(--{criterion.outcome})"
    if low is not None and high is not None:
        drawn.append(
            f'<line x1="{_x(low)}" x2="{_x(high)}" y1="15" y2="15" stroke="{color}" stroke-width="3"/>'
            f"{_arrow(low, color)}{_arrow(high, color)}"
        )
    if middle is not None and LEFT <= middle <= RIGHT:
        drawn.append(f'<circle cx="{_x(middle)}" cy="15" r="6" fill="{color}"/>')
    return f'<svg role="img" aria-label="{escape(criterion.words)}">{"".join(drawn)}</svg>'


def _x(value: float) -> str:
    share = (min(max(value, LEFT), RIGHT) - LEFT) / (RIGHT - LEFT)
    return f"{share * 100:.2f}%"


def _tick(value: float, dashes: str = "none") -> str:
    return f'<line x1="{_x(value)}" x2="{_x(value)}" y1="0" y2="30" stroke="var(--soft)" stroke-dasharray="{dashes}"/>'


def _arrow(value: float, color: str) -> str:
    if LEFT <= value <= RIGHT:
        return ""
    sign, anchor = ("◀", "start") if value < LEFT else ("▶", "end")
    return f'<text x="{_x(value)}" y="20" text-anchor="{anchor}" font-size="14" fill="{color}">{sign}</text>'


def _label(value: float, text: str) -> str:
    return f'<text x="{_x(value)}" y="14" text-anchor="middle" font-size="12" fill="var(--soft)">{text}</text>'


def _task(task: TaskSummary | None) -> str:
    if task is None:
        return "<h2>The task</h2><p>It was not measured.</p>"
    shown = [("exact answers", task.baseline.exact, task.adapted.exact)]
    if task.metric == "json":
        shown += [
            ("field F1", task.baseline.f1, task.adapted.f1),
            ("answers that are JSON", task.baseline.parse_rate, task.adapted.parse_rate),
        ]
    if task.metric == "number":
        shown.append(("answers that are numbers", task.baseline.parse_rate, task.adapted.parse_rate))
    if task.baseline.calibration_error is not None and task.adapted.calibration_error is not None:
        shown.append(("calibration error", task.baseline.calibration_error, task.adapted.calibration_error))
    rows = "".join(_bars(*row) for row in shown)
    return (
        "<h2>What the adapter learned</h2>"
        f"<p class=soft>{task.adapted.rows:,} held-out rows, the base above and the adapter below.</p>{rows}"
    )


def _bars(name: str, baseline: float, adapted: float) -> str:
    bars = "".join(
        f'<rect x="0" y="{y}" width="{value * 100:.2f}%" height="12" fill="var(--{which})"/>'
        for which, value, y in (("base", baseline, 1), ("adapted", adapted, 16))
    )
    edge = '<rect x="0" y="0" width="100%" height="29" fill="none" stroke="var(--line)"/>'
    words = f"{baseline:.1%} → {adapted:.1%}"
    return (
        f'<div class="row"><span class="name">{name}</span><svg role="img" aria-label="{words}">{edge}{bars}</svg>'
        f'<span class="figures">{words}</span></div>'
    )


def _drift(report: RetentionReport) -> str:
    if not report.drift:
        return ""
    rows = "".join(_drift_row(probe, level(report.margins)) for probe in report.drift)
    return (
        "<h2>How far it moved from the base</h2>"
        "<p class=soft>KL(base‖adapted) in nats per token, averaged over documents. It warns and does not judge.</p>"
        "<div class=scroll><table><tr><th>probe<th>mean<th>median<th>largest<th>documents<th></tr>"
        f"{rows}</table></div>{_displacement(report)}{_curve(report.curve)}"
    )


def _curve(curve: Sequence[ScalePoint]) -> str:
    """Plot what a smaller scale would forget, and what it would unlearn."""
    if not curve:
        return ""
    plots = [_plot("KL to the base", [(point.scale, point.kl) for point in curve], "fail")]
    learned = [(point.scale, point.task) for point in curve if point.task is not None]
    if learned:
        plots.append(_plot("loss on the task's answers", learned, "adapted"))
    return (
        "<h2>What a smaller scale would do</h2><p class=soft>Nats per token at parts of the scale, on a part of the "
        f"probes and of the task's rows. At 0 it is the base.</p><div class=plots>{''.join(plots)}</div>"
    )


def _plot(title: str, points: Sequence[tuple[float, float]], color: str) -> str:
    highest = max((value for _, value in points), default=0.0) or 1.0
    places = [(100 * scale, 90 - 80 * value / highest) for scale, value in points]
    lines = "".join(
        f'<line x1="{x:.1f}%" y1="{y:.1f}%" x2="{after_x:.1f}%" y2="{after_y:.1f}%" stroke="var(--{color})" '
        'stroke-width="2"/>'
        for (x, y), (after_x, after_y) in itertools.pairwise(places)
    )
    dots = "".join(f'<circle cx="{x:.1f}%" cy="{y:.1f}%" r="4" fill="var(--{color})"/>' for x, y in places)
    said = ", ".join(f"{scale:g}: {value:.3f}" for scale, value in points)
    return (
        f'<figure><figcaption>{title}</figcaption><svg role="img" aria-label="{title}: {said}">'
        f'<line x1="0" y1="90%" x2="100%" y2="90%" stroke="var(--line)"/>{lines}{dots}</svg>'
        f"<small>{said}</small></figure>"
    )


def _displacement(report: RetentionReport) -> str:
    if report.displacement is None:
        return ""
    return (
        f"<p>F<sub>Δ</sub> = {report.displacement:.3f}: what the adapter adds to the output of a matrix, as a share of "
        "the length of what goes in, on general text under the plain base.</p>"
    )


def _drift_row(probe: Drift, warn: float) -> str:
    values = np.array([document.kl for document in probe.documents] or [np.nan])
    state = f"<span class=inconclusive>above {warn:g}</span>" if probe.mean > warn else f"within {warn:g}"
    figures = "".join(f"<td class=n>{value:.4f}" for value in (values.mean(), np.median(values), values.max()))
    return f"<tr><td>{escape(probe.suite)}{figures}<td class=n>{len(probe.documents)}<td>{state}</tr>"


def _suites(report: RetentionReport) -> str:
    rows = "".join(_suite_row(suite) for suite in report.suites)
    return (
        "<h2>What was measured</h2><div class=scroll><table>"
        "<tr><th>suite<th>items<th>excluded<th>trained on<th>guessing<th>forgotten, gained<th>answer margin"
        "<th>source, licence<th>digest"
        f"</tr>{rows}</table></div>"
        "<p><small>Excluded: items that do not fit the context. Trained on: items that stand in the training rows, "
        "and do not count. Forgotten: right without the adapter and wrong with it, in brackets what is left of it when "
        "what guessing alone would turn is taken off; gained: the other way. Answer margin: how much more likely the "
        "right option is than the best wrong one, in nats (per byte, unless the suite scores whole options)."
        "</small></p>"
    )


def _suite_row(suite: SuiteSummary) -> str:
    chance = "" if suite.chance is None else f"{suite.chance:.0%}"
    margin = changed = ""
    if suite.flips is not None:
        found = suite.flips
        changed = f"{found.forgotten:.1%} ({found.truly_forgotten:.1%}), {found.gained:.1%}"
    if suite.baseline_margin is not None and suite.adapted_margin is not None:
        margin = f"{suite.baseline_margin:+.3f} → {suite.adapted_margin:+.3f}"
    return (
        f"<tr><td>{escape(suite.name)}<td class=n>{suite.items}<td class=n>{suite.excluded}"
        f"<td class=n>{suite.trained_on}<td class=n>{chance}<td class=n>{changed}<td class=n>{margin}"
        f"<td>{escape(suite.source)}<br><small>{escape(suite.license)}</small>"
        f'<td><code title="{escape(suite.digest)}">{escape(suite.digest[:12])}</code></tr>'
    )


def _about(report: RetentionReport) -> str:
    margins = report.margins
    facts = [
        ("adapter", f"<code>{escape(report.adapter_sha256)}</code>, scale {report.scale:g}"),
        ("base", f"<code>{escape(report.base_sha256)}</code>"),
        ("engine", escape(report.engine)),
        ("versions", escape(", ".join(f"{name} {version}" for name, version in sorted(report.versions.items())))),
        (
            "bootstrap",
            f"{margins.resamples:,} resamples of groups, seed {margins.seed}; for accuracies the wider of it and "
            "Tango's score interval",
        ),
    ]
    rows = "".join(f"<tr><th>{name}<td>{value}</tr>" for name, value in facts)
    return f"<h2>On what</h2><div class=scroll><table>{rows}</table></div>"
