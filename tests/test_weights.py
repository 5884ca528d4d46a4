"""Files of weights: read by header, onto a device tensor by tensor, and known again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from msgspec import structs
from safetensors.torch import save_file
from torch import nn

from rsd_trt import weights
from rsd_trt.config import WeightFile, WeightsFolder
from rsd_trt.errors import UserError
from rsd_trt.records import from_json
from rsd_trt.weights import check_folder, contents, describe_file, fill


class WithBuffer(nn.Linear):
    """A module with a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("table", torch.zeros(2), persistent=False)


def on_meta(kind: type[nn.Module], *arguments: int) -> nn.Module:
    with torch.device("meta"):
        return kind(*arguments)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """A linear layer in two files."""
    layer = nn.Linear(3, 2)
    for name, value in layer.state_dict().items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    return [tmp_path / "weight.safetensors", tmp_path / "bias.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filling_takes_every_file_and_says_how_fast(
    dtype: torch.dtype, shards: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        layer = fill(on_meta(nn.Linear, 3, 2), contents(shards), shards[0].parent, dtype, "cpu")
    assert {value.dtype for value in layer.state_dict().values()} == {dtype}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(torch.zeros(1, 3, dtype=dtype))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "0.00 GB onto cpu in" in message
    assert "GB/s" in message


def test_a_key_in_two_files_is_refused(shards: list[Path]) -> None:
    save_file({"bias": torch.zeros(2)}, shards[0])
    with pytest.raises(UserError, match=r"bias is in both .*weight.safetensors and .*bias.safetensors"):
        contents(shards)


def test_errors_name_the_file_of_a_key(shards: list[Path]) -> None:
    save_file({"bias": torch.zeros(3), "more": torch.zeros(1)}, shards[1])
    folder = shards[0].parent
    with pytest.raises(UserError) as error:
        fill(on_meta(nn.Linear, 3, 2), contents(shards), folder, torch.float32, "cpu")
    assert str(error.value) == (
        f"{folder} does not fit the configuration; unexpected: more (bias.safetensors); "
        f"of another shape: bias (bias.safetensors) is [3], not [2]"
    )


def test_a_tensor_that_no_file_holds_is_a_bug(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    found = contents([tmp_path / "a.safetensors"])
    with pytest.raises(RuntimeError, match="WithBuffer has tensors that no file holds: \\['table'\\]"):
        fill(on_meta(WithBuffer), found, tmp_path, torch.float32, "cpu")


def test_a_device_that_is_too_small_is_noticed_first(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "free_memory", lambda _: 10)
    found = contents(shards)
    monkeypatch.setattr(weights, "open_tensors", None)
    with pytest.raises(UserError, match=r"needs 0\.00 GB on cuda, 0\.00 GB are free\. End what else uses the GPU"):
        fill(on_meta(nn.Linear, 3, 2), found, shards[0].parent, torch.float32, "cuda")


def test_a_device_that_fills_up_on_the_way(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = contents(shards)
    monkeypatch.setattr(weights, "open_tensors", full)
    with pytest.raises(UserError, match=r"needs 0\.00 GB on cpu, 0\.00 GB are free"):
        fill(on_meta(nn.Linear, 3, 2), found, shards[0].parent, torch.float32, "cpu")


def test_converting_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """What is loaded in another dtype takes the converted numbers, and not the file's beside them."""
    width, layers = 2048, 8
    module = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    del module
    with torch.device("meta"):
        empty = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
    found = contents([tmp_path / "a.safetensors"])
    before = anonymous_bytes()
    filled = fill(empty, found, tmp_path, torch.bfloat16, "cpu")
    assert anonymous_bytes() - before < size / 2 + 2 * size / layers
    assert sum(value.numel() for value in filled.state_dict().values()) * 4 <= size


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def packed(path: Path) -> WeightsFolder:
    save_file({"a": torch.arange(100_000.0)}, path / "a.safetensors")
    return WeightsFolder(str(path), (describe_file(path / "a.safetensors"),))


def rewrite(file: Path, at: int, value: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    file.write_bytes(bytes(data))


def test_an_unchanged_folder_passes(tmp_path: Path) -> None:
    assert check_folder(packed(tmp_path), tmp_path, whole=True) == (tmp_path / "a.safetensors",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "a.safetensors is missing: the bundle refers to it"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "bytes, the bundle was packed with 400"),
        (lambda file: save_file({"b": torch.arange(100_000.0)}, file), "has changed: sha256 of its samples is"),
        (lambda file: save_file({"a": torch.arange(100_000.0) + 1}, file), "has changed: sha256 of its samples is"),
    ],
    ids=["missing", "truncated", "another key", "other numbers"],
)
def test_a_changed_file_is_refused_by_every_load(change: object, message: str, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    change(tmp_path / "a.safetensors")  # type: ignore[operator]
    with pytest.raises(UserError) as error:
        check_folder(folder, tmp_path)
    assert message in str(error.value)
    assert str(error.value).endswith("pack the bundle again: rsd-trt pack")


def test_one_changed_byte_between_the_samples_is_found_on_request(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    size = folder.files[0].bytes
    rewrite(tmp_path / "a.safetensors", 100 + size // weights.SAMPLES // 2 + weights.SAMPLE_BYTES // 2, b"\x01")
    check_folder(folder, tmp_path)
    with pytest.raises(UserError, match="has changed: sha256 of its content is"):
        check_folder(folder, tmp_path, whole=True)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "a/b", "", ".", ".."])
def test_names_outside_the_folder_are_refused(name: str) -> None:
    data = {"folder": "/x", "files": [{"name": name, "bytes": 1, "sample_sha256": "", "sha256": ""}]}
    with pytest.raises(UserError, match="must be a plain name in its folder"):
        from_json(WeightsFolder, data, "config.json")


def test_a_folder_is_absolute_or_the_bundle() -> None:
    record = WeightFile("a", 1, "", "")
    for folder in (".", "/x/y"):
        assert WeightsFolder(folder, (record,)).folder == folder
    with pytest.raises(UserError, match="must be an absolute path"):
        structs.replace(WeightsFolder(".", (record,)), folder="../x")
