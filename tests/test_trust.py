"""What a file may not do: lead elsewhere, fill the memory, keep us waiting, or be exchanged after it was checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import synthetic
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

from rsd_trt.bundle import Bundle, copy_with
from rsd_trt.errors import UserError
from rsd_trt.eval.read import read_run
from rsd_trt.manifest import Manifest, read_manifest
from rsd_trt.models.signature import Port, Signature
from rsd_trt.records import from_json, to_json
from rsd_trt.runtime.policy import Policy
from rsd_trt.runtime.trt_session import TrtSession
from rsd_trt.trt import Distribution

FILES = ("config.json", "tokenizer.json", "backbone.safetensors", "draft.safetensors", "codec.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_a_bundle_is_refused(name: str, bundle_copy: Path, tmp_path: Path) -> None:
    file = bundle_copy / name
    file.symlink_to(file.rename(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=f"{name} is a symbolic link, which may lead anywhere"):
        Policy.load(bundle_copy)


def test_a_bundle_may_lie_behind_a_link(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle_copy)
    assert Policy.load(tmp_path / "link").config.name == "tiny"


def test_a_copy_takes_no_file_along_from_elsewhere(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / "notes").symlink_to("/etc/passwd")
    copy_with(bundle, bundle.config, tmp_path / "new")
    assert not (tmp_path / "new" / "notes").is_symlink()
    (bundle_copy / "tokenizer.json").unlink()
    (bundle_copy / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match=r"tokenizer\.json is a symbolic link"):
        copy_with(bundle, bundle.config, tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_keeps_nobody_waiting(name: str, bundle_copy: Path) -> None:
    (bundle_copy / name).unlink()
    os.mkfifo(bundle_copy / name)
    with pytest.raises(UserError, match=f"{name} is no regular file"):
        Policy.load(bundle_copy)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "con\n", "-rf", ".hidden"])
def test_a_bundles_name_is_a_name(name: str, bundle: Bundle) -> None:
    with pytest.raises(UserError, match="it names the folder of the exports"):
        structs.replace(bundle.config, name=name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", ""])
def test_a_manifest_names_files_of_its_folder(name: str) -> None:
    file = {"name": name, "bytes": 1, "sha256": "0"}
    artefact = {
        **{"component": "draft", "precision": "fp32", "batch": "1", "kind": "onnx", "files": [file], "opset": 18},
        **{"weights_sha256": "0", "inputs": [], "outputs": [], "torch": "2", "build_seconds": 1.0, "date": "d"},
    }
    with pytest.raises(UserError, match="a file outside its folder"):
        from_json(Manifest, {"bundle": "x", "artefacts": [artefact]}, "m")


def test_a_manifest_behind_a_link_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="is a symbolic link"):
        read_manifest(tmp_path, bundle)


def test_results_name_no_other_folder(tmp_path: Path) -> None:
    data = to_json(synthetic.run())
    data["settings"]["suite"] = "../../home"  # type: ignore[index]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="it names a folder"):
        read_run(tmp_path / "r.json")


def test_a_small_file_fills_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "r.json.gz"
    file.write_bytes(gzip.compress(b" " * (300 << 20), 9))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="no results file does"):
            read_run(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.stat().st_size < 400_000
    assert peak < 150 * file.stat().st_size + (16 << 20)


@pytest.mark.parametrize("section", ["padding", "truncation"])
def test_a_tokenizer_neither_pads_nor_cuts(section: str, bundle_copy: Path) -> None:
    file = bundle_copy / "tokenizer.json"
    data = json.loads(file.read_text())
    data["padding"] = {
        **{"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0},
        **{"pad_type_id": 0, "pad_token": "<s>"},
    }
    data["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    for other in {"padding", "truncation"} - {section}:
        data[other] = None
    before = Bundle.open(bundle_copy).tokenizer().encode("pick up the bowl").ids
    file.write_text(json.dumps(data))
    assert Bundle.open(bundle_copy).tokenizer().encode("pick up the bowl").ids == before


@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "I64"), (torch.bool, "BOOL"), (torch.complex64, "C64")])
def test_weights_of_another_kind_of_number(dtype: torch.dtype, name: str, bundle_copy: Path) -> None:
    file = bundle_copy / "draft.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=f"of another kind of number: .* is {name}"):
        Bundle.open(bundle_copy).draft()


def test_a_hidden_pixel_is_no_picture(bundle: Bundle) -> None:
    control = structs.replace(bundle.config.control, center_crop=1e-300)
    with pytest.raises(UserError, match="leaves no pixel"):
        structs.replace(bundle.config, control=control)


@pytest.mark.parametrize("swap", [False, True])
def test_an_engine_exchanged_after_the_check_is_not_loaded(swap: bool, tmp_path: Path) -> None:
    seen: list[bytes] = []

    def deserialise(content: bytes) -> SimpleNamespace:
        seen.append(content)
        return SimpleNamespace(num_io_tensors=2, get_tensor_name=["x", "y"].__getitem__)

    module = ModuleType("double")
    module.__version__ = "10"
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None})
    module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0})
    module.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=deserialise)
    engine, signature = tmp_path / "e.engine", Signature((Port("x", ("B",)),), (Port("y", ("B",)),), {})
    engine.write_bytes(b"checked")
    digest = hashlib.sha256(b"checked").hexdigest()
    if swap:
        engine.write_bytes(b"hostile")
    load: Callable[[], TrtSession] = lambda: TrtSession(  # noqa: E731
        engine, signature, torch.device("cpu"), Distribution("tensorrt", module), digest
    )
    if swap:
        with pytest.raises(UserError, match="was exchanged while it was loaded"):
            load()
    else:
        load()
    assert seen == ([] if swap else [b"checked"])
