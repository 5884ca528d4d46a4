"""A policy on disk: one folder with `config.json`, four safetensors files and a tokenizer.

Loading is strict and never writes. Saving goes to a temporary name first, so that a folder is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rsd_trt.config import FORMAT_VERSION, BundleConfig, Component, Precision
from rsd_trt.errors import UserError
from rsd_trt.files import own
from rsd_trt.jsonio import from_json, named, parse, to_json

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from rsd_trt.models.backbone import Backbone
    from rsd_trt.models.codec import Codec
    from rsd_trt.models.draft import DraftModel
    from rsd_trt.models.fused import ActionTransform
    from rsd_trt.models.head import Head
    from rsd_trt.models.signature import Exportable

log = logging.getLogger(__name__)

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
HIDDEN_STATES = "hidden_states.safetensors"  # optional: recorded on LIBERO, for `rsd-trt verify`
PARTS = ("backbone", "draft", "head", "codec")
COMPONENT_VERSION = 1  # to be raised when a component computes something else from the same weights
LISTED_KEYS = 10  # of each kind, in the error about a file that does not fit
BOS = "<s>"


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
            UserError: no bundle there, or a configuration that does not fit this version.
        """
        file = path / CONFIG
        try:
            text = own(file).read_text("utf-8")
        except FileNotFoundError:
            raise UserError(f"{path} is not a bundle ({CONFIG} is missing). Make one: rsd-trt init {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        data = parse(text, str(file))
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(f"{file} has format_version {version}, this version reads {FORMAT_VERSION}: update rsd-trt")
        return cls(path, from_json(BundleConfig, data, str(file)))

    def file(self, part: str) -> Path:
        """The weights of one of `PARTS`."""
        return self.path / f"{part}.safetensors"

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

    def backbone(self, device: torch.device | str = "cpu") -> Backbone:
        """The backbone in the dtype of its configuration."""
        import torch

        from rsd_trt.models.backbone import Backbone

        dtype = getattr(torch, self.config.backbone.dtype)
        return self._load("backbone", lambda: Backbone(self.config.backbone), dtype, device)

    def draft(self, device: torch.device | str = "cpu") -> DraftModel:
        """The draft model, in float32."""
        import torch

        from rsd_trt.models.draft import DraftModel

        config = self.config
        build = lambda: DraftModel(config.draft, config.dims, config.hidden)  # noqa: E731
        return self._load("draft", build, torch.float32, device)

    def head(self, device: torch.device | str = "cpu") -> Head:
        """The main head, in float32."""
        import torch

        from rsd_trt.models.head import build_head

        config = self.config
        build = lambda: build_head(config.head, config.dims, config.hidden)  # noqa: E731
        return self._load("head", build, torch.float32, device)

    def codec(self, device: torch.device | str = "cpu") -> Codec:
        """The codec, in float32. A layernorm codec is lossy, and says so in the log."""
        import torch

        from rsd_trt.models.codec import Codec

        codec = self._load("codec", lambda: Codec(self.config.codec, self.config.dims), torch.float32, device)
        if self.config.codec.scale == "layernorm":
            log.warning(
                "%s: codec.scale is layernorm, whose tokens alone do not carry the action: round-trip MSE %.2g",
                self.path,
                codec.round_trip_error(),
            )
        return codec

    def transform(self, device: torch.device | str = "cpu") -> ActionTransform:
        """The policy's action conventions -> the environment's."""
        from rsd_trt.models.fused import ActionTransform

        return ActionTransform(self.config.control, self.config.dims).to(device)

    def component(
        self, name: Component, device: torch.device | str = "cpu", precision: Precision = "fp32"
    ) -> Exportable:
        """What is exported and launched: a module with a `signature`.

        `precision` is that of draft and head. The codec stays in float32: its finest scales are below what half
        precision resolves.
        """
        import torch

        from rsd_trt.models.codec import Decoder
        from rsd_trt.models.fused import Accept, Chain

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        if name == "draft":
            return self.draft(device).to(dtype)
        if name == "head":
            return self.head(device).to(dtype)
        decoder = Decoder(self.codec(device), self.config.dims)
        if name == "decoder":
            return decoder
        transform = self.transform(device)
        if name == "accept":
            return Accept(self.draft(device).to(dtype), decoder, transform)
        return Chain(self.head(device).to(dtype), decoder, transform)

    def component_fingerprint(self, name: Component) -> str:
        """sha256 of all that a component is made from: its parts' weights and the configuration that they read."""
        parts = {"draft": ["draft"], "head": ["head"], "decoder": ["codec"]}
        parts |= {"accept": ["draft", "codec"], "chain": ["head", "codec"]}
        config = to_json(self.config)
        facts: dict[str, object] = {"maths": COMPONENT_VERSION}
        for part in parts[name]:
            file = self.file(part)
            if (weights := self.digest(file.name)) is None:
                raise UserError(f"{file} is missing: the bundle has no {part}")
            facts[part] = [weights, config[part]]
        control = to_json(self.config.control)
        facts |= {"dims": config["dims"], "hidden": self.config.hidden}
        if name in ("accept", "chain"):
            facts |= {key: control[key] for key in ("gripper", "action_quantiles")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The prompt's tokenizer."""
        from tokenizers import Tokenizer

        file = own(self.path / TOKENIZER)
        if not file.is_file():
            raise UserError(f"{file} is missing: the bundle is incomplete")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, and its panics are not even that
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:400]}") from None
        tokenizer.no_padding()  # rows are padded, and prompts kept whole, by whoever makes a batch of them
        tokenizer.no_truncation()
        return tokenizer

    def _load(self, part: str, build: Callable[[], ModuleT], dtype: torch.dtype, device: torch.device | str) -> ModuleT:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = own(self.file(part))
        if not file.is_file():
            raise UserError(f"{file} is missing: the bundle has no {part}")
        with torch.device("meta"):
            module = build()
        try:
            state = load_file(file, device=str(device))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from None
        check_keys(module, state, str(file))
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()


