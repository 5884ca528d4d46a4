"""Runs as the report needs them: named, priced, set against open loop, and with all that follows computed once."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rsd_trt.config import MODES
from rsd_trt.errors import UserError
from rsd_trt.eval.read import read_run
from rsd_trt.eval.report.breakdown import Breakdown, breakdown
from rsd_trt.eval.report.compare import Comparison, Difference, Endpoint, Needed, compare, differences, judge, needed
from rsd_trt.eval.report.cost import COUNTED, Price, read_price
from rsd_trt.eval.results import RATE_INTERVAL, BundleSettings, Results
from rsd_trt.eval.statistics import Interval, counted, holm
from rsd_trt.eval.summary import rate_interval

SAME_RATE = 0.01  # a random-acceptance control that accepts more or less often than that beside a run is none
MARGIN = 1 + 1e-9  # of a cost that is no higher

Rival = Literal["open loop, n = 1", "open loop of no higher cost", "random acceptance"]
RULE = (
    "Declared before any run: each run that checks by a rule is set against open loop with n = 1, and against the run "
    "of open loop with most successes among those of no higher cost. p: McNemar's exact test of the paired episodes, "
    "or, where several begin in one initial state, a sign-flip test of the states' sums; with Holm's adjustment over "
    "all of these; and once more by task, a sign-flip test of the tasks' sums. A difference is shown where both are "
    "below 5%. Would be shown by: so many episodes, with 80% power, if it is as large as measured. The control of "
    "random acceptance is outside of them."
)


@dataclass(frozen=True)
class Against:
    """A run beside a rival. p, by_task_p: with Holm's adjustment over all declared comparisons of the report."""

    rival: Rival
    label: Annotated[str, "the rival's name without the condition"]
    versus: Comparison
    p: float
    by_task_p: float
    verdict: Annotated[Difference, "what both p show at 5%"]
    needed: Annotated[Needed | None, "what would show a difference that is not shown; null: none was measured"] = None


@dataclass(frozen=True)
class Run:
    """A run of a report."""

    number: Annotated[int, "from 1, in the order of the report"]
    name: str
    path: Path
    results: Results
    endpoint: Endpoint
    breakdown: Breakdown
    reached: Annotated[float | None, "rate of success within the endpoint's steps"]
    reached_interval: Annotated[Interval | None, RATE_INTERVAL]
    mean_steps: Annotated[float | None, "restricted to the endpoint's steps"]
    cost: Annotated[float | None, "per action, in the price's unit"]
    against: tuple[Against, ...] = ()
    alone: Annotated[str | None, "why it is set against no run of open loop"] = None

    def rival(self, rival: Rival) -> Against | None:
        """What it comes to beside that rival."""
        return next((one for one in self.against if one.rival == rival), None)

    @property
    def label(self) -> str:
        """The name without the condition."""
        return self.name.replace(f", {condition(self.results.settings.perturb)}", "")

    @property
    def open_loop(self) -> bool:
        return self.results.settings.mode == "baseline"


def read_runs(
    paths: Sequence[Path],
    profile: Path | None = None,
    within: int | None = None,
    declared: Mapping[Path, Collection[str]] | None = None,
) -> tuple[Price, list[Run]]:
    """Every file, and every results file of a folder, as a run, open loop first, and what their counts are priced at.

    Raises:
        UserError: as `read_run` and `read_price`, a file is given twice, or a run is not of a bundle.
    """
    paths = [file for path in paths for file in (_of_folder(path) if path.is_dir() else [path])]
    resolved = [os.path.realpath(path) for path in paths]  # of a loop of links, too
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path} is given twice")
    found = [(path, read_run(path)) for path in paths]
    for path, results in found:
        if results.settings.bundle is None:
            raise UserError(f"{path} is a run of {results.settings.policy}, a script; a report is on runs of bundles")
    price = read_price(profile, [results for _, results in found])
    return price, pair_up(found, price, within, declared)


