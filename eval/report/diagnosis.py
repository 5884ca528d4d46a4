"""Why a target is missed: rules over results files. Each finding has its figures, and says when nothing stands out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Literal

from rsd_trt.config import ACTION_NAMES, ARM_DIMS
from rsd_trt.eval.report.breakdown import (
    Agreement,
    agreement_by_dimension,
    agreement_by_step,
    executed,
    full_query_share,
    gripper_switches,
    route_times,
    share_outside,
)
from rsd_trt.eval.report.compare import Comparison, differences
from rsd_trt.eval.report.conclusion import targets
from rsd_trt.eval.report.runs import Run
from rsd_trt.eval.report.wording import ABSENT, listed, number, signed
from rsd_trt.eval.results import Results

OUTSIDE = 0.05  # share of actions outside the training data's 1% to 99% quantiles, of which the data itself has 0.02
NARROW = 0.5  # of the training range: less is hardly moving
BIASED = 0.25  # of the training range, between its middle and the mean action
LOSSY = 0.01  # root mean square error of the codec, environment units: 0.5 mm under LIBERO's OSC_POSE
FEWEST_SWITCHES, MOST_SWITCHES = 1.0, 10.0  # of the gripper in an episode: grasping is one, letting go another
MOSTLY = 0.5  # of the queries, or of a full query's time
UNINFORMED = 0.05  # above the chance line: less is as good as chance
WEAK = 0.9  # agreement of a dimension or step that leaves little of a plan to be accepted
CLOSE = 0.05  # difference of two shares of agreement that is not worth a word
FALSE_ACCEPTS = 0.05  # of the accepted queries

Topic = Literal["success", "speed-up", "acceptance"]
Picture = Literal["actions", "dimensions", "steps", "tokens"]


@dataclass(frozen=True)
class Finding:
    """What a rule found in a run."""

    run: str
    source: Annotated[str, "the run that the figures are of: for acceptance, the shadow-mode run beside it"]
    topic: Annotated[Topic, "the target that is missed or not proved"]
    title: str
    stands_out: Annotated[bool, "whether the figures explain the miss"]
    sentence: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: Picture | None = None


def diagnose(runs: Sequence[Run]) -> tuple[Finding, ...]:
    """The findings on every target that a run does not meet. Shadow mode acts as the baseline, and is looked at for
    itself only where it is alone."""
    modes = {run.results.settings.mode for run in runs}
    found: list[Finding] = []
    for run in runs:
        mode, results = run.results.settings.mode, run.results
        missed = {target.what for target in targets(run) if target.verdict != "met"}
        if "success" in missed and results.total_episodes and (mode != "shadow" or modes == {"shadow"}):
            found += (_actions(run.name, results), _codec(run.name, results), _gripper(run.name, results))
        if "speed-up" in missed and results.queries:
            found += [_draft_block(run), _time(run)]
            found += [] if run.versus is None else [_actions_per_query(run, run.versus)]
        if "acceptance" in missed and results.queries and (mode == "rsd" or "rsd" not in modes):
            shadow = _shadow(run, runs)
            found += _agreement(run.name, shadow)
            found += [] if shadow is None else [_decisions(run.name, shadow.name, shadow.results)]
            found += _tokens(run.name, (shadow or run).name, (shadow or run).results)
    return tuple(found)


def _actions(run: str, results: Results) -> Finding:
    done, training, title = executed(results), results.settings.training_actions, "Executed actions"
    if done is None:
        return Finding(run, run, "success", title, False, "Not measured: no action statistics are in the results file.")
    columns = ("dimension", "min", "mean", "max", "training 1%", "training 99%", "outside")
    rows: list[tuple[str, ...]] = []
    odd: list[str] = []
    for i, name in enumerate(ACTION_NAMES):
        row = [name, *(signed(values[i]) for values in (done.minimum, done.mean, done.maximum))]
        if training is None:
            rows.append((*row, ABSENT, ABSENT, ABSENT))
            continue
        low, high = training.q01[i], training.q99[i]
        outside = share_outside(done.histogram[i], low, high)
        rows.append((*row, signed(low), signed(high), number(outside, "%")))
        if i < ARM_DIMS:
            reached = done.maximum[i] - done.minimum[i]
            if outside > OUTSIDE:
                odd.append(f"{name} leaves the training range in at least {outside:.0%} of the steps")
            elif reached < NARROW * (high - low):
                odd.append(f"{name} covers {reached / (high - low):.0%} of the training range")
            elif abs(done.mean[i] - (low + high) / 2) > BIASED * (high - low):
                odd.append(f"{name} is biased: its mean is {signed(done.mean[i])}")
    if training is None:
        sentence = "Not judged: the bundle has no training_actions to set them against."
    elif odd:
        sentence = f"Of the executed actions, {listed(odd)}. Check the control section against the training."
    else:
        sentence = "Nothing stands out: ranges and means are those of the training data."
    return Finding(run, run, "success", title, bool(odd), sentence, columns, tuple(rows), "actions")


def _codec(run: str, results: Results) -> Finding:
    mse = results.codec_round_trip_mse
    assert mse is not None, "a report is on runs of bundles"
    rms = math.sqrt(mse)
    lossy = rms > LOSSY
    sentence = (
        f"Decoding the tokens loses {rms:.2g} (root mean square, environment units): the codec cannot be decoded from "
        "tokens alone, so no head can act precisely. Retrain it with static scales."
        if lossy
        else f"Nothing stands out: decoding the tokens loses {rms:.2g} (root mean square, environment units)."
    )
    columns = ("tokens to actions", "environment units")
    rows = (("mean square error", f"{mse:.2g}"), ("root mean square error", f"{rms:.2g}"))
    return Finding(run, run, "success", "Codec round trip", lossy, sentence, columns, rows)


def _gripper(run: str, results: Results) -> Finding:
    won, lost = gripper_switches(results, True), gripper_switches(results, False)
    rows = (("succeeded", number(won)), ("failed", number(lost)))
    columns, title = ("episodes that", "gripper switches, mean"), "Gripper"
    if lost is None:
        return Finding(run, run, "success", title, False, "No failed episode has action statistics.", columns, rows)
    if lost < FEWEST_SWITCHES:
        sentence = (
            f"Failed episodes switch the gripper {number(lost)} times on average: it hardly ever closes. Check "
            "control.gripper and whether the approach ends above the object."
        )
    elif lost > MOST_SWITCHES:
        sentence = f"Failed episodes switch the gripper {number(lost)} times on average: it chatters."
    else:
        sentence = f"Nothing stands out: failed episodes switch the gripper {number(lost)} times on average."
    return Finding(run, run, "success", title, not FEWEST_SWITCHES <= lost <= MOST_SWITCHES, sentence, columns, rows)


def _draft_block(run: Run) -> Finding:
    k, n = run.results.settings.rsd.draft_block, run.results.settings.backbone_blocks
    late = k == n
    sentence = (
        f"The draft reads after block {k}, the last: a query can never be cheaper than the baseline's, and only more "
        "actions a query save time. Train a draft on an earlier block."
        if late
        else f"The draft reads after block {k} of {n}: an accepted query skips {1 - k / n:.0%} of the blocks."
    )
    return Finding(run.name, run.name, "speed-up", "Draft block", late, sentence, ("k", "N"), ((str(k), str(n)),))


def _time(run: Run) -> Finding:
    results = run.results
    share = full_query_share(results) or 0.0
    causes = ", ".join(f"{route} {count:,}" for route, count in results.routes.items())
    said = [f"{share:.0%} of the queries run the whole backbone (routes: {causes})"]
    times = route_times(results) if results.settings.timing == "single" else ()
    medians = {part.group: median(part.ms) for part in times}
    full = [ms for part in times if part.group in ("rejected", "full query") for ms in part.ms]
    ratio = medians["accepted"] / median(full) if "accepted" in medians and full else 0.0
    if ratio:
        said.append(f"an accepted query takes {ratio:.0%} of a full query's time")
    columns = ("route", "queries", "p50", "share of policy time") if times else ()
    rows = tuple(
        (part.group, number(len(part.ms)), number(medians[part.group], "ms"), number(part.share, "%")) for part in times
    )
    odd = max(share, ratio) > MOSTLY
    return Finding(run.name, run.name, "speed-up", "Where the time goes", odd, f"{'; '.join(said)}.", columns, rows)


def _actions_per_query(run: Run, versus: Comparison) -> Finding:
    mine, before = run.results.actions_per_query, versus.figures[versus.modes[0]]["actions_per_query"]
    fewer = mine is not None and before is not None and mine < before * (1 - CLOSE)
    sentence = f"A query commits {number(mine)} actions, one of the baseline {number(before)}"
    sentence += ": the queries that this adds eat up what cheap ones save." if fewer else "."
    columns, rows = ("run", "actions per query"), (("this run", number(mine)), ("baseline", number(before)))
    return Finding(run.name, run.name, "speed-up", "Actions per query", fewer, sentence, columns, rows)


def _agreement(name: str, shadow: Run | None) -> tuple[Finding, ...]:
    title = "Agreement by dimension and step"
    if shadow is None:
        told = "Not measured: no shadow-mode run of the same settings is here (rsd-trt eval --mode shadow)."
        return (Finding(name, name, "acceptance", title, False, told),)
    source = shadow.name
    by_dimension, by_step = agreement_by_dimension(shadow.results), agreement_by_step(shadow.results)
    if by_dimension is None or by_step is None:
        told = f"Not measured: {source} tested no live plan."
        return (Finding(name, source, "acceptance", title, False, told),)
    return _by_dimension(name, source, by_dimension), _by_step(name, source, by_step)


def _by_dimension(name: str, source: str, found: Agreement) -> Finding:
    worst = min(range(len(found.draft)), key=lambda i: found.draft[i])
    draft, main = found.draft[worst], found.main[worst]
    weak = draft < WEAK
    sentence = (
        f"{ACTION_NAMES[worst]} agrees least: the draft is within the tolerance in {draft:.0%} of the steps, the main "
        f"head's own next plan in {main:.0%}"
    )
    sentence += (
        ": the tolerance is tighter than the main head repeats itself." if weak and main - draft < CLOSE else "."
    )
    columns = ("dimension", "draft agrees", "main head agrees", "median |draft - plan|", "steps")
    rows = _agreement_rows(ACTION_NAMES, found)
    return Finding(name, source, "acceptance", "Agreement by dimension", weak, sentence, columns, rows, "dimensions")


def _by_step(name: str, source: str, found: Agreement) -> Finding:
    first, last = found.draft[0], found.draft[-1]
    sentence = f"All dimensions agree in {first:.0%} of the queries at the first step ahead, in {last:.0%} at the last."
    columns = ("step ahead", "draft agrees", "main head agrees", "median of the worst arm dimension", "queries")
    rows = _agreement_rows([str(i + 1) for i in range(len(found.draft))], found)
    return Finding(name, source, "acceptance", "Agreement by step", first < WEAK, sentence, columns, rows, "steps")


def _agreement_rows(names: Sequence[str], found: Agreement) -> tuple[tuple[str, ...], ...]:
    shares = zip(names, found.draft, found.main, found.gap, found.n, strict=True)
    return tuple((name, number(d, "%"), number(m, "%"), f"{gap:.3f}", number(n)) for name, d, m, gap, n in shares)


def _decisions(name: str, source: str, shadow: Results) -> Finding:
    counts = shadow.verdicts
    wrong = counts.get("false_accept", 0)
    accepted = counts.get("true_accept", 0) + wrong
    share = wrong / accepted if accepted else 0.0
    sentence = (
        f"{number(share, '%')} of the accepted queries commit actions that the main head would not confirm."
        if accepted
        else "No query was accepted."
    )
    rows = tuple((verdict.replace("_", " "), number(count)) for verdict, count in counts.items())
    odd = share > FALSE_ACCEPTS
    return Finding(
        name, source, "acceptance", "Right and wrong decisions", odd, sentence, ("decision", "queries"), rows
    )


def _tokens(name: str, source: str, results: Results) -> tuple[Finding, ...]:
    if results.token_agreement is None:
        return ()
    chance = results.token_agreement_chance
    blind = [f"L{i}" for i, share in enumerate(results.token_agreement) if share < chance + UNINFORMED]
    sentence = (
        f"No better than chance ({chance:.0%}): the draft's tokens of {listed(blind)}."
        if blind
        else f"Every coarse layer agrees more often than by chance ({chance:.0%})."
    )
    rows = tuple((f"L{i}", number(s, "%"), number(chance, "%")) for i, s in enumerate(results.token_agreement))
    columns = ("layer", "equal tokens", "chance")
    return (Finding(name, source, "acceptance", "Token agreement", bool(blind), sentence, columns, rows, "tokens"),)


def _shadow(run: Run, runs: Sequence[Run]) -> Run | None:
    """The shadow-mode run of the same settings."""
    if run.results.settings.mode == "shadow":
        return run
    alike = (
        other
        for other in runs
        if other.results.settings.mode == "shadow" and not differences(run.results.settings, other.results.settings)
    )
    return next(alike, None)