if TYPE_CHECKING:
    from typing import TypeVar

    ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_keys(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Compares a state dict with what the module expects.

    Raises:
        UserError: missing, unexpected and mis-shaped keys, at most ten of each, with the file.
    """
    wanted = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in wanted.items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    shapes = [
        f"{key} is {list(found[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    kinds = [
        f"{key} is {state[key].dtype}"
        for key in expected
        if key in found and state[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    problems = [
        f"{kind}: {', '.join(map(named, keys[:LISTED_KEYS]))}"
        + (f" and {more} more" if (more := len(keys) - LISTED_KEYS) > 0 else "")
        for kind, keys in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unexpected", sorted(found.keys() - expected.keys())),
            ("of another shape", shapes),
            ("of another kind of number", kinds),
        )
        if keys
    ]
    if problems:
        raise UserError(f"{where} does not fit the configuration; {'; '.join(problems)}")


def sha256(file: Path) -> str:
    """The file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save(path: Path, config: BundleConfig, parts: dict[str, nn.Module], tokenizer: Tokenizer) -> Bundle:
    """Writes a whole bundle. `parts` may leave out some of `PARTS`.

    Raises:
        UserError: `path` exists, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_folder(path) as folder:
        (folder / CONFIG).write_text(json.dumps(to_json(config), indent=2) + "\n", "utf-8")
        tokenizer.save(str(folder / TOKENIZER))
        for part, module in parts.items():
            state = {key: value.contiguous() for key, value in module.state_dict().items()}
            try:
                save_file(state, folder / f"{part}.safetensors")
            except SafetensorError as error:  # a full disk comes as this, not as an OSError
                raise UserError(f"{path} cannot be written: {error}") from None
    return Bundle.open(path)


def copy_with(bundle: Bundle, config: BundleConfig, path: Path) -> Bundle:
    """A bundle with the same weights and another configuration.

    Raises:
        UserError: `path` exists, or cannot be written.
    """
    with new_folder(path) as folder:
        for file in bundle.path.iterdir():
            if own(file).is_file():
                shutil.copyfile(file, folder / file.name)
        (folder / CONFIG).write_text(json.dumps(to_json(config), indent=2) + "\n", "utf-8")
    return Bundle.open(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and vanishes when it does not."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; choose another path or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        for file in temporary.iterdir():  # mkdtemp and safetensors make what only the owner can read
            file.chmod(0o644)
        temporary.chmod(0o755)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
