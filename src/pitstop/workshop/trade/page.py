"""The trade between artifacts as one HTML page: a table, and size against distance as a plot."""

import math
from html import escape

from pitstop.retention.page import MARKS, STYLE
from pitstop.workshop.trade.result import HEADS, Trade, cells

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 86, 110, 16, 48  # of the plot, for its labels
LEAST_KL = 1e-5  # nats per token; below it is no distance anybody could see
COLORS = {"gguf": "#1f5fa8", "onnx": "#00796b"}
MORE_STYLE = "svg.plot{width:100%;height:auto;display:block}svg.plot text{font-size:13px;fill:var(--soft)}"


def page(result: Trade) -> str:
    """Return the result as an HTML page that needs nothing else."""
    title = f"{escape(result.name)}: what to ship"
    said = f"{MARKS['pass']} {escape(result.chosen)}" if result.chosen else f"{MARKS['fail']} none"
    lines = "".join(f"<li>{escape(reason)}</li>" for reason in result.reasons)
    board = f" and fits {escape(result.profile)}" if result.profile else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}{MORE_STYLE}</style></head><body>\n<h1>{title}</h1>"
        f'<div class="verdict {"pass" if result.chosen else "fail"}"><b>{said}</b><span>The fastest base on this '
        f"machine on which the adapter is near enough to what was trained{board}.</span></div><ul>{lines}</ul>\n"
        f"{_table(result)}\n{_plot(result)}\n</body></html>\n"
    )


def _table(result: Trade) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td class=n>{escape(cell)}" for cell in cells(one)) + "</tr>" for one in result.options
    )
    heads = "".join(f"<th>{head}" for head in HEADS)
    return (
        "<p class=soft>KL: nats per token of the answers of held-out rows by which the exported adapter differs from "
        f"the trained one; {result.allowed_kl:g} are allowed. Exact: answers equal to the expected ones.</p>"
        f"<div class=scroll><table><tr>{heads}</tr>{rows}</table></div>"
    )


def _plot(result: Trade) -> str:
    """Draw size against KL, on a logarithmic axis, with what is allowed as a line."""
    values = [max(LEAST_KL, one.kl_nats_per_token) for one in result.options] + [result.allowed_kl]
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.3
    largest = max(one.base_bytes for one in result.options) * 1.1

    def down(kl: float) -> float:
        return TOP + (high - math.log10(max(LEAST_KL, kl))) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def across(size: float) -> float:
        return LEFT + size / largest * (WIDTH - LEFT - RIGHT)

    limit = down(result.allowed_kl)
    drawn = [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="var(--fail)"/>',
        f'<text x="{WIDTH - RIGHT + 6}" y="{limit + 4:.1f}">allowed</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">MB of the base</text>',
    ]
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        drawn.append(
            f'<text x="{LEFT - 8}" y="{down(10.0**exponent) + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>'
        )
    for one in result.options:
        x, y = across(one.base_bytes), down(one.kl_nats_per_token)
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{COLORS[one.format]}"/>')
        label = f"{one.base}, {one.base_bytes / 1e6:,.0f} MB, {one.decode_tokens_per_s:,.0f} tok/s"
        drawn.append(f'<text x="{x - 10:.1f}" y="{y - 10:.1f}" text-anchor="middle">{escape(label)}</text>')
    return (
        "<h2>Distance from what was trained, against size</h2>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL against size of '
        f'{len(result.options)} artifacts">{"".join(drawn)}</svg>'
    )