def pair_up(
    found: Sequence[tuple[Path, Results]],
    price: Price = COUNTED,
    within: int | None = None,
    declared: Mapping[Path, Collection[str]] | None = None,
) -> list[Run]:
    """Names and numbers the runs, those of a condition together and open loop first, and sets those that check against
    their rivals.

    within: as `Endpoint.of`. declared: the rivals that a file's run is tested against, if not all runs against both.
    """

    def place(one: tuple[Path, Results]) -> tuple[str, int, int]:
        settings = one[1].settings
        return settings.perturb or "", MODES.index(settings.of_bundle.mode), settings.n_action_steps

    ordered = sorted(found, key=place)
    names = run_names([results for _, results in ordered])
    named = [_run(i, name, *one, price, within) for i, (name, one) in enumerate(zip(names, ordered, strict=True), 1)]
    return _judged(
        [_set_against(run, named, price, None if declared is None else declared.get(run.path, ())) for run in named]
    )


def _of_folder(folder: Path) -> list[Path]:
    """Its results files.

    Raises:
        UserError: it has none.
    """
    if not (found := sorted(folder.glob("*_results.json*"))):
        raise UserError(f"{folder} has no *_results.json", "rsd-trt eval writes them")
    return found


def _run(number: int, name: str, path: Path, results: Results, price: Price, within: int | None) -> Run:
    endpoint = Endpoint.of(results.settings, within)
    done = [episode for episode in results.episodes if episode.error is None]
    reached = sum(map(endpoint.reached, done))
    return Run(
        number=number,
        name=name,
        path=path,
        results=results,
        endpoint=endpoint,
        breakdown=breakdown(results),
        reached=reached / len(done) if done else None,
        reached_interval=rate_interval(done, results.settings.seeds, endpoint.reached),
        mean_steps=sum(map(endpoint.steps, done)) / len(done) if done else None,
        cost=price.per_action(results),
    )


def _set_against(run: Run, runs: Sequence[Run], price: Price, declared: Collection[str] | None) -> Run:
    """A run that checks by a rule beside its rivals, those of them that are declared; p not adjusted yet."""
    settings = run.results.settings
    if settings.mode != "rsd":
        return run
    loops = [other for other in runs if other.open_loop]
    alike = [loop for loop in loops if not differences(loop.results.settings, settings)]
    if not alike:
        return replace(run, alone=_why_alone(run, loops))
    rivals: list[tuple[Rival, Run]] = []
    if single := [loop for loop in alike if loop.results.settings.n_action_steps == 1]:
        rivals.append(("open loop, n = 1", single[0]))
    cheap = [loop for loop in alike if None not in (loop.cost, run.cost) and loop.cost <= run.cost * MARGIN]  # type: ignore[operator]
    if cheap:
        best = max(cheap, key=lambda loop: (loop.reached or 0.0, -(loop.cost or 0.0)))
        rivals.append(("open loop of no higher cost", best))
    if declared is not None:
        rivals = [(kind, other) for kind, other in rivals if kind in declared]
    if control := _control(run, runs):
        rivals.append(("random acceptance", control))
    found = []
    for kind, other in rivals:
        try:
            versus = compare(other.results, run.results, price, run.endpoint.within, (other.name, run.name))
        except UserError as error:  # they share no episode
            return replace(run, alone=str(error))
        found.append(Against(kind, other.label, versus, versus.mcnemar.p, versus.by_task_p, versus.difference))
    return replace(run, against=tuple(found))


def _why_alone(run: Run, loops: Sequence[Run]) -> str:
    if not loops:
        return "no run of open loop is among the results"
    reasons = {loop.name: differences(loop.results.settings, run.results.settings) for loop in loops}
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    return f"it differs from {nearest}: {'; '.join(reasons[nearest])}"


def _control(run: Run, runs: Sequence[Run]) -> Run | None:
    """The random-acceptance control of a run that checks by a rule: of the same settings, numbers of steps and rate."""
    settings, rates = run.results.settings, run.results.rsd_stats
    if rates.draft_acceptance_rate is None or rates.partial_acceptance_rate is None:
        return None
    accepted = rates.draft_acceptance_rate + rates.partial_acceptance_rate

    def apart(other: Run) -> float:
        return abs((other.results.settings.of_bundle.accept_rate or 0.0) - accepted)

    found = [
        other
        for other in runs
        if other.results.settings.mode == "random"
        and other.results.settings.n_action_steps == settings.n_action_steps
        and not differences(other.results.settings, settings)
        and apart(other) <= SAME_RATE
    ]
    return min(found, key=apart, default=None)


