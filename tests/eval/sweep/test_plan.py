"""What a sweep declares: which runs a file and options stand for, what is tested, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, DEFAULT_BUNDLE
from rsd_trt.errors import UserError
from rsd_trt.eval.sweep.plan import Declared, read_sweep

ROOT = Path(__file__).parents[3]
SWEEPS = ROOT / "examples" / "reference_policy"
BOTH = ("open loop, n = 1", "open loop of no higher cost")


def names(*options: tuple[str, object], file: str = "", folder: Path = Path()) -> list[str]:
    path = None
    if file:
        path = folder / "sweep.toml"
        path.write_text(file)
    return [run.name for run in read_sweep(path, dict(options), Path("out"), 4).runs]


def test_lists_stand_for_their_combinations_where_they_make_a_difference() -> None:
    options = (("mode", ("baseline", "rsd")), ("n_action_steps", (1, 4)), ("rule", "first"), ("tolerance", (0.1, 0.2)))
    assert names(*options, ("perturb", ("none", 7))) == [
        *("baseline_n1", "baseline_n1_displace-7", "baseline_n4", "baseline_n4_displace-7"),
        *("rsd_first_n1_tolerance0.1", "rsd_first_n1_tolerance0.1_displace-7"),
        *("rsd_first_n1_tolerance0.2", "rsd_first_n1_tolerance0.2_displace-7"),
        *("rsd_first_n4_tolerance0.1", "rsd_first_n4_tolerance0.1_displace-7"),
        *("rsd_first_n4_tolerance0.2", "rsd_first_n4_tolerance0.2_displace-7"),
    ]


def test_a_threshold_tells_runs_of_its_rule_apart() -> None:
    options = (("mode", "rsd"), ("rule", ("first", "likelihood")), ("tolerance", (0.1, 0.2)), ("threshold", (-1, -2)))
    assert names(*options) == [
        *("rsd_first_tolerance0.1", "rsd_first_tolerance0.2"),
        *("rsd_likelihood_threshold-1", "rsd_likelihood_threshold-2"),
    ]


def test_options_take_the_place_of_the_files_and_tables_add_to_what_stands_above_them(tmp_path: Path) -> None:
    text = 'trials = 50\ntasks = "0-2"\n[[run]]\nmode = "baseline"\nn_action_steps = [1, 2]\n[[run]]\ntrials = 9\n'
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    baseline, _, rsd = (run.request for run in read_sweep(path, {"seed": 3}, tmp_path, 4).runs)
    assert (baseline.mode, baseline.n_action_steps, baseline.trials, baseline.tasks) == ("baseline", 1, 50, (0, 1, 2))
    assert (rsd.mode, rsd.trials, rsd.workers, rsd.seed) == ("rsd", 9, 4, 3)
    assert rsd.out == tmp_path / "rsd"
    assert {run.request.trials for run in read_sweep(path, {"trials": 2}, tmp_path, 4).runs} == {2}


@pytest.mark.parametrize(
    ("name", "folder", "count"), [("frontier", "reference", 18), ("confirmation", "confirmation", 3)]
)
def test_the_sweeps_of_the_reference_policy_are_what_was_published(name: str, folder: str, count: int) -> None:
    """Every published run is one of the sweep's, and the other way round."""
    sweep, shipped = read_sweep(SWEEPS / f"{name}.toml", {}, Path("out"), 16), Bundle.open(DEFAULT_BUNDLE).config.rsd
    published = set()
    for file in (ROOT / "docs" / "results" / folder).glob("*.json.gz"):
        settings = json.loads(gzip.decompress(file.read_bytes()))["settings"]
        made, rsd = settings["bundle"], settings["bundle"]["rsd"]
        decided = decisive(made["mode"], rsd)
        condition = (tuple(settings["tasks"]), settings["trials"], settings["perturb"])
        published.add((made["mode"], settings["n_action_steps"], decided, *condition))
    declared = set()
    for asked in (run.request for run in sweep.runs):
        given = {name: getattr(asked, name) for name in ("rule", "threshold", "check_steps")}
        chosen = {name: value for name, value in given.items() if value is not None}
        if asked.tolerance is not None:
            chosen["tolerance"] = (asked.tolerance,) * ARM_DIMS
        rsd = structs.asdict(shipped) | chosen
        decided = decisive(asked.mode, rsd)
        perturb = None if asked.perturb is None else str(asked.perturb)
        condition = (asked.tasks or tuple(range(10)), asked.trials, perturb)
        declared.add((asked.mode, asked.n_action_steps or shipped.n_action_steps, decided, *condition))
    assert declared == published and len(sweep.runs) == len(declared) == count
    assert all(run.request.bundle == DEFAULT_BUNDLE for run in sweep.runs)
    tested = [run.name for run in sweep.runs if run.request.mode == "rsd" and "harmless" not in run.name]
    rivals = BOTH if name == "frontier" else BOTH[1:]
    assert set(sweep.comparisons) == {Declared(one, rival) for one in tested for rival in rivals}


