"""Recordings: what a policy's queries saw and said, by whole episodes, in a folder that any tool can write and read.

    FOLDER/recordings.json               whose they are: one `Facts`
    FOLDER/episodes/NAME.safetensors     an episode: tensors, and an `EpisodeFacts` as JSON in the metadata, `episode`

An episode of Q queries, with C cameras and chunks of T steps, has the tensors

    step         int32 [Q]           control steps that were executed before the query
    instruction  int32 [Q]           index into the episode's instructions
    state        float32 [Q, 8]      end-effector position (m), axis-angle (rad), gripper joints (m); NaN where unknown
    frames       uint8 [bytes]       JPEG files (or any that Pillow reads) one behind the other, query by query, in the
                                     order of the cameras; `size` pixels a side, RGB, turned as the cameras give them
    frame_end    int64 [Q, C]        where each of them ends in `frames`
    chunk        float32 [Q, T, 7]   the main head's chunk in environment units; NaN where the query asked no main head
    tokens       uint8 [Q, T, D, L]  its tokens, where the head gives any (optional)
    actions      float32 [N, 7]      what was committed, query behind query
    committed    int32 [Q]           how many of them are each query's

An episode's file is whole or absent. `recorder` writes them. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from rsd_trt.config import ACTION_DIMS, PROPRIO_DIM, RECORD_SIZE, Count, Pixels
from rsd_trt.errors import UserError, did_you_mean, missing_extra, named, reason, shown
from rsd_trt.files import own
from rsd_trt.records import Natural, Record, differing, from_text, read_record, to_json

if TYPE_CHECKING:
    from safetensors import safe_open

    from rsd_trt.bundle import Bundle

FACTS = "recordings.json"
EPISODES = "episodes"
SUFFIX = ".safetensors"
TYPES = {  # of the tensors, as safetensors names them
    "step": "I32",
    "instruction": "I32",
    "state": "F32",
    "frames": "U8",
    "frame_end": "I64",
    "chunk": "F32",
    "tokens": "U8",
    "actions": "F32",
    "committed": "I32",
}
OPTIONAL = {"tokens"}
MOST_TOKEN = 255  # that a byte holds
MAKES_NO_CHUNK = {"limits", "hand_step", "settle_steps", "max_steps", "statistics"}  # of `control`
SERVER = "server "  # begins the fingerprint of chunks that somebody else's server gave

Array = NDArray[Any]


class Facts(Record, frozen=True):
    """Whose recordings lie in a folder."""

    bundle: str  # its name
    fingerprint: str  # of all that makes the main head's chunks: `main_fingerprint`, or `SERVER` and an address
    cameras: Annotated[tuple[str, ...], Meta(min_length=1)]
    size: Pixels  # of a frame, a side
    chunk: Count  # T
    format_version: Literal[1] = 1

    @classmethod
    def of(cls, bundle: Bundle, size: int = RECORD_SIZE) -> Facts:
        """Those of a bundle that acts.

        Raises:
            UserError: frames would be larger than the cameras'.
        """
        control = bundle.config.control
        if not 0 < size <= control.camera_size:
            raise UserError(
                f"frames of {size} pixels cannot be recorded: the bundle's cameras have {control.camera_size}",
                f"Use: --record-size {control.camera_size}",
            )
        return cls(bundle.config.name, main_fingerprint(bundle), control.cameras, size, bundle.config.dims.T)


class EpisodeFacts(Record, frozen=True):
    """What an episode was."""

    instructions: Annotated[tuple[str, ...], Meta(min_length=1)]
    task: Natural | None = None
    success: bool | None = None
    steps: Natural | None = None  # that were executed; None: all that were committed
    initial_state: Natural | None = None  # of the task's: which one it began in; None: one of its own


def main_fingerprint(bundle: Bundle) -> str:
    """sha256 of all that makes a bundle's main chunks: the weights of backbone, head and, where the head gives tokens,
    codec, wherever they lie, the tokenizer, and what of `control` the main head reads or its actions go through. The
    draft and how far it is trusted do not count, nor what ends or clips an episode."""
    from rsd_trt.prompts import TOKENIZER

    config = to_json(bundle.config)
    parts = ("backbone", "head", "codec") if bundle.config.head.gives_tokens else ("backbone", "head")
    files = {name: bundle.digest(name) for name in (TOKENIZER, *(bundle.file(part).name for part in parts))}
    facts = {name: config[name] for name in (*parts, "dims")}
    elsewhere = bundle.config.backbone_weights
    facts["backbone_weights"] = [file.sha256 for file in elsewhere.files] if elsewhere else None
    control = to_json(bundle.config.control)
    facts["control"] = {key: control[key] for key in control.keys() - MAKES_NO_CHUNK}
    return hashlib.sha256(json.dumps([files, facts], sort_keys=True).encode()).hexdigest()


class Recordings:
    """A folder of recordings, read lazily: headers when it is opened, and of an episode what is asked for.

    facts: whose they are. episodes: in the order of their names.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError: there are none, or an episode is damaged or does not fit the folder's facts."""
        self.folder = folder
        try:
            self.facts = read_record(Facts, folder / FACTS)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{folder} holds no recordings: it has no {FACTS}", "Make some: rsd-trt eval --record"
            ) from None
        files = sorted((folder / EPISODES).glob(f"[!.]*{SUFFIX}"))
        self.episodes = [RecordedEpisode.open(file, self.facts) for file in files]

    def __len__(self) -> int:
        """Queries in all."""
        return sum(map(len, self.episodes))

    def check(self, facts: Facts) -> None:
        """Raises UserError if they are not those of `facts`; the size of their frames does not count."""
        check_facts(self.folder, self.facts, facts, ("size",))


