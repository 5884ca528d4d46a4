"""What a sweep declares: its runs, and the comparisons that will be tested. From a TOML file, options, or both.

An option with a list of values stands for a run with each of them; several lists for all combinations. An option that
has no effect in a mode, or with a rule, does not tell runs of it apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from rsd_trt.bundle import Bundle
from rsd_trt.config import (
    CHECKED,
    DEFAULT_BUNDLE,
    MAX_COUNT,
    MAX_TOLERANCE,
    BackboneKind,
    BackbonePrecision,
    Backend,
    Mode,
    Precision,
    RuleName,
    idle_in_all,
)
from rsd_trt.errors import UserError, did_you_mean, named
from rsd_trt.eval.libero.perturb import PerturbSpec
from rsd_trt.eval.libero.request import EvalRequest, task_numbers, with_options
from rsd_trt.eval.statistics import counted
from rsd_trt.files import read_bounded
from rsd_trt.records import Positive, Record, from_json, read_record, write_record

T = TypeVar("T")
Some: TypeAlias = T | tuple[T, ...]
Steps = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Tolerance = Annotated[float, Meta(ge=0, le=MAX_TOLERANCE)]
LogProbability = Annotated[float, Meta(ge=-MAX_COUNT, le=0)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Workers = Annotated[int, Meta(ge=1, le=256)]
Seconds = Annotated[float, Meta(ge=1, le=86400)]
Rate = Annotated[float, Meta(ge=0, le=1)]
Rival = Literal["open loop, n = 1", "open loop of no higher cost"]  # as the report names what a run is set against

# What a run's name says of an option, before its value.
SHORT = {"n_action_steps": "n", "check_steps": "m", "tolerance": "tolerance", "threshold": "threshold", "sure": "sure"}
SHORT |= {"refresh": "refresh", "accept_rate": "rate", "rule": "", "perturb": "", "suite": "", "bundle": ""}
CALM = "none"  # of `perturb`: undisturbed
PLAN = "sweep.json"


class Options(Record, frozen=True):
    """Options of `rsd-trt eval` under their names, for one run or, with lists, for many."""

    mode: Some[Mode] | None = None
    n_action_steps: Some[Steps] | None = None
    check_steps: Some[Steps] | None = None
    rule: Some[RuleName] | None = None
    tolerance: Some[Tolerance] | None = None
    threshold: Some[LogProbability] | None = None
    sure: Some[LogProbability] | None = None
    refresh: Some[Steps] | None = None
    accept_rate: Some[Rate | Literal["matched"]] | None = None  # of mode random: its own, or that of the like rsd run
    perturb: Some[int | str] | None = None  # "none": undisturbed
    suite: Some[str] | None = None
    bundle: Some[str] | None = None
    policy: str | None = None
    tasks: int | str | tuple[int, ...] | None = None
    trials: Positive | None = None
    seed: Seed | None = None
    protocol: str | None = None
    max_steps: Positive | None = None
    backend: Backend | None = None
    device: str | None = None
    precision: Precision | None = None
    backbone: BackboneKind | None = None
    backbone_precision: BackbonePrecision | None = None
    engines: str | None = None
    workers: Workers | None = None  # of each model that is loaded
    timeout: Seconds | None = None


class Compare(Record, frozen=True):
    """Runs, by names in which * stands for anything, and what they are tested against."""

    run: str
    against: Annotated[tuple[Rival, ...], Meta(min_length=1)] = ("open loop, n = 1", "open loop of no higher cost")


class SweepFile(Options, frozen=True):
    """A sweep's TOML file: options of all runs, tables of runs, and tables of comparisons."""

    run: tuple[Options, ...] = ()
    compare: tuple[Compare, ...] | None = None  # None: every run that checks by a rule against both rivals


@dataclass(frozen=True)
class Run:
    """A run of a sweep. matched: the name of the run whose rate of acceptance it takes over."""

    name: str
    request: EvalRequest
    matched: str | None = None


class Declared(Record, frozen=True):
    """A comparison that will be tested."""

    run: str
    against: Rival


class Plan(Record, frozen=True):
    """What is kept of a plan beside its results: the comparisons, before the first episode of any of them."""

    comparisons: tuple[Declared, ...]


