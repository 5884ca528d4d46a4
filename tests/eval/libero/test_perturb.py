"""Perturbations: what is asked for, what is drawn, and what becomes of it in the real simulator."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from rsd_trt.config import ACTION_DIMS, PERTURBATIONS, ControlConfig, PerturbKind
from rsd_trt.errors import UserError
from rsd_trt.eval.libero.body import PENETRATION, STIRRED, Body
from rsd_trt.eval.libero.course import Course, Offset
from rsd_trt.eval.libero.episode import Answer, Assignment, run_episode
from rsd_trt.eval.libero.harmless import FREEZES, FROZEN_STEPS, PLATE, Frozen, Harmless
from rsd_trt.eval.libero.perturb import DOSES, PerturbSpec
from rsd_trt.eval.libero.simulator import IDLE, Simulator
from rsd_trt.eval.libero.slide import Still, body_names
from rsd_trt.eval.libero.target import (
    CLEARANCE,
    DISPLACEMENT,
    NEAR,
    STEPS,
    TARGET,
    Displace,
    Late,
    Moving,
    displace,
    grasp_distance,
)

NOTHING = np.array(IDLE, np.float32)
KEYS = [(seed, task, trial) for seed in range(3) for task in range(4) for trial in range(5)]
STILL_BESIDE = 0.001  # m that the other objects may stir by


def drawn(kind: PerturbKind, key: tuple[int, int, int], dose: tuple[float, float] | None = None) -> object:
    return PerturbSpec(kind, key[:1], dose).draw(*key[1:])


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("7", PerturbSpec("displace", (7,))),
        ("displace:7", PerturbSpec("displace", (7,))),
        ("late:7", PerturbSpec("late", (7,))),
        ("late:7:0.05-0.08", PerturbSpec("late", (7,), (0.05, 0.08))),
        ("moving:0:0.1-0.1", PerturbSpec("moving", (0,), (0.1, 0.1))),
        ("frozen:12", PerturbSpec("frozen", (12,))),
        ("late:7+8:0.05-0.08", PerturbSpec("late", (7, 8), (0.05, 0.08))),
    ],
)
def test_what_is_asked_for(text: str, spec: PerturbSpec) -> None:
    assert PerturbSpec.parse(text) == spec == PerturbSpec.parse(str(spec))


def test_each_initial_state_is_tried_with_every_seed() -> None:
    both, single = PerturbSpec.parse("late:7+8"), [PerturbSpec.parse(f"late:{seed}") for seed in (7, 8)]
    for trial in range(6):
        assignment = Assignment(2, trial, 9, seeds=len(both.seeds))
        assert both.draw(2, trial) == single[trial % 2].draw(2, assignment.state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latex:7", "perturbation 'latex' is unknown; did you mean 'late'"),
        ("-1", "is not KIND:SEED"),
        ("late", "is not KIND:SEED"),
        ("late:7:1:2", "is not KIND:SEED"),
        ("late:7+", "is not KIND:SEED"),
        ("late:7+8+7", "names a seed twice"),
        ("harmless:7:0.1-0.2", "perturbation harmless has no dose"),
        ("late:7:0.1", "dose '0.1' is not LOW-HIGH"),
        ("late:7:0.08-0.05", "must be 0 < LOW <= HIGH"),
        ("late:7:0-0.05", "must be 0 < LOW <= HIGH"),
        ("moving:7:0.1-5", "HIGH <= 0.2"),
        ("moving:7:nan-nan", "must be 0 < LOW"),
    ],
)
def test_what_cannot_be_asked_for(text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        PerturbSpec.parse(text)
    assert message.lower() in str(refused.value).lower()


def test_where_there_is_no_target_or_no_room() -> None:
    with pytest.raises(UserError, match="it has no target for libero_goal"):
        PerturbSpec("displace", (7,)).check("libero_goal", [0])
    with pytest.raises(UserError, match=r"tasks 3, 4, 5 have no room for that. .* --tasks 0,6$"):
        PerturbSpec("late", (7,)).check("libero_spatial", [0, 3, 4, 5, 6])
    with pytest.raises(UserError, match=r"--tasks 3,4$"):
        PerturbSpec("late", (7,), (0.02, 0.05)).check("libero_spatial", [3, 4, 5])
    with pytest.raises(UserError, match=r"--tasks 4$"):
        PerturbSpec("moving", (7,)).check("libero_spatial", [3, 4, 5])
    PerturbSpec("late", (7,)).check("libero_spatial", [0, 6])
    PerturbSpec("displace", (7,)).check("libero_spatial", range(10))


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_drawn_from_the_key_alone(kind: PerturbKind) -> None:
    found = [drawn(kind, key) for key in KEYS]
    np.random.seed(1)
    assert [drawn(kind, key) for key in reversed(KEYS)][::-1] == found
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(set(found)) == (len(KEYS) if kind != "frozen" else len({f.step for f in found}))  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", KEYS)
def test_drawn_in_range(key: tuple[int, int, int]) -> None:
    jump = drawn("displace", key)
    assert isinstance(jump, Displace)
    assert STEPS[0] <= jump.step < STEPS[1]
    lengths = [np.hypot(*offset) for offset in jump.offsets]
    assert DISPLACEMENT[0] <= min(lengths) and max(lengths) <= DISPLACEMENT[1]
    late, small, moving, frozen = (
        drawn("late", key, (0.05, 0.08)),
        drawn("late", key),
        drawn("moving", key, (0.02, 0.06)),
        drawn("frozen", key),
    )
    assert isinstance(late, Late) and isinstance(small, Late) and isinstance(moving, Moving)
    assert isinstance(frozen, Frozen) and FREEZES[0] <= frozen.step < FREEZES[1]
    assert NEAR[0] <= late.near <= NEAR[1] and 5 <= late.steps <= 10
    assert all(0.05 <= distance <= 0.08 for _, distance in late.candidates)
    assert all(DOSES["late"][0] <= distance <= DOSES["late"][1] for _, distance in small.candidates)
    assert [angle for angle, _ in late.candidates] == [angle for angle, _ in small.candidates]  # doses are paired
    assert 0.02 <= moving.speed <= 0.06


def test_golden_draw() -> None:
    """Episodes of one seed are paired over years: the draw of a key must not change."""
    jump, late = drawn("displace", (0, 3, 7)), drawn("late", (0, 3, 7))
    assert isinstance(jump, Displace) and isinstance(late, Late)
    assert jump.step == 14
    assert jump.offsets[0] == pytest.approx((-0.004690, -0.042514), abs=1e-6)
    assert (late.near, late.steps) == (pytest.approx(0.068009, abs=1e-6), 7)


def target(simulator: Simulator) -> NDArray[np.float64]:
    return np.array(simulator.physics.data.get_joint_qpos(f"{TARGET}_joint0"))


@pytest.mark.slow
@pytest.mark.libero
def test_the_target_rests_where_it_was_put_and_the_next_observation_shows_it() -> None:
    """On a cookie box, from which it could topple."""
    with closing(Simulator("libero_spatial", 3, ControlConfig(camera_size=32))) as simulator:
        simulator.reset(7)
        before, seen = target(simulator), simulator.raw[f"{TARGET}_pos"].copy()
        image = simulator.observation().images[0].copy()
        edge = ((0.0, 0.9),)  # off the box
        assert displace(simulator.physics, edge) is None
        assert np.array_equal(target(simulator), before)
        jump = drawn("displace", (0, 3, 7))
        assert isinstance(jump, Displace)
        offset = displace(simulator.physics, jump.offsets)
        assert offset is not None
        assert (target(simulator) - before)[:2] == pytest.approx(offset, abs=1e-9)
        simulator.step(NOTHING, render=True)
        assert (simulator.raw[f"{TARGET}_pos"] - seen)[:2] == pytest.approx(offset, abs=1e-3)
        assert not np.array_equal(simulator.observation().images[0], image)
        for _ in range(20):
            simulator.step(NOTHING, render=False)
        assert np.linalg.norm((target(simulator) - before)[:3] - (*offset, 0.0)) < STIRRED


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    """Task 2: the bowl stands in the middle of the table."""
    with closing(Simulator("libero_spatial", 2, ControlConfig(camera_size=32))) as made:
        yield made


@pytest.mark.libero
@pytest.mark.slow
def test_a_target_that_the_hand_is_at_is_left_alone(simulator: Simulator) -> None:
    simulator.reset(0, render=False)
    jump = drawn("displace", (0, 2, 0))
    assert isinstance(jump, Displace)
    joint = f"{TARGET}_joint0"
    place = simulator.physics.data.get_joint_qpos(joint).copy()
    place[:3] = simulator.raw["robot0_eef_pos"] - (0, 0, CLEARANCE / 2)
    simulator.physics.data.set_joint_qpos(joint, place)
    simulator.physics.forward()
    assert displace(simulator.physics, jump.offsets) is None


def expert(simulator: Simulator) -> NDArray[np.float32]:
    from examples.reference_policy.scripted import act

    return act(simulator)[0]


def watched(
    simulator: Simulator, course: Course, act: Callable[[Simulator], NDArray[np.float32]], steps: int
) -> Iterator[int]:
    """Runs an episode and stops after each control step."""
    for step in range(steps):
        action = act(simulator)
        course.before_step(step, action)
        if simulator.step(action, render=False):
            return
        yield step


@pytest.mark.libero
@pytest.mark.parametrize("dose", [(0.02, 0.05), (0.05, 0.08)])
def test_late_the_target_slides_upright_on_its_support_and_nothing_touches_it(
    simulator: Simulator, dose: tuple[float, float]
) -> None:
    perturbation = PerturbSpec("late", (7,), dose).draw(2, 0)
    assert isinstance(perturbation, Late)
    simulator.reset(0, render=False)
    bowl = Body(simulator.physics, TARGET)
    others = {name: Body(simulator.physics, name) for name in body_names(simulator.physics) if name != TARGET}
    course = simulator.perturbed(perturbation)
    slid: list[NDArray[np.float64]] = []
    distance = np.inf
    for step in watched(simulator, course, expert, 100):
        event = course.event
        if event is None:
            distance = grasp_distance(simulator.physics)
            assert np.linalg.norm(bowl.position - bowl.home[:3]) < STILL_BESIDE
            continue
        slid.append(target(simulator))
        assert not bowl.touched
        assert bowl._touching(bowl._data)[1] < bowl._depth + PENETRATION
        assert 2 * np.arccos(min(abs(float(slid[-1][3:] @ bowl.home[3:])), 1.0)) < 0.05  # no tilt, no turn
        assert abs(slid[-1][2] - bowl.home[2]) < STILL_BESIDE
        assert all(np.linalg.norm(body.position - body.home[:3]) < STILL_BESIDE for body in others.values())
        if step == event.step + perturbation.steps + 2:
            break
    event = course.event
    assert event is not None and event.displacement is not None
    assert distance < perturbation.near  # which set it off
    assert dose[0] <= np.hypot(*event.displacement) <= dose[1]
    assert slid[-1][:2] - bowl.home[:2] == pytest.approx(event.displacement, abs=2e-3)
    paces = np.linalg.norm(np.diff([bowl.home[:2], *(pose[:2] for pose in slid)], axis=0), axis=1)
    assert (paces[: perturbation.steps] > 0.001).all() and (paces[perturbation.steps :] < 1e-3).all()


@pytest.mark.libero
def test_a_slide_is_over_where_something_is_in_the_way(simulator: Simulator) -> None:
    simulator.reset(0, render=False)
    angles = [(float(angle), 0.08) for angle in np.arange(0, 6.2, 0.4)]
    course = simulator.perturbed(Late((0, 2, 0), near=10.0, steps=5, candidates=tuple(angles)))  # at once
    bowl, box = Body(simulator.physics, TARGET), Body(simulator.physics, "cookies_1")
    course.before_step(0, NOTHING)
    course.before_step(1, NOTHING)
    assert course.event is not None and course.event.displacement is not None
    reached = np.array(course.event.displacement)
    ahead = bowl.home[:2] + reached + 0.08 * reached / np.linalg.norm(reached)
    box.put(tuple((ahead - box.home[:2]).tolist()))  # at the latest its next place meets it
    course.before_step(2, NOTHING)
    box.put((0.0, 0.0))
    course.before_step(3, NOTHING)
    assert course.event.displacement == tuple(reached)
    assert bowl.position[:2] - bowl.home[:2] == pytest.approx(reached)


@pytest.mark.libero
def test_a_moving_target_goes_to_and_fro_until_the_gripper_closes(simulator: Simulator) -> None:
    perturbation = Moving((7, 2, 0), near=10.0, speed=0.08, angles=(0.5, 2.0, 4.0))  # at once
    simulator.reset(0, render=False)
    bowl = Body(simulator.physics, TARGET)
    course = simulator.perturbed(perturbation)
    reach: list[float] = []
    for step in watched(simulator, course, lambda _: NOTHING, 70):
        reach.append(float(np.linalg.norm(bowl.position[:2] - bowl.home[:2])))
        assert not bowl.touched, step
        assert bowl._touching(bowl._data)[1] < bowl._depth + PENETRATION
        assert abs(bowl.position[2] - bowl.home[2]) < STILL_BESIDE
    paces = np.abs(np.diff(reach))
    assert np.median(paces) == pytest.approx(0.08 * 0.05, rel=0.05)
    assert 0.04 <= max(reach) <= 0.105 and min(reach[20:]) < 0.01  # there and back
    closing_ = NOTHING.copy()
    closing_[-1] = 1.0
    course.before_step(70, closing_)
    course.before_step(71, NOTHING)
    assert course.event is not None and course.event.step == 0
    before = bowl.position
    simulator.step(NOTHING, render=False)
    assert np.linalg.norm(bowl.position - before) < 2e-3


@pytest.mark.slow
@pytest.mark.libero
def test_harmless_a_distractor_slides_or_the_light_changes_and_the_target_stays(simulator: Simulator) -> None:
    for distractor, kind in ((True, "distractor"), (False, "light")):
        perturbation = Harmless(1, 0.5, distractor, 0.0, 5, tuple((a, 0.04) for a in np.arange(0, 6.2, 0.4)))
        images = []
        for course_of in (None, perturbation):
            simulator.reset(0)
            bodies = {name: Body(simulator.physics, name) for name in body_names(simulator.physics)}
            course = simulator.perturbed(course_of) if course_of else Still()
            for step in range(8):
                course.before_step(step, NOTHING)
                simulator.step(NOTHING, render=step == 7)
            images.append(simulator.observation().images[0].astype(int))
        assert course.event is not None and (course.event.kind, course.event.step) == (kind, 1)
        assert np.abs(images[0] - images[1]).max() > 20
        moved = {name for name, body in bodies.items() if np.linalg.norm(body.position - body.home[:3]) > 0.01}
        assert len(moved) == distractor and not moved & {TARGET, PLATE}
    simulator.reset(0)
    for step in range(8):
        simulator.step(NOTHING, render=step == 7)
    assert np.array_equal(simulator.observation().images[0], images[0])  # a reset brings the light back


@pytest.mark.slow
@pytest.mark.libero
def test_frozen_cameras_repeat_one_frame_whatever_is_asked_for(simulator: Simulator) -> None:
    """With 1 and with 4 actions a query: the frame is the same, and the robot's state goes on."""
    repeated = []
    for n in (1, 4):
        seen: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []

        def act(scene: Simulator, step: int, n: int = n, seen: list[object] = seen) -> Answer:  # type: ignore[assignment]
            observation = scene.observation()
            seen.append((observation.images.copy(), observation.proprio))
            return Answer(np.tile(np.array([0.5, 0, -0.5, 0, 0, 0, -1], np.float32), (n, 1)))

        finished = run_episode(simulator, Assignment(2, 0, 17, perturbation=Frozen(9)), act)
        assert finished.event is not None and finished.event.step == 9
        frames = {step: seen[step // n][0] for step in range(0, 17, n)}
        during = [step for step in frames if 9 <= step <= 9 + FROZEN_STEPS]
        assert len(during) >= 1 and all(np.array_equal(frames[step], frames[during[0]]) for step in during)
        assert not np.array_equal(frames[16], frames[during[0]])
        assert not np.array_equal(seen[-2][1], seen[-1][1])
        repeated.append(frames[during[0]])
    assert np.array_equal(*repeated)


@pytest.mark.slow
@pytest.mark.libero
def test_the_same_for_every_policy_and_in_any_order(simulator: Simulator) -> None:
    """A policy of 1 and one of 8 actions a query, after other trials: the path and what is drawn are the same."""
    ends: list[Offset | None] = []
    for n, others in ((1, ()), (8, (3, 1))):
        for trial in others:
            simulator.reset(trial, render=False)
        perturbation = PerturbSpec("late", (7,), (0.05, 0.08)).draw(2, 4)

        def act(scene: Simulator, step: int, n: int = n) -> Answer:
            return Answer(np.tile(expert(scene), (n, 1)))

        finished = run_episode(simulator, Assignment(2, 4, 70, perturbation=perturbation), act, looks=False)
        assert finished.event is not None and finished.actions.shape[1] == ACTION_DIMS
        ends.append(finished.event.displacement)
    assert ends[0] == ends[1]


def test_every_kind_has_a_name_in_the_records() -> None:
    from rsd_trt.eval.libero.course import Happening

    assert set(PERTURBATIONS) - {"harmless"} <= set(get_args(Happening))