@dataclass(frozen=True)
class RecordedEpisode:
    """An episode's file, of which the header was read.

    shapes: of its tensors. Arrays that it gives are the caller's.
    """

    path: Path
    facts: EpisodeFacts
    of: Facts
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path, of: Facts) -> RecordedEpisode:
        """Raises UserError: it is damaged, or not as the format says."""
        from safetensors import SafetensorError

        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                types = {name: str(part.get_dtype()) for name, part in slices.items()}
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {reason(error)}", "Remove it, or record it anew") from None
        if "episode" not in metadata:
            raise UserError(f"{path} is no recorded episode: its metadata has no `episode`")
        episode = cls(path, from_text(EpisodeFacts, metadata["episode"], str(path)), of, shapes)
        episode._check(types)
        return episode

    @property
    def name(self) -> str:
        return self.path.stem

    def __len__(self) -> int:
        """Queries."""
        return self.shapes["step"][0]

    def read(self, *names: str) -> dict[str, Array]:
        """Whole tensors of the file, by name; without names all but the frames.

        Raises:
            UserError: a state or an action is not finite, an index is out of range, or actions belong to no query.
        """
        wanted = names or tuple(name for name in self.shapes if name not in ("frames", "frame_end"))
        with _opened(self.path) as file:
            found: dict[str, Array] = {name: file.get_tensor(name) for name in wanted}
        for name in {"state", "actions", "chunk"} & set(found):
            rows = found[name].reshape(len(found[name]), -1)
            unknown = np.isnan(rows).all(1) if name != "actions" else np.zeros(len(rows), np.bool_)
            if not np.isfinite(rows[~unknown]).all():
                raise UserError(f"{self.path}: {name} holds numbers that are not finite")
        if "committed" in found:
            told, there = int(found["committed"].sum(dtype=np.int64)), self.shapes["actions"][0]
            if told != there or (found["committed"] < 0).any():
                raise UserError(f"{self.path}: the queries committed {told} actions, and there are {there}")
        if "instruction" in found and not (found["instruction"] >= 0).all():
            raise UserError(f"{self.path}: an index of an instruction is negative")
        if "instruction" in found and (found["instruction"] >= len(self.facts.instructions)).any():
            raise UserError(f"{self.path}: {len(self.facts.instructions)} instructions, and an index beyond them")
        return found

    def frames(self, first: int = 0, last: int | None = None) -> NDArray[np.uint8]:
        """The frames of queries first..last-1, [n, cameras, size, size, 3].

        Raises:
            UserError: one cannot be decoded, or is of another size.
        """
        count, cameras, size = len(self), len(self.of.cameras), self.of.size
        last = count if last is None else min(last, count)
        out = np.zeros((max(0, last - first), cameras, size, size, 3), np.uint8)
        ends = self._ends
        begin = int(ends[first * cameras])
        with _opened(self.path) as file:
            data = memoryview(file.get_slice("frames")[begin : int(ends[last * cameras])])
        for i in range(len(out)):
            for camera in range(cameras):
                place = (first + i) * cameras + camera
                file_bytes = data[int(ends[place]) - begin : int(ends[place + 1]) - begin]
                out[i, camera] = self._decoded(file_bytes, first + i)
        return out

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """0, and where each frame's file ends."""
        with _opened(self.path) as file:
            ends = np.concatenate([[0], file.get_tensor("frame_end").ravel()])
        if (np.diff(ends) < 0).any() or ends[-1] > self.shapes["frames"][0]:
            raise UserError(f"{self.path}: frame_end does not fit the {self.shapes['frames'][0]} bytes of frames")
        return ends

    def _decoded(self, data: memoryview, query: int) -> NDArray[np.uint8]:
        try:
            from PIL import Image
        except ImportError:
            raise missing_extra("pillow", "train") from None
        size = self.of.size
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.size != (size, size):
                    found = "x".join(map(str, image.size))
                    raise UserError(f"{self.path}: a frame of query {query} has {found} pixels, not {size}x{size}")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path}: a frame of query {query} cannot be decoded: {reason(error)}") from None

    def _check(self, types: Mapping[str, str]) -> None:
        """Raises UserError: a tensor is missing, or of another shape or type."""
        for name in self.shapes:
            if name not in TYPES:
                raise UserError(f"{self.path} has an unknown tensor {shown(name)}{did_you_mean(name[:80], TYPES)}")
        for name, kind in TYPES.items():
            if name not in self.shapes and name not in OPTIONAL:
                raise UserError(f"{self.path}: the tensor {name} is missing")
            if name in types and types[name] != kind:
                raise UserError(f"{self.path}: {name} is {types[name]}, not {kind}")
        queries = self.shapes["step"][0] if self.shapes["step"] else 0
        wanted: dict[str, Sequence[int]] = {
            "step": [queries],
            "instruction": [queries],
            "state": [queries, PROPRIO_DIM],
            "frame_end": [queries, len(self.of.cameras)],
            "chunk": [queries, self.of.chunk, ACTION_DIMS],
            "committed": [queries],
        }
        for name, shape in wanted.items():
            if list(self.shapes[name]) != list(shape):
                raise UserError(f"{self.path}: {name} is {list(self.shapes[name])}, not {list(shape)}")
        flat = len(self.shapes["frames"]) == 1 and self.shapes["actions"][1:] == (ACTION_DIMS,)
        if not flat or ("tokens" in self.shapes and self.shapes["tokens"][:2] != (queries, self.of.chunk)):
            raise UserError(f"{self.path}: its tensors are of shapes {shown(dict(self.shapes))}")


def check_facts(folder: Path, found: Facts, wanted: Facts, but: Sequence[str] = ()) -> None:
    """Raises UserError if recordings `found` in a folder are not those of the bundle that is `wanted`, fields of `but`
    apart."""
    differences = differing(to_json(found), to_json(wanted))
    # Chunks and cameras say more than the fingerprint, which differs with them; a size is of the same bundle.
    for key, there, here in sorted(differences, key=lambda one: (one[0] == "size", one[0] == "fingerprint")):
        if key in but or key == "bundle":
            continue
        if key == "fingerprint":
            of = [x if x.startswith(SERVER) else x[:12] for x in map(str, (there, here))]
            raise UserError(
                f"{folder} is of bundle {shown(found.bundle)} ({named(of[0])}), not of {wanted.bundle} ({of[1]})",
                "Use the bundle that was recorded, or another folder. Where you know that its main head said all this, "
                f"write the fingerprint {here} into {folder / FACTS}",
            )
        raise UserError(f"{folder}: {key} is {shown(there)} there, and {shown(here)} here", "Use another folder")


def _opened(path: Path) -> safe_open:
    from safetensors import safe_open

    return safe_open(own(path), framework="numpy")
