"""A policy on disk: one folder with `config.json`, four safetensors files and a tokenizer.

The backbone's weights may stay in another folder, to which `backbone_weights` of the configuration refers.

Loading is strict and never writes. Saving goes to a temporary name first, so that a folder is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from rsd_trt.config import (
    COMPONENTS,
    OWN_FOLDER,
    PARTS,
    BundleConfig,
    Component,
    HiddenDraftConfig,
    Precision,
    VisionDraftConfig,
    torch_dtype,
)
from rsd_trt.errors import UserError
from rsd_trt.files import new_folder, own
from rsd_trt.prompts import TOKENIZER, read_tokenizer
from rsd_trt.records import checked, read_record, to_json, to_text
from rsd_trt.weights import Entry, check_folder, check_keys, contents, fill, sha256, without_unused

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from rsd_trt.models.backbone import Backbone
    from rsd_trt.models.codec import Codec
    from rsd_trt.models.components import ActionTransform
    from rsd_trt.models.draft import DraftModel
    from rsd_trt.models.head import ActionHead, Head
    from rsd_trt.models.signature import Exportable
    from rsd_trt.models.vision_draft import VisionDraft

log = logging.getLogger(__name__)

CONFIG = "config.json"
HIDDEN_STATES = "hidden_states.safetensors"  # optional: recorded on LIBERO, for `rsd-trt verify`
SEEN_BY_DRAFT = ("cameras", "camera_size", "rotate_images", "center_crop", "proprio_quantiles")  # of `control`
COMPONENT_VERSION = 2  # to be raised when a component computes something else from the same weights


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its configuration, and its parts on request."""

    path: Path
    config: BundleConfig
    _digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Reads the configuration only.

        Raises:
            UserError: no bundle there, a configuration that does not fit this version, or a part is gone.
        """
        try:
            bundle = cls(path, read_record(BundleConfig, path / CONFIG))
        except FileNotFoundError:
            there = f"{path} is no bundle: it has no {CONFIG}" if path.exists() else f"there is no folder {path}"
            raise UserError(there, "A bundle is a folder, made by rsd-trt pack") from None
        except NotADirectoryError:
            beside = (path.parent / CONFIG).is_file()
            remedy = f"Give the folder: {path.parent}" if beside else "A bundle is made by rsd-trt pack"
            raise UserError(f"{path} is a file, and a bundle is a folder", remedy) from None
        for part in bundle.config.parts or ():
            if not bundle.has(part):
                raise UserError(
                    f"{bundle.file(part)} is missing: the bundle was made with it, as its {CONFIG} says",
                    "Put it back, or take another copy of the bundle",
                )
        return bundle

    def file(self, part: str) -> Path:
        """The bundle's own weights of one of `PARTS`."""
        return self.path / f"{part}.safetensors"

    def has(self, part: str) -> bool:
        """Whether the bundle has weights of that part, its own or elsewhere."""
        return self.file(part).exists() or (part == "backbone" and self.config.backbone_weights is not None)

    @property
    def weights_folder(self) -> Path | None:
        """Where backbone weights lie that are not the bundle's own."""
        weights = self.config.backbone_weights
        return self.path / weights.folder if weights else None

    def weights(self, part: str, whole: bool = False) -> dict[str, Entry]:
        """The tensors of a part, by key. Files elsewhere are compared with what they were when the bundle was packed:
        size, header and samples; with `whole`, every byte.

        Raises:
            UserError: the part is missing or damaged, or a file has changed.
        """
        file = self.file(part)
        if not self.has(part):
            raise UserError(f"{file} is missing: the bundle has no {part}")
        mine = [own(file)] if file.exists() else []
        if part != "backbone" or self.config.backbone_weights is None:
            return contents(mine)
        shards = check_folder(self.config.backbone_weights, self.path / self.config.backbone_weights.folder, whole)
        return without_unused(contents([*mine, *shards]), self.config.backbone)

    @property
    def files(self) -> tuple[Path, ...]:
        """The bundle's own files, of whatever else lies in its folder.

        Raises:
            UserError: one is no regular file.
        """
        weights = self.config.backbone_weights
        shards = [file.name for file in weights.files] if weights and weights.folder == OWN_FOLDER else []
        names = (CONFIG, TOKENIZER, HIDDEN_STATES, *(self.file(part).name for part in PARTS), *shards)
        return tuple(self.path / name for name in names if own(self.path / name).exists())

    def digest(self, file: str) -> str | None:
        """sha256 of one of the bundle's files, computed once; None when it is absent."""
        if file not in self._digests and own(self.path / file).is_file():
            self._digests[file] = sha256(self.path / file)
        return self._digests.get(file)

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of every file that makes the policy; absent files are left out."""
        files = [CONFIG, TOKENIZER, *(self.file(part).name for part in PARTS)]
        return {file: digest for file in files if (digest := self.digest(file))}

    @property
    def fingerprint(self) -> str:
        """sha256 over all fingerprints: one name for the whole policy."""
        lines = (f"{name} {digest}\n" for name, digest in sorted(self.fingerprints.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def backbone(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Backbone:
        """The backbone; without a `dtype`, in that of its configuration."""
        from rsd_trt.models.backbone import Backbone

        return self._load("backbone", Backbone, dtype or torch_dtype(self.config.backbone.precision), device)

    def draft(self, device: torch.device | str = "cpu") -> DraftModel | VisionDraft:
        """The draft of the configuration's kind, in float32."""
        import torch

        from rsd_trt.models.draft import DraftModel
        from rsd_trt.models.vision_draft import VisionDraft

        kind: type[DraftModel | VisionDraft] = DraftModel
        if isinstance(self.config.draft, VisionDraftConfig):
            kind = VisionDraft
        return self._load("draft", kind, torch.float32, device).to(device)  # with its constants, which no file holds

    def head(self, device: torch.device | str = "cpu") -> Head | ActionHead:
        """The main head, in float32."""
        import torch

        from rsd_trt.models.head import ActionHead, Head

        kind: type[Head | ActionHead] = Head if self.config.head.gives_tokens else ActionHead
        return self._load("head", kind, torch.float32, device)

    def codec(self, device: torch.device | str = "cpu") -> Codec:
        """The codec, in float32. A layernorm codec is lossy, and says so in the log."""
        import torch

        from rsd_trt.models.codec import Codec

        codec = self._load("codec", Codec, torch.float32, device)
        if self.config.codec.scale == "layernorm":
            log.warning(
                "%s: codec.scale is layernorm, whose tokens alone do not carry the action: round-trip MSE %.2g",
                self.path,
                codec.round_trip_error(),
            )
        return codec

    def transform(self, device: torch.device | str = "cpu") -> ActionTransform:
        """The policy's action conventions -> the environment's."""
        from rsd_trt.models.components import ActionTransform

        return ActionTransform(self.config.control, self.config.dims).to(device)

    def component(
        self, name: Component, device: torch.device | str = "cpu", precision: Precision = "fp32"
    ) -> Exportable:
        """What is exported and launched: a module with a `signature`.

        `precision` is that of draft and head. The codec stays in float32: its finest scales are below what half
        precision resolves.
        """
        from rsd_trt.models.codec import Decoder
        from rsd_trt.models.components import Predict, PredictActions, Propose
        from rsd_trt.models.head import ActionHead

        dtype = torch_dtype(precision)
        if name == "draft":
            return self.draft(device).to(dtype)
        if name == "head":
            return self.head(device).to(dtype)
        if name == "predict" and isinstance(head := self.head(device), ActionHead):
            return PredictActions(head.to(dtype), self.transform(device))
        decoder = Decoder(self.codec(device), self.config.dims)
        if name == "decoder":
            return decoder
        transform = self.transform(device)
        if name == "propose":
            return Propose(self.draft(device).to(dtype), decoder, transform)
        assert not isinstance(head, ActionHead)
        return Predict(head.to(dtype), decoder, transform)

    def parts_of(self, name: Component) -> tuple[str, ...]:
        """Those of `PARTS` that a component is made from."""
        predict = ("head", "codec") if self.config.head.gives_tokens else ("head",)
        parts: dict[Component, tuple[str, ...]] = {"draft": ("draft",), "head": ("head",), "decoder": ("codec",)}
        return {**parts, "propose": ("draft", "codec"), "predict": predict}[name]

    @property
    def components(self) -> tuple[Component, ...]:
        """Those that the bundle has all parts for."""
        return tuple(name for name in COMPONENTS if all(map(self.has, self.parts_of(name))))

    def component_fingerprint(self, name: Component) -> str:
        """sha256 of all that a component is made from: its parts' weights and the configuration that they read."""
        config = to_json(self.config)
        facts: dict[str, object] = {"maths": COMPONENT_VERSION}
        for part in self.parts_of(name):
            file = self.file(part)
            if (weights := self.digest(file.name)) is None:
                raise UserError(f"{file} is missing: the bundle has no {part}")
            facts[part] = [weights, config[part]]
        control = to_json(self.config.control)
        facts |= {"dims": config["dims"], "hidden": self.config.hidden}
        if name in ("propose", "predict"):
            facts |= {key: control[key] for key in ("gripper", "action_quantiles")}
        if name in ("draft", "propose") and isinstance(self.config.draft, VisionDraftConfig):
            facts |= {key: control[key] for key in SEEN_BY_DRAFT}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The prompt's tokenizer."""
        own(self.path / TOKENIZER)
        return read_tokenizer(self.path)

    def outline(self, part: str, whole: bool = False) -> nn.Module:
        """A part without its weights (on the meta device), after a check that its files hold them."""
        module = outline(self.config, part)
        check_keys(module, self.weights(part, whole), self._where(part))
        return module

    def _load(self, part: str, kind: type[ModuleT], dtype: torch.dtype, device: torch.device | str) -> ModuleT:
        module = outline(self.config, part)
        assert isinstance(module, kind)
        return fill(module, self.weights(part), self._where(part), dtype, device)

    def _where(self, part: str) -> Path:
        """What an error about the part's weights names."""
        return self.weights_folder if part == "backbone" and self.weights_folder else self.file(part)


