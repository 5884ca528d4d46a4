"""What stands between the heads and the robot: action conventions, agreement, and the check for NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rsd_trt.config import ARM_DIMS, CodecConfig, ControlConfig, Gripper, HeadConfig, HiddenDraftConfig, Quantiles
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.components import ActionTransform, Predict, Propose, agreeing_steps, all_finite, most_likely
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.head import build_head
from rsd_trt.presets import preset
from rsd_trt.runtime.session import TorchSession

NAN, INF = float("nan"), float("inf")
DIMS = preset("tiny", "tiny").dims
HIDDEN = 12
TOLERANCE = torch.tensor([0.125] * ARM_DIMS)
QUANTILES = Quantiles(
    q01=(-1.0, 0.0, -2.0, -1.0, -1.0, 5.0, 0.0),
    q99=(1.0, 1.0, 4.0, -0.5, 1.0, 9.0, 1.0),
    mask=(True, True, True, True, True, False, False),
)


@pytest.mark.parametrize(
    ("control", "action", "expected"),
    [
        (ControlConfig(), [0.5, -0.5, 2, 0, 0, 0, 0.25], [0.5, -0.5, 2, 0, 0, 0, 0.25]),
        (ControlConfig(gripper="openvla"), [0.5, 0, 0, 0, 0, 0, 1.0], [0.5, 0, 0, 0, 0, 0, -1]),
        (ControlConfig(gripper="openvla"), [0.5, 0, 0, 0, 0, 0, 0.0], [0.5, 0, 0, 0, 0, 0, 1]),
        (ControlConfig(gripper="openvla"), [0, 0, 0, 0, 0, 0, 0.51], [0, 0, 0, 0, 0, 0, -1]),
        (ControlConfig(gripper="openvla"), [0, 0, 0, 0, 0, 0, 0.49], [0, 0, 0, 0, 0, 0, 1]),
        (ControlConfig(action_quantiles=QUANTILES), [0, 0, 0, 0, 0, 0, 0.3], [0, 0.5, 1, -0.75, 0, 0, 0.3]),
        (ControlConfig(action_quantiles=QUANTILES), [1, 1, 1, 1, 1, 1, 1], [1, 1, 4, -0.5, 1, 1, 1]),
        (ControlConfig(action_quantiles=QUANTILES), [-1, -1, -1, -1, -1, -1, -1], [-1, 0, -2, -1, -1, -1, -1]),
        (ControlConfig(action_quantiles=QUANTILES), [2, 3, 0, 0, 0, 0, 0], [2, 2, 1, -0.75, 0, 0, 0]),
        (
            ControlConfig(action_quantiles=QUANTILES, gripper="openvla"),
            [0, 0, 0, 0, 0, 0, 0.9],
            [0, 0.5, 1, -0.75, 0, 0, -1],
        ),
    ],
)
def test_action_conventions(control: ControlConfig, action: list[float], expected: list[float]) -> None:
    actions = torch.tensor(action, dtype=torch.float32).expand(2, DIMS.T, DIMS.A)
    out = ActionTransform(control, DIMS)(actions)
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float32).expand_as(out))


@given(
    gripper=st.sampled_from(["env", "openvla"]),
    mask=st.lists(st.booleans(), min_size=7, max_size=7),
    widths=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=7, max_size=7),
    seed=st.integers(0, 99),
)
def test_inverse_is_undone_by_forward(gripper: Gripper, mask: list[bool], widths: list[float], seed: int) -> None:
    """Of all actions that the environment can be given. Where q01 is q99 that is one."""
    random = np.random.default_rng(seed)
    low = random.uniform(-1, 1, 7)
    widths[6] = max(widths[6], 0.5) if gripper == "openvla" else widths[6]  # or it could only open, or close
    quantiles = Quantiles(tuple(low.tolist()), tuple((low + widths).tolist()), tuple(mask))
    actions = low + random.uniform(0, 1, (1, DIMS.T, 7)) * widths
    actions[..., 6] = random.choice([-1, 1], DIMS.T) if gripper == "openvla" else actions[..., 6]
    there = torch.from_numpy(actions).float()
    transform = ActionTransform(ControlConfig(gripper=gripper, action_quantiles=quantiles), DIMS)
    torch.testing.assert_close(transform(transform.inverse(there)), there, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "agrees"),
    [
        ([0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], True),
        ([0.125, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], True),
        ([0, 0, 0, 0, 0, -0.125, 1], [0, 0, 0, 0, 0, 0, 1], True),
        ([0.1251, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], False),
        ([0, 0, 0, 0, 0, 0.1251, 1], [0, 0, 0, 0, 0, 0, 1], False),
        ([0, 0, 0, 0, 0, 0, 0.1], [0, 0, 0, 0, 0, 0, 1], True),
        ([0, 0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 0, 0, 1], False),
        ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, -1], True),
        ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], False),
        ([NAN, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], False),
        ([NAN, 0, 0, 0, 0, 0, 1], [NAN, 0, 0, 0, 0, 0, 1], False),
        ([INF, 0, 0, 0, 0, 0, 1], [INF, 0, 0, 0, 0, 0, 1], False),
        ([0, 0, 0, 0, 0, 0, NAN], [0, 0, 0, 0, 0, 0, -1], False),
        ([0, 0, 0, 0, 0, 0, NAN], [0, 0, 0, 0, 0, 0, NAN], False),
    ],
)
def test_a_step_agrees(a: list[float], b: list[float], agrees: bool) -> None:
    first, second = torch.zeros(1, 2, 7), torch.zeros(1, 2, 7)
    first[0, 1], second[0, 1] = torch.tensor(a), torch.tensor(b)
    assert agreeing_steps(first, second, TOLERANCE).tolist() == [[True, agrees]]
    assert agreeing_steps(second, first, TOLERANCE).tolist() == [[True, agrees]]


def test_each_dimension_has_its_own_tolerance() -> None:
    delta = torch.diag(torch.full((7,), 0.2))[None, :ARM_DIMS]  # step i is off in dimension i only
    tolerance = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.1, 0.3])
    assert agreeing_steps(delta, torch.zeros_like(delta), tolerance)[0].tolist() == [False, True] * 3


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_finite_for_each_of_a_batch(bad: float) -> None:
    a, b = torch.zeros(4, 2, 3), torch.zeros(4, 5)
    a[1, 1, 2], b[2, 0] = bad, bad
    assert all_finite(a, b).tolist() == [True, False, False, True]
    assert all_finite(a).tolist() == [True, False, True, True]


def test_most_likely_puts_layers_last() -> None:
    tokens = torch.randint(0, DIMS.K, (2, DIMS.T, DIMS.D, 5), generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(2, 5, DIMS.T * DIMS.D, DIMS.K)
    for b in range(2):
        for layer in range(5):
            for t in range(DIMS.T):
                for d in range(DIMS.D):
                    logits[b, layer, t * DIMS.D + d, tokens[b, t, d, layer]] = 1
    assert torch.equal(most_likely(logits, DIMS), tokens)


class Parts:
    """Draft, head, codec and transform with random weights, and the two modules made of them."""

    def __init__(self, kind: str, randomise: Callable[..., None]) -> None:
        config = HeadConfig(kind=kind, feature=8, width=6, embedding=4)  # type: ignore[arg-type]
        control = ControlConfig(action_quantiles=QUANTILES, gripper="openvla")
        self.draft = DraftModel(HiddenDraftConfig(width=8, mlp_width=16, positions=1), DIMS, HIDDEN)
        self.head = build_head(config, DIMS, HIDDEN)
        self.codec, self.transform = Codec(CodecConfig(), DIMS), ActionTransform(control, DIMS)
        for seed, part in enumerate((self.draft, self.head, self.codec)):
            randomise(part, seed)
        decoder = Decoder(self.codec, DIMS)
        self.propose = Propose(self.draft, decoder, self.transform).eval()
        self.predict = Predict(self.head, decoder, self.transform).eval()
        self.hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_propose_is_its_parts(randomise: Callable[..., None]) -> None:
    parts = Parts("rfsq", randomise)
    tokens, actions, first, finite = parts.propose(parts.hidden)
    logits = parts.draft(parts.hidden)
    assert torch.equal(first, logits[:, 0])
    expected = logits.argmax(-1).view(3, DIMS.C, DIMS.T, DIMS.D).permute(0, 2, 3, 1)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(actions, parts.transform(parts.codec.decode(expected)))
    assert finite.tolist() == [True] * 3


@pytest.mark.parametrize("kind", ["rfsq", "conditioned", "classification"])
@torch.no_grad()
def test_predict_is_its_parts(kind: str, randomise: Callable[..., None]) -> None:
    parts = Parts(kind, randomise)
    guess = parts.propose(parts.hidden)[0]
    condition = (guess,) if kind == "conditioned" else ()
    tokens, actions, finite = parts.predict(parts.hidden, *condition)
    logits = parts.head(parts.hidden, *condition)
    expected = logits.argmax(-1).view(3, DIMS.L, DIMS.T, DIMS.D).permute(0, 2, 3, 1)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(actions, parts.transform(parts.codec.decode(expected)))
    assert finite.tolist() == [True] * 3


@torch.no_grad()
def test_nan_logits_are_caught_although_argmax_hides_them(randomise: Callable[..., None]) -> None:
    parts = Parts("rfsq", randomise)
    parts.hidden[1, 0] = NAN
    _, coarse, _, finite = parts.propose(parts.hidden)
    assert torch.isfinite(coarse).all()
    assert finite.tolist() == [True, False, True]
    _, actions, finite = parts.predict(parts.hidden)
    assert torch.isfinite(actions).all()
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", ["rfsq", "conditioned"])
def test_signatures_fit_the_forwards(kind: str, randomise: Callable[..., None]) -> None:
    parts = Parts(kind, randomise)
    for module in (parts.propose, parts.predict):
        signature = module.signature
        inputs = {
            port.name: torch.zeros(signature.shape(port, 2), dtype=getattr(torch, port.dtype))
            for port in signature.inputs
        }
        outputs = TorchSession(module).run(inputs)
        assert [port.name for port in signature.outputs] == list(outputs)
        for port in signature.outputs:
            assert outputs[port.name].shape == signature.shape(port, 2)
            assert outputs[port.name].dtype == getattr(torch, port.dtype)


def test_the_transform_is_no_part_of_a_checkpoint() -> None:
    control = structs.replace(ControlConfig(), action_quantiles=QUANTILES)
    assert ActionTransform(control, DIMS).state_dict() == {}
