"""Every number and convention of a policy, as frozen dataclasses.

This is the only place where a dimension is written. A bundle's `config.json` is one `BundleConfig`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rsd_trt.errors import UserError
from rsd_trt.jsonio import shown

FORMAT_VERSION = 1
PROPRIO_DIM = 8  # end-effector position 3, axis-angle 3, gripper joints 2
FEATURIZERS = ("featurizer", "fused_featurizer")  # the vision towers, side by side, as OpenVLA names them
TOWERS = len(FEATURIZERS)
MAX_SIZE = 1 << 18  # of any width, vocabulary or picture: a hostile configuration may not fill the memory,
MAX_COUNT = 1 << 10  # nor keep anyone busy with building blocks, layers, steps or levels one by one
MAX_PIXELS = 1 << 12  # a side
COUNTS = ("blocks", "heads", "prefix_tokens", "T", "A", "D", "L", "C", "K")
MAX_TOLERANCE = 2.0  # environment units: the whole range of an action
MAX_BATCH = 64  # rows that engines with a dynamic batch take
ARM_DIMS = 6  # dx dy dz droll dpitch dyaw; the gripper is the action dimension behind them
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "reference"  # the policy that is shipped with the toolkit
DEFAULT_ENGINES = Path("engines")
OWN_FOLDER = "."  # of weights that were copied into their bundle

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
Mode = Literal["baseline", "rsd", "shadow", "random"]
PolicyKind = Literal["bundle", "expert"]
Size = Literal["tiny", "reference", "openvla-7b"]
Component = Literal["draft", "head", "decoder", "propose", "predict"]
Precision = Literal["fp32", "fp16", "bf16"]  # of draft and head
BackboneKind = Literal["eager", "graph", "compiled"]  # PyTorch; CUDA graphs; CUDA graphs of what torch.compile made
BackbonePrecision = Literal["bundle", "bf16", "fp8"]
Preset = Literal["openvla", "openvla-oft", "rvq"]
Resize = Literal["resize-naive", "letterbox"]  # the names are OpenVLA's
MODES: tuple[Mode, ...] = typing.get_args(Mode)
POLICIES: tuple[PolicyKind, ...] = typing.get_args(PolicyKind)
SIZES: tuple[Size, ...] = typing.get_args(Size)
COMPONENTS: tuple[Component, ...] = typing.get_args(Component)
BACKBONES: tuple[BackboneKind, ...] = typing.get_args(BackboneKind)
BACKBONE_PRECISIONS: tuple[BackbonePrecision, ...] = typing.get_args(BackbonePrecision)
PRECISIONS: tuple[Precision, ...] = typing.get_args(Precision)
PRESETS: tuple[Preset, ...] = typing.get_args(Preset)


@dataclass(frozen=True)
class Dims:
    """The dimensions that draft, head and codec share, under the symbols that the tensors are described with."""

    T: int = 8  # steps of an action chunk
    A: int = 7  # action dimensions: dx dy dz droll dpitch dyaw gripper
    D: int = 16  # latent dimensions of a step
    L: int = 8  # RFSQ layers
    C: int = 3  # coarse layers, those that the draft guesses
    K: int = 7  # levels of a layer


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer. OpenVLA's two towers (DINOv2 with registers, SigLIP) differ in these fields only."""

    width: int
    blocks: int  # blocks that run: the features are the last one's output, without a final norm
    heads: int
    mlp_width: int
    patch: int  # pixels
    prefix_tokens: int  # class and register tokens, dropped from the features
    layer_scale: bool
    mean: tuple[float, float, float]  # per RGB channel, of pixels in [0, 1]
    std: tuple[float, float, float]
    gelu: Literal["exact", "tanh"] = "exact"


@dataclass(frozen=True)
class LanguageConfig:
    """Llama blocks, under the names of the Llama paper's parts."""

    hidden: int  # H, the backbone's width
    intermediate: int  # SwiGLU width
    blocks: int  # N
    heads: int
    vocab: int
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class BackboneConfig:
    """Two vision towers, a projector and Llama blocks: the architecture of OpenVLA."""

    towers: tuple[TowerConfig, ...]
    language: LanguageConfig
    image_size: int  # pixels a side, of every tower's input
    proprio: bool = False  # one more embedding, made from the robot's own state
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class DraftConfig:
    """The draft: one transformer layer and a classifier for each coarse RFSQ layer."""

    width: int = 512
    mlp_width: int = 2048
    positions: int = 256  # rows of the position encoding on disk; the sequence has length 1


@dataclass(frozen=True)
class HeadConfig:
    """The main head. `rfsq` and `conditioned` share the feature layer; `classification` has none."""

    kind: Literal["rfsq", "classification", "conditioned"] = "rfsq"
    feature: int = 1024
    width: int = 512  # hidden width of a layer's classifier (`classification`: of its first stage)
    embedding: int = 64  # of a condition token (`conditioned` only)


