"""Every number and convention of a policy, as frozen records.

A dimension of robots, chunks and tokens is written here and nowhere else; `presets` has the sizes of whole models.
Bounds stand beside the fields, and are checked where a file is read. A bundle's `config.json` is one `BundleConfig`.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, field
from msgspec.structs import replace

from rsd_trt.errors import UserError, require, shown
from rsd_trt.records import Natural, Record
from rsd_trt.suites import SUITES

if TYPE_CHECKING:
    import torch

FORMAT_VERSION: Literal[1] = 1
PROPRIO_DIM = 8  # end-effector position 3, axis-angle 3, gripper joints 2
STOP_TOKEN = 2  # Llama's </s>
FEATURIZERS = ("featurizer", "fused_featurizer")  # the vision towers, side by side, as OpenVLA names them
TOWERS = len(FEATURIZERS)
MAX_SIZE = 1 << 18  # of any width, vocabulary or picture: a hostile configuration may not fill the memory,
MAX_COUNT = 1 << 10  # nor keep anyone busy with building blocks, layers, steps or levels one by one
MAX_CAMERAS = 16
MAX_PIXELS = 1 << 12  # a side
MAX_TOLERANCE = 2.0  # environment units: the whole range of an action
RECORD_SIZE = 128  # pixels a side, of recorded frames
RECORD_GB = 20.0  # that recordings may take
MAX_BATCH = 64  # rows that engines with a dynamic batch take
ARM_DIMS = 6  # dx dy dz droll dpitch dyaw; the gripper is the action dimension behind them
ACTION_DIMS = ARM_DIMS + 1
SEEDS_APART = "+"  # between the seeds of a perturbation
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "reference"  # the policy that is shipped with the toolkit
HOME = Path(os.environ.get("RSD_TRT_HOME", ""))  # of what is written without being told where; "": the current folder
DEFAULT_ENGINES = HOME / "engines"
DEFAULT_RESULTS = HOME / "results"
OWN_FOLDER = "."  # of weights that were copied into their bundle

Backend = Literal["torch", "graph", "compiled", "ort", "trt"]
Mode = Literal["baseline", "rsd", "shadow", "random"]
PerturbKind = Literal["displace", "late", "moving", "harmless", "frozen"]
Size = Literal["tiny", "reference", "openvla-7b"]
Component = Literal["draft", "head", "decoder", "propose", "predict"]
RuleName = Literal["first", "actions", "path", "tokens", "likelihood"]
Precision = Literal["fp32", "fp16", "bf16", "fp8"]  # what numbers are stored and multiplied in; fp8 is E4M3
BackboneKind = Literal["eager", "graph", "compiled"]  # PyTorch; CUDA graphs; CUDA graphs of what torch.compile made
BackbonePrecision = Literal["bundle"] | Precision  # bundle: what its weights are stored in
BundlePart = Literal["backbone", "draft", "head", "codec"]
Preset = Literal["openvla", "openvla-oft", "rvq"]
Resize = Literal["resize-naive", "letterbox"]  # the names are OpenVLA's
Resampling = Literal["bicubic", "lanczos3"]
Attention = Literal["causal", "bidirectional"]
Gripper = Literal["env", "openvla"]
Rotation = Literal["shortest", "robosuite"]  # of q and -q, the one with w >= 0; q as it is (OpenVLA-OFT)
HeadKind = Literal["rfsq", "classification", "conditioned", "oft-l1"]
BACKENDS: tuple[Backend, ...] = typing.get_args(Backend)
PERTURBATIONS: tuple[PerturbKind, ...] = typing.get_args(PerturbKind)
MODES: tuple[Mode, ...] = typing.get_args(Mode)
SIZES: tuple[Size, ...] = typing.get_args(Size)
PARTS: tuple[BundlePart, ...] = typing.get_args(BundlePart)
COMPONENTS: tuple[Component, ...] = typing.get_args(Component)
RULES: tuple[RuleName, ...] = typing.get_args(RuleName)
TOLERANT_RULES: tuple[RuleName, ...] = ("first", "actions", "path")  # that compare actions
JUDGED = ("rule", "tolerance", "threshold", "sure")  # options of rules, and with the others all those of checks
CHECKED = (*JUDGED, "check_steps", "refresh")
BACKBONES: tuple[BackboneKind, ...] = typing.get_args(BackboneKind)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")  # that draft and head are run in
BACKBONE_PRECISIONS: tuple[BackbonePrecision, ...] = ("bundle", "bf16", "fp8")  # that the backbone is run in
ROTATIONS: tuple[Rotation, ...] = typing.get_args(Rotation)
GRIPPERS: tuple[Gripper, ...] = typing.get_args(Gripper)
PRESETS: tuple[Preset, ...] = typing.get_args(Preset)

Width = Annotated[int, Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Pixels = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
Share = Annotated[float, Meta(gt=0, le=1)]
LogProbability = Annotated[float, Meta(le=0)]
Factor = Annotated[float, Meta(ge=0, le=MAX_COUNT)]
Rgb = tuple[float, float, float]
ByDim = Annotated[  # of actions, in environment units
    tuple[Annotated[float, Meta(ge=-MAX_COUNT, le=MAX_COUNT)], ...],
    Meta(min_length=ACTION_DIMS, max_length=ACTION_DIMS),
]
ByArmDim = Annotated[  # how far two actions may differ, by arm dimension
    tuple[Annotated[float, Meta(ge=0, le=MAX_TOLERANCE)], ...], Meta(min_length=ARM_DIMS, max_length=ARM_DIMS)
]


def state_and_seed(trial: int, seeds: int) -> tuple[int, int]:
    """The initial state that a trial begins in, and which of so many seeds it is perturbed with: each state is tried
    with every seed before the next."""
    return divmod(trial, seeds)


class Dims(Record, frozen=True):
    """The dimensions that draft, head and codec share, under the symbols that the tensors are described with."""

    T: Count = 8  # steps of an action chunk
    A: Count = ACTION_DIMS  # action dimensions: dx dy dz droll dpitch dyaw gripper
    D: Count = 16  # latent dimensions of a step
    L: Count = 8  # RFSQ layers
    C: Count = 3  # coarse layers, those that the draft guesses
    K: Annotated[int, Meta(ge=2, le=MAX_COUNT)] = 7  # levels of a layer


class TowerConfig(Record, frozen=True):
    """One vision transformer. OpenVLA's two towers (DINOv2 with registers, SigLIP) differ in these fields only."""

    width: Width
    blocks: Count  # blocks that run: the features are the last one's output, without a final norm
    heads: Count
    mlp_width: Width
    patch: Width  # pixels
    prefix_tokens: Annotated[int, Meta(ge=0, le=MAX_COUNT)]  # class and register tokens, dropped from the features
    layer_scale: bool
    mean: Rgb  # per RGB channel, of pixels in [0, 1]
    std: Rgb
    gelu: Literal["exact", "tanh"] = "exact"