if TYPE_CHECKING:
    from typing import TypeVar

    ModuleT = TypeVar("ModuleT", bound=nn.Module)


def outline(config: BundleConfig, part: str) -> nn.Module:
    """One of `PARTS` on the meta device: shapes without numbers."""
    import torch

    with torch.device("meta"):
        return build(config, part)


def build(config: BundleConfig, part: str) -> nn.Module:
    """One of `PARTS` as the configuration states it, untrained, on torch's current device and in its default dtype."""
    from rsd_trt.models.backbone import Backbone
    from rsd_trt.models.codec import Codec
    from rsd_trt.models.head import build_head

    builders: dict[str, Callable[[], nn.Module]] = {
        "backbone": lambda: Backbone(config.backbone),
        "draft": lambda: build_draft(config),
        "head": lambda: build_head(config.head, config.dims, config.hidden),
        "codec": lambda: Codec(config.codec, config.dims),
    }
    return builders[part]()


def build_draft(config: BundleConfig) -> DraftModel | VisionDraft:
    """An untrained draft of the configuration's kind, on torch's current device."""
    from rsd_trt.models.draft import DraftModel
    from rsd_trt.models.vision_draft import VisionDraft

    if isinstance(config.draft, HiddenDraftConfig):
        return DraftModel(config.draft, config.dims, config.hidden)
    return VisionDraft(config.draft, config.dims, config.control, config.hidden)


