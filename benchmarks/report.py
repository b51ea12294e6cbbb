"""What vs_pytorch.py measured, in words: a line a row while it runs, Markdown tables, and the plots of how cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure

Result = dict[str, Any]
RIVALS = ("eager", "compile")


def met(result: Result, rival: str | None = None) -> str:
    """ "met", "not met", or "" without a target. Of a comparison, against one rival."""
    if rival is not None:
        target = result["target"].get(rival)
        if target is None or rival not in result["ratio"]:
            return ""
        return "met" if result["ratio"][rival] >= target else "not met"
    reached = result["value"] <= result["target"] if result["bound"] == "at most" else result["value"] >= result["target"]
    return "met" if reached else "not met"


def figure(value: float, unit: str) -> str:
    if unit == "s":
        return measure.si(value)
    return f"{value:.0%}" if unit == "%" else f"{value:.3g} {unit}".strip()


def line(name: str, result: Result) -> str:
    if "reason" in result:
        return f"{name:44s} not measured: {result['reason']}"
    if "value" in result:
        detail = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result["detail"].items())
        wanted = f"{result['bound']} {figure(result['target'], result['unit'])}: {met(result)}"
        return f"{name:44s} {figure(result['value'], result['unit'])} ({wanted}) {detail}"
    parts = [f"ladd {measure.si(result['seconds']['ladd']['median'])}"]
    for rival in RIVALS:
        if rival in result["ratio"]:
            wanted = f" (target {result['target'][rival]}: {met(result, rival)})" if rival in result["target"] else ""
            parts.append(f"{rival} {measure.si(result['seconds'][rival]['median'])} ratio {result['ratio'][rival]:.2f}{wanted}")
    parts += [f"{who}: {what}" for who, what in result["notes"].items()]
    return f"{name:44s} " + "; ".join(parts)


# ---- Markdown -----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def joined(rows: dict[str, Result]) -> dict[str, Result]:
    """With what was measured against torch.compile beside what was measured against eager PyTorch."""
    out = {name: row for name, row in rows.items() if not (name.endswith("/compile") and name.removesuffix("/compile") in rows)}
    for name, row in rows.items():
        base = name.removesuffix("/compile")
        if base != name and base in out and "ratio" in row and "ratio" in out[base]:
            merged = {key: {**row[key], **out[base][key]} for key in ("seconds", "ratio", "target", "notes")}
            out[base] = {**out[base], **merged}
    return out


def comparison(name: str, result: Result, rivals: tuple[str, ...]) -> list[str]:
    cells = [name.replace("/", ", "), measure.si(result["seconds"]["ladd"]["median"])]
    for rival in rivals:
        if rival not in result["ratio"]:
            cells += ["-" if rival not in result["notes"] else result["notes"][rival], "-", "-"]
            continue
        target = result["target"].get(rival)
        wanted = f"{target}, {met(result, rival)}" if target is not None else "-"
        cells += [measure.si(result["seconds"][rival]["median"]), f"{result['ratio'][rival]:.2f}", wanted]
    return cells


def markdown(results: Result) -> str:
    rows = joined(results["rows"])
    about = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in results.items() if k not in ("rows", "growth"))
    out = [f"{about}.\n"]
    compared = {n: r for n, r in rows.items() if "ratio" in r}
    models = {n: r for n, r in compared.items() if not n.startswith(("attention", "growth/"))}
    head = ["row", "ladd", "eager", "ratio", "target"]
    if models:
        out += [table([*head, "compile", "ratio", "target"], [comparison(n, r, RIVALS) for n, r in models.items()]), ""]
    for kind in ("attention", "growth/"):
        if chosen := {n: r for n, r in compared.items() if n.startswith(kind)}:
            out += [table(head, [comparison(n, r, RIVALS[:1]) for n, r in chosen.items()]), ""]
    figures = {n: r for n, r in rows.items() if "value" in r}
    if figures:
        cells = [
            [n.replace("/", ", "), figure(r["value"], r["unit"]), f"{r['bound']} {figure(r['target'], r['unit'])}, {met(r)}"]
            for n, r in figures.items()
        ]
        out += [table(["what", "measured", "target"], cells), ""]
    missing = [f"- {n}: {r['reason']}" for n, r in rows.items() if "reason" in r]
    if missing:
        out += ["Not measured:\n", *missing, ""]
    verdicts = [met(r, rival) for r in compared.values() for rival in RIVALS] + [met(r) for r in figures.values()]
    out.append(f"{verdicts.count('met')} targets met, {verdicts.count('not met')} not met.")
    return "\n".join(out)


# ---- growth -------------------------------------------------------------------------------------------------------------


def plot(results: Result, path: Path) -> None:
    """Seconds over image tokens and over depth, both sides, of a training step and of one sampling step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure_, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    fixed = {"image tokens": "depth 2", "depth": "256 image tokens"}
    for axis, along in zip(axes, fixed, strict=True):
        for what, style in (("step", "-o"), ("forward", "--s")):
            wanted = {"along": along, "what": what}
            rows = [r for r in results["rows"].values() if "growth" in r and wanted.items() <= r["growth"].items()]
            points = {r["growth"]["x"]: r["seconds"] for r in rows}
            xs = sorted(points)
            for side, name, colour in (("eager", "PyTorch", "tab:orange"), ("ladd", "ladd", "tab:blue")):
                label = f"{'LADD step' if what == 'step' else 'one sampling step'}, {name}"
                axis.loglog(xs, [points[x][side]["median"] for x in xs], style, color=colour, label=label)
        axis.set_title(f"{fixed[along]}, width 384, 77 text tokens, batch 1", fontsize=10)
        axis.set_xlabel({"depth": "depth (transformer blocks)"}.get(along, along))
        axis.set_xticks(xs, map(str, xs))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: measure.si(y)))
        axis.tick_params(labelleft=True)
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("time, float32")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)