class LanguageConfig(Record, frozen=True):
    """Llama blocks, under the names of the Llama paper's parts."""

    hidden: Width  # H, the backbone's width
    intermediate: Width  # SwiGLU width
    blocks: Count  # N
    heads: Count
    vocab: Width
    rms_eps: float = 1e-6
    rope_theta: float = 10000.0


class BackboneConfig(Record, frozen=True):
    """Two vision towers, a projector and Llama blocks: the architecture of OpenVLA."""

    towers: Annotated[tuple[TowerConfig, ...], Meta(min_length=TOWERS, max_length=TOWERS)]
    language: LanguageConfig
    image_size: Pixels  # pixels a side, of every tower's input
    proprio: bool = False  # one more embedding, made from the robot's own state
    attention: Attention = "causal"  # of the Llama blocks; bidirectional: every position looks at all that are real
    # Placeholders behind the prompt, one for each number of an action chunk, and a stop token behind them: the hidden
    # states that are read are theirs, shifted by one as in next-token prediction. 0: the prompt's last position is read
    action_tokens: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def precision(self) -> Precision:
        """What its weights are stored in."""
        return "fp32" if self.dtype == "float32" else "bf16"

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of what the main head reads of a query: [H], with n action tokens [n, H]."""
        tokens = (self.action_tokens,) if self.action_tokens else ()
        return (*tokens, self.language.hidden)


class HiddenDraftConfig(Record, frozen=True, tag_field="kind", tag="hidden"):
    """The original experiment's draft, which reads the backbone's last hidden state: one transformer layer and a
    classifier for each coarse RFSQ layer."""

    width: Width = 512
    mlp_width: Width = 2048
    positions: Width = 256  # rows of the position encoding on disk; the sequence has length 1


class VisionDraftConfig(Record, frozen=True, tag_field="kind", tag="vision"):
    """A draft with eyes of its own: its vision transformer and its classifiers."""

    side: Pixels = 128  # S, pixels a side of what the transformer sees
    patch: Pixels = 16  # pixels
    width: Width = 192
    blocks: Count = 4
    heads: Count = 3
    mlp_width: Width = 768
    classifier: Width = 256  # hidden width of a layer's classifier
    state: bool = True  # it reads the robot's own state
    instruction: Count = 64  # rows of the instruction's embeddings

    def __post_init__(self) -> None:
        """Raises UserError: sizes that do not divide evenly."""
        require(
            self.side % self.patch == 0 and self.width % self.heads == 0,
            f"draft.side {self.side} must be a multiple of draft.patch {self.patch}, and draft.width {self.width} "
            f"of draft.heads {self.heads}",
        )

    @property
    def patches(self) -> int:
        """Of one image."""
        return (self.side // self.patch) ** 2


DraftConfig = VisionDraftConfig | HiddenDraftConfig


class HeadConfig(Record, frozen=True):
    """The main head. `rfsq` and `conditioned` share the feature layer; `classification` has none. `oft-l1` is
    OpenVLA-OFT's: it reads the action tokens' hidden states, and gives actions and no tokens."""

    kind: HeadKind = "rfsq"
    feature: Width = 1024
    width: Width = 512  # hidden width of a layer's classifier (`classification`: of its first stage; `oft-l1`: of all)
    embedding: Width = 64  # of a condition token (`conditioned` only)
    blocks: Count = 2  # residual ones (`oft-l1` only)

    @property
    def gives_tokens(self) -> bool:
        """Whether it gives RFSQ tokens, which the codec decodes, and not actions."""
        return self.kind != "oft-l1"


class CodecConfig(Record, frozen=True):
    """The RFSQ autoencoder. Only `static` and `plain` codes can be decoded without loss from tokens alone."""

    width: Width = 64
    scale: Literal["static", "plain", "layernorm"] = "static"


class RsdConfig(Record, frozen=True):
    """How much the draft is trusted: `rsd_trt.runtime.speculate` has the loop and the rules. Actions are compared in
    environment units, [-1, 1] of the controller."""

    rule: RuleName = "first"
    tolerance: ByArmDim = (0.2,) * ARM_DIMS  # of first, actions, path; 0.1 is 5 mm and 0.05 rad under OSC_POSE
    threshold: LogProbability | None = None  # of likelihood: the least mean log-probability that passes
    sure: LogProbability | None = None  # of likelihood: a check that passes below it commits one action, not m
    # Of tolerance or thresholds, by the chunk's executed steps; the last is for all older.
    by_age: Annotated[tuple[Factor, ...], Meta(max_length=MAX_COUNT)] = ()
    token_share: Share = 0.7  # of tokens: of a step's coarse tokens that have to be equal
    n_action_steps: Count = 4  # n, actions of its new chunk that a full query commits
    check_steps: Count | None = None  # m, actions of the old chunk that an accepted check commits; None: n
    refresh: Count | None = None  # executed steps of a chunk after which a full query is due; None: at its end

    def idle(self, mode: Mode, given: Mapping[str, object]) -> dict[str, str]:
        """Which options that are given in the place of these (None: not) have no effect in a mode or with the rule,
        each with why.

        Raises:
            UserError: the rule likelihood has no threshold.
        """
        told = {name: value for name, value in given.items() if value is not None}
        rule = told.get("rule", self.rule)
        why = {} if mode == "random" else {"accept_rate": f"is of mode random: the mode is {mode}"}
        if mode == "baseline":
            why |= dict.fromkeys(CHECKED, "is of checks, and mode baseline makes none")
        elif mode == "random":
            why |= dict.fromkeys(JUDGED, "is of rules, and mode random accepts by chance")
        else:
            if rule not in TOLERANT_RULES:
                why["tolerance"] = f"is of the rules {', '.join(TOLERANT_RULES)}: the rule is {rule}"
            if rule != "likelihood":
                why |= dict.fromkeys(("threshold", "sure"), f"is of the rule likelihood: the rule is {rule}")
            elif told.get("threshold", self.threshold) is None:
                raise UserError("the rule likelihood needs a threshold, such as -1.5: the bundle has none")
            elif (told.get("check_steps", self.check_steps) or told.get("n_action_steps", self.n_action_steps)) == 1:
                why["sure"] = "is of checks that may commit more than one action: check_steps is 1"
        return {name: reason for name, reason in why.items() if name in told}


def idle_in_all(found: Iterable[tuple[Mode, Mapping[str, str]]]) -> dict[str, str]:
    """The options that have no effect in any of some loops, from what each says of itself (`RsdConfig.idle`), each with
    why: a mode that checks by a rule says it best, and one that makes no checks worst."""
    best_first = [idle for _, idle in sorted(found, key=lambda one: (one[0] == "baseline", one[0] == "random"))]
    return {name: why for name, why in best_first[0].items() if all(name in idle for idle in best_first)}


class Quantiles(Record, frozen=True):
    """1% and 99% quantiles of training data; `mask` is true where a dimension is normalised."""

    q01: Annotated[tuple[float, ...], Meta(max_length=MAX_COUNT)]
    q99: Annotated[tuple[float, ...], Meta(max_length=MAX_COUNT)]
    mask: Annotated[tuple[bool, ...], Meta(max_length=MAX_COUNT)]


class Limits(Record, frozen=True):
    """What the controller takes of each action dimension, in environment units."""

    low: ByDim = (-1.0,) * ACTION_DIMS
    high: ByDim = (1.0,) * ACTION_DIMS

    def __post_init__(self) -> None:
        """Raises UserError: nothing lies between them."""
        for name, low, high in zip(ACTION_NAMES, self.low, self.high, strict=True):
            require(low < high, f"control.limits of {name} are {low} to {high}: low must be below high")


class ControlConfig(Record, frozen=True):
    """Every convention between the policy and the robot, stated once. Nothing is guessed from a path."""

    cameras: Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_CAMERAS)] = (
        "agentview_image",
        "robot0_eye_in_hand_image",
    )
    camera_size: Pixels = 256  # pixels a side, as rendered
    rotate_images: bool = True  # by 180 degrees, as OpenVLA's LIBERO data is
    jpeg_quality: Annotated[int, Meta(ge=1, le=100)] | None = None  # of a JPEG that rotated images go through
    center_crop: Share = 1.0  # share of the image's area that is kept
    resize: Resize = "resize-naive"  # the same for square cameras, and no others exist
    # bicubic: the crop is of whole pixels, then PIL's bicubic; lanczos3: antialiased to size, then the crop, bilinearly
    # (OpenVLA and OpenVLA-OFT on LIBERO)
    resampling: Resampling = "bicubic"
    prompt: str = "In: What action should the robot take to {instruction}?\nOut:"
    lowercase: bool = True  # the instruction, before it goes into the prompt
    suffix_token: Annotated[int, Meta(ge=0, le=MAX_SIZE)] | None = (
        None  # appended when the prompt's last token is another
    )
    rotation: Rotation = "shortest"  # of the hand, in the state: which axis-angle of a quaternion
    gripper: Gripper = "env"  # env: -1 open, +1 close; openvla: 1 open, 0 close
    statistics: str | None = None  # the data set that the quantiles are of
    action_quantiles: Quantiles | None = None
    limits: Limits = Limits()  # the actions that leave the policy are clipped to them
    hand_step: Annotated[float, Meta(gt=0)] | None = 0.03  # m that the hand moves in a step at the most; a server takes
    # what is more for a new episode. None: it does not look. In LIBERO it moves by 0.022 at the most
    proprio_quantiles: Quantiles | None = None
    settle_steps: Annotated[int, Meta(ge=0, le=MAX_SIZE)] = 10  # idle steps before the first query, not counted
    max_steps: Annotated[dict[str, Width], Meta(max_length=MAX_COUNT)] = field(
        default_factory=lambda: {
            "libero_spatial": 220,
            "libero_object": 280,
            "libero_goal": 300,
            "libero_10": 520,
            "libero_90": 400,
        }
    )


class WeightFile(Record, frozen=True):
    """A safetensors file as it was when the bundle was packed."""

    name: str  # a plain name, in the folder
    bytes: Natural
    sample_sha256: str  # of the size, the header and samples of the rest: compared by every load
    sha256: str  # of the whole file: compared by `rsd-trt info --hash`

    def __post_init__(self) -> None:
        require(
            Path(self.name).name == self.name and self.name not in ("", ".", ".."),
            f"a file of weights is named {self.name!r}; it must be a plain name in its folder",
        )


class WeightsFolder(Record, frozen=True):
    """Weights of the backbone that stay where they are: the shards of a Hugging Face folder."""

    folder: str  # absolute, or OWN_FOLDER: they were copied into the bundle
    files: Annotated[tuple[WeightFile, ...], Meta(max_length=MAX_COUNT)]

    def __post_init__(self) -> None:
        require(
            self.folder == OWN_FOLDER or Path(self.folder).is_absolute(),
            f"backbone_weights.folder {self.folder!r} must be an absolute path, or '.'",
        )


class BundleConfig(Record, frozen=True):
    """A policy: what every part is shaped like, and how it is driven."""

    name: str
    trained: bool
    backbone: BackboneConfig
    rsd: RsdConfig = RsdConfig()
    dims: Dims = Dims()
    draft: DraftConfig = VisionDraftConfig()
    head: HeadConfig = HeadConfig()
    codec: CodecConfig = CodecConfig()
    control: ControlConfig = ControlConfig()
    backbone_weights: WeightsFolder | None = None  # beside or instead of backbone.safetensors
    training_actions: Quantiles | None = None  # of the training data's actions, in environment units: for diagnosis
    parts: tuple[BundlePart, ...] | None = None  # that the bundle was made with; None: those that lie there
    format_version: Literal[1] = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Raises UserError: sizes that do not fit each other."""
        dims, rsd = self.dims, self.rsd
        for tower in self.backbone.towers:
            require(
                self.backbone.image_size % tower.patch == 0 and tower.width % tower.heads == 0,
                f"a tower of width {tower.width} with {tower.heads} heads and patches of {tower.patch} does not "
                f"divide evenly (images of {self.backbone.image_size})",
            )
        patches = {self.backbone.image_size // tower.patch for tower in self.backbone.towers}
        require(len(patches) == 1, f"the towers give {sorted(patches)} patches a side; they must be equal")
        language = self.backbone.language
        require(
            language.hidden % (2 * language.heads) == 0,
            f"language.hidden {language.hidden} must be an even multiple of language.heads {language.heads}",
        )
        require(
            not self.backbone.action_tokens or (language.vocab > STOP_TOKEN),
            f"language.vocab {language.vocab} has no stop token {STOP_TOKEN}, which stands behind action tokens",
        )
        for name in ("n_action_steps", "check_steps"):
            steps = getattr(rsd, name)
            require(steps is None or steps <= dims.T, f"rsd.{name} {steps} is not in 1..{dims.T}, the steps of a chunk")
        require(
            rsd.rule != "likelihood" or rsd.threshold is not None,
            "rsd.rule likelihood needs rsd.threshold, the least mean log-probability that is accepted",
        )
        require(
            rsd.sure is None or (rsd.threshold is not None and rsd.sure >= rsd.threshold),
            f"rsd.sure {rsd.sure} is below rsd.threshold {rsd.threshold}: what passes is at least that likely",
        )
        require(dims.A == ACTION_DIMS, f"dims.A {dims.A} must be {ACTION_DIMS}: six of the arm, one gripper")
        require(dims.C <= dims.L, f"dims.C {dims.C} is more than dims.L {dims.L}")
        if self.head.gives_tokens:
            tokens = self.backbone.action_tokens
            require(tokens == 0, f"backbone.action_tokens {tokens}: head.kind {self.head.kind} reads one hidden state")
        else:
            self._check_without_tokens()
        control = self.control
        require(
            self.name.replace("-", "").replace("_", "").replace(".", "").isalnum() and self.name[0] not in ".-",
            f"name {shown(self.name)} must be letters, digits, '-', '_' and '.': it names the folder of the exports",
        )
        require(
            control.camera_size**2 * control.center_crop >= 1,
            f"control.center_crop {control.center_crop} leaves no pixel of {control.camera_size} a side",
        )
        require("{instruction}" in control.prompt, f"control.prompt {shown(control.prompt)} lacks {{instruction}}")
        for name, quantiles, size in (
            ("control.action_quantiles", control.action_quantiles, dims.A),
            ("control.proprio_quantiles", control.proprio_quantiles, PROPRIO_DIM),
            ("training_actions", self.training_actions, dims.A),
        ):
            lengths = {len(quantiles.q01), len(quantiles.q99), len(quantiles.mask)} if quantiles else {size}
            require(lengths == {size}, f"{name} has lists of {sorted(lengths)} numbers, not {size}")

    def _check_without_tokens(self) -> None:
        """Raises UserError: what a main head without tokens does not go with."""
        count, kind = self.dims.T * self.dims.A, self.head.kind
        require(
            self.backbone.action_tokens == count,
            f"backbone.action_tokens {self.backbone.action_tokens} must be {count}, one for each number of a chunk: "
            f"head.kind {kind} reads their hidden states",
        )
        require(
            self.rsd.rule != "tokens",
            f"rsd.rule tokens compares the draft's tokens with the main head's, and head.kind {kind} gives actions "
            "without tokens: take the rule first, actions, path or likelihood",
        )
        require(
            isinstance(self.draft, VisionDraftConfig),
            f"draft.kind hidden reads one hidden state of a query, head.kind {kind} makes {count}: take a draft with "
            "eyes of its own (draft.kind vision)",
        )

    @property
    def late_draft(self) -> str | None:
        """Why the draft cannot save time; None where it can."""
        if isinstance(self.draft, VisionDraftConfig):
            return None
        return (
            "the draft reads the backbone's last hidden state (draft.kind hidden): a check costs as much as a full "
            "query, and no time can be saved. Distil one with eyes of its own: rsd-trt distill"
        )

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


def torch_dtype(precision: Precision) -> torch.dtype:
    """PyTorch's type of a precision."""
    import torch

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return types[precision]


def with_protocol(control: ControlConfig, name: str) -> ControlConfig:
    """`control` under the named protocol."""
    return replace(control, **vars(PROTOCOLS[name]))


def protocol_name(control: ControlConfig) -> str:
    """The published protocol that `control` follows, or `custom`."""
    return next((name for name in PROTOCOLS if with_protocol(control, name) == control), "custom")
