"""The report's charts: with units, and in colours that colour-blind people can tell apart.

They are small, so that a phone shows them without shrinking the text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rsd_trt.config import ACTION_NAMES
from rsd_trt.eval.plots import COLOURS
from rsd_trt.eval.report.breakdown import GROUPS, PHASES, Agreement, Group
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.svg import INK, Chart, draw_chart, legend
from rsd_trt.eval.report.targets import SUCCESS_TARGET
from rsd_trt.eval.results import Throughput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = 18  # characters a line of a run's name
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION = COLOURS
GREY = "#8c8c8c"
GROUP_COLOURS: dict[Group, str] = {"accepted": BLUE, "partial": SKY, "rejected": VERMILION, "full query": GREY}
MARKERS = "osD^vP"


def success_chart(runs: Sequence[Run]) -> Chart | None:
    """Success rates with their intervals, beside the target; None when no run has one."""
    known = [
        (run.name, rate, bounds)
        for run in reversed(runs)
        if (rate := run.results.final_success_rate) is not None and (bounds := run.results.final_success_interval)
    ]
    if not known:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (_, rate, (low, high)) in enumerate(known):
            axes.plot((low * 100, high * 100), (row, row), color=BLUE, linewidth=2.5, solid_capstyle="butt")
            axes.plot(rate * 100, row, "o", color=BLUE, markersize=6)
        axes.axvline(SUCCESS_TARGET * 100, color=VERMILION, linestyle="--", linewidth=1.2)
        axes.set_yticks(range(len(known)), [textwrap.fill(name, LABEL) for name, _, _ in known])
        axes.margins(x=0.08)
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.set_xlabel(f"success, % (dashed: target {SUCCESS_TARGET:.0%})")
        axes.grid(axis="y", visible=False)

    lines = sum(len(textwrap.wrap(name, LABEL)) + 1 for name, _, _ in known)
    return draw_chart("success", draw, 0.9 + 0.17 * lines, "Success rate of each run with its 95% Wilson interval.")


def phase_chart(run: Run) -> Chart | None:
    """Acceptance over the episode; None when no query tested a chunk."""
    found = run.breakdown.phases
    if not any(phase.tested for phase in found):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places, bottom = np.arange(PHASES), np.zeros(PHASES)
        tested = np.asarray([max(1, phase.tested) for phase in found])
        counts = {
            "accepted": [phase.accepted for phase in found],
            "partial": [phase.partial for phase in found],
            "rejected": [phase.rejected for phase in found],
        }
        for kind in GROUPS[:3]:
            share = np.asarray(counts[kind]) / tested * 100
            axes.bar(places, share, 0.86, bottom, color=GROUP_COLOURS[kind], label=kind)
            bottom += share
        axes.set_xticks(places, [f"{(i + 1) * 100 // PHASES}" for i in range(PHASES)])
        axes.set_xlabel("up to this % of the episode's steps")
        axes.set_ylabel("tested queries, %")
        axes.set_ylim(0, 100)
        axes.grid(visible=False)
        legend(axes, 3)

    total = sum(phase.tested for phase in found)
    return draw_chart(
        f"phase {run.name}", draw, 2.9, f"{run.name}: how {total:,} tested queries went, by decile of the episode."
    )


def route_chart(run: Run) -> Chart | None:
    """Latency of a query by kind of route; None without queries."""
    times = run.breakdown.routes
    if not times:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        rows = list(reversed(times))
        for row, part in enumerate(rows):
            p5, p25, p50, p75, p95 = (part.ms[name] for name in ("p5", "p25", "p50", "p75", "p95"))
            colour = GROUP_COLOURS[part.group]
            axes.plot((p5, p95), (row, row), color=colour, linewidth=1.5)
            axes.barh(row, p75 - p25, 0.5, left=p25, color=colour)
            axes.plot((p50, p50), (row - 0.32, row + 0.32), color=INK, linewidth=2)
        axes.set_yticks(range(len(rows)), [f"{part.group}\nn = {part.queries:,}" for part in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms a query")
        axes.grid(axis="y", visible=False)

    caption = f"{run.name}: latency of a query; line p50, box p25 to p75, whiskers p5 to p95."
    return draw_chart(f"routes {run.name}", draw, 1.1 + 0.45 * len(times), caption)


def throughput_chart(runs: Sequence[Run]) -> Chart | None:
    """Episodes per second over workers, of modes that ran on two numbers of them or more; None without one."""
    modes: dict[str, dict[int, Throughput]] = {}
    for run in runs:
        if (found := run.results.throughput) is not None:
            points = modes.setdefault(run.results.settings.label, {})
            fastest = points.get(found.workers, found)
            points[found.workers] = max(fastest, found, key=lambda one: one.episodes_per_second)
    modes = {mode: points for mode, points in modes.items() if len(points) > 1}
    if not modes:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ticks = sorted({workers for points in modes.values() for workers in points})
        for i, (mode, points) in enumerate(modes.items()):
            xs = sorted(points)
            ys = [points[x].episodes_per_second for x in xs]
            axes.plot(xs, ys, color=COLOURS[i], linewidth=1.8, label=mode)
            for x, y in zip(xs, ys, strict=True):
                fill = "none" if points[x].bound == "policy" else COLOURS[i]
                axes.plot(x, y, MARKERS[i], color=COLOURS[i], markerfacecolor=fill, markersize=7)
            first = ys[0] / xs[0]
            axes.plot((0, xs[-1]), (0, first * xs[-1]), ":", color=COLOURS[i], linewidth=1.2)
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.set_xlim(0, ticks[-1] * 1.05)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("workers (simulator processes)")
        axes.set_ylabel("episodes per second")
        legend(axes, len(modes))

    caption = "Episodes per second of the whole run. Dotted: in proportion to the workers; hollow: bound by the policy."
    return draw_chart("throughput", draw, 2.9, caption)


def actions_chart(run: Run) -> Chart | None:
    """Ranges of the executed actions, beside the training data's; None where no action was recorded."""
    found = run.breakdown.actions
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, one in enumerate(reversed(found)):
            if one.training is not None:
                low, high = one.training
                axes.barh(row, high - low, 0.6, left=low, color=ORANGE, alpha=0.4)
            axes.plot((one.minimum, one.maximum), (row, row), color=BLUE, linewidth=1.5)
            axes.plot(one.mean, row, "o", color=BLUE, markersize=6)
        axes.set_yticks(range(len(found)), [one.dimension for one in reversed(found)])
        axes.set_xlabel("environment units")
        axes.grid(axis="y", visible=False)

    bar = "bar: 1% to 99% of the training data" if found[0].training else "the bundle has no training statistics"
    caption = f"{run.name}: {run.breakdown.action_steps:,} executed actions; line: their range; point: mean; {bar}."
    return draw_chart(f"actions {run.name}", draw, 2.9, caption)


