"""The policy's loop on scripted drafts and chunks, and end to end on the tiny bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import DIMS, DRAFT_BLOCK, Frame, N, Step, scripted

from rsd_trt.bundle import Bundle
from rsd_trt.config import ARM_DIMS, MODES, Mode
from rsd_trt.errors import PolicyFault, UserError
from rsd_trt.runtime.backends import check_device
from rsd_trt.runtime.chunk import Judgement, Query, judge
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.speculate import ActionsAgree, Checks, RandomAcceptance, Route, Rule, TokensAgree

T = DIMS.T
OPEN, CLOSED = -1, 1
STILL: list[Step] = [(0, OPEN)] * T
AWAY: list[Step] = [(1, OPEN)] * T

steps = st.tuples(st.sampled_from([0, 0, 0, 1]), st.sampled_from([OPEN, OPEN, OPEN, CLOSED]))
chunks = st.lists(steps, min_size=T, max_size=T)
frames = st.builds(Frame, draft=chunks, main=chunks)
episodes = st.lists(frames, min_size=1, max_size=12)


def play(policy: Policy, count: int) -> list[Query]:
    return [policy.act_batch([i], [0])[0] for i in range(count)]  # type: ignore[list-item]


def committed(query: Query) -> list[Step]:
    """The actions as the script writes them."""
    return [(int(action[0]), int(action[ARM_DIMS])) for action in query.actions]


def textbook(script: Sequence[Frame], n_action_steps: int, refresh: int) -> list[tuple[bool, list[Step]]]:
    """The loop of rsd in plain Python, for equality as agreement: (full query, actions) of each query."""

    def prefix(draft: Sequence[Step], plan: Sequence[Step], before: Step) -> int:
        n = 0
        while n < len(plan) and draft[n] == plan[n] and plan[n][1] == before[1]:
            n += 1
        return n

    out, plan, cursor, accepted = [], None, 0, 0
    for frame in script:
        if plan and cursor < T and accepted + 1 < refresh:
            n = min(prefix(frame.draft, plan[cursor:], plan[cursor - 1]), n_action_steps)
            if n:
                out.append((False, plan[cursor : cursor + n]))
                cursor, accepted = cursor + n, accepted + 1
                continue
        plan, accepted = list(frame.main), 0
        cursor = max(1, min(prefix(frame.draft, plan, plan[0]), n_action_steps))
        out.append((True, plan[:cursor]))
    return out


@given(script=episodes, n_action_steps=st.integers(1, T), refresh=st.integers(1, 5))
def test_the_loop_equals_the_textbook(script: list[Frame], n_action_steps: int, refresh: int) -> None:
    policy, world = scripted(script, n_action_steps=n_action_steps, refresh=refresh)
    queries = play(policy, len(script))
    expected = textbook(script, n_action_steps, refresh)
    assert [(query.full_query, committed(query)) for query in queries] == expected
    for i, (full, _) in enumerate(expected):
        assert [block for frame, block in world.ran if frame == i] == list(range(1, (N if full else DRAFT_BLOCK) + 1))


@given(script=episodes)
def test_zero_tolerance_and_refresh_one_act_as_the_baseline(script: list[Frame]) -> None:
    rsd, _ = scripted(script, "rsd", tolerance=(0.0,) * ARM_DIMS, refresh=1, n_action_steps=1)
    baseline, _ = scripted(script, "baseline", n_action_steps=1)
    for a, b in zip(play(rsd, len(script)), play(baseline, len(script)), strict=True):
        assert a.full_query
        assert b.route == "full"
        np.testing.assert_array_equal(a.actions, b.actions)


@given(batch=st.lists(episodes, min_size=3, max_size=3), order=st.permutations([0, 1, 2]))
@settings(max_examples=50)
def test_a_batch_of_mixed_decisions_equals_each_query_alone(batch: list[list[Frame]], order: list[int]) -> None:
    length = min(map(len, batch))
    together, _ = scripted([frame for script in batch for frame in script[:length]], environments=3)
    alone = [scripted(script)[0] for script in batch]
    for i in range(length):
        queries = together.act_batch([env * length + i for env in order], order)  # type: ignore[misc]
        for env, query in zip(order, queries, strict=True):
            expected = alone[env].act_batch([i], [0])[0]  # type: ignore[list-item]
            np.testing.assert_array_equal(query.actions, expected.actions)
            assert (query.route, query.prefix) == (expected.route, expected.prefix)
            assert query.token_agreement == expected.token_agreement


@pytest.mark.parametrize(
    ("script", "routes", "actions"),
    [
        ([Frame(STILL, STILL)] * 4, ["start", "accepted", "accepted", "exhausted"], [2, 2, 2, 2]),
        ([Frame(AWAY, STILL)] * 4, ["start", "rejected", "rejected", "rejected"], [1, 1, 1, 1]),
        ([Frame(STILL, STILL), Frame([(0, OPEN), *AWAY[1:]], STILL)], ["start", "partial"], [2, 1]),
        ([Frame(STILL, [*STILL[:2], *[(0, CLOSED)] * 4])] * 2, ["start", "gripper"], [2, 2]),
        ([Frame([*STILL[:1], *[(0, CLOSED)] * 5], [*STILL[:1], *[(0, CLOSED)] * 5])] * 2, ["start", "gripper"], [1, 1]),
    ],
    ids=["perfect draft", "contradicting draft", "partly right", "gripper next", "gripper inside"],
)
def test_routes(script: list[Frame], routes: list[Route], actions: list[int]) -> None:
    queries = play(scripted(script)[0], len(script))
    assert [query.route for query in queries] == routes
    assert [len(query.actions) for query in queries] == actions


@pytest.mark.parametrize(("draft", "share"), [(STILL, "draft_acceptance_rate"), (AWAY, "full_rejection_rate")])
def test_a_perfect_draft_accepts_everything_and_a_contradicting_one_nothing(draft: list[Step], share: str) -> None:
    queries = play(scripted([Frame(draft, STILL)] * 20)[0], 20)
    assert Checks.of(query.route for query in queries).rates()[share] == 1


def test_refresh_forces_a_full_query() -> None:
    queries = play(scripted([Frame(STILL, STILL)] * 6, n_action_steps=1, refresh=3)[0], 6)
    assert [query.route for query in queries] == ["start", "accepted", "accepted", "refresh", "accepted", "accepted"]


@pytest.mark.parametrize(
    ("mode", "kind", "count", "condition"),
    [
        ("rsd", "conditioned", 1, 2),
        ("baseline", "conditioned", 2, 0),
        ("shadow", "conditioned", 2, 0),
        ("rsd", "rfsq", 2, None),
    ],
)
def test_a_conditioned_head_gets_the_drafts_tokens_and_commits_one_action(
    mode: Mode, kind: str, count: int, condition: int | None
) -> None:
    policy, world = scripted([Frame(STILL, STILL, draft_token=2, main_token=2)], mode, kind=kind)
    (query,) = play(policy, 1)
    assert len(query.actions) == count
    if condition is None:
        assert world.conditions == []
    else:
        (seen,) = world.conditions
        assert torch.equal(seen, torch.full((1, T, DIMS.D, DIMS.C), condition))
        assert seen.dtype == torch.int64


@pytest.mark.parametrize(
    ("draft_token", "draft", "route", "agreement"),
    [(1, AWAY, "accepted", (1.0, 1.0)), (0, STILL, "rejected", (0.0, 0.0))],
)
def test_the_token_rule_reads_tokens_and_not_actions(
    draft_token: int, draft: list[Step], route: Route, agreement: tuple[float, ...]
) -> None:
    policy, _ = scripted([Frame(draft, STILL, draft_token, main_token=1)] * 2, rule="tokens", token_share=0.7)
    first, second = play(policy, 2)
    assert first.token_agreement == agreement
    assert second.route == route


@given(script=episodes)
@settings(max_examples=50)
def test_shadow_acts_as_the_baseline(script: list[Frame]) -> None:
    shadow, world = scripted(script, "shadow")
    baseline, _ = scripted(script, "baseline")
    for a, b in zip(play(shadow, len(script)), play(baseline, len(script)), strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.full_query
    assert len(world.ran) == len(set(world.ran)) == N * len(script)


@pytest.mark.parametrize(
    ("draft", "main", "route", "judgement"),
    [
        (STILL, STILL, "accepted", "true_accept"),
        (STILL, AWAY, "accepted", "false_accept"),
        (STILL, [(0, OPEN), *AWAY[1:]], "accepted", "false_accept"),
        (STILL, [*STILL[:2], *AWAY[2:]], "accepted", "true_accept"),
        ([(0, OPEN), *AWAY[1:]], [(0, OPEN), *AWAY[1:]], "partial", "true_accept"),
        (AWAY, AWAY, "rejected", "true_reject"),
        (AWAY, STILL, "rejected", "false_reject"),
    ],
)
def test_shadow_judges_what_rsd_would_have_done(
    draft: list[Step], main: list[Step], route: Route, judgement: Judgement
) -> None:
    policy, _ = scripted([Frame(STILL, STILL), Frame(draft, main)], "shadow")
    first, second = play(policy, 2)
    assert (first.route, first.judgement) == ("start", None)
    assert (second.route, second.judgement) == (route, judgement)


@pytest.mark.parametrize(
    ("by_draft", "by_main", "judgement"),
    [
        (0, 0, "true_reject"),
        (0, 1, "false_reject"),
        (2, 2, "true_accept"),
        (2, 3, "true_accept"),
        (2, 1, "false_accept"),
        (1, 0, "false_accept"),
    ],
)
def test_judgements(by_draft: int, by_main: int, judgement: Judgement) -> None:
    assert judge(by_draft, by_main) == judgement


@pytest.mark.parametrize(
    ("mode", "nan", "message"),
    [
        ("rsd", "hidden k", f"hidden state after block {DRAFT_BLOCK} "),
        ("rsd", "hidden N", f"hidden state after block {N} "),
        ("rsd", "draft", "draft's logits or actions"),
        ("rsd", "head", "main head's logits or actions"),
        ("baseline", "hidden N", f"hidden state after block {N} "),
        ("baseline", "head", "main head's logits or actions"),
        ("shadow", "hidden k", "hidden state after block"),
        ("shadow", "draft", "draft's logits or actions"),
        ("shadow", "head", "main head's logits or actions"),
    ],
)
def test_a_nan_ends_its_query_only(mode: Mode, nan: str, message: str) -> None:
    good, bad = Frame(STILL, STILL), Frame(STILL, STILL, nan=nan)  # type: ignore[arg-type]
    policy, _ = scripted([good, bad], mode, environments=3)
    first, fault, third = policy.act_batch([0, 1, 0], [0, 1, 2])  # type: ignore[list-item]
    assert [(len(query.actions), query.fault) for query in (first, third)] == [(2, None)] * 2
    assert fault.actions.shape == (0, DIMS.A)
    assert message in str(fault.fault)
    again = policy.act_batch([0, 0, 0], [0, 1, 2])  # type: ignore[list-item]
    if mode != "baseline":
        assert [query.route for query in again] == ["accepted", "start", "accepted"]


def held(plan: Sequence[Step], cursor: int) -> int:
    """The steps of a chunk from `cursor` on before it switches its gripper."""
    n = 0
    while cursor + n < len(plan) and plan[cursor + n][1] == plan[max(cursor, 1) - 1][1]:
        n += 1
    return n


def control(
    script: Sequence[Frame], rule: RandomAcceptance, episode: tuple[int, ...], n_action_steps: int, refresh: int
) -> list[tuple[bool, list[Step]]]:
    """The loop of mode random in plain Python: (full query, actions) of each query. The draft has no say."""
    out: list[tuple[bool, list[Step]]] = []
    plan: list[Step] = []
    cursor = accepted = 0
    for query, frame in enumerate(script):
        n = min(held(plan, cursor), n_action_steps) if plan else 0
        if n and accepted + 1 < refresh and rule.accepts((*episode, query)):
            out.append((False, plan[cursor : cursor + n]))
            cursor, accepted = cursor + n, accepted + 1
            continue
        plan, accepted = list(frame.main), 0
        cursor = min(held(plan, 0), n_action_steps)
        out.append((True, plan[:cursor]))
    return out


@given(
    script=episodes,
    n_action_steps=st.integers(1, T),
    refresh=st.integers(1, 5),
    rule=st.builds(RandomAcceptance, st.floats(0, 1), st.integers(0, 9)),
)
def test_the_random_acceptance_control_equals_the_textbook(
    script: list[Frame], n_action_steps: int, refresh: int, rule: RandomAcceptance
) -> None:
    policy, world = scripted(script, "random", decided_by=rule, n_action_steps=n_action_steps, refresh=refresh)
    policy.reset(0, (3, 4))
    queries = play(policy, len(script))
    expected = control(script, rule, (3, 4), n_action_steps, refresh)
    assert [(query.full_query, committed(query)) for query in queries] == expected
    for i, (full, _) in enumerate(expected):
        assert [block for frame, block in world.ran if frame == i] == list(range(1, (N if full else DRAFT_BLOCK) + 1))


@given(step=steps, n_action_steps=st.integers(1, T), refresh=st.integers(1, 5))
def test_accepting_always_is_a_draft_that_always_agrees(step: Step, n_action_steps: int, refresh: int) -> None:
    script = [Frame([step] * T, [step] * T)] * 20
    rsd, _ = scripted(script, "rsd", n_action_steps=n_action_steps, refresh=refresh)
    control, _ = scripted(
        script, "random", decided_by=RandomAcceptance(1.0, 0), n_action_steps=n_action_steps, refresh=refresh
    )
    for a, b in zip(play(rsd, len(script)), play(control, len(script)), strict=True):
        assert (a.route, a.prefix, committed(a)) == (b.route, b.prefix, committed(b))


def test_an_environment_that_is_reset_in_the_middle_of_an_episode_goes_on_counting_its_queries() -> None:
    rules = (RandomAcceptance(0.5, seed) for seed in range(99))
    rule = next(rule for rule in rules if [rule.accepts((0, 1, query)) for query in (1, 3)] == [0, 1])
    policy, _ = scripted([Frame(STILL, STILL)], "random", environments=2, decided_by=rule)
    policy.reset(1, (0, 1))

    def route() -> Route:
        return policy.act_batch([0], [1])[0].route  # type: ignore[list-item]

    assert [route(), route()] == ["start", "rejected"]
    policy.reset(1)
    assert [route(), route()] == ["start", "accepted"]
    policy.reset(1, (0, 1))
    assert [route(), route()] == ["start", "rejected"]


@pytest.mark.parametrize(
    ("mode", "rule", "verb"),
    [
        ("random", None, "needs the"),
        ("random", ActionsAgree(), "needs the"),
        ("rsd", RandomAcceptance(0.5, 0), "has no"),
        ("baseline", RandomAcceptance(0.5, 0), "has no"),
    ],
)
def test_only_mode_random_has_the_rule_random(mode: Mode, rule: Rule | None, verb: str, bundle: Bundle) -> None:
    with pytest.raises(UserError, match=f"mode {mode} {verb} rule random"):
        Policy.load(bundle, mode, rule=rule)


def test_a_rule_may_be_given_in_the_bundles_place() -> None:
    policy, _ = scripted([Frame(AWAY, STILL, draft_token=1, main_token=1)] * 2, decided_by=TokensAgree(1.0))
    assert [query.route for query in play(policy, 2)] == ["start", "accepted"]


@pytest.mark.parametrize("nan", ["hidden k", "draft"])
def test_a_fault_of_the_draft_ends_a_chunk_too(nan: str) -> None:
    policy, _ = scripted([Frame(STILL, STILL), Frame(STILL, STILL, nan=nan)])  # type: ignore[arg-type]
    policy.act_batch([0], [0])  # type: ignore[list-item]
    with pytest.raises(PolicyFault, match="not finite"):
        policy.act(1)  # type: ignore[arg-type]
    assert policy.act_batch([0], [0])[0].route == "start"  # type: ignore[list-item]


@pytest.mark.parametrize("mode", MODES)
def test_actions_belong_to_the_caller(mode: Mode) -> None:
    script = [Frame(STILL, STILL)] * 4
    expected = play(scripted(script, mode)[0], 4)
    policy, _ = scripted(script, mode)
    for i in range(4):
        query = policy.act_batch([i], [0])[0]  # type: ignore[list-item]
        assert (query.route, committed(query)) == (expected[i].route, committed(expected[i]))
        query.actions[:] = 9


def test_reset_forgets_one_environment_or_all() -> None:
    policy, _ = scripted([Frame(STILL, STILL)], environments=2)
    policy.act_batch([0, 0], [0, 1])  # type: ignore[list-item]
    policy.reset(1)
    assert [query.route for query in policy.act_batch([0, 0], [0, 1])] == ["accepted", "start"]  # type: ignore[list-item]
    policy.reset()
    assert [query.route for query in policy.act_batch([0, 0], [0, 1])] == ["start", "start"]  # type: ignore[list-item]


@pytest.mark.parametrize(("mode", "warnings"), [("baseline", 0), ("rsd", 1), ("shadow", 1)])
def test_a_draft_on_the_last_block_is_warned_about(mode: Mode, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        play(scripted([Frame(STILL, STILL)] * 2, mode, draft_block=N)[0], 2)
    assert len(caplog.records) == warnings
    assert all("reads block 4, the backbone's last" in record.getMessage() for record in caplog.records)


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
    backbone = bundle.backbone()
    hidden = backbone.hidden(backbone.run(inputs, until=config.backbone.language.blocks))
    tokens = bundle.head()(hidden).argmax(-1).view(config.dims.L, config.dims.T, config.dims.D).permute(1, 2, 0)
    np.testing.assert_allclose(actions, bundle.codec().decode(tokens[None])[0].detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("observations", "environments", "message"),
    [
        ([], [], "0 observations for 0 environments"),
        ([0, 1], [0], "2 observations for 1 environments"),
        ([0, 1], [1, 1], r"environments \[1, 1\], each of 0..1 at most once"),
        ([0], [2], r"environments \[2\], each of 0..1"),
    ],
)
def test_a_call_that_cannot_be_answered(observations: list[int], environments: list[int], message: str) -> None:
    policy, _ = scripted([Frame(STILL, STILL)] * 2, environments=2)
    with pytest.raises(UserError, match=message):
        policy.act_batch(observations, environments)  # type: ignore[arg-type]


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
