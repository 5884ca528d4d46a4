"""A bundle on disk: exact, strict, whole or absent, and never written to by reading."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command import rsd_trt
from made_without import made_without
from msgspec import structs
from torch import nn

from rsd_trt.bundle import CONFIG, TOKENIZER, Bundle, build, copy_with, save
from rsd_trt.cli.info import describe
from rsd_trt.config import PARTS
from rsd_trt.errors import UserError
from rsd_trt.presets import byte_tokenizer, initialise, preset
from rsd_trt.records import to_text

FILES = {CONFIG, TOKENIZER, *(f"{part}.safetensors" for part in PARTS)}
CONFIGURATION = preset("tiny", "tiny")


def modules(randomise: Callable[..., None]) -> dict[str, nn.Module]:
    config = CONFIGURATION
    parts = {part: build(config, part) for part in PARTS}
    for seed, module in enumerate(parts.values()):
        randomise(module, seed)
    return parts


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in [folder, *folder.rglob("*")]}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def change_keys(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = safetensors.torch.load_file(file)
    change(state)
    safetensors.torch.save_file(state, file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_is_exact_to_the_bit(dtype: str, randomise: Callable[..., None], tmp_path: Path) -> None:
    parts = modules(randomise)
    parts["backbone"].to(getattr(torch, dtype))
    backbone = structs.replace(CONFIGURATION.backbone, dtype=dtype)  # type: ignore[arg-type]
    config = structs.replace(CONFIGURATION, backbone=backbone)
    saved = save(tmp_path / "a" / "b", config, parts, byte_tokenizer())
    assert {file.name for file in saved.path.iterdir()} == FILES
    opened = Bundle.open(tmp_path / "a" / "b")
    assert opened.config == structs.replace(config, parts=PARTS)
    for part, module in parts.items():
        loaded, expected = getattr(opened, part)().state_dict(), module.state_dict()
        assert list(loaded) == list(expected)
        for key, value in expected.items():
            assert loaded[key].dtype == value.dtype
            assert torch.equal(loaded[key], value)
    assert opened.tokenizer().encode("go").ids == byte_tokenizer().encode("go").ids


def test_loaded_parts_are_for_inference(bundle: Bundle) -> None:
    for part in PARTS:
        module = getattr(bundle, part)()
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_reading_writes_nothing(bundle_copy: Path) -> None:
    before = listing(bundle_copy)
    bundle = Bundle.open(bundle_copy)
    describe(bundle, bundle_copy.parent / "engines")
    for part in (*PARTS, "tokenizer"):
        getattr(bundle, part)()
    assert listing(bundle_copy) == before


def test_a_saved_bundle_is_readable_by_others(bundle: Bundle) -> None:
    assert bundle.path.stat().st_mode & 0o777 == 0o755
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in bundle.path.iterdir()} == dict.fromkeys(
        FILES, "0o644"
    )


def test_the_same_seed_gives_the_same_bundle(bundle: Bundle, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = initialise(tmp_path / "tiny", "tiny", seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.fingerprints == bundle.fingerprints
    assert again.fingerprint == bundle.fingerprint
    other = initialise(tmp_path / "other" / "tiny", "tiny", seed=1)
    same = {name for name, digest in other.fingerprints.items() if digest == bundle.fingerprints[name]}
    assert same == {CONFIG, TOKENIZER}


@pytest.mark.parametrize("file", sorted(FILES))
def test_fingerprints_change_with_any_file(file: str, bundle: Bundle, bundle_copy: Path) -> None:
    assert Bundle.open(bundle_copy).fingerprint == bundle.fingerprint
    data = (bundle_copy / file).read_bytes()
    (bundle_copy / file).write_bytes(data[:-1] + b" " if file == CONFIG else data[:-1] + bytes([data[-1] ^ 1]))
    changed = Bundle.open(bundle_copy)
    assert changed.fingerprint != bundle.fingerprint
    assert {name for name in FILES if changed.fingerprints[name] != bundle.fingerprints[name]} == {file}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.0.bias"), "missing: encoder.0.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda state: state.update({"encoder.0.bias": torch.zeros(3)}),
            "of another shape: encoder.0.bias is [3], not [64]",
        ),
        (
            lambda state: (state.pop("encoder.0.bias"), state.update(extra=torch.zeros(1))),
            "missing: encoder.0.bias; unexpected: extra",
        ),
    ],
    ids=["missing", "unexpected", "mis-shaped", "both"],
)
def test_keys_that_do_not_fit_are_listed(change: Callable[..., None], message: str, bundle_copy: Path) -> None:
    file = bundle_copy / "codec.safetensors"
    change_keys(file, change)
    with pytest.raises(UserError) as error:
        Bundle.open(bundle_copy).codec()
    assert one_line(error) == f"{file} does not fit the configuration; {message}"


def test_at_most_ten_keys_of_a_kind_are_listed(bundle_copy: Path) -> None:
    file = bundle_copy / "head.safetensors"
    change_keys(file, lambda state: state.update({f"extra{i:02}": torch.zeros(1) for i in range(13)}))
    with pytest.raises(UserError) as error:
        Bundle.open(bundle_copy).head()
    assert one_line(error).endswith(", ".join(f"extra{i:02}" for i in range(10)) + " and 3 more")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kept", [0, 4, 0.5], ids=["empty", "four bytes", "half"])
def test_a_truncated_part_is_one_clear_line(part: str, kept: float, bundle_copy: Path) -> None:
    file = bundle_copy / f"{part}.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(UserError) as error:
        getattr(Bundle.open(bundle_copy), part)()
    assert one_line(error).startswith(f"{file} cannot be read as safetensors: ")


@pytest.mark.parametrize("name", [f"{part}.safetensors" for part in PARTS] + [TOKENIZER])
def test_an_absent_file_is_named(name: str, bundle_copy: Path) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(UserError) as error:
        getattr(Bundle.open(bundle_copy), name.partition(".")[0])()
    assert one_line(error).startswith(f"{bundle_copy / name} is missing")


@pytest.mark.parametrize("command", ["info", "verify", "profile", "eval", "export"])
def test_a_part_that_is_gone_is_an_error_of_every_command(
    command: str, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not "no head"; a bundle that was made without one is none of its business."""
    monkeypatch.chdir(tmp_path)
    (bundle_copy / "head.safetensors").unlink()
    done = rsd_trt(command, bundle_copy)
    assert done.exit_code == 1
    said = f"error: {bundle_copy / 'head.safetensors'} is missing: the bundle was made with it, as its config.json says"
    assert said in done.stderr


