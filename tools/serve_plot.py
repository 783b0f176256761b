"""Latency over throughput as an SVG, without a plotting library."""

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50
CURVES = (
    ("TTFT p50", "ttft_ms", "p50", "#1f77b4"),
    ("TTFT p99", "ttft_ms", "p99", "#9ecae1"),
    ("TPOT p50", "tpot_ms", "p50", "#d62728"),
    ("TPOT p99", "tpot_ms", "p99", "#ff9896"),
)


def plot(points: Sequence[dict[str, Any]], title: str) -> str:
    """`points` as `tools.bench_serve` reports them; the mean over the runs of a point, axes from 0."""
    curves = [(*curve, _mean_points(points, curve[1], curve[2])) for curve in CURVES]
    every = [at for curve in curves for at in curve[-1]]
    most_x, most_y = (max((at[axis] for at in every), default=1) * 1.05 or 1 for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        inner_x, inner_y = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + x / most_x * inner_x, HEIGHT - BOTTOM - y / most_y * inner_y

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(WIDTH / 2, 22, title),
        _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 12, "output tokens a second"),
        f'<g transform="rotate(-90 16 {HEIGHT / 2})">{_text(16, HEIGHT / 2, "milliseconds")}</g>',
    ]
    for tick in range(5):
        x, y = most_x * tick / 4, most_y * tick / 4
        (at_x, bottom), (left, at_y) = place(x, 0), place(0, y)
        parts.append(_text(at_x, bottom + 18, f"{x:,.0f}"))
        parts.append(_text(left - 8, at_y + 4, f"{y:,.0f}", "end"))
        parts.append(f'<path d="M{LEFT} {at_y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, (name, _, _, colour, places) in enumerate(curves):
        at = [place(x, y) for x, y in places]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
        y = TOP + 18 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 32, y + 10, name, "start"))
    return "\n".join([*parts, "</svg>"])


def _mean_points(points: Sequence[dict[str, Any]], name: str, percentile: str) -> list[tuple[float, float]]:
    """(output tokens a second, milliseconds) of the points where any run has both, by throughput."""
    out = []
    for point in points:
        runs = [run for run in point["runs"] if run.get(name)]
        if runs:
            x, y = (
                sum(values) / len(runs)
                for values in ([r["output_tokens_per_s"] for r in runs], [r[name][percentile] for r in runs])
            )
            out.append((x, y))
    return sorted(out)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