@dataclass(frozen=True)
class Sweep:
    """Runs in the order in which they are begun: one that takes over a rate comes after the one that has it."""

    runs: tuple[Run, ...]
    comparisons: tuple[Declared, ...]
    out: Path

    def declare(self) -> None:
        """Writes the comparisons down, or finds that they are those of before.

        Raises:
            UserError: they are others: what is tested cannot be chosen once results are there.
        """
        path = self.out / PLAN
        try:
            before = set(read_record(Plan, path).comparisons)
        except FileNotFoundError:
            self.out.mkdir(parents=True, exist_ok=True)
            write_record(path, Plan(self.comparisons))
            return
        if changed := before ^ set(self.comparisons):
            one = min(changed, key=lambda declared: (declared.run, declared.against))
            verb = "was" if one in before else "was not"
            raise UserError(
                f"{path}: {one.run} against {one.against} {verb} declared when the sweep began, and now it is "
                f"otherwise ({counted(len(changed), 'such comparison')})",
                "Declare the same comparisons, or choose another -o",
            )


def read_sweep(path: Path | None, given: Mapping[str, object], out: Path, workers: int) -> Sweep:
    """The sweep of a TOML file, of options, or of both: options take the place of the file's. workers: where neither
    says how many.

    Raises:
        UserError: the file cannot be read, or declares no run, a run twice, or what makes no sense.
    """
    options = from_json(Options, dict(given), "the options")
    where, file = "the options", SweepFile()
    if path is not None:
        where, file = str(path), from_json(SweepFile, _toml(path), str(path))
    if file == SweepFile() and options == Options():
        raise UserError(f"{where} declares no run", "Write a [[run]] table, or give options such as --mode rsd")
    common = {name: getattr(file, name) for name in Options.__struct_fields__}
    runs: dict[str, Run] = {}
    idle: list[tuple[Mode, dict[str, str]]] = []  # which options make no difference in a run, with why
    for number, table in enumerate(file.run or (Options(),), start=1):
        told_by = f"{where}, run {number}" if file.run else where
        own = _given(msgspec.structs.asdict(table))
        merged = _given(common) | own | _given(msgspec.structs.asdict(options))
        declared, without = _expand({"workers": workers, **merged}, out, told_by)
        _refuse({name: why for name, why in idle_in_all(without).items() if name in own}, told_by)
        idle += without
        for run in declared:
            if runs.setdefault(run.name, run) is not run:
                raise UserError(f"{told_by} declares {run.name} again", "Declare a run once")
    _refuse(idle_in_all(idle), where)
    _check_distinct(list(runs.values()), where)
    ordered = _matched(list(runs.values()), where)
    return Sweep(tuple(ordered), _comparisons(ordered, file.compare, where), out)