def _judged(runs: Sequence[Run]) -> list[Run]:
    """With Holm's adjustment over the declared comparisons of all runs."""
    declared = [one for run in runs for one in run.against if one.rival != "random acceptance"]
    adjusted = {
        id(one): pair
        for one, *pair in zip(
            declared, holm([one.p for one in declared]), holm([one.by_task_p for one in declared]), strict=True
        )
    }

    def told(one: Against) -> Against:
        p, by_task = adjusted.get(id(one), (one.p, one.by_task_p))
        verdict = judge(one.versus.mcnemar, p, by_task)
        tests = len(declared) if id(one) in adjusted else 1
        lacking = needed(one.versus, p, by_task, tests) if verdict == "not shown" else None
        return replace(one, p=p, by_task_p=by_task, verdict=verdict, needed=lacking)

    return [replace(run, against=tuple(map(told, run.against))) for run in runs]


def run_names(runs: Sequence[Results]) -> list[str]:
    """What each run is, and whatever else it takes to tell it from the others of its kind."""
    names = [_kind(run) for run in runs]
    traits = [_traits(run) for run in runs]
    for trait in traits[0] if traits else ():
        alike = {group: {t[trait] for g, t in zip(names, traits, strict=True) if g == group} for group in names}
        told = [len(alike[name]) > 1 and bool(t[trait]) for name, t in zip(names, traits, strict=True)]
        names = [f"{n}, {t[trait]}" if tell else n for n, t, tell in zip(names, traits, told, strict=True)]
    seen = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name}, #{n}" for name, n in zip(names, seen, strict=True)]


def _kind(run: Results) -> str:
    settings = run.settings
    mode = "open loop" if settings.mode == "baseline" else settings.label
    return f"{mode}, n = {settings.n_action_steps}"


def _traits(run: Results) -> dict[str, str]:
    settings, bundle = run.settings, run.settings.of_bundle
    return {
        "condition": condition(settings.perturb),
        "suite": settings.suite,
        "bundle": settings.policy,
        "variant": variant(bundle),
        "backend": bundle.backend,
        "precision": bundle.precision,
        "backbone": f"{bundle.backbone_name} backbone",
        "protocol": f"protocol {settings.protocol}",
        "hardware": str(settings.hardware.get("gpu", settings.hardware.get("cpu", ""))),
        "timing": f"{settings.timing} timing",
        "workers": counted(run.throughput.workers, "worker") if run.throughput else "interrupted",
        "episodes": counted(run.total_episodes, "episode"),
    }


def condition(perturb: str | None) -> str:
    """`unperturbed`, or the perturbation."""
    return "unperturbed" if perturb is None else perturb


def check_steps(bundle: BundleSettings, n_action_steps: int) -> int:
    """m, the steps that an accepted check commits at most."""
    return bundle.rsd.check_steps or n_action_steps


def variant(bundle: BundleSettings) -> str:
    """What decides acceptance beside the mode: the rule with its threshold, or the rate of `random`."""
    if bundle.mode == "baseline":
        return ""
    rsd = bundle.rsd
    m = f", m = {rsd.check_steps}" if rsd.check_steps else ""
    if bundle.accept_rate is not None:
        return f"accepting {bundle.accept_rate:.1%}{m}"
    thresholds: dict[str, Sequence[float | None]] = {"tokens": (rsd.token_share,), "likelihood": (rsd.threshold,)}
    sure = f", sure {rsd.sure:g}" if rsd.rule == "likelihood" and rsd.sure is not None else ""
    told = dict.fromkeys(thresholds.get(rsd.rule, rsd.tolerance))
    return f"{rsd.rule} {'/'.join('-' if x is None else f'{x:g}' for x in told)}{sure}{m}"