def save(path: Path, config: BundleConfig, parts: dict[str, nn.Module], tokenizer: Tokenizer) -> Bundle:
    """Writes a whole bundle. `parts` may leave out some of `PARTS`.

    Raises:
        UserError: `path` exists, or cannot be written.
    """
    with new_folder(path) as folder:
        tokenizer.save(str(folder / TOKENIZER))
        for part, module in parts.items():
            write_part(folder, part, module.state_dict())
        write_config(folder, config)
    return Bundle.open(path)


def write_config(folder: Path, config: BundleConfig) -> None:
    """Writes the configuration of a bundle that is being made, whose parts are there: it says which they are.

    Raises:
        UserError: it could not be read again.
    """
    made = Bundle(folder, config)
    config = structs.replace(config, parts=tuple(part for part in PARTS if made.has(part)))
    (folder / CONFIG).write_text(to_text(checked(config, CONFIG), indent=2), "utf-8")


def write_part(folder: Path, part: str, state: Mapping[str, Tensor]) -> None:
    """Writes the weights of one of `PARTS` of a bundle that is being made.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = folder / f"{part}.safetensors"
    try:
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    except SafetensorError as error:  # a full disk comes as this, not as an OSError
        raise UserError(f"{file.name} cannot be written: {error}") from None


def copy_with(
    bundle: Bundle, config: BundleConfig, path: Path, parts: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Bundle:
    """A bundle with another configuration and the same weights, those of `parts` apart, which are given.

    Raises:
        UserError: `path` exists, or cannot be written.
    """
    given = parts or {}
    with new_folder(path) as folder:
        for file in bundle.files:
            if file.stem not in given:
                shutil.copyfile(file, folder / file.name)
        for part, state in given.items():
            write_part(folder, part, state)
        write_config(folder, config)
    return Bundle.open(path)


def bundle_name(path: Path) -> str:
    """The name of a bundle that is made at `path`; empty where the path has nothing to make one from."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in path.name).lstrip("-.")
