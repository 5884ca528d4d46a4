"""What is shown to both sides of a comparison: hidden states to components, observations to a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rsd_trt.bundle import HIDDEN_STATES, Bundle
from rsd_trt.config import ARM_DIMS, COMPONENTS, PROPRIO_DIM, Component, ControlConfig
from rsd_trt.errors import UserError
from rsd_trt.models.signature import Signature
from rsd_trt.runtime.backends import Encoder, Launcher
from rsd_trt.runtime.observation import Observation
from rsd_trt.weights import open_tensors

EDGE = 1.2  # a chunk differs from the guess by up to this many tolerances, so that agreement is a close call
TRIALS = 5  # of each task
INSTRUCTIONS = (  # two, as every length of prompt is captured and compiled for itself
    "pick up the bowl",
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
)


def hidden_states(bundle: Bundle, count: int, file: Path | None, device: torch.device) -> Tensor:
    """The backbone's hidden states [count, H], with n action tokens [count, n, H]: recorded ones if there are any, else
    seeded.

    Raises:
        UserError: the file lacks them, or holds too few or of another width.
    """
    recorded, shape = file or bundle.path / HIDDEN_STATES, bundle.config.backbone.hidden_shape
    if file is None and not recorded.is_file():
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with open_tensors(recorded) as tensors:
        state = tensors.get_tensor("hidden") if "hidden" in tensors.keys() else None  # noqa: SIM118 (not a mapping)
    if state is None or tuple(state.shape[1:]) != shape or len(state) < count:
        size = "nothing" if state is None else list(state.shape)
        raise UserError(f"{recorded} has {size} as 'hidden', not [>= {count}, {', '.join(map(str, shape))}]")
    spread = torch.linspace(0, len(state) - 1, count).long()  # neighbouring queries are nearly alike
    return state[spread].float().to(device)


@dataclass(frozen=True)
class Case:
    """What the components are given, and the chunks that a guess is judged beside."""

    inputs: dict[Component, dict[str, Tensor]]
    actions: Tensor  # [n, T, A]
    tokens: Tensor | None  # [n, T, D, L]; None without a codec


def make_case(launcher: Launcher, hidden: Tensor) -> Case:
    """Inputs for every component, from what `hidden_states` gives. The chunks lie around the draft's own guesses by up
    to EDGE tolerances, in actions and in coarse tokens, so that some are accepted and some are not."""
    config, device, count = launcher.bundle.config, hidden.device, len(hidden)
    dims, rsd = config.dims, config.rsd
    head: dict[str, Tensor] = {"hidden": hidden}
    inputs: dict[Component, dict[str, Tensor]] = {}
    guess: dict[str, Tensor] | None = None
    if launcher.bundle.has("draft"):
        propose = launcher.open("propose", "dynamic")
        inputs["draft"] = inputs["propose"] = _seen(propose.signature, hidden)
        guess = clone(propose.run(inputs["propose"]))
    if config.head.kind == "conditioned":
        zeros = torch.zeros(count, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
        head["condition"] = zeros if guess is None else guess["tokens"]
    chunk = clone(launcher.open("predict", "dynamic").run(head))
    chunk_tokens = chunk.get("tokens")
    if chunk_tokens is None and launcher.bundle.has("codec"):
        chunk_tokens = torch.from_numpy(Encoder(launcher.bundle)(chunk["actions"].cpu().numpy())).to(device)
    inputs |= {"head": head, "predict": head}
    if chunk_tokens is not None:
        inputs["decoder"] = {"tokens": chunk_tokens}
    inputs = {component: inputs[component] for component in COMPONENTS if component in inputs}
    if guess is None:
        return Case(inputs, chunk["actions"], chunk_tokens)
    assert chunk_tokens is not None  # there is a codec, which `propose` decodes by
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0, EDGE, count)[:, None, None]  # from none to EDGE tolerances
    noise = (torch.rand(guess["actions"].shape, generator=generator) * 2 - 1) * scale
    noise[..., :ARM_DIMS] *= torch.tensor(rsd.tolerance)
    noise[..., ARM_DIMS:] = 0
    coarse = guess["tokens"]
    other = torch.rand(coarse.shape, generator=generator) < scale[..., None] * (1 - rsd.token_share)
    coarse = torch.where(other.to(device), (coarse + 1) % dims.K, coarse)
    tokens = torch.cat([coarse, chunk_tokens[..., dims.C :]], -1)
    return Case(inputs, guess["actions"] + noise.to(device), tokens)


def _seen(signature: Signature, hidden: Tensor) -> dict[str, Tensor]:
    """What a draft reads: hidden states, or as many seeded frames, states and instructions of different lengths."""
    generator, count = torch.Generator().manual_seed(2), len(hidden)
    seen: dict[str, Tensor] = {}
    for port in signature.inputs:
        shape = signature.shape(port, count)
        if port.name == "hidden":
            seen["hidden"] = hidden
        elif port.dtype == "uint8":
            seen[port.name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        else:
            seen[port.name] = torch.randn(shape, generator=generator)
    if "instruction" in seen:
        rows = seen["instruction"].shape[1]
        real = torch.arange(count) % rows + 1  # rows behind an instruction's last are zero
        seen["instruction"] *= (torch.arange(rows) < real[:, None])[..., None]
    return {name: value.to(hidden.device) for name, value in seen.items()}


def clone(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a session returned, kept: its next run may overwrite its own."""
    return {name: value.clone() for name, value in outputs.items()}


def random_observations(control: ControlConfig, count: int) -> list[Observation]:
    """Seeded noise for every camera, under a short instruction and a long one in turn."""
    random, side = np.random.default_rng(0), control.camera_size
    return [
        Observation(
            images=random.integers(0, 256, (len(control.cameras), side, side, 3), dtype=np.uint8),
            proprio=random.uniform(-1, 1, PROPRIO_DIM).astype(np.float32),
            instruction=INSTRUCTIONS[i % len(INSTRUCTIONS)],
        )
        for i in range(count)
    ]


def libero_observations(suite: str, control: ControlConfig) -> Iterator[Observation]:
    """What the robot sees first in the first trials of every task of a suite.

    Raises:
        UserError: LIBERO is not installed, or cannot render here.
    """
    from rsd_trt.eval.libero.simulator import Simulator, open_suite

    for task in range(open_suite(suite).n_tasks):
        simulator = Simulator(suite, task, control)
        for trial in range(min(TRIALS, simulator.trials)):
            simulator.reset(trial)
            yield simulator.observation()
        simulator.close()
