"""One demonstration: the expert labels every state, perturbed actions are executed (DART, Laskey et al. 2017).

What is executed differs from the label on purpose, so that the data shows how to come back: Gaussian noise of a
level that is drawn for the episode, short bursts of one random action, a grasp that is spoilt now and then, and a
target bowl that is displaced on its support before the grasp, or slides. The label is always the expert's own action.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.reference_policy.expert import expert_action, scene_state
from examples.reference_policy.slide import Slide, Sliding, draw_slide
from rsd_trt.config import ARM_DIMS, PROPRIO_DIM, ControlConfig, Dims
from rsd_trt.eval.libero.episode import Act
from rsd_trt.eval.libero.simulator import Simulator
from rsd_trt.eval.libero.target import TARGET, displace, offsets

PLATE, HAND = "plate_1", "robot0_eef_pos"  # robosuite's names of the plate and of the grip site's position
POSITION_DIMS = 3  # of the arm's dimensions; the others turn the hand
SCENE_DIM = 6  # bowl and plate, relative to the grip site

UNDISTURBED_SHARE = 0.4  # of the episodes run without Gaussian noise
NOISE = (0.03, 0.15)  # standard deviation on the position dimensions, in action units
TURN_SHARE = 0.3  # of that on the rotation dimensions
BURST_COUNTS = (0.55, 0.3, 0.15)  # how probable 0, 1 and 2 bursts are
BURST_STEPS = (3, 10)
BURST_BEGIN = 90  # a burst begins before this step
GRIPPER_BURSTS = 0.2  # of the bursts have the gripper the wrong way round
DISPLACED_SHARE = 0.3  # of the episodes have the bowl displaced
DISPLACED_BEGIN = (3, 30)  # the first step at which it may be
HANDOVER = (10, 140)  # the step at which a policy hands over to the expert


@dataclass(frozen=True)
class Burst:
    """One action in place of the expert's, for a while."""

    begin: int
    end: int
    arm: tuple[float, ...]
    gripper: float  # 1 keeps the expert's, -1 inverts it


@dataclass(frozen=True)
class Perturbations:
    """All that goes wrong in an episode, drawn from its seed."""

    noise: float  # standard deviation on the position dimensions
    bursts: tuple[Burst, ...]
    displace_from: int | None  # the first step at which the bowl may be displaced
    handover: int  # the step from which the expert acts, where a policy does before
    slide: Slide | None = None  # of the bowl, where it is not displaced


@dataclass(frozen=True)
class Demonstration:
    """F recorded frames of an episode of S steps."""

    images: NDArray[np.uint8]  # [F, cameras, size, size, 3], as the backbone sees them
    proprio: NDArray[np.float32]  # [F, 8]
    scene: NDArray[np.float32]  # [F, 6], m from the grip site to the bowl and to the plate
    steps: NDArray[np.int32]  # [F], at which the frames were taken
    actions: NDArray[np.float32]  # [S, A], the expert's at every step
    success: bool
    displaced: bool
    slid: bool = False


def draw_disturbances(random: np.random.Generator) -> Perturbations:
    """The perturbations of one episode."""
    noise = 0.0 if random.random() < UNDISTURBED_SHARE else float(random.uniform(*NOISE))
    bursts = []
    for _ in range(int(random.choice(len(BURST_COUNTS), p=BURST_COUNTS))):
        begin = int(random.integers(BURST_BEGIN))
        arm = random.uniform(-1, 1, ARM_DIMS)
        arm[POSITION_DIMS:] *= TURN_SHARE
        inverted = random.random() < GRIPPER_BURSTS
        end = begin + int(random.integers(*BURST_STEPS))
        bursts.append(Burst(begin, end, tuple(arm.tolist()), -1.0 if inverted else 1.0))
    displaced = int(random.integers(*DISPLACED_BEGIN)) if random.random() < DISPLACED_SHARE else None
    handover = int(random.integers(*HANDOVER))
    slide = draw_slide(random)
    return Perturbations(noise, tuple(bursts), displaced, handover, None if displaced is not None else slide)


def perturb(
    action: NDArray[np.float32], perturbations: Perturbations, step: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """What is executed in place of `action` [A]; the result is in [-1, 1]."""
    executed = action.copy()
    for burst in perturbations.bursts:
        if burst.begin <= step < burst.end:
            executed[:ARM_DIMS] = burst.arm
            executed[ARM_DIMS] = action[ARM_DIMS] * burst.gripper
            return executed
    deviation = np.full(ARM_DIMS, perturbations.noise)
    deviation[POSITION_DIMS:] *= TURN_SHARE
    executed[:ARM_DIMS] += random.normal(0.0, 1.0, ARM_DIMS) * deviation
    return np.clip(executed, -1.0, 1.0)


def demonstrate(
    simulator: Simulator,
    control: ControlConfig,
    seed: int,
    size: int,
    every: int,
    max_steps: int,
    actor: Act[Simulator] | None = None,
    beta: float = 0.0,
) -> Demonstration:
    """One episode in the scene of training seed `seed`.

    Frames are rendered and recorded at every `every`-th step, from a step that the seed decides. With an `actor`,
    the actor acts until the handover (with probability `beta` the expert does, at each step), and the expert from
    there: what it can't finish is no example.
    """
    random = np.random.default_rng([seed, 1])
    perturbations = draw_disturbances(random)
    phase = int(random.integers(every))
    images: list[NDArray[np.uint8]] = []
    proprio, scene, steps, actions = [], [], [], []
    success, displaced, step = False, False, 0
    sliding = Sliding(perturbations.slide, TARGET) if perturbations.slide is not None else None
    simulator.sample(seed, render=actor is not None or phase == 0)
    while step < max_steps and not success:
        raw = simulator.raw
        label = expert_action(scene_state(raw, simulator.physics))
        observation = simulator.observation()
        if step % every == phase:
            images.append(model_images(observation.images, control, size))
            proprio.append(observation.proprio)
            scene.append(np.concatenate([raw[f"{TARGET}_pos"] - raw[HAND], raw[f"{PLATE}_pos"] - raw[HAND]]))
            steps.append(step)
        actions.append(label)
        if actor is not None and step < perturbations.handover:
            executed = label if random.random() < beta else np.clip(actor(simulator, step).actions[0], -1.0, 1.0)
        else:
            executed = perturb(label, perturbations, step, random)
        if not displaced and perturbations.displace_from is not None and step >= perturbations.displace_from:
            displaced = displace(simulator.physics, offsets(random)) is not None
        if sliding is not None:
            sliding.advance(simulator.physics, step)
        step += 1
        wanted = step % every == phase or (actor is not None and step < perturbations.handover)
        success = simulator.step(executed, render=wanted)
    frames = len(steps)
    return Demonstration(
        np.stack(images) if images else np.zeros((0, len(control.cameras), size, size, 3), np.uint8),
        np.array(proprio, np.float32).reshape(frames, PROPRIO_DIM),
        np.array(scene, np.float32).reshape(frames, SCENE_DIM),
        np.array(steps, np.int32),
        np.array(actions, np.float32).reshape(step, Dims().A),
        success,
        displaced,
        sliding is not None and sliding.moved,
    )


def model_images(images: NDArray[np.uint8], control: ControlConfig, size: int) -> NDArray[np.uint8]:
    """[cameras, S, S, 3] as rendered -> [cameras, size, size, 3] as the backbone sees them, bit-equal to
    `Preprocessor.pixels` before its normalisation; `control.center_crop` must be 1."""
    from PIL import Image

    assert control.center_crop == 1, "cropping is the preprocessor's"
    images = images[:, ::-1, ::-1] if control.rotate_images else images
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])
