"""The original experiment's targets, and what a run says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rsd_trt.eval.report.compare import SpeedUp
from rsd_trt.eval.results import Results
from rsd_trt.eval.statistics import Interval, Verdict, bootstrap_share, counted, verdict, wilson

# Each is to be exceeded.
SUCCESS_TARGET = 0.85
SPEEDUP_TARGET = 1.2
ACCEPTANCE_TARGET = 0.6

VERDICTS = (
    "met, not met: the whole interval is above, below; not proved: it is not. For success, episodes that ended in an "
    "error count as failures for met, and as successes for not met"
)
TESTED = ("accepted", "partial", "rejected")


@dataclass(frozen=True)
class Target:
    """A target and what a run has to say about it."""

    what: Literal["success", "speed-up", "acceptance"]
    above: float
    unit: Literal["%", "x"]
    value: float | None
    interval: Annotated[Interval | None, "95%"]
    verdict: Annotated[Verdict, VERDICTS]
    reason: Annotated[str | None, "why it is not measured or not proved, or why there is no interval"]

    @property
    def bound(self) -> str:
        """`85%`, `1.2x`."""
        return f"{self.above:.0%}" if self.unit == "%" else f"{self.above:g}x"


def targets(results: Results, speedup: SpeedUp | None, no_speedup: str | None) -> tuple[Target, ...]:
    """What a run says about the targets that its mode can speak of: a baseline about success, shadow mode about
    acceptance too, and rsd about all. Mode random is a control, and has none. no_speedup: why there is no speed-up."""
    mode = results.settings.mode
    if mode == "random":
        return ()
    found = [_success(results)]
    if mode == "rsd":
        found.append(_speedup(speedup, no_speedup))
    if mode != "baseline":
        found.append(_acceptance(results))
    return tuple(found)


def _success(results: Results) -> Target:
    """The rate is of the episodes without an error; the verdict holds however those with one would have ended."""
    done, succeeded, errors = results.total_episodes, results.total_successes, results.errors
    said: Verdict = "not measured"
    reason: str | None = "no episode ended without an error"
    worst, best = wilson(succeeded, done + errors), wilson(succeeded + errors, done + errors)
    if done and worst and best:
        said, reason = verdict((worst[0], best[1]), SUCCESS_TARGET), None
        if errors and said == "not proved":
            reason = f"{errors:,} of {counted(done + errors, 'episode')} ended in an error"
    return Target(
        "success", SUCCESS_TARGET, "%", results.final_success_rate, results.final_success_interval, said, reason
    )


def _speedup(found: SpeedUp | None, no_speedup: str | None) -> Target:
    if found is None:
        return Target("speed-up", SPEEDUP_TARGET, "x", None, None, "not measured", no_speedup)
    return Target(
        "speed-up", SPEEDUP_TARGET, "x", found.value, found.interval, *_judged(found.interval, SPEEDUP_TARGET)
    )


def _acceptance(results: Results) -> Target:
    rate = results.rsd_stats.draft_acceptance_rate
    if rate is None:
        reason = "no query tested a chunk"
        return Target("acceptance", ACCEPTANCE_TARGET, "%", None, None, "not measured", reason)
    routes = [[query.route for query in episode.queries] for episode in results.episodes if episode.error is None]
    bounds = bootstrap_share(
        [r.count("accepted") for r in routes], [sum(route in TESTED for route in r) for r in routes]
    )
    return Target("acceptance", ACCEPTANCE_TARGET, "%", rate, bounds, *_judged(bounds, ACCEPTANCE_TARGET))


def _judged(bounds: Interval | None, target: float) -> tuple[Verdict, str | None]:
    """The verdict on what was measured, and why it has no interval."""
    if bounds is None:
        return "not proved", "too few episodes for an interval"
    return verdict(bounds, target), None