@dataclass(frozen=True)
class CodecConfig:
    """The RFSQ autoencoder. Only `static` and `plain` codes can be decoded without loss from tokens alone."""

    width: int = 64
    scale: Literal["static", "plain", "layernorm"] = "static"


@dataclass(frozen=True)
class RsdConfig:
    """How much the draft is trusted. Compared actions are in environment units, [-1, 1] of the controller."""

    draft_block: int  # k, the block after which the draft reads; k = N is the textbook form
    n_action_steps: int = 4  # actions committed by a query at the most
    rule: Literal["actions", "tokens"] = "actions"
    tolerance: tuple[float, ...] = (0.1,) * ARM_DIMS  # 0.1 is 5 mm and 0.05 rad under LIBERO's OSC_POSE
    token_share: float = 0.7  # of equal coarse tokens, for the rule `tokens`
    refresh: int = 8  # every refresh-th query at the latest is a full query


@dataclass(frozen=True)
class Quantiles:
    """1% and 99% quantiles of training data; `mask` is true where a dimension is normalised."""

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]


@dataclass(frozen=True)
class ControlConfig:
    """Every convention between the policy and the robot, stated once. Nothing is guessed from a path."""

    cameras: tuple[str, ...] = ("agentview_image", "robot0_eye_in_hand_image")
    camera_size: int = 256  # pixels a side, as rendered
    rotate_images: bool = True  # by 180 degrees, as OpenVLA's LIBERO data is
    center_crop: float = 1.0  # share of the image's area that is kept
    resize: Resize = "resize-naive"  # the same for square cameras, and no others exist
    prompt: str = "In: What action should the robot take to {instruction}?\nOut:"
    lowercase: bool = True  # the instruction, before it goes into the prompt
    suffix_token: int | None = None  # appended when the prompt's last token is another
    gripper: Literal["env", "openvla"] = "env"  # env: -1 open, +1 close; openvla: 1 open, 0 close
    statistics: str | None = None  # the data set that the quantiles are of
    action_quantiles: Quantiles | None = None
    proprio_quantiles: Quantiles | None = None
    settle_steps: int = 10  # idle steps before the first query, not counted
    max_steps: dict[str, int] = field(
        default_factory=lambda: {
            "libero_spatial": 220,
            "libero_object": 280,
            "libero_goal": 300,
            "libero_10": 520,
            "libero_90": 400,
        }
    )


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file as it was when the bundle was packed."""

    name: str  # a plain name, in the folder
    bytes: int
    sample_sha256: str  # of the size, the header and samples of the rest: compared by every load
    sha256: str  # of the whole file: compared by `rsd-trt info --hash`

    def __post_init__(self) -> None:
        _require(
            Path(self.name).name == self.name and self.name not in ("", ".", ".."),
            f"a file of weights is named {self.name!r}; it must be a plain name in its folder",
        )


@dataclass(frozen=True)
class WeightsFolder:
    """Weights of the backbone that stay where they are: the shards of a Hugging Face folder."""

    folder: str  # absolute, or OWN_FOLDER: they were copied into the bundle
    files: tuple[WeightFile, ...]

    def __post_init__(self) -> None:
        _require(
            self.folder == OWN_FOLDER or Path(self.folder).is_absolute(),
            f"backbone_weights.folder {self.folder!r} must be an absolute path, or '.'",
        )


@dataclass(frozen=True)
class BundleConfig:
    """A policy: what every part is shaped like, and how it is driven."""

    name: str
    trained: bool
    backbone: BackboneConfig
    rsd: RsdConfig
    dims: Dims = Dims()
    draft: DraftConfig = DraftConfig()
    head: HeadConfig = HeadConfig()
    codec: CodecConfig = CodecConfig()
    control: ControlConfig = ControlConfig()
    backbone_weights: WeightsFolder | None = None  # beside or instead of backbone.safetensors
    training_actions: Quantiles | None = None  # of the training data's actions, in environment units: for diagnosis
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        dims, rsd, blocks = self.dims, self.rsd, self.backbone.language.blocks
        _require(
            self.format_version == FORMAT_VERSION,
            f"format_version {self.format_version} is not {FORMAT_VERSION}, which this version reads",
        )
        self._require_sizes()
        for tower in self.backbone.towers:
            _require(
                self.backbone.image_size % tower.patch == 0 and tower.width % tower.heads == 0,
                f"a tower of width {tower.width} with {tower.heads} heads and patches of {tower.patch} does not "
                f"divide evenly (images of {self.backbone.image_size})",
            )
        patches = {self.backbone.image_size // tower.patch for tower in self.backbone.towers}
        _require(len(patches) == 1, f"the towers give {sorted(patches)} patches a side; they must be equal")
        language = self.backbone.language
        _require(
            language.hidden % (2 * language.heads) == 0,
            f"language.hidden {language.hidden} must be an even multiple of language.heads {language.heads}",
        )
        _require(0 < rsd.draft_block <= blocks, f"rsd.draft_block {rsd.draft_block} is not in 1..{blocks}")
        _require(
            0 < rsd.n_action_steps <= dims.T,
            f"rsd.n_action_steps {rsd.n_action_steps} is not in 1..{dims.T}, the steps of a chunk",
        )
        _require(rsd.refresh >= 1, f"rsd.refresh {rsd.refresh} must be at least 1")
        _require(
            len(rsd.tolerance) == ARM_DIMS and all(0 <= x <= MAX_TOLERANCE for x in rsd.tolerance),
            f"rsd.tolerance {shown(rsd.tolerance)} must be {ARM_DIMS} numbers in 0..{MAX_TOLERANCE:g}, one for each "
            "arm dimension",
        )
        _require(0 < rsd.token_share <= 1, f"rsd.token_share {rsd.token_share} is not in (0, 1]")
        _require(dims.C <= dims.L, f"dims.C {dims.C} is more than dims.L {dims.L}")
        _require(dims.A == ARM_DIMS + 1, f"dims.A {dims.A} must be {ARM_DIMS + 1}: six of the arm, one gripper")
        control = self.control
        _require(
            self.name.replace("-", "").replace("_", "").replace(".", "").isalnum() and self.name[0] not in ".-",
            f"name {shown(self.name)} must be letters, digits, '-', '_' and '.': it names the folder of the exports",
        )
        for name, low, value, high in (
            ("control.camera_size", 1, control.camera_size, MAX_PIXELS),
            ("control.settle_steps", 0, control.settle_steps, MAX_SIZE),
            ("backbone.image_size", 1, self.backbone.image_size, MAX_PIXELS),
        ):
            _require(low <= value <= high, f"{name} {value} is not in {low}..{high}")
        _require(
            all(0 < steps <= MAX_SIZE for steps in control.max_steps.values()),
            f"control.max_steps {list(control.max_steps.values())[:8]} must be in 1..{MAX_SIZE}",
        )
        _require(0 < control.center_crop <= 1, f"control.center_crop {control.center_crop} is not in (0, 1]")
        _require(
            control.camera_size**2 * control.center_crop >= 1,
            f"control.center_crop {control.center_crop} leaves no pixel of {control.camera_size} a side",
        )
        _require(bool(control.cameras), "control.cameras is empty; name at least one camera")
        _require("{instruction}" in control.prompt, f"control.prompt {shown(control.prompt)} lacks {{instruction}}")
        for name, quantiles, size in (
            ("control.action_quantiles", control.action_quantiles, dims.A),
            ("control.proprio_quantiles", control.proprio_quantiles, PROPRIO_DIM),
            ("training_actions", self.training_actions, dims.A),
        ):
            lengths = {len(quantiles.q01), len(quantiles.q99), len(quantiles.mask)} if quantiles else {size}
            _require(lengths == {size}, f"{name} has lists of {sorted(lengths)} numbers, not {size}")

    def _require_sizes(self) -> None:
        towers = self.backbone.towers
        _require(len(towers) == TOWERS, f"backbone.towers has {len(towers)} entries, not {TOWERS}")
        sections = {
            "dims": self.dims,
            "backbone": self.backbone,
            **{f"backbone.towers[{i}]": tower for i, tower in enumerate(towers)},
            "backbone.language": self.backbone.language,
            "draft": self.draft,
            "head": self.head,
            "codec": self.codec,
        }
        least = {"dims.K": 2} | {f"backbone.towers[{i}].prefix_tokens": 0 for i in range(TOWERS)}
        for section, config in sections.items():
            for name, value in vars(config).items():
                key = f"{section}.{name}"
                low, high = least.get(key, 1), MAX_COUNT if name in COUNTS else MAX_SIZE
                _require(type(value) is not int or low <= value <= high, f"{key} {value} is not in {low}..{high}")

    @property
    def hidden(self) -> int:
        """H, the width that draft and head read."""
        return self.backbone.language.hidden


@dataclass(frozen=True)
class Protocol:
    """What a published evaluation fixes about the episodes."""

    rotate_images: bool
    settle_steps: int
    max_steps: dict[str, int]


PROTOCOLS: dict[str, Protocol] = {
    # OpenVLA-OFT's LIBERO evaluation.
    "oft": Protocol(rotate_images=True, settle_steps=10, max_steps=ControlConfig().max_steps),
    # The evaluation of the original RSD experiment.
    "original": Protocol(rotate_images=False, settle_steps=0, max_steps={suite: 300 for suite in SUITES}),
}


def with_protocol(control: ControlConfig, name: str) -> ControlConfig:
    """`control` under the named protocol."""
    return dataclasses.replace(control, **vars(PROTOCOLS[name]))


def protocol_name(control: ControlConfig) -> str:
    """The published protocol that `control` follows, or `custom`."""
    return next((name for name in PROTOCOLS if with_protocol(control, name) == control), "custom")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
