"""What OpenVLA-OFT's bundle is fed and does on LIBERO, beside a plain transcription of its authors' evaluation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import nn

from rsd_trt.bundle import copy_with
from rsd_trt.config import ARM_DIMS, ControlConfig, Dims, Quantiles
from rsd_trt.eval.libero.episode import Answer, Assignment, run_episode
from rsd_trt.eval.libero.simulator import Simulator, axis_angle, open_suite
from rsd_trt.eval.verify.oracle import tensorflow_resample
from rsd_trt.models.components import ActionTransform
from rsd_trt.presets import byte_tokenizer, initialise, preset
from rsd_trt.runtime.forward import EagerBackbone
from rsd_trt.runtime.pixels import through_jpeg
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.preprocess import Preprocessor

Numbers = NDArray[np.float64]
MANY = 100_000
STATE = Quantiles(  # of about libero_spatial's size
    q01=(-0.27, -0.24, 0.92, 2.78, -1.32, -0.42, 0.0015, -0.04),
    q99=(0.14, 0.36, 1.29, 3.28, 0.93, 0.63, 0.04, -0.0017),
    mask=(True,) * 7 + (False,),
)
ACTIONS = Quantiles(q01=(-0.7,) * 6 + (0.0,), q99=(0.9,) * 6 + (1.0,), mask=(True,) * 6 + (False,))


def quat2axisangle(quaternion: Numbers) -> Numbers:
    q = quaternion.copy()
    q[3] = min(1.0, max(-1.0, q[3]))
    root = np.sqrt(1.0 - q[3] * q[3])
    return np.zeros(3) if math.isclose(root, 0.0) else (q[:3] * 2.0 * math.acos(q[3])) / root


def normalize_proprio(state: Numbers) -> Numbers:
    low, high = np.array(STATE.q01), np.array(STATE.q99)
    return np.clip(np.where(STATE.mask, 2 * (state - low) / (high - low + 1e-8) - 1, state), -1.0, 1.0)


def unnormalize_actions(normalised: NDArray[np.float32]) -> Numbers:
    low, high = np.array(ACTIONS.q01), np.array(ACTIONS.q99)
    return np.where(ACTIONS.mask, 0.5 * (normalised + 1) * (high - low + 1e-8) + low, normalised)


def process_action(action: Numbers) -> Numbers:
    """normalize_gripper_action, binarised, and invert_gripper_action."""
    action = action.copy()
    action[..., -1] = np.sign(2 * (action[..., -1] - 0.0) / (1.0 - 0.0) - 1)
    action[..., -1] *= -1.0
    return action


def test_states_are_equal_on_many_inputs() -> None:
    random = np.random.default_rng(0)
    q = random.normal(size=(MANY, 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    q[: MANY // 4, 3] *= 1e-3  # the hand points down: w is near 0, of either sign
    q[: MANY // 4] /= np.linalg.norm(q[: MANY // 4], axis=1, keepdims=True)
    edges = [[0, 0, 0, 1], [0, 0, 0, -1], [0, 0, 0, 1.0000001], [1e-9, 0, 0, 1 - 1e-16], [1, 0, 0, 0], [1, 0, 0, -0.0]]
    q = np.concatenate([q, np.array(edges, float)])
    turned = np.stack([axis_angle(x, "robosuite") for x in q])
    assert np.array_equal(turned, np.stack([quat2axisangle(x) for x in q]))
    rest = random.normal(size=(len(q), 5))
    raw = np.concatenate([rest[:, :3], turned, rest[:, 3:]], axis=1)
    raw[:2] = STATE.q01, STATE.q99
    control = ControlConfig(proprio_quantiles=STATE)
    process = Preprocessor(control, preset("tiny", "tiny").backbone, byte_tokenizer(), torch.device("cpu"))
    assert np.array_equal(process.proprio(raw), normalize_proprio(raw).astype(np.float32))


def test_actions_are_equal_on_many_inputs() -> None:
    """Grippers exactly, arms to the rounding of float32."""
    random = np.random.default_rng(0)
    normalised = random.normal(0.3, 0.8, size=(MANY // 8, 8, 7)).astype(np.float32)
    half = np.float32(0.5)
    normalised[0, :4, 6] = half, np.nextafter(half, np.float32(1)), np.nextafter(half, np.float32(0)), -0.0
    control = ControlConfig(action_quantiles=ACTIONS, gripper="openvla")
    found = ActionTransform(control, Dims())(torch.from_numpy(normalised)).numpy()
    expected = process_action(unnormalize_actions(normalised))
    assert np.array_equal(found[..., ARM_DIMS], expected[..., ARM_DIMS])
    np.testing.assert_allclose(found[..., :ARM_DIMS], expected[..., :ARM_DIMS], rtol=0, atol=1e-6)


@dataclass
class Trace:
    """What a policy is fed at each query, what its head gives, and what is executed."""

    images: list[Numbers] = field(default_factory=list)  # [cameras, size, size, 3] in 0..255
    states: list[Numbers] = field(default_factory=list)  # normalised, [8]
    tokens: list[list[int]] = field(default_factory=list)  # of the prompt
    normalised: list[NDArray[np.float32]] = field(default_factory=list)  # [8, 7]
    executed: list[Numbers] = field(default_factory=list)


def authors_loop(task: int, steps: int, size: int, prompt: Callable[[str], list[int]], heads: Trace) -> Trace:
    """run_episode of run_libero_eval.py for trial 0, with the answers of `heads` in the model's place."""
    from libero.libero.envs import OffScreenRenderEnv

    benchmark = open_suite("libero_spatial")
    file = benchmark.get_task_bddl_file_path(task)
    trace, queue, answers = Trace(), deque(maxlen=8), iter(heads.normalised)  # type: ignore[var-annotated]
    env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=256, camera_widths=256)
    with closing(env):
        env.seed(0)
        env.reset()
        obs = env.set_init_state(benchmark.get_task_init_states(task)[0])
        for _ in range(10):
            obs, _, _, _ = env.step([0, 0, 0, 0, 0, 0, -1])
        for _ in range(steps):
            if not queue:
                images = []
                for name in ("agentview_image", "robot0_eye_in_hand_image"):
                    image = through_jpeg(np.ascontiguousarray(obs[name][::-1, ::-1]), 95)
                    images.append(tensorflow_resample(image, size, 0.9).astype(np.float64))
                turned = quat2axisangle(obs["robot0_eef_quat"])
                state = np.concatenate((obs["robot0_eef_pos"], turned, obs["robot0_gripper_qpos"]))
                trace.images.append(np.stack(images))
                trace.states.append(normalize_proprio(state))
                sentence = benchmark.get_task(task).language.lower()
                trace.tokens.append(prompt(f"In: What action should the robot take to {sentence}?\nOut:"))
                queue.extend(unnormalize_actions(next(answers)))
            action = process_action(queue.popleft())
            trace.executed.append(action)
            obs, _, done, _ = env.step(action.tolist())
            if done:
                break
    return trace


