"""Two runs side by side, if they may be compared at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rsd_trt.errors import UserError

Json = Mapping[str, object]

# What must be equal; the mode is what may differ.
SAME = (
    *("suite", "tasks", "trials", "backend", "precision", "backbone", "device", "protocol", "max_steps"),
    *("n_action_steps", "seed", "bundle_sha256", "exports_sha256", "hardware", "versions"),
)
# (key of the summary, label, unit)
FIGURES = (
    ("final_success_rate", "success rate", "%"),
    ("total_episodes", "episodes", ""),
    ("errors", "errors", ""),
    ("avg_inference_time_ms", "policy time per action", "ms"),
    ("query_ms.p50", "query p50", "ms"),
    ("query_ms.p95", "query p95", "ms"),
    ("queries", "queries", ""),
    ("full_passes", "full passes", ""),
    ("actions_per_query", "actions per query", ""),
    ("steps_per_second", "steps per second, simulation included", ""),
    ("rsd_stats.draft_acceptance_rate", "accepted", "%"),
    ("rsd_stats.partial_acceptance_rate", "partially accepted", "%"),
    ("rsd_stats.full_rejection_rate", "rejected", "%"),
)


def read(path: Path) -> Json:
    """A results file.

    Raises:
        UserError: it is absent, or not a results file.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    episodes = data.get("episodes") if isinstance(data, dict) else None
    whole = isinstance(episodes, list) and all(
        isinstance(e, dict) and {"task_id", "trial"} <= e.keys() for e in episodes
    )
    if not whole or not isinstance(data.get("settings"), dict):
        raise UserError(f"{path} is not a results file of rsd-trt eval (it has no settings and episodes)")
    return data


@dataclass(frozen=True)
class Comparison:
    """Figures of both runs by mode, and how many times less policy time an action took in the second."""

    figures: dict[str, dict[str, float | None]]
    speedup: float | None
    settings: Json
    trained: bool


def compare(a: Json, b: Json) -> Comparison:
    """Two runs of the same episodes.

    Raises:
        UserError: the runs differ in something that makes their figures incomparable.
    """
    left, right = a["settings"], b["settings"]
    assert isinstance(left, Mapping) and isinstance(right, Mapping)
    if absent := [key for key in ("mode", *SAME) if key not in left or key not in right]:
        raise UserError(f"these runs cannot be compared: a results file lacks the settings {', '.join(absent)}")
    different = [
        f"{key} is {left.get(key)!r} and {right.get(key)!r}" for key in SAME if left.get(key) != right.get(key)
    ]
    if left.get("mode") == right.get("mode"):
        different.append(f"both are of mode {left.get('mode')!r}")
    if _episodes(a) != _episodes(b):
        different.append(f"they hold {len(_episodes(a))} and {len(_episodes(b))} episodes, not the same ones")
    if different:
        raise UserError(f"these runs cannot be compared: {'; '.join(different)}")
    before, after = figure(a, "avg_inference_time_ms"), figure(b, "avg_inference_time_ms")
    return Comparison(
        figures={str(left["mode"]): figures(a), str(right["mode"]): figures(b)},
        speedup=before / after if before and after else None,
        settings={key: left.get(key) for key in SAME},
        trained=bool(left.get("trained")),
    )


def figures(summary: Json) -> dict[str, float | None]:
    """The figures of a run, by key."""
    return {key: figure(summary, key) for key, _, _ in FIGURES}


def figure(summary: Json, key: str) -> float | None:
    """A number of the summary by its dotted key; None when the run has none."""
    value: object = summary
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _episodes(summary: Json) -> set[tuple[object, object]]:
    """(task, trial) of every episode that ended without an error."""
    episodes = summary["episodes"]
    assert isinstance(episodes, list)
    return {(e["task_id"], e["trial"]) for e in episodes if e.get("error") is None}