def test_a_bundle_says_which_parts_it_was_made_with(bundle_copy: Path, tmp_path: Path) -> None:
    assert Bundle.open(bundle_copy).config.parts == PARTS
    some = Bundle.open(made_without(bundle_copy, "draft", "head"))
    assert copy_with(some, some.config, tmp_path / "another").config.parts == ("backbone", "codec")
    (bundle_copy / CONFIG).write_text(to_text(structs.replace(some.config, parts=None)))  # as it was made before
    (bundle_copy / "codec.safetensors").unlink()
    assert Bundle.open(bundle_copy).components == ()


def test_a_copy_has_the_bundles_own_files(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / ".cache" / "huggingface").mkdir(parents=True)  # as hf download leaves it
    (bundle_copy / "notes").symlink_to("nowhere")
    bundle = Bundle.open(bundle_copy)
    assert {file.name for file in copy_with(bundle, bundle.config, tmp_path / "another").path.iterdir()} == FILES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG, b"{", "cannot be read: "),
        (CONFIG, b"\xff", "cannot be read: "),
        (CONFIG, b"[]", "the top level is [], not an object"),
        (CONFIG, b"[" * 100_000, "cannot be read: "),
        (CONFIG, b'{"nam": "x"}', "unknown key nam; did you mean 'name'?"),
        (TOKENIZER, b"{}", "cannot be read: "),
    ],
    ids=["half", "bytes", "list", "deep", "typo", "tokenizer"],
)
def test_a_broken_file_is_one_clear_line(name: str, content: bytes, message: str, bundle_copy: Path) -> None:
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Bundle.open(bundle_copy).tokenizer()
    assert one_line(error).startswith(f"{bundle_copy / name}")
    assert message in str(error.value)