@pytest.mark.libero
@pytest.mark.slow
def test_a_trace_of_an_episode_is_the_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole chunks of eight and the start of a third, executed to the last action, from the same first scene."""
    task, steps, trace = 0, 20, Trace()
    made = initialise(tmp_path / "made", "tiny", seed=0, head="oft-l1")
    control = structs.replace(made.config.control, action_quantiles=ACTIONS, proprio_quantiles=STATE)
    bundle = copy_with(made, structs.replace(made.config, control=control), tmp_path / "oft")
    policy = Policy.load(bundle, "baseline")
    assert policy.n_action_steps == 8
    backbone = bundle.config.backbone
    mean, std = (torch.tensor([getattr(t, n) for t in backbone.towers])[0].view(3, 1, 1) for n in ("mean", "std"))

    def fed(self: EagerBackbone, observations: object) -> torch.Tensor:
        inputs = self._preprocess(observations)  # type: ignore[arg-type]
        levels = (inputs.pixels[0, :, 0] * std + mean) * 255
        trace.images.append(levels.permute(0, 2, 3, 1).double().numpy())
        assert inputs.proprio is not None
        trace.states.append(inputs.proprio[0].double().numpy())
        trace.tokens.append(inputs.tokens[0].tolist())
        return self._backbone(inputs).float()

    def answered(module: nn.Module, _: object, output: torch.Tensor) -> None:
        trace.normalised.append(output[0].numpy().copy())

    monkeypatch.setattr(EagerBackbone, "__call__", fed)
    head = policy._forward.sessions["predict"].module.head  # type: ignore[attr-defined]
    head.register_forward_hook(answered)
    with closing(Simulator("libero_spatial", task, control)) as simulator:
        act = lambda simulator, _: Answer(policy.act(simulator.observation()))  # noqa: E731
        finished = run_episode(simulator, Assignment(task, 0, steps), act)
    expected = authors_loop(task, steps, backbone.image_size, lambda text: bundle.tokenizer().encode(text).ids, trace)
    assert len(trace.images) == len(expected.images) == 3
    assert trace.tokens == [[*ids, *[-1] * 56, 2] for ids in expected.tokens]
    np.testing.assert_allclose(trace.states, expected.states, rtol=0, atol=1e-5)
    assert np.abs(np.array(trace.images) - np.array(expected.images)).mean() < 0.01
    np.testing.assert_allclose(finished.actions, np.clip(expected.executed, -1, 1), rtol=0, atol=1e-6)
