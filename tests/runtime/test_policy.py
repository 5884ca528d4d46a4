"""The policy's loop on scripted drafts and chunks, and end to end on the tiny bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DIMS, Frame, Step, scripted
from textbook import Verdict, actions, first, textbook

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, MODES, Limits, Mode
from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.runtime.backends import check_device
from rsd_trt.runtime.chunk import Query
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import Checks, FirstStep, RandomAcceptance, Route, Rule, TokensAgree, Tolerance

T = DIMS.T
OPEN, CLOSED = -1, 1
STILL: list[Step] = [(0, OPEN)] * T
AWAY: list[Step] = [(1, OPEN)] * T

steps = st.tuples(st.sampled_from([0, 0, 0, 1]), st.sampled_from([OPEN, OPEN, OPEN, CLOSED]))
chunks = st.lists(steps, min_size=T, max_size=T)
frames = st.builds(
    Frame,
    draft=chunks,
    main=chunks,
    nan=st.sampled_from(["", "", "", "draft"]),
    instruction=st.sampled_from(["do it"] * 5 + ["do that"]),
)
episodes = st.lists(frames, min_size=1, max_size=12)
horizons = {"n_action_steps": st.integers(1, T), "check_steps": st.integers(1, T)}
refreshes = st.none() | st.integers(1, T)


def play(policy: Policy, script: Sequence[Frame]) -> list[Query]:
    return [policy.act_batch([frame], [0])[0] for frame in script]  # type: ignore[list-item]


def committed(query: Query) -> list[Step]:
    """The actions as the script writes them."""
    return [(int(action[0]), int(action[ARM_DIMS])) for action in query.actions]


@pytest.mark.parametrize(("rule", "verdict"), [("first", first), ("actions", actions)])
@given(script=episodes, refresh=refreshes, **horizons)
def test_the_loop_equals_the_textbook(
    rule: str, verdict: Verdict, script: list[Frame], n_action_steps: int, check_steps: int, refresh: int | None
) -> None:
    policy, world = scripted(rule=rule, n_action_steps=n_action_steps, check_steps=check_steps, refresh=refresh)
    queries = play(policy, script)
    expected = textbook(script, verdict, n_action_steps, check_steps, refresh)
    assert [(query.route, committed(query)) for query in queries] == expected
    ran = []
    for query, frame in zip(queries, script, strict=True):
        ran += [("check", frame)] * query.checked + [("full", frame)] * query.full_query
        assert query.checked == (query.route in ("accepted", "partial", "rejected"))
        assert query.full_query == (query.route not in ("accepted", "partial"))
    assert world.ran == ran  # nothing is computed that the decisions do not need


@given(
    script=episodes, refresh=refreshes, rule=st.builds(RandomAcceptance, st.floats(0, 1), st.integers(0, 9)), **horizons
)
def test_the_random_acceptance_control_equals_the_textbook(
    script: list[Frame], refresh: int | None, rule: RandomAcceptance, n_action_steps: int, check_steps: int
) -> None:
    policy, _ = scripted(
        "random", decided_by=rule, n_action_steps=n_action_steps, check_steps=check_steps, refresh=refresh
    )
    policy.reset(0, (3, 4))

    def by_chance(guess: Sequence[Step], left: Sequence[Step], number: int, age: int) -> int:
        return len(left) * rule.accepts((3, 4, number))

    expected = textbook(script, by_chance, n_action_steps, check_steps, refresh)
    assert [(query.route, committed(query)) for query in play(policy, script)] == expected


@given(script=episodes, **horizons)
def test_with_a_refresh_at_once_the_loop_acts_as_open_loop(
    script: list[Frame], n_action_steps: int, check_steps: int
) -> None:
    rsd, _ = scripted("rsd", refresh=1, n_action_steps=n_action_steps, check_steps=check_steps)
    baseline, world = scripted("baseline", n_action_steps=n_action_steps)
    for a, b in zip(play(rsd, script), play(baseline, script), strict=True):
        assert b.route == "full"
        np.testing.assert_array_equal(a.actions, b.actions)
    assert [what for what, _ in world.ran] == ["full"] * len(script)


@given(batch=st.lists(episodes, min_size=3, max_size=3), order=st.permutations([0, 1, 2]))
@settings(max_examples=50)
def test_a_batch_of_mixed_decisions_equals_each_query_alone(batch: list[list[Frame]], order: list[int]) -> None:
    together, _ = scripted(environments=3)
    alone = [scripted()[0] for _ in batch]
    for i in range(min(map(len, batch))):
        queries = together.act_batch([batch[env][i] for env in order], order)  # type: ignore[misc]
        for env, query in zip(order, queries, strict=True):
            expected = alone[env].act_batch([batch[env][i]], [0])[0]  # type: ignore[list-item]
            np.testing.assert_array_equal(query.actions, expected.actions)
            for name in ("route", "prefix", "checked", "full_query", "token_agreement", "draft_finite"):
                assert getattr(query, name) == getattr(expected, name)


@given(script=episodes)
@settings(max_examples=50)
def test_what_the_draft_is_asked_does_not_depend_on_the_chunk(script: list[Frame]) -> None:
    """Whatever the main head said: a check is given the observation, and nothing else."""
    seen = []
    for main in (STILL, AWAY):
        policy, world = scripted("shadow")
        play(policy, [replace(frame, main=main) for frame in script])
        seen.append([replace(frame, main=STILL) for what, frame in world.ran if what == "check"])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("script", "routes", "actions"),
    [
        ([Frame(STILL, STILL)] * 4, ["start", "accepted", "accepted", "exhausted"], [2, 2, 2, 2]),
        ([Frame(AWAY, STILL)] * 4, ["start", "rejected", "rejected", "rejected"], [2, 2, 2, 2]),
        ([Frame(STILL, STILL), Frame([(0, OPEN), *AWAY[1:]], STILL)], ["start", "partial"], [2, 1]),
        ([Frame(STILL, [*STILL[:2], *[(0, CLOSED)] * 4])] * 2, ["start", "gripper"], [2, 2]),
        ([Frame(STILL, STILL), Frame(STILL, STILL, instruction="do that")], ["start", "instruction"], [2, 2]),
    ],
    ids=["perfect draft", "contradicting draft", "partly right", "gripper next", "another instruction"],
)
def test_routes(script: list[Frame], routes: list[Route], actions: list[int]) -> None:
    queries = play(scripted()[0], script)
    assert [query.route for query in queries] == routes
    assert [len(query.actions) for query in queries] == actions


@pytest.mark.parametrize(("draft", "share"), [(STILL, "draft_acceptance_rate"), (AWAY, "full_rejection_rate")])
def test_a_perfect_draft_accepts_everything_and_a_contradicting_one_nothing(draft: list[Step], share: str) -> None:
    queries = play(scripted()[0], [Frame(draft, STILL)] * 20)
    assert Checks.of(query.route for query in queries).rates()[share] == 1


def test_a_chunk_grows_old_by_its_executed_steps() -> None:
    queries = play(scripted(n_action_steps=2, check_steps=1, refresh=4)[0], [Frame(STILL, STILL)] * 6)
    assert [query.route for query in queries] == ["start", "accepted", "accepted", "refresh", "accepted", "accepted"]


def test_tolerance_by_age() -> None:
    policy, _ = scripted(rule="first", n_action_steps=1, tolerance=(2.0,) * ARM_DIMS, by_age=(9.0, 1.0, 0.1))
    queries = play(policy, [Frame(AWAY, STILL)] * 3)
    assert [query.route for query in queries] == ["start", "accepted", "rejected"]
    assert [query.score for query in queries] == [None, 0.5, pytest.approx(5.0)]


@pytest.mark.parametrize("draft_token", [1, 2])
def test_a_conditioned_head_is_fed_the_drafts_tokens_where_a_check_was_rejected(draft_token: int) -> None:
    frame = Frame(AWAY, STILL, draft_token)
    policy, world = scripted(environments=3)
    policy.act_batch([frame, frame], [0, 1])  # type: ignore[list-item]
    policy.act_batch([frame, replace(frame, nan="draft"), frame], [0, 1, 2])  # type: ignore[list-item]
    due, fed = world.conditions
    assert not due.any()
    assert [set(row.flatten()) for row in fed] == [{draft_token}, {0}, {0}]  # rejected, by a draft that is NaN, due


@pytest.mark.parametrize(
    ("draft_token", "draft", "route"), [(1, AWAY, "accepted"), (0, STILL, "rejected")], ids=["equal", "other"]
)
@pytest.mark.parametrize("rule", ["tokens", "likelihood"])
def test_rules_of_tokens_do_not_read_actions(rule: str, draft_token: int, draft: list[Step], route: Route) -> None:
    policy, _ = scripted(rule=rule, token_share=0.7, threshold=-1.0)
    first, second = play(policy, [Frame(draft, STILL, draft_token, main_token=1)] * 2)
    assert first.token_agreement is None
    assert second.route == route
    assert second.token_agreement == (None if route == "accepted" else (0.0, 0.0))


@given(script=episodes)
@settings(max_examples=50)
def test_shadow_acts_as_the_baseline_and_records_every_step_that_was_left(script: list[Frame]) -> None:
    shadow, world = scripted("shadow")
    old: Frame | None = None
    for frame, a, b in zip(script, play(shadow, script), play(scripted("baseline")[0], script), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.full_query
        recorded = old is not None and old.instruction == frame.instruction and frame.nan != "draft"
        assert (a.draft_gap is not None) == (a.main_gap is not None) == recorded
        if old is not None and a.draft_gap is not None and a.main_gap is not None:
            assert len(a.draft_gap) == len(a.main_gap) == T - 2
            for i, (draft, main) in enumerate(zip(a.draft_gap, a.main_gap, strict=True)):
                (arm, gripper), now = old.main[2 + i], (frame.draft[i], frame.main[i])
                for gap, (there, switch) in zip((draft, main), now, strict=True):
                    assert gap == (abs(there - arm),) * ARM_DIMS + (float(switch != gripper),)
        old = frame
    assert [what for what, _ in world.ran] == ["check", "full"] * len(script)


@given(script=st.lists(frames, min_size=2, max_size=2))
def test_shadow_decides_as_rsd_would(script: list[Frame]) -> None:
    names = ("route", "checked", "prefix", "score", "draft_finite")
    for a, b in zip(play(scripted("shadow")[0], script), play(scripted("rsd")[0], script), strict=True):
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


@pytest.mark.parametrize(
    ("mode", "nan", "message"),
    [
        ("rsd", "hidden", "the hidden state is not finite"),
        ("rsd", "head", "the logits or actions of the main head are not finite"),
        ("baseline", "hidden", "the hidden state is not finite"),
        ("baseline", "head", "the logits or actions of the main head are not finite"),
        ("shadow", "head", "the logits or actions of the main head are not finite"),
    ],
)
def test_a_main_head_that_is_not_finite_ends_its_query_only(mode: Mode, nan: str, message: str) -> None:
    good, bad = Frame(STILL, STILL), Frame(STILL, STILL, nan=nan)  # type: ignore[arg-type]
    policy, _ = scripted(mode, environments=3)
    first, fault, third = policy.act_batch([good, bad, good], [0, 1, 2])  # type: ignore[list-item]
    assert [(len(query.actions), query.fault) for query in (first, third)] == [(2, None)] * 2
    assert fault.actions.shape == (0, DIMS.A)
    assert fault.fault == message
    again = policy.act_batch([good] * 3, [0, 1, 2])  # type: ignore[list-item]
    if mode != "baseline":
        assert [query.route for query in again] == ["accepted", "start", "accepted"]
    with pytest.raises(PolicyFault, match=message):
        scripted(mode)[0].act(bad)  # type: ignore[arg-type]


def test_a_draft_that_is_not_finite_rejects_and_is_told() -> None:
    policy, _ = scripted()
    query = play(policy, [Frame(STILL, STILL), Frame(STILL, STILL, nan="draft")])[1]
    assert (query.route, query.checked, query.draft_finite, query.fault) == ("rejected", True, False, None)
    assert len(query.actions) == 2


@pytest.mark.parametrize("mode", MODES)
def test_actions_are_clipped_to_the_limits_and_counted(mode: Mode) -> None:
    limits = Limits(low=(-0.25,) * ARM_DIMS + (-1.0,), high=(0.25,) * ARM_DIMS + (1.0,))
    wild: list[Step] = [(0, OPEN), (7, OPEN), *AWAY[2:]]
    policy, _ = scripted(mode, limits=limits, decided_by=RandomAcceptance(1.0, 0) if mode == "random" else None)
    queries = play(policy, [Frame(wild[2:] + STILL[:2], wild)] * 2)
    assert [query.clipped for query in queries] == [1, 1 if mode in ("baseline", "shadow") else 2]
    assert max(query.actions[:, :ARM_DIMS].max() for query in queries) == 0.25


def test_an_environment_that_is_reset_in_the_middle_of_an_episode_goes_on_counting_its_queries() -> None:
    rules = (RandomAcceptance(0.5, seed) for seed in range(99))
    rule = next(rule for rule in rules if [rule.accepts((0, 1, query)) for query in (1, 3)] == [0, 1])
    policy, _ = scripted("random", environments=2, decided_by=rule)
    policy.reset(1, (0, 1))

    def route() -> Route:
        return policy.act_batch([Frame(STILL, STILL)], [1])[0].route  # type: ignore[list-item]

    assert [route(), route()] == ["start", "rejected"]
    policy.reset(1)
    assert [route(), route()] == ["start", "accepted"]
    policy.reset(1, (0, 1))
    assert [route(), route()] == ["start", "rejected"]


@pytest.mark.parametrize(
    ("mode", "rule", "verb"),
    [
        ("random", None, "needs the"),
        ("random", FirstStep(Tolerance((0.1,) * ARM_DIMS)), "needs the"),
        ("rsd", RandomAcceptance(0.5, 0), "has no"),
        ("baseline", RandomAcceptance(0.5, 0), "has no"),
    ],
)
def test_only_mode_random_has_the_rule_random(mode: Mode, rule: Rule | None, verb: str, bundle: Bundle) -> None:
    with pytest.raises(UserError, match=f"mode {mode} {verb} rule random"):
        Policy.load(bundle, mode, rule=rule)


def test_a_rule_may_be_given_in_the_bundles_place() -> None:
    policy, _ = scripted(decided_by=TokensAgree(1.0))
    queries = play(policy, [Frame(AWAY, STILL, draft_token=1, main_token=1)] * 2)
    assert [query.route for query in queries] == ["start", "accepted"]


@pytest.mark.parametrize("mode", MODES)
def test_actions_belong_to_the_caller(mode: Mode) -> None:
    script = [Frame(STILL, STILL)] * 4
    expected = play(scripted(mode)[0], script)
    policy, _ = scripted(mode)
    for i in range(4):
        query = policy.act_batch([script[i]], [0])[0]  # type: ignore[list-item]
        assert (query.route, committed(query)) == (expected[i].route, committed(expected[i]))
        query.actions[:] = 9


def test_reset_forgets_one_environment_or_all() -> None:
    policy, _ = scripted(environments=2)
    both = [Frame(STILL, STILL)] * 2
    policy.act_batch(both, [0, 1])  # type: ignore[arg-type]
    policy.reset(1)
    assert [query.route for query in policy.act_batch(both, [0, 1])] == ["accepted", "start"]  # type: ignore[arg-type]
    policy.reset()
    assert [query.route for query in policy.act_batch(both, [0, 1])] == ["start", "start"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "hidden", "warnings"), [("baseline", True, 0), ("rsd", True, 1), ("shadow", True, 1), ("rsd", False, 0)]
)
def test_a_draft_that_cannot_save_time_is_warned_about_once(
    mode: Mode, hidden: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        play(scripted(mode, hidden=hidden)[0], [Frame(STILL, STILL)] * 2)
    assert len(caplog.records) == warnings
    assert all("no time can be saved" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("n_action_steps", [0, -1, 9])
def test_n_action_steps_out_of_range(bundle: Bundle, n_action_steps: int) -> None:
    with pytest.raises(UserError, match=rf"n_action_steps is {n_action_steps}; a chunk has 1\.\.8 steps"):
        Policy.load(bundle, n_action_steps=n_action_steps)


def test_auto_is_a_device_that_works() -> None:
    assert check_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("mode", MODES)
def test_the_tiny_bundle_end_to_end(mode: Mode, bundle: Bundle, observe: Callable[..., Observation]) -> None:
    policy = Policy.load(bundle, mode, rule=RandomAcceptance(0.5, 0) if mode == "random" else None)
    control = bundle.config.control
    queries = [policy.act_batch([observe(control, seed)], [0])[0] for seed in range(4)]
    assert queries[0].route == ("full" if mode == "baseline" else "start")
    for query in queries:
        n, width = query.actions.shape
        assert (query.actions.dtype, width) == (np.float32, bundle.config.dims.A)
        assert 1 <= n <= bundle.config.rsd.n_action_steps
        assert np.isfinite(query.actions).all()
        assert query.route in get_args(Route)
        assert query.ms > 0
    policy.reset()
    np.testing.assert_array_equal(policy.act(observe(control, 0)), queries[0].actions)


def test_the_baseline_is_backbone_then_head_then_codec(bundle: Bundle, observe: Callable[..., Observation]) -> None:
    from rsd_trt.runtime.preprocess import Preprocessor

    config = bundle.config
    observation = observe(config.control, 3)
    actions = Policy.load(bundle, "baseline", n_action_steps=config.dims.T).act(observation)
    inputs = Preprocessor(config.control, config.backbone, bundle.tokenizer(), torch.device("cpu"))([observation])
    hidden = bundle.backbone()(inputs)
    tokens = bundle.head()(hidden).argmax(-1).view(config.dims.L, config.dims.T, config.dims.D).permute(1, 2, 0)
    decoded = bundle.codec().decode(tokens[None])[0].detach().numpy()
    np.testing.assert_allclose(actions, decoded.clip(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "environments", "message"),
    [
        (0, [], "0 observations for 0 environments"),
        (2, [0], "2 observations for 1 environments"),
        (2, [1, 1], r"environments \[1, 1\], each of 0..1 at most once"),
        (1, [2], r"environments \[2\], each of 0..1"),
    ],
)
def test_a_call_that_cannot_be_answered(count: int, environments: list[int], message: str) -> None:
    policy, _ = scripted(environments=2)
    with pytest.raises(UserError, match=message):
        policy.act_batch([Frame(STILL, STILL)] * count, environments)  # type: ignore[arg-type]


def test_an_observation_that_is_refused_leaves_the_chunks_of_others_as_they_were(
    bundle: Bundle, observe: Callable[..., Observation]
) -> None:
    policy = Policy.load(bundle, "rsd", rule=FirstStep(Tolerance((9.0,) * ARM_DIMS)), environments=2)
    seen = observe(bundle.config.control)
    policy.act_batch([seen], [0])
    cursor = policy._chunks[0].cursor
    with pytest.raises(UserError, match="images are uint8"):
        policy.act_batch([seen, replace(seen, images=seen.images[:1])], [0, 1])
    assert policy._chunks[0].cursor == cursor


def test_threads_take_turns(bundle: Bundle, observe: Callable[..., Observation]) -> None:
    control, count = bundle.config.control, 4
    seen = [[observe(control, 10 * env + i) for i in range(count)] for env in range(2)]
    alone = []
    for env in range(2):
        policy = Policy.load(bundle, "rsd")
        alone.append([policy.act(observation) for observation in seen[env]])
    shared = Policy.load(bundle, "rsd", environments=2)

    def drive(env: int) -> list[Query]:
        return [shared.act_batch([observation], [env])[0] for observation in seen[env]]

    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(alone, pool.map(drive, range(2)), strict=True):
            for a, b in zip(expected, found, strict=True):
                np.testing.assert_array_equal(a, b.actions)