def agreement_charts(run: Run) -> tuple[Chart, ...]:
    """Agreement by dimension and by step ahead, of a shadow-mode run, and by RFSQ layer."""
    found, charts = run.breakdown, []
    if found.by_dimension is not None:
        charts.append(_agreement(run, "dimension", "steps within the tolerance, %", ACTION_NAMES, found.by_dimension))
    if found.by_step is not None:
        steps = [str(i + 1) for i in range(len(found.by_step.n))]
        charts.append(_agreement(run, "step ahead", "queries that agree, %", steps, found.by_step))
    if found.layers:
        charts.append(_layers(run))
    return tuple(charts)


def _agreement(run: Run, what: str, unit: str, labels: Sequence[str], found: Agreement) -> Chart:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(labels))
        axes.bar(places - 0.2, np.asarray(found.draft) * 100, 0.38, color=BLUE, label="draft")
        axes.bar(places + 0.2, np.asarray(found.main) * 100, 0.38, color=ORANGE, label="main head's next chunk")
        axes.set_xticks(places, labels)
        axes.set_xlabel(what)
        axes.set_ylabel(unit)
        axes.set_ylim(0, 100)
        axes.grid(axis="x", visible=False)
        legend(axes, 2)

    caption = f"{run.name}: agreement with what is left of the chunk, by {what}; n = {max(found.n):,}."
    return draw_chart(f"{what} {run.name}", draw, 2.9, caption)


def _layers(run: Run) -> Chart:
    layers = run.breakdown.layers

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.bar(range(len(layers)), [layer.equal * 100 for layer in layers], 0.6, color=BLUE)
        axes.axhline(layers[0].chance * 100, color=VERMILION, linestyle="--", linewidth=1.2)
        axes.set_xticks(range(len(layers)), [f"L{i}" for i in range(len(layers))])
        axes.set_xlabel(f"RFSQ layer (dashed: chance, {layers[0].chance:.0%})")
        axes.set_ylabel("equal tokens, %")
        axes.set_ylim(0, 100)
        axes.grid(axis="x", visible=False)

    return draw_chart(f"tokens {run.name}", draw, 2.6, f"{run.name}: draft and main head give the same token.")
