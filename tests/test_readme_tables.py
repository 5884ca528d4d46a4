"""The tables of the README and of the model card are made from the published results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """docs/results/tables.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "docs" / "results" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_say_what_the_results_say(tables: ModuleType) -> None:
    pages = [page.read_text("utf-8") for page in tables.PAGES]
    assert all(f"<!-- table: {name} -->" in "".join(pages) for name in tables.TABLES)
    assert [tables.fill(page) for page in pages] == pages, "python docs/results/tables.py"


def test_a_changed_figure_changes_the_table(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    stale = readme.replace("| 0.201 |", "| 0.101 |")
    assert stale != readme
    assert tables.fill(stale) == readme
    (tmp_path / "README.md").write_text(stale, "utf-8")
    monkeypatch.setattr(tables, "PAGES", (tmp_path / "README.md",))
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 1
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0
    assert (tmp_path / "README.md").read_text("utf-8") == readme


def test_an_unknown_table_is_an_error(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="stage"):
        tables.fill("<!-- table: stage -->\n<!-- end -->")


def stage(what: str, backbone: str, p50: float, **more: object) -> dict[str, Any]:
    row = {"what": what, "backbone": backbone, "precision": "bf16", "images": 1, "prompt_tokens": 28}
    ms = {"n": 300, "p50": p50, "p99": p50 + 1}
    return {**row, "ms": ms, "outside_ms": None, "times_roofline": 1.5, "speedup": None, **more}


def test_stages_are_of_all_backbones_in_the_first_shape_and_of_the_fastest_in_the_others(tables: ModuleType) -> None:
    rows = [
        stage("vision", "timm + transformers", 17, speedup=1.0),
        stage("baseline query", "timm + transformers", 47, speedup=1.0),
        stage("vision", "graph", 3),
        stage("blocks <= k", "graph", 1.5),
        stage("accepted query", "graph", 4),
        stage("baseline query", "graph", 8, outside_ms={"p50": 0.25}, speedup=5.875),
        stage("baseline query", "compiled", 0, ms=None),
        stage("baseline query", "compiled", 12, images=2),
        stage("baseline query", "graph", 16, images=2),
    ]
    found = tables.stages({"hardware": {"cpu": "x", "gpu": "a GPU"}, "stages": {"rows": rows}})
    assert found == [
        "| p50 ms, batch 1, a GPU, n = 300 | preprocess | vision | blocks &le; k | blocks > k | accepted query "
        "| rejected query | baseline query | its p99 | its floor | outside the GPU | over timm + transformers |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| 1 image, 28 tokens: timm + transformers bf16 | | 17.00 | | | | | 47.00 | 48.00 | 1.50x | | 1.00x |",
        "| 1 image, 28 tokens: graph bf16 | | 3.00 | 1.50 | | 4.00 | | 8.00 | 9.00 | 1.50x | 0.25 | 5.88x |",
        "| 2 images, 28 tokens: compiled bf16 | | | | | | | 12.00 | 13.00 | 1.50x | | |",
    ]


def test_a_replay_names_decisions_and_clock(tables: ModuleType) -> None:
    row = {"decisions_of": "reference", "n_action_steps": 1, "episodes": 50, "queries": 4000, "backbone": "graph"}
    row |= {
        "full_queries": 4000,
        "ms_per_action": 8.0,
        "backbone_precision": "fp8",
        "route_queries": {"a": 90, "b": 10},
    }
    baseline = {**row, "mode": "baseline", "ms_per_action_interval": None, "speedup": None, "speedup_interval": None}
    rsd = {**baseline, "mode": "rsd", "results": "rsd_1_action.json.gz", "full_queries": 1500, "ms_per_action": 5.0}
    rsd |= {"ms_per_action_interval": [4.9, 5.1], "speedup": 1.6, "speedup_interval": [1.55, 1.65]}
    found = tables.replay({"bundle": "7b", "hardware": {"cpu": "x"}, "rows": [baseline, rsd]})
    assert "decisions of ..., clock of 7b, graph fp8, x" in found[0]
    assert found[2:] == [
        "| reference, baseline, 1 action | 100 | 50 | 4,000 | 4,000 | 8.00 | |",
        "| reference, rsd, tolerance 0.1, 1 action | 100 | 50 | 4,000 | 1,500 | 5.00 (4.90 to 5.10) "
        "| 1.60x (1.55x to 1.65x) |",
    ]
