"""Which runs may be compared, and the speed-up's definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rsd_trt.errors import UserError
from rsd_trt.eval.compare import SAME, compare, read


def results(mode: str, ms: float, **settings: object) -> dict[str, object]:
    return {
        "settings": {**dict.fromkeys(SAME, 0), "mode": mode, "backend": "torch", "trained": True, **settings},
        "episodes": [{"task_id": 0, "trial": 0, "error": None}],
        "avg_inference_time_ms": ms,
        "query_ms": {"p50": ms},
    }


def test_speedup_is_policy_time_per_action() -> None:
    found = compare(results("baseline", 30.0), results("rsd", 20.0))
    assert found.speedup == 1.5
    assert found.figures["rsd"]["query_ms.p50"] == 20.0
    assert found.figures["rsd"]["rsd_stats.draft_acceptance_rate"] is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "ort"),
        ("protocol", "seed"),
        ("n_action_steps", 4),
        ("max_steps", 9),
        ("bundle_sha256", "ff"),
        ("hardware", {}),
    ],
)
def test_other_conditions_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"cannot be compared: {key} is .* and {value!r}"):
        compare(results("baseline", 30.0), results("rsd", 20.0, **{key: value}))


def test_other_episodes_are_refused() -> None:
    other = results("rsd", 20.0)
    other["episodes"] = [{"task_id": 0, "trial": 1, "error": None}]
    with pytest.raises(UserError, match="not the same ones"):
        compare(results("baseline", 30.0), other)


def test_the_same_mode_twice_is_refused() -> None:
    with pytest.raises(UserError, match="both are of mode 'rsd'"):
        compare(results("rsd", 30.0), results("rsd", 20.0))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"settings": 3, "episodes": []}', '{"settings": {}, "episodes": [1]}', "\x00"]
)
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.json"):
        read(path)


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(results("rsd", 1.0)))
    assert read(path) == results("rsd", 1.0)


def test_absent_settings_are_refused() -> None:
    with pytest.raises(UserError, match="lacks the settings suite"):
        compare({"settings": {"mode": "baseline"}, "episodes": []}, {"settings": {"mode": "rsd"}, "episodes": []})
