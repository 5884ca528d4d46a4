"""What a server tells its clients about the policy, and how what they send becomes an observation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsd_trt.config import ARM_DIMS, PROPRIO_DIM, BundleConfig, ControlConfig, Dims, Mode, RsdConfig, VisionDraftConfig
from rsd_trt.errors import shown
from rsd_trt.records import to_json
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.serve.arrays import MAX_SIDE, MAX_TEXT, BadMessage

Frames = Literal["upright", "rendered"]
MAX_INSTRUCTION = 1000  # characters
WIRE_NAMES = ("image", "wrist_image")  # openpi's, of the first and the second camera
OTHERS = {"agentview": 0, "wrist": 1}  # vla-eval's


@dataclass(frozen=True)
class Interface:
    """A policy as its clients see it.

    frames: how they send images. `upright`: as LIBERO's clients do, turned by 180 degrees where the bundle's
    (`control.rotate_images`) are; `rendered`: as the cameras give them. resize: whether frames of another size are
    made to fit, or refused. side: pixels a side; None: any.
    """

    name: str
    fingerprint: str | None
    mode: Mode
    n: int  # actions of a reply
    dims: Dims
    rsd: RsdConfig
    control: ControlConfig
    side: int | None
    reads_state: bool
    frames: Frames = "upright"
    resize: bool = False
    propose: str | None = None  # fingerprint of the component that checks; None: there is none
    main: str | None = None  # fingerprint of what makes the chunks: `rsd_trt.recordings.main_fingerprint`
    conditioned: bool = False  # the main head is fed the draft's tokens
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # colour in [0, 1] around frames that are padded to a square

    @classmethod
    def of(
        cls, config: BundleConfig, mode: Mode, n: int, fingerprint: str | None, propose: str | None, **choices: object
    ) -> Interface:
        """That of a bundle. propose: None where it has no draft that could check without the backbone."""
        eyes = config.draft if isinstance(config.draft, VisionDraftConfig) else None
        return cls(
            config.name,
            fingerprint,
            mode,
            n,
            config.dims,
            config.rsd,
            config.control,
            config.control.camera_size,
            config.backbone.proprio or (eyes is not None and eyes.state),
            propose=propose if eyes is not None else None,
            conditioned=config.head.kind == "conditioned",
            mean=config.backbone.towers[0].mean,
            **choices,  # type: ignore[arg-type]
        )

    def metadata(self) -> dict[str, object]:
        """The first frame of an openpi connection: under vLLM-Omni's names what it knows, and what the client at a
        robot's side needs."""
        side = self.side
        return {
            "server": "rsd-trt",
            "policy": self.name,
            "fingerprint": self.fingerprint,
            "mode": self.mode,
            "image_resolution": None if side is None else [side, side],
            "n_external_cameras": 1,
            "needs_wrist_camera": len(self.control.cameras) > 1,
            "needs_session_id": False,
            "cameras": list(self.control.cameras),
            "image_keys": [f"observation/{name}" for name in image_keys(self.control.cameras)],
            "frames": self.frames,
            "resize": self.resize,
            "state": PROPRIO_DIM if self.reads_state else 0,
            "action_space": "delta_eef",
            "action_dim": self.dims.A,
            "action_horizon": self.n,
            "n_action_steps": self.n,
            "chunk": self.dims.T,
            "dims": to_json(self.dims),
            "rsd": to_json(self.rsd),
            "control": to_json(self.control),
            "propose": self.propose,
            "main": self.main,
            "conditioned": self.conditioned,
        }

    def openpi(self, message: Mapping[str, object]) -> Observation:
        """From openpi's keys: `observation/image`, `observation/wrist_image`, `observation/state`, `prompt`."""
        cameras = self.control.cameras
        keys = [(f"observation/{a}", f"observation/{b}") for a, b in zip(image_keys(cameras), cameras, strict=True)]
        images = [message.get(a, message.get(b)) for a, b in keys]
        return self.observation([a for a, _ in keys], images, message.get("observation/state"), message.get("prompt"))

    def openvla(self, body: Mapping[str, object]) -> Observation:
        """From the keys of OpenVLA's or OpenVLA-OFT's `/act`."""
        wrists = [key for key in body if "wrist" in key]
        first = "full_image" if "full_image" in body else "image"
        keys = [first, *(wrists or ["wrist_image"])][: len(self.control.cameras)]
        return self.observation(keys, [body.get(key) for key in keys], body.get("state"), body.get("instruction"))

    def vla_eval(self, payload: Mapping[str, object]) -> Observation:
        """From the payload of vla-eval's observation."""
        images = payload.get("images")
        if not isinstance(images, dict):
            raise BadMessage("the observation has no images")
        cameras = self.control.cameras
        named = {OTHERS[key]: key for key in images if key in OTHERS}
        keys = [camera if camera in images else named.get(i, camera) for i, camera in enumerate(cameras)]
        state = payload.get("states", payload.get("state"))
        return self.observation(keys, [images.get(key) for key in keys], state, payload.get("task_description"))

    def observation(
        self, keys: Sequence[str], images: Sequence[object], state: object, instruction: object
    ) -> Observation:
        """What the policy takes.

        Raises:
            BadMessage: a camera is missing, or a value is not what the bundle takes.
        """
        if len(keys) != len(self.control.cameras):
            raise BadMessage(f"{len(keys)} images came, the policy has the cameras {', '.join(self.control.cameras)}")
        frames = [self._frame(key, image) for key, image in zip(keys, images, strict=True)]
        if not isinstance(instruction, str) or not 0 < len(instruction) <= min(MAX_INSTRUCTION, MAX_TEXT):
            raise BadMessage(f"the instruction is {shown(instruction)}: a text of 1..{MAX_INSTRUCTION} characters")
        if len({frame.shape for frame in frames}) != 1:
            raise BadMessage(f"the cameras' frames are of sizes {[frame.shape[0] for frame in frames]}")
        turned = self.frames == "upright" and self.control.rotate_images
        stacked = np.array(frames)
        return Observation(stacked[:, ::-1, ::-1] if turned else stacked, self._state(state), instruction)

    def _state(self, state: object) -> NDArray[np.float32] | None:
        if state is None and not self.reads_state:
            return None
        try:
            value = np.asarray(state) if isinstance(state, (list, np.ndarray)) else None
        except ValueError:
            raise BadMessage(f"the state is a ragged list, the policy takes {PROPRIO_DIM} numbers") from None
        if value is None or value.dtype.kind not in "fiu" or value.size != PROPRIO_DIM or value.ndim > 2:
            there = f"{value.dtype} {list(value.shape)}" if value is not None else type(state).__name__
            raise BadMessage(f"the state is {there}, the policy takes {PROPRIO_DIM} numbers")
        value = value.reshape(PROPRIO_DIM).astype(np.float32)
        if not np.isfinite(value).all():
            raise BadMessage(f"the state is not finite: {value.tolist()}")
        return value

    def _frame(self, key: str, image: object) -> NDArray[np.uint8]:
        """[S, S, 3] uint8, from HWC or CHW, bytes or floats in 0..1."""
        if image is None:
            raise BadMessage(f"{key} is missing: the policy has the cameras {', '.join(self.control.cameras)}")
        if not isinstance(image, np.ndarray):
            raise BadMessage(f"{key} is {type(image).__name__}, not a frame [height, width, 3]")
        frame: NDArray[Any] = image
        if frame.ndim != 3 or 3 not in (frame.shape[0], frame.shape[2]):
            raise BadMessage(f"{key} is {frame.dtype} {list(frame.shape)}, not a frame [height, width, 3]")
        if not 0 < min(frame.shape) <= max(frame.shape) <= MAX_SIDE:
            raise BadMessage(f"{key} is {list(frame.shape)}, not of 1..{MAX_SIDE} pixels a side")
        if frame.shape[2] != 3:
            frame = frame.transpose(1, 2, 0)
        if frame.dtype.kind == "f":
            if not (np.isfinite(frame).all() and frame.min() >= 0 and frame.max() <= 1):
                raise BadMessage(f"{key} has floats outside of 0..1")
            frame = (frame * 255).astype(np.uint8)
        if frame.dtype != np.uint8:
            raise BadMessage(f"{key} is {frame.dtype}, not uint8, or floats in 0..1")
        height, width, _ = frame.shape
        if self.side is None or (height, width) == (self.side, self.side):
            return frame
        if not self.resize:
            raise BadMessage(
                f"{key} is {height} x {width}, the policy takes {self.side} x {self.side}: send that, or start the "
                "server with --resize"
            )
        from rsd_trt.runtime.preprocess import fit_frames  # torch: at a server, not at the robot's side

        return fit_frames(frame[None].copy(), self.control, self.mean)[0]


def image_keys(cameras: Sequence[str]) -> tuple[str, ...]:
    """openpi's key of each camera, behind `observation/`."""
    return tuple(WIRE_NAMES[i] if i < len(WIRE_NAMES) else name for i, name in enumerate(cameras))


def openvla_gripper(actions: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of actions [n, A] with the gripper as OpenVLA's servers give it (1 open, 0 close): their clients turn it
    round into the environment's (-1 open, 1 close)."""
    copy = actions.copy()
    copy[:, ARM_DIMS] = (1 - actions[:, ARM_DIMS]) / 2
    return copy
