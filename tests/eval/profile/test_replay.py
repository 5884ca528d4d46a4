"""Replays: the recorded decisions, all of them and no others, each with its time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs
from replayable import FEW, made
from synthetic import run, write

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import replay as module
from rsd_trt.eval.profile.inputs import InputSize
from rsd_trt.eval.profile.replay import ReplayRequest, choose, replay, write_replay
from rsd_trt.eval.profile.replay_record import Replay, read_replay
from rsd_trt.eval.results import Episode, Results
from rsd_trt.runtime import policy
from rsd_trt.runtime.backends import Launcher
from rsd_trt.runtime.forward import EagerForward

CPU = torch.device("cpu")
EARLY_MS, LATE_MS, WHOLE_MS = 3.0, 5.0, 7.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARM_UP", 1)


def asked(bundle: Bundle, *paths: Path, episodes: int = 50, tokens: int | None = None) -> ReplayRequest:
    return ReplayRequest(paths, episodes, Launcher(bundle, "torch", CPU), "eager", "bundle", InputSize(None, tokens))


def replayed(bundle: Bundle, *paths: Path, episodes: int = 50) -> Replay:
    return replay(asked(bundle, *paths, episodes=episodes), "rsd-trt replay")


def priced(track: module.Track, ms: float) -> None:
    """An episode whose queries of every route took that."""
    track.episode_ms.append(ms)
    track.route_ms = {route: [ms] for route in track.results.routes}


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A forward that computes nothing new and whose parts take fixed times. Gives how often each ran."""
    now, parts = [0.0], Counter[str]()

    def timed(name: str, ms: float) -> None:
        part = getattr(EagerForward, name)

        def call(self: EagerForward, *arguments: object) -> None:
            part(self, *arguments)
            now[0] += ms / 1e3
            parts[name] += 1

        monkeypatch.setattr(EagerForward, name, call)

    for name, ms in (("early", EARLY_MS), ("late", LATE_MS), ("whole", WHOLE_MS)):
        timed(name, ms)
    monkeypatch.setattr(policy, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return parts


def test_every_recorded_decision_is_replayed_and_costs_its_parts(
    bundle: Bundle, tmp_path: Path, clocked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_warm_up", lambda *_: None)
    runs: dict[str, Results] = {mode: made(mode) for mode in ("baseline", "rsd")}
    found = replayed(bundle, *(write(tmp_path / f"{mode}.json", results) for mode, results in runs.items()))
    baseline, rsd = found.rows
    for row, results in zip(found.rows, runs.values(), strict=True):
        assert (row.run, row.mode, row.n_action_steps) == (results.settings.run, results.settings.mode, 4)
        assert (row.queries, row.full_queries) == (results.queries, results.full_queries)
        assert (row.actions, row.episodes) == (results.steps, 4)
        assert (row.suite, row.decisions_of, row.backbone) == ("libero_spatial", "made-up", "eager")
        assert set(row.route_ms) == set(results.routes)
    assert clocked == {
        "whole": baseline.queries,
        "early": rsd.queries,
        "late": rsd.full_queries,
    }
    assert baseline.ms_per_action == pytest.approx(WHOLE_MS * baseline.queries / baseline.actions)
    total = EARLY_MS * rsd.queries + LATE_MS * rsd.full_queries
    assert rsd.ms_per_action == pytest.approx(total / rsd.actions)
    assert sum(rsd.episode_ms) == pytest.approx(total)
    assert rsd.route_ms["accepted"] == pytest.approx(EARLY_MS)
    assert rsd.route_ms["rejected"] == pytest.approx(EARLY_MS + LATE_MS)
    assert (baseline.speedup, baseline.baseline) == (None, None)
    assert rsd.baseline == baseline.run
    assert rsd.speedup == pytest.approx(baseline.ms_per_action / rsd.ms_per_action)
    assert rsd.speedup_interval is None  # four episodes are too few


@pytest.mark.usefixtures("clocked")
def test_enough_episodes_have_intervals(bundle: Bundle, tmp_path: Path) -> None:
    settings = {"tasks": (0, 1, 2), "trials": 5}
    runs = [made("baseline", **settings), made("rsd", **settings), made("random", accept_rate=0.7, **settings)]
    paths = [write(tmp_path / f"{results.settings.mode}.json", results) for results in runs]
    baseline, rsd, random = replayed(bundle, *paths, episodes=12).rows
    assert [row.episodes for row in (baseline, rsd, random)] == [15] * 3
    assert random.baseline == rsd.baseline == baseline.run
    assert rsd.ms_per_action_interval is not None and rsd.speedup is not None and rsd.speedup_interval is not None
    assert rsd.ms_per_action_interval[0] <= rsd.ms_per_action <= rsd.ms_per_action_interval[1]
    assert rsd.speedup_interval[0] <= rsd.speedup <= rsd.speedup_interval[1]


def test_episodes_take_turns(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    monkeypatch.setattr(
        module,
        "_replay_episode",
        lambda track, episode, prompt, seen: turns.append(track.path.stem) or priced(track, 1.0),
    )
    paths = [write(tmp_path / f"{mode}.json", made(mode)) for mode in ("baseline", "rsd")]
    done: list[tuple[int, int]] = []
    replay(asked(bundle, *paths, episodes=4), "", lambda i, total: done.append((i, total)))
    assert turns == ["baseline", "rsd"] * 4
    assert done == [(i, 8) for i in range(1, 9)]


def test_runs_share_the_episodes_that_ended_well_in_all_of_them() -> None:
    whole, broken = made("baseline"), made("baseline", broken=((0, 1),))
    assert set(choose([whole, broken], "libero_spatial", 50, 0)) == {(0, 0), (1, 0), (1, 1)}
    assert choose([whole], "libero_spatial", 2, 0) == choose([whole], "libero_spatial", 2, 0)
    assert len(choose([whole], "libero_spatial", 2, 1)) == 2
    with pytest.raises(UserError, match="no episode of libero_spatial is in every results file"):
        choose([whole, made(tasks=(2,))], "libero_spatial", 50, 0)


def test_every_route_of_every_run_is_met() -> None:
    """One episode has a route that no other has: it is among the chosen ones."""

    def refreshed(episode: Episode) -> Episode:
        query = structs.replace(episode.queries[0], route="refresh")
        return structs.replace(episode, queries=(query, *episode.queries[1:])) if episode.key == (1, 1) else episode

    plain = made(trials=5)
    rare = structs.replace(plain, episodes=tuple(map(refreshed, plain.episodes)))
    for seed in range(3):
        assert (1, 1) in choose([plain, rare], "libero_spatial", 1, seed)


def test_prices_are_pooled_and_cost_what_was_measured() -> None:
    """Two runs of rsd launch the same: p50s are averaged by their queries, and what slow ones add raises all alike."""
    policy: Any = None
    tracks = []
    for episode_ms in (60.0, 44.0):
        results = made("rsd", tasks=(0,), trials=1)
        (episode,) = results.episodes
        tracks.append(module.Track(Path("r.json"), results, {episode.key: episode}, policy, [episode_ms]))
    counts = Counter(query.route for query in tracks[0].episodes[0, 0].queries)
    tracks[0].route_ms = {route: [2.0] * (3 * n) for route, n in counts.items()}
    tracks[1].route_ms = {route: [6.0] * n for route, n in counts.items()}
    prices = module.price(tracks, {"libero_spatial": [(0, 0)]})
    assert list(prices) == ["draft"]
    (level,) = {round(ms, 9) for ms in prices["draft"].values()}
    assert level * 2 * counts.total() == pytest.approx(60 + 44)
    assert tracks[0].priced({"draft": {}}) == {}  # no route has a price: nothing is known of the episode


@pytest.mark.usefixtures("clocked")
def test_a_few_episodes_price_the_decisions_of_all(bundle: Bundle, tmp_path: Path) -> None:
    baseline, rsd = made("baseline", trials=5), made("rsd", trials=5)
    paths = [write(tmp_path / "b.json", baseline), write(tmp_path / "r.json", rsd)]
    record = replayed(bundle, *paths, episodes=2)
    row = record.rows[1]
    assert (row.episodes, row.queries, row.full_queries, row.actions) == (10, rsd.queries, rsd.full_queries, rsd.steps)
    assert len(row.episode_ms) == len(record.replayed["libero_spatial"]) < 10
    assert sum(row.route_queries.values()) < row.queries
    total = sum(record.prices["draft"][route] * count for route, count in rsd.routes.items())
    assert row.ms_per_action == pytest.approx(total / rsd.steps)
    assert row.speedup == pytest.approx(record.rows[0].ms_per_action / row.ms_per_action)


@pytest.mark.usefixtures("clocked")
def test_other_actions_a_query_have_no_baseline(bundle: Bundle, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.json", made("baseline", n_action_steps=8)), write(tmp_path / "b.json", made("rsd"))]
    assert [row.speedup for row in replayed(bundle, *paths).rows] == [None, None]


def test_another_prompt_is_asked_of_all_tasks(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    monkeypatch.setattr(module, "_warm_up", lambda forward, given, texts: prompts.extend(texts))
    monkeypatch.setattr(module, "_replay_episode", lambda track, *_: priced(track, 1.0))
    path = write(tmp_path / "rsd.json", made())
    assert replay(asked(bundle, path, tokens=30), "").prompt_tokens == 30
    assert replay(asked(bundle, path), "").prompt_tokens is None
    assert [len(prompt) for prompt in prompts[:1]] == [29]  # and BOS
    assert len(prompts) == 1 + 2


def test_it_is_written_and_read(bundle: Bundle, tmp_path: Path) -> None:
    path = write(tmp_path / "rsd.json", made())
    record = write_replay(asked(bundle, path, episodes=1), tmp_path / "out", "rsd-trt replay rsd.json")
    assert read_replay(tmp_path / "out" / "replay.json") == record
    assert record.bundle_sha256 == bundle.fingerprint and record.hardware["cpu"] and record.versions["torch"]
    with pytest.raises(UserError, match=r"rsd\.json/x cannot be written: Not a directory"):
        write_replay(asked(bundle, path, episodes=1), path / "x", "")


def test_what_cannot_be_replayed_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def refused(results: Results, message: str, *more: Path) -> None:
        with pytest.raises(UserError, match=message):
            replayed(bundle, write(tmp_path / "r.json", results), *more)

    refused(made("shadow"), r"r\.json is a run of shadow: only baseline, rsd and random decide what is computed")
    refused(made("baseline", policy="expert", bundle=None), r"r\.json is a run of expert")
    refused(made(n_action_steps=9), r"r\.json has 9 actions a query, the chunk of .* 8 steps")
    accepted = run("rsd", acceptance=1.0, **FEW)  # type: ignore[arg-type]
    refused(accepted, r"r\.json, task 0, trial 0, step \d+: a plan has more steps than the chunk of")
    path = write(tmp_path / "same.json", made())
    refused(made(), r"holds run \w+, which is given twice", path)
    data = json.loads(path.read_text())
    data["queries"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"same\.json is damaged: queries is 3, its episodes give"):
        replayed(bundle, path)