def decisive(mode: str, rsd: dict[str, Any]) -> tuple[object, ...]:
    """What of a bundle's settings a mode's checks depend on."""
    if mode == "baseline":
        return ()
    limit = rsd["threshold"] if rsd["rule"] == "likelihood" else tuple(rsd["tolerance"])
    return (rsd["check_steps"], *((rsd["rule"], limit) if mode == "rsd" else ()))


def test_comparisons_are_those_of_every_rsd_run_unless_they_are_named(tmp_path: Path) -> None:
    runs = "[[run]]\nmode = 'rsd'\nrule = 'first'\ntolerance = [0.1, 0.2]\n[[run]]\nmode = 'baseline'\n"
    path = tmp_path / "sweep.toml"
    path.write_text(runs)
    assert len(read_sweep(path, {}, tmp_path, 1).comparisons) == 4
    path.write_text(f"{runs}[[compare]]\nrun = '*0.1'\nagainst = ['open loop, n = 1']\n")
    declared = read_sweep(path, {}, tmp_path, 1)
    assert declared.comparisons == (Declared("rsd_first_tolerance0.1", "open loop, n = 1"),)
    path.write_text(
        f"{runs}compare = []\n".replace("[[run]]", "compare = []\n[[run]]", 1).removesuffix("compare = []\n")
    )
    assert read_sweep(path, {}, tmp_path, 1).comparisons == ()


def test_what_is_tested_cannot_be_chosen_once_the_sweep_has_begun(tmp_path: Path) -> None:
    first = read_sweep(None, {"mode": ("baseline", "rsd"), "rule": "first", "tolerance": (0.1, 0.2)}, tmp_path, 1)
    first.declare()
    first.declare()
    more_loops = {"mode": ("baseline", "rsd"), "rule": "first", "tolerance": (0.1, 0.2), "n_action_steps": (1, 2)}
    for other in (more_loops, {"mode": ("baseline", "rsd"), "rule": "first", "tolerance": 0.1}):
        with pytest.raises(UserError, match=r"(was|was not) declared when the sweep began"):
            read_sweep(None, other, tmp_path, 1).declare()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode = 'basline'", "mode is 'basline'; did you mean 'baseline'"),
        ("mode = ['rsd', 'basline']", r"mode\[1\] is 'basline'; did you mean 'baseline'"),
        ("n_action_step = 1", "unknown key n_action_step; did you mean 'n_action_steps'"),
        ("[[run]]\nmode = 'baseline'\ntolerance = 0.1", "run 1: tolerance is of checks, and mode baseline makes none"),
        (
            "mode = ['baseline', 'rsd']\ntolerance = 0.1\n[[run]]",
            "tolerance is of the rules first, actions, path",
        ),
        (
            "mode = ['rsd', 'baseline']\ntolerance = 0.1\n[[run]]",
            "tolerance is of the rules first, actions, path",
        ),
        (
            "mode = ['random', 'rsd']\ntolerance = 0.1\naccept_rate = 0.5\n[[run]]",
            "tolerance is of the rules first, actions, path",
        ),
        (
            "tolerance = 0.1\n[[run]]\nmode = 'rsd'\n[[run]]\nmode = 'baseline'",
            "tolerance is of the rules first, actions, path",
        ),
        ("accept_rate = 0.5", "accept_rate is of mode random: the mode is rsd"),
        ("# nothing", "declares no run"),
        ("[[run]]\n[[run]]", "run 2 declares rsd again"),
        ("mode = 'random'", "random takes over the rate of the rsd run with the same options, which are none"),
        (
            "mode = ['rsd', 'random']\nrule = 'first'\ntolerance = [0.1, 0.2]",
            "which are rsd_first_tolerance0.1, rsd_first_tolerance0.2",
        ),
        (
            "rule = 'likelihood'\nthreshold = -1\ntolerance = 0.1\n[[run]]\n[[run]]\nmode = 'baseline'",
            "tolerance is of the rules first, actions, path: the rule is likelihood",
        ),
        ("sure = -0.06\n[[run]]", "sure is of checks that may commit more than one action: check_steps is 1"),
        ("rule = 'likelihood'\nthreshold = 1", "threshold is 1, which must be <= 0"),
        ("policy = 'a:b'\ntolerance = 0.1", "policy a:b runs no bundle, and tolerance is of bundles"),
        ("policy = 'ab'", "policy ab is not MODULE:FUNCTION"),
        ("tasks = 'x'", "tasks 'x' is not a list such as 0,3 or 0-4 or all"),
        ("perturb = 'lat:7'", "perturbation 'lat' is unknown; did you mean 'late'"),
        ("[[compare]]\nrun = 'x'", "compare names 'x', which no rsd run is"),
        ("[[compare]]\nrun = 'rsd'\nagainst = ['x']", r"compare\[0\].against\[0\] is 'x'"),
        ("mode", "is no TOML"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        names(file=text, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((str(tmp_path), "perturbation"))
