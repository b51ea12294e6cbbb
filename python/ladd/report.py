"""One page that shows what a distillation did: pictures side by side, curves, tables. No scripts, no files beside it, no network.

write_html(path, page)              the self-contained page: pictures as base64 PNG, curves as inline SVG, light and dark
write_grid(path, prompts, strips)   the same pictures as one PNG with labels
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evaluation.evaluate import COLUMNS, cell


@dataclass(frozen=True)
class Strip:
    """One row of pictures: the same prompts and seeds for every strip. images: PIL pictures, one a prompt."""

    label: str
    images: Sequence[Any]
    note: str = ""
    highlight: bool = False


@dataclass(frozen=True)
class Series:
    """One line of a chart; values that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A line chart. smooth: a running mean is drawn over the faint raw values. points: mark every value."""

    title: str
    series: Sequence[Series]
    x_label: str = ""
    log_x: bool = False
    log_y: bool = False
    smooth: bool = False
    points: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of numbers as evaluate.summarize makes them: row -> number -> {"mean", "std"}."""

    title: str
    text: str
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]
    highlight: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Page:
    """All that the page says. facts: short (value, meaning) pairs for the head of the page."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    prompts: Sequence[str]
    strips: Sequence[Strip]
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)  # id of a section -> a sentence under its heading


# ---- charts ------------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 38


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    marks = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
    inside = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
    return inside if len(inside) > 1 else ticks(low, high)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each position (of as many as there are, at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


def _label(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axis(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.2, high * 1.2)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def chart_svg(chart: Chart) -> str:
    """The chart as an inline SVG whose colours come from the page's style."""
    kept = []  # (number of the series, its points)
    for number, series in enumerate(chart.series):
        points = [
            (float(x), float(y))
            for x, y in zip(series.x, series.y, strict=True)
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)
        ]
        if points:
            kept.append((number, points))
    if not kept:
        return f'<p class="empty">{html.escape(chart.title)}: no values</p>'
    x_low, x_high = _axis([x for _, points in kept for x, _ in points], chart.log_x)
    if not chart.log_x and not chart.points:
        x_low, x_high = min(x for _, p in kept for x, _ in p), max(x for _, p in kept for x, _ in p)
    y_low, y_high = _axis([y for _, points in kept for _, y in points], chart.log_y)

    def place(value: float, low: float, high: float, log: bool, start: float, end: float) -> float:
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)

    def px(x: float) -> float:
        return place(x, x_low, x_high, chart.log_x, _LEFT, _WIDTH - _RIGHT)

    def py(y: float) -> float:
        return place(y, y_low, y_high, chart.log_y, _HEIGHT - _BOTTOM, _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(chart.title, quote=True)}">']
    for tick in _log_ticks(y_low, y_high) if chart.log_y else ticks(y_low, y_high):
        y = py(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_label(tick)}</text>')
    marks = sorted({x for _, points in kept for x, _ in points}) if chart.points else []
    if not 1 <= len(marks) <= 8:
        marks = _log_ticks(x_low, x_high) if chart.log_x else ticks(x_low, x_high)
    for tick in marks:
        parts.append(f'<text x="{px(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_label(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{html.escape(chart.x_label)}</text>')
    for number, points in kept:
        drawn = [("line", points)]
        if chart.smooth:
            means = running_mean([y for _, y in points], max(1, len(points) // 25))
            drawn = [("raw", points), ("line", [(x, y) for (x, _), y in zip(points, means, strict=True)])]
        for kind, line in drawn:
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in _thin(line))
            parts.append(f'<polyline class="{kind} c{number % 4}" points="{path}"/>')
        if chart.points:
            parts += [f'<circle class="dot c{number % 4}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="4"/>' for x, y in points]
    parts.append("</svg>")
    return "".join(parts)


def _thin(line: Sequence[tuple[float, float]], most: int = 600) -> Sequence[tuple[float, float]]:
    """Every k-th point and the last one: no more than a screen can show."""
    step = -(-len(line) // most)
    return line if step <= 1 else [*line[::step], line[-1]]


# ---- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6169; --line: #dfe2e6; --paper: #ffffff; --card: #f6f7f9; --mark: #fff3d6; --edge: #d99a00;
        --c0: #2463c9; --c1: #cf5b17; --c2: #14806b; --c3: #8a3fb0;
        --cell: clamp(64px, calc(7.6vw - 8px), 96px); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a7b0; --line: #343a42; --paper: #14171b; --card: #1d2126; --mark: #3a3015; --edge: #e0ac2b;
          --c0: #78aaff; --c1: #ff9a5c; --c2: #52cfb4; --c3: #d394f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1290px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 6px; }
p { max-width: 76ch; margin: 6px 0 14px; }
.soft, figcaption, .note { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 26px 0 8px; padding: 0; list-style: none; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.facts b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; margin: 12px 0; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); font-size: 14px; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
tr.mark td, tr.mark th, tr.mark td:first-child, tr.mark th:first-child { background: var(--mark); }
.pictures th, .pictures td { text-align: center; padding: 4px; }
.pictures thead th { white-space: normal; font-weight: 400; font-size: 12.5px; line-height: 1.25; min-width: var(--cell); }
.pictures tbody th { text-align: left; font-weight: 600; padding: 5px 14px; }
.pictures tbody th span { display: block; font-weight: 400; color: var(--soft); font-size: 12.5px; }
.pictures img { display: block; width: var(--cell); height: var(--cell); margin: auto; border-radius: 6px; border: 1px solid var(--line); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 18px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
figure h3 { font-size: 15px; margin: 0 0 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-linejoin: round; } .line { stroke-width: 2; } .raw { stroke-width: 1; opacity: .28; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); } polyline.c2 { stroke: var(--c2); } polyline.c3 { stroke: var(--c3); }
.dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin: 4px 0 0; padding: 0; list-style: none; color: var(--soft); }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
.legend .c0 { background: var(--c0); } .legend .c1 { background: var(--c1); } .legend .c2 { background: var(--c2); } .legend .c3 { background: var(--c3); }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 14px; color: var(--soft); font-size: 14px; }
"""  # noqa: E501


def _picture(image: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _pictures(page: Page) -> str:
    head = "".join(f"<th>{html.escape(prompt)}</th>" for prompt in page.prompts)
    rows = []
    for strip in page.strips:
        if len(strip.images) != len(page.prompts):
            raise ValueError(f"strip {strip.label!r} must have {len(page.prompts)} pictures, one a prompt, got {len(strip.images)}")
        cells = "".join(
            f'<td><img alt="{html.escape(f"{prompt}, {strip.label}", quote=True)}" src="{_picture(image)}"></td>'
            for prompt, image in zip(page.prompts, strip.images, strict=True)
        )
        mark = ' class="mark"' if strip.highlight else ""
        rows.append(f"<tr{mark}><th>{html.escape(strip.label)}<span>{html.escape(strip.note)}</span></th>{cells}</tr>")
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="pictures">{body}</table></div>'


def _figure(chart: Chart) -> str:
    names = [series.name for series in chart.series]
    legend = "".join(f'<li><i class="c{number % 4}"></i>{html.escape(name)}</li>' for number, name in enumerate(names))
    return f'<figure><h3>{html.escape(chart.title)}</h3>{chart_svg(chart)}<ul class="legend">{legend}</ul></figure>'


def _table(table: Table) -> str:
    used = [column for column in COLUMNS if any(column[0] in numbers for numbers in table.rows.values())]
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title, _ in used)
    rows = []
    for name, numbers in table.rows.items():
        cells = "".join(f"<td>{html.escape(cell(numbers.get(key), pattern))}</td>" for key, _, pattern in used)
        mark = ' class="mark"' if name in table.highlight else ""
        rows.append(f"<tr{mark}><td>{html.escape(name)}</td>{cells}</tr>")
    return (
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.text)}</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def page_html(page: Page) -> str:
    """The page as one string."""

    def heading(name: str, title: str) -> str:
        text = page.sections.get(name)
        return f"<h2>{html.escape(title)}</h2>" + (f"<p>{html.escape(text)}</p>" if text else "")

    body = [f"<h1>{html.escape(page.title)}</h1><p>{html.escape(page.lead)}</p>"]
    facts = "".join(f"<li><b>{html.escape(value)}</b><span>{html.escape(meaning)}</span></li>" for value, meaning in page.facts)
    body.append(f'<ul class="facts">{facts}</ul>')
    body.append(heading("pictures", "The same prompts and seeds") + _pictures(page))
    if page.charts:
        body.append(heading("charts", "Curves") + f'<div class="charts">{"".join(map(_figure, page.charts))}</div>')
    body += [_table(table) for table in page.tables]
    body.append("<footer>" + "".join(f"<p>{html.escape(note)}</p>" for note in page.notes) + "</footer>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(page.title)}</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def write_html(path: str | Path, page: Page) -> None:
    Path(path).write_text(page_html(page), encoding="utf-8")


# ---- the grid ----------------------------------------------------------------------------------------------------------


def _wrapped(text: str, width: float, font: Any) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def write_grid(path: str | Path, prompts: Sequence[str], strips: Sequence[Strip], *, cell_size: int = 128) -> None:
    """Strips as the rows of one PNG, prompts above the columns, labels at the left."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    gap, ink, soft = 6, (28, 30, 33), (91, 97, 105)
    left = 24 + max([180, *(int(font.getlength(strip.label)) for strip in strips)])
    titles = [_wrapped(prompt, cell_size - 4, small) for prompt in prompts]
    top = 20 + 15 * max(map(len, titles))
    size = (left + len(prompts) * (cell_size + gap) + gap, top + len(strips) * (cell_size + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        x = left + column * (cell_size + gap)
        for number, line in enumerate(lines):
            middle = x + (cell_size - small.getlength(line)) / 2
            draw.text((middle, top - 8 - 15 * (len(lines) - number)), line, fill=soft, font=small)
    for row, strip in enumerate(strips):
        y = top + row * (cell_size + gap)
        if strip.highlight:
            draw.rectangle((0, y - gap // 2, size[0], y + cell_size + gap // 2), fill=(255, 243, 214))
        draw.text((14, y + cell_size // 2 - 18), strip.label, fill=ink, font=font)
        draw.text((14, y + cell_size // 2 + 4), strip.note, fill=soft, font=small)
        for column, image in enumerate(strip.images):
            picture = image.convert("RGB").resize((cell_size, cell_size), Image.Resampling.BICUBIC)
            x = left + column * (cell_size + gap)
            sheet.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + cell_size, y + cell_size), outline=(223, 226, 230))
    sheet.save(path, optimize=True)
