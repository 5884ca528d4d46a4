"""The experiment's targets and the report's conclusion: words that follow from the numbers by rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from rsd_trt.eval.report.compare import Comparison, displaced
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.tradeoff import Tradeoff, same_cost_sentences
from rsd_trt.eval.report.wording import interval, listed, number
from rsd_trt.eval.results import Results
from rsd_trt.eval.statistics import (
    CONFIDENCE,
    Interval,
    Verdict,
    bootstrap_share,
    counted,
    smallest_provable_loss,
    verdict,
    wilson,
)

# Of the original experiment; each is to be exceeded.
SUCCESS_TARGET = 0.85
SPEEDUP_TARGET = 1.2
ACCEPTANCE_TARGET = 0.6

What = Literal["success", "speed-up", "acceptance"]
VERDICTS = (
    "met, not met: the whole interval is above, below; not proved: it is not. For success, episodes that ended in an "
    "error count as failures for met, and as successes for not met"
)
TESTED = ("accepted", "partial", "rejected")


@dataclass(frozen=True)
class Target:
    """A target and what a run has to say about it."""

    what: What
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


def targets(run: Run) -> tuple[Target, ...]:
    """What a run says about the targets that its mode can speak of: a baseline about success, shadow mode about
    acceptance too, and rsd about all. Mode random is a control, and has none."""
    mode = run.results.settings.mode
    if mode == "random":
        return ()
    found = [_success(run.results)]
    if mode == "rsd":
        found.append(_speedup(run))
    if mode != "baseline":
        found.append(_acceptance(run.results))
    return tuple(found)


def _success(results: Results) -> Target:
    """The rate is of the episodes without an error; the verdict holds however those with one would have ended."""
    done, succeeded, errors = results.total_episodes, results.total_successes, results.errors
    said: Verdict = "not measured"
    reason: str | None = "no episode ended without an error"
    worst, best = wilson(succeeded, done + errors), wilson(succeeded + errors, done + errors)
    if done and worst and best:
        said = verdict((worst[0], best[1]), SUCCESS_TARGET)
        reason = _errors(results) if errors and said == "not proved" else None
    rate, bounds = results.final_success_rate, results.final_success_interval
    return Target("success", SUCCESS_TARGET, "%", rate, bounds, said, reason)


def _errors(results: Results) -> str:
    """`2 of 100 episodes ended in an error`."""
    return f"{results.errors:,} of {counted(results.total_episodes + results.errors, 'episode')} ended in an error"


def _speedup(run: Run) -> Target:
    if run.versus is None or run.versus.speedup is None:
        reason = (run.versus.no_speedup if run.versus else run.alone) or ""
        said = reason.removeprefix("not measured: ")
        return Target("speed-up", SPEEDUP_TARGET, "x", None, None, "not measured", said)
    found = run.versus.speedup
    judged, why = _judged(found.interval, SPEEDUP_TARGET)
    return Target("speed-up", SPEEDUP_TARGET, "x", found.value, found.interval, judged, why)


def _acceptance(results: Results) -> Target:
    done = [episode for episode in results.episodes if episode.error is None]
    routes = [[query.route for query in episode.queries] for episode in done]
    bounds = bootstrap_share(
        [r.count("accepted") for r in routes], [sum(route in TESTED for route in r) for r in routes]
    )
    rate = results.rsd_stats.draft_acceptance_rate
    if rate is None:
        reason = "no query tested a live plan"
        return Target("acceptance", ACCEPTANCE_TARGET, "%", None, None, "not measured", reason)
    said, why = _judged(bounds, ACCEPTANCE_TARGET)
    return Target("acceptance", ACCEPTANCE_TARGET, "%", rate, bounds, said, why)


def _judged(bounds: Interval | None, target: float) -> tuple[Verdict, str | None]:
    """The verdict on what was measured, and why it has no interval."""
    if bounds is None:
        return "not proved", "too few episodes for an interval"
    return verdict(bounds, target), None


@dataclass(frozen=True)
class Conclusion:
    headlines: Annotated[tuple[str, ...], "what matters most"]
    sentences: Annotated[tuple[str, ...], "the figures behind it"]


def conclude(runs: Sequence[Run], tradeoff: Tradeoff | None = None) -> Conclusion:
    """The conclusion in words."""
    headlines = []
    if untrained := [run.name for run in runs if not run.results.settings.trained]:
        headlines.append(
            f"The bundle of {listed(untrained)} is untrained (random weights): these figures show that the tools work, "
            "and say nothing about a policy."
        )
    speculative = [run for run in runs if run.results.settings.mode == "rsd"]
    headlines += [headline(run) for run in speculative]
    if not speculative:
        headlines.append("No run of mode rsd is among the results: speed-up and acceptance of rsd are not measured.")
    sentences = []
    for run in runs:
        sentences.append(success_sentence(run))
        if run.versus is not None and run.baseline is not None:
            sentences.append(difference_sentence(run.versus, run.name, run.baseline))
            if run.results.settings.mode == "rsd":
                sentences.append(speedup_sentence(run.versus, run.name, run.baseline))
        elif run.alone is not None:
            sentences.append(f"The run {run.name} is not compared: {run.alone}.")
        if run.versus_control is not None and run.control is not None:
            sentences.append(difference_sentence(run.versus_control, run.name, run.control))
    if tradeoff is not None:
        sentences += same_cost_sentences(tradeoff)
    return Conclusion(tuple(headlines), tuple(sentences))


def headline(run: Run) -> str:
    """Which targets a run meets, by verdict, and how many of its episodes ended in an error."""
    errors = f"; {_errors(run.results)}" if run.results.errors else ""
    verdicts: dict[Verdict, list[str]] = {}
    for target in targets(run):
        verdicts.setdefault(target.verdict, []).append(target.what)
    if len(verdicts) == 1 and "met" in verdicts:
        return f"The run {run.name} meets all three targets{errors}."
    words: tuple[tuple[Verdict, str, str], ...] = (
        ("met", "meets", ""),
        ("not met", "misses", ""),
        ("not proved", "neither meets nor misses", " beyond doubt"),
        ("not measured", "does not measure", ""),
    )
    parts = [f"{verb} {_targets(verdicts[v])}{end}" for v, verb, end in words if v in verdicts]
    return f"The run {run.name} {'; it '.join(parts)}{errors}."


def success_sentence(run: Run) -> str:
    """How many episodes of a run succeed."""
    results = run.results
    if not results.total_episodes:
        return f"In {run.name}, no episode ended without an error ({counted(results.errors, 'error')})."
    errors = f"; {counted(results.errors, 'episode')} ended in an error, counted apart" if results.errors else ""
    moved = displaced(results)
    if moved is not None:
        errors += f"; the target was displaced in {moved:,} of them"
    return (
        f"In {run.name}, {results.total_successes:,} of {counted(results.total_episodes, 'episode')} succeed: "
        f"{number(results.final_success_rate, '%')} ({interval(results.final_success_interval, '%')}){errors}."
    )


def difference_sentence(versus: Comparison, name: str, baseline: str) -> str:
    """Success of a run against the baseline's on the same initial states."""
    test = versus.mcnemar
    left_out = f" ({versus.left_out:,} left out)" if versus.left_out else ""
    if versus.other_hardware:
        left_out += f", but on other hardware ({'; '.join(versus.other_hardware)})"
    start = (
        f"On the same {counted(versus.pairs, 'initial state')}{left_out}, {name} gains {test.gained} and loses "
        f"{test.lost} against {baseline} ({versus.success_points:+.1f} points, McNemar's exact p = {test.p:.2g}): "
    )
    if test.p < 1 - CONFIDENCE:
        return start + f"its success is {'higher' if test.gained > test.lost else 'lower'}."
    least = smallest_provable_loss(versus.pairs)
    if least is None:
        return start + "too few episodes to show any difference."
    return start + (
        f"no difference is shown, and by {versus.pairs:,} pairs no loss of fewer than {least} episodes "
        f"({least / versus.pairs * 100:.1f} points) could be."
    )


def speedup_sentence(versus: Comparison, name: str, baseline: str) -> str:
    """Policy time per action of a run against the baseline's."""
    if versus.speedup is None or versus.ms_per_action is None:
        return f"Speed-up of {name} over {baseline}: {versus.no_speedup}."
    before, after = versus.ms_per_action
    bounds = versus.speedup.interval
    start = (
        f"{'Replayed, an' if versus.speedup.replayed else 'An'} action takes {number(after, 'ms')} of policy time in "
        f"{name} and {number(before, 'ms')} in {baseline}: "
        f"{number(versus.speedup.value, 'x')}"
    )
    if bounds is None:
        return f"{start}, from too few episodes for an interval."
    judged = "faster" if bounds[0] > 1 else "slower" if bounds[1] < 1 else "neither faster nor slower beyond doubt"
    return f"{start} ({interval(bounds, 'x')}), {judged}."


def _targets(whats: Sequence[str]) -> str:
    return f"the target{'s' if len(whats) > 1 else ''} for {listed(whats)}"