def _toml(path: Path) -> object:
    try:
        return msgspec.toml.decode(read_bounded(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # the decoder's errors are ValueErrors
        raise UserError(f"{path} is no TOML: {error}") from None


def _given(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _values(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _refuse(idle: Mapping[str, str], where: str) -> None:
    for name, why in idle.items():
        raise UserError(f"{where}: {name} {why}", "Leave it out, or choose such a rule or mode")


def _expand(
    options: Mapping[str, object], out: Path, where: str
) -> tuple[list[Run], list[tuple[Mode, dict[str, str]]]]:
    """A run for each combination of values that makes a difference; and of each combination its mode, and which options
    make none, with why."""
    lists = {name: _values(value) for name, value in options.items() if name != "tasks"}
    runs: dict[str, Run] = {}
    found: list[tuple[Mode, dict[str, str]]] = []
    for combination in itertools.product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        idle = _idle(chosen, where)
        found.append((chosen.get("mode", "rsd"), idle))  # type: ignore[arg-type]
        used = {name: value for name, value in chosen.items() if name not in idle}
        run = _run(used | {"tasks": options.get("tasks")}, out, where)
        runs.setdefault(run.name, run)
    return list(runs.values()), found


def _check_distinct(runs: Sequence[Run], where: str) -> None:
    """Raises UserError: two runs come to one, where a bundle's own values stand for what a request does not name."""
    names: dict[object, str] = {}
    for run in runs:
        request = run.request
        rsd = None if request.policy is not None else with_options(Bundle.open(request.bundle).config.rsd, request)
        checks = dict.fromkeys(("n_action_steps", *CHECKED))
        told = replace(request, out=Path(), **checks)  # type: ignore[arg-type]
        other = names.setdefault((told, rsd, run.matched), run.name)
        if other != run.name:
            raise UserError(
                f"{where}: {other} and {run.name} have the same settings: they are one run", "Leave one of them out"
            )


def _idle(chosen: Mapping[str, object], where: str) -> dict[str, str]:
    """The options of a run that have no effect on its bundle's loop, each with why."""
    if chosen.get("policy") is not None or not chosen.keys() & {*CHECKED, "accept_rate"}:
        return {}
    try:
        rsd = Bundle.open(Path(str(chosen.get("bundle", DEFAULT_BUNDLE)))).config.rsd
        return rsd.idle(chosen.get("mode", "rsd"), chosen)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.remedy) from None


def _run(chosen: dict[str, object], out: Path, where: str) -> Run:
    mode: Mode = chosen.get("mode", "rsd")  # type: ignore[assignment]
    bundle = Path(str(chosen.get("bundle", DEFAULT_BUNDLE)))
    perturb = str(chosen.pop("perturb", CALM))
    spec = None if perturb == CALM else PerturbSpec.parse(perturb)
    if chosen.get("policy") is not None:
        module, _, function = str(chosen["policy"]).partition(":")
        if not module or not function:
            raise UserError(f"{where}: policy {named(chosen['policy'])} is not MODULE:FUNCTION")
        idle = [name for name in chosen if name in SHORT and name not in ("suite",)] + ["mode"] * ("mode" in chosen)
        if idle:
            raise UserError(f"{where}: policy {chosen['policy']} runs no bundle, and {idle[0]} is of bundles")
    matched = mode == "random" and chosen.get("accept_rate", "matched") == "matched"
    if matched:
        chosen["accept_rate"] = None
    parts = [mode if chosen.get("policy") is None else str(chosen["policy"]).rpartition(".")[2].replace(":", ".")]
    parts += [bundle.name] if "bundle" in chosen else []
    parts += [str(chosen[name]) for name in ("suite", "rule") if chosen.get(name) is not None]
    parts += [
        f"{short}{value:g}" for name, short in SHORT.items() if isinstance(value := chosen.get(name), (int, float))
    ]
    parts += [] if spec is None else [str(spec).replace(":", "-")]
    name = "_".join(parts)
    paths = {key: Path(str(chosen.pop(key))) for key in ("bundle", "engines") if chosen.get(key) is not None}
    tasks = _tasks(chosen.pop("tasks", None), where)
    request = EvalRequest(**_given(chosen), **paths, tasks=tasks, perturb=spec, out=out / name)  # type: ignore[arg-type]
    return Run(name, request, matched="" if matched else None)


def _tasks(value: object, where: str) -> tuple[int, ...] | None:
    """As `task_numbers`; a number or a list of numbers, too."""
    if value is None or isinstance(value, tuple):
        return value and tuple(sorted(set(value)))
    try:
        return task_numbers(str(value))
    except UserError as error:
        raise UserError(f"{where}: tasks {error}") from None


def _matched(runs: list[Run], where: str) -> list[Run]:
    """The runs with those that take over a rate behind the run that they take it from.

    Raises:
        UserError: there is none, or more than one.
    """
    found = []
    for run in runs:
        if run.matched is not None:
            same = replace(run.request, mode="rsd", out=Path())
            ruled = [other for other in runs if other.request.mode == "rsd" and other.request.policy is None]
            alike = [
                other
                for other in ruled
                if replace(other.request, rule=None, tolerance=None, threshold=None, sure=None, out=Path()) == same
            ]
            if len(alike) != 1:
                names = ", ".join(other.name for other in alike) or "none"
                raise UserError(
                    f"{where}: {run.name} takes over the rate of the rsd run with the same options, which are {names}",
                    "Declare one such run, or give accept_rate",
                )
            run = replace(run, matched=alike[0].name)
        found.append(run)
    return sorted(found, key=lambda run: run.matched is not None)


def _comparisons(runs: list[Run], declared: tuple[Compare, ...] | None, where: str) -> tuple[Declared, ...]:
    """The comparisons of runs that check by a rule, by default with both rivals."""
    testable = [run.name for run in runs if run.request.policy is None and run.request.mode == "rsd"]
    found: dict[Declared, None] = {}
    for one in (Compare("*"),) if declared is None else declared:
        names = [name for name in testable if fnmatchcase(name, one.run)]
        if not names and declared is not None:
            raise UserError(f"{where}: compare names {one.run!r}, which no rsd run is{did_you_mean(one.run, testable)}")
        found |= {Declared(name, rival): None for name in names for rival in one.against}
    return tuple(found)