def test_no_bundle_there_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Bundle.open(tmp_path / "nothing")
    assert one_line(error).endswith(f"{tmp_path / 'nothing'}. A bundle is a folder, made by rsd-trt pack")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_path_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists; choose another path or remove it first"):
        initialise(path, "tiny", seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    assert path.is_dir() or path.is_symlink() or path.read_text() == "precious"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        initialise(tmp_path / "file" / "bundle", "tiny", seed=0)
    assert "cannot be written" in one_line(error)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (safetensors.SafetensorError("I/O error: No space left on device"), UserError),
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["disk full", "disk full inside safetensors", "bug", "ctrl-c"],
)
def test_a_save_that_fails_midway_leaves_nothing(
    failure: BaseException,
    expected: type[BaseException],
    randomise: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Path] = []

    def fail_at_the_second(state: object, file: Path) -> None:
        if written:
            raise failure
        Path(file).write_text("")
        written.append(Path(file))

    monkeypatch.setattr(safetensors.torch, "save_file", fail_at_the_second)
    with pytest.raises(expected):
        save(tmp_path / "bundle", CONFIGURATION, modules(randomise), byte_tokenizer())
    assert written
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB of disk, 0\.00 GB are free"):
        initialise(tmp_path / "deep" / "bundle", "tiny", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_without_a_backbone(tmp_path: Path) -> None:
    bundle = initialise(tmp_path / "tiny", "tiny", seed=0, with_backbone=False)
    assert {file.name for file in bundle.path.iterdir()} == FILES - {"backbone.safetensors"}
    assert "backbone.safetensors" not in bundle.fingerprints
    description = describe(bundle, tmp_path / "engines")
    assert description["parts"]["backbone"] is None  # type: ignore[index]
    with pytest.raises(UserError, match="the bundle has no backbone"):
        bundle.backbone()


def test_describe_says_what_a_bundle_is_made_of(bundle: Bundle, tmp_path: Path) -> None:
    description = json.loads(json.dumps(describe(bundle, tmp_path / "engines")))
    assert (description["name"], description["trained"], description["protocol"]) == ("tiny", False, "oft")
    assert description["round_trip_mse"] == 0
    assert description["config"]["dims"] == {"T": 8, "A": 7, "D": 16, "L": 8, "C": 3, "K": 7}
    assert list(description["parts"]) == list(PARTS)
    for part, facts in description["parts"].items():
        assert facts["parameters"] == sum(p.numel() for p in getattr(bundle, part)().parameters()) > 0
        assert facts["bytes"] == bundle.file(part).stat().st_size
        assert facts["sha256"] == bundle.fingerprints[f"{part}.safetensors"]
    assert description["parts"]["draft"]["inputs"] == [
        "frames [B, cameras=2, side=256, side=256, 3=3] uint8",
        "state [B, state=8] float32",
        "instruction [B, P=16, E=32] float32",
    ]
    assert description["parts"]["head"]["outputs"] == ["logits [B, L=8, T*D=128, K=7] float32"]


@pytest.mark.parametrize("text", ["Pick up the bowl", "größe 物 🙂", ""])
def test_the_byte_tokenizer_covers_any_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert len(ids) == 1 + len(text.encode())
    assert max(ids) < preset("tiny", "x").backbone.language.vocab
