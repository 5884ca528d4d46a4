"""What a run costs: its counts times the two costs of a profile.

    cost per action = (checks x check + full queries x full) / actions

Counts are of the run's own episodes. A rejected check pays both. Without a profile the cost is the number of full
queries per action, and checks count as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rsd_trt.errors import UserError
from rsd_trt.eval.results import Episode, Results
from rsd_trt.files import read_bounded
from rsd_trt.load import Steadiness
from rsd_trt.records import from_json, parse

HIDDEN = "reads the backbone's hidden state: a check costs a whole backbone pass, so rsd cannot save time with it"
PROFILE = "Give a profile.json; it is made by rsd-trt profile"
Milliseconds = Annotated[float, Meta(gt=0)]


class _Median(msgspec.Struct, frozen=True):
    p50: Milliseconds


class _Row(msgspec.Struct, frozen=True):
    """A row of `costs`, in what a report needs of it."""

    what: Literal["check", "full"]
    backend: str
    backbone: str
    ms: _Median | None
    backbone_precision: str = "bundle"


class _Profile(msgspec.Struct, frozen=True):
    """`profile.json`, in what a report needs of it."""

    bundle: str
    bundle_sha256: str
    hardware: dict[str, str | int]
    costs: tuple[_Row, ...]
    clock: Steadiness | None = None


@dataclass(frozen=True)
class Price:
    """Medians of a check and of a full query of one bundle, on one backend, on one machine."""

    check: float  # ms; without a profile 0
    full: float  # ms; without a profile 1
    unit: Literal["ms", "full queries"]
    told: Annotated[str, "whose costs these are"]
    disturbed: Annotated[tuple[str, ...], "what disturbed the machine while they were measured"] = ()

    def of(self, episodes: Iterable[Episode]) -> list[float]:
        """The cost of each episode."""
        return [
            sum(query.checked for query in e.queries) * self.check + sum(q.full_query for q in e.queries) * self.full
            for e in episodes
        ]

    def per_action(self, run: Results) -> float | None:
        """None where no action was executed, and for shadow mode, which computes all that rsd would save."""
        if not run.steps or run.settings.mode == "shadow":
            return None
        return (run.checks * self.check + run.full_queries * self.full) / run.steps


COUNTED = Price(0.0, 1.0, "full queries", "without a profile: full queries per action, checks left out")


def read_price(path: Path | None, runs: Sequence[Results]) -> Price:
    """The costs in a profile of the backend and backbone that most of the runs had, else of the fastest that were
    measured. Those of another bundle make an estimate for that bundle.

    Raises:
        UserError: the profile cannot be read, or has no pair of costs.
    """
    if path is None:
        return COUNTED
    try:
        found = parse(read_bounded(path), str(path))
    except (OSError, UserError) as error:
        why = error.message if isinstance(error, UserError) else f"{path} cannot be read: {error.strerror or error}"
        raise UserError(why, PROFILE) from None
    if not isinstance(found, dict) or "costs" not in found:
        raise UserError(f"{path} has no costs of a check and a full query", PROFILE)
    profile = from_json(_Profile, found, str(path))
    pairs: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in profile.costs:
        if row.ms is not None:
            pairs.setdefault((row.backend, row.backbone, row.backbone_precision), {})[row.what] = row.ms.p50
    whole = {kind: ms for kind, ms in pairs.items() if len(ms) == 2}
    if not whole:
        raise UserError(f"{path} measured no check beside a full query", "Profile a backend that runs there")
    bundles = [run.settings.of_bundle for run in runs]
    kinds = [(x.backend, x.backbone, x.backbone_precision) for x in bundles]
    own = [kind for kind in kinds if kind in whole]
    kind = max(own, key=own.count) if own else min(whole, key=lambda kind: whole[kind]["full"])
    device = profile.hardware.get("gpu", profile.hardware.get("cpu", ""))
    backend, backbone, precision = kind
    told = f"{profile.bundle} on {device}, {backend}, {backbone}{'' if precision == 'bundle' else f' {precision}'}"
    if any(run.settings.policy_sha256 != profile.bundle_sha256 for run in runs):
        told = f"an estimate for {told}, by the counts of these runs"
    disturbed = profile.clock.disturbed if profile.clock is not None else ()
    return Price(whole[kind]["check"], whole[kind]["full"], "ms", told, disturbed)


def measured(run: Results) -> float | None:
    """ms per action by the run's own clock: the median of each route times its queries, so that what disturbed a few of
    them does not count. None unless queries were answered alone."""
    if run.settings.timing != "single" or not run.steps:
        return None
    times: dict[str, list[float]] = {}
    for query in (query for e in run.episodes if e.error is None for query in e.queries):
        times.setdefault(query.route, []).append(query.ms)
    return sum(median(ms) * len(ms) for ms in times.values()) / run.steps if times else None


def disturbances(runs: Sequence[tuple[str, Results]], price: Price) -> str | None:
    """What disturbed the clocks that a report shows; runs: with their names."""
    found = [(name, run.clock.disturbed) for name, run in runs if run.clock is not None]
    found.append(("the profile", price.disturbed))
    told = [f"{name} ({'; '.join(said)})" for name, said in found if said]
    return f"Disturbed while they were timed: {', '.join(told)}." if told else None


def cannot_save_time(runs: Sequence[Results]) -> str | None:
    """What a report says first where a draft is of kind hidden."""
    names = dict.fromkeys(r.settings.policy for r in runs if r.settings.bundle and r.settings.bundle.draft == "hidden")
    return f"The draft of {', '.join(names)} {HIDDEN}. Distil one with eyes: rsd-trt distill." if names else None
