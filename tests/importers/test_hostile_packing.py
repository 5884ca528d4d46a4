"""What `rsd-trt pack` reads, made hostile: Hugging Face folders, and the original experiment's `.pt` files."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import original
import pytest
import torch
from hostile import SECONDS, memory, told, try_all, within
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_file, damaged_json
from openvla_folder import STATISTICS, OpenVLA, ProprioProjector, write_folder
from torch import Tensor, nn

from rsd_trt.config import Preset
from rsd_trt.errors import UserError
from rsd_trt.importers.original import Part, read_checkpoint
from rsd_trt.importers.pack import PackRequest, pack

__all__ = ["told"]  # a fixture of every test here
EXAMPLES = 40  # of each kind of file
INDEX = "model.safetensors.index.json"
PROPRIO_FILE = "proprio_projector--1_checkpoint.pt"
NAMES = [
    *("../x.safetensors", "../../../etc/passwd", "/etc/passwd", "model/../x.safetensors", "model.safetensors/..", ""),
    *("model\0.safetensors", "model\n.safetensors", "model-x.safetensors", "MODEL.SAFETENSORS", "model.pt", "."),
]
MODULES: dict[Part, nn.Module] = {
    "draft": original.RFSQDraftModelWithProjection(),
    "head": original.ConditionedRFSQHead(),
    "codec": original.ActionRFSQAE(True),
    "proprio_projector": ProprioProjector(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVLA-OFT's folder with its data sets' statistics, and the parts beside it. Tests put back what they damage."""
    path = write_folder(tmp_path_factory.mktemp("hf") / "openvla", OpenVLA())
    (path / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    torch.save(MODULES["proprio_projector"].state_dict(), path / PROPRIO_FILE)
    for part, module in MODULES.items():
        torch.save({"model_state_dict": module.state_dict(), "config": {"use_layernorm": True}}, path / f"{part}.pt")
    return path


def packed(folder: Path, preset: Preset = "openvla-oft") -> None:
    """All that is ever done with the folder's files."""
    out = folder.parent / "out"
    files = {part: folder / f"{part}.pt" for part in ("draft", "head", "codec")}
    pack(PackRequest(str(folder), preset, out, statistics="bridge_orig", chunk=original.T, **files))
    for file in out.iterdir():
        file.unlink()
    out.rmdir()


def try_file(file: Path, strategy: Callable[[bytes], st.SearchStrategy[bytes]], kind: str, examples: int) -> None:
    """Tries a file of the folder, and puts it back."""
    valid = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        packed(file.parent)

    try:
        read(valid)
        try_all(kind, strategy(valid), read, examples)
    finally:
        file.write_bytes(valid)
    assert not list(file.parent.parent.glob(".out*"))


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "dataset_statistics.json", "tokenizer.json"]
)
def test_configurations_of_others(name: str, folder: Path) -> None:
    try_file(folder / name, damaged_file, f"Hugging Face's {name}", EXAMPLES)


def test_the_index_of_shards(folder: Path) -> None:
    def hostile(valid: bytes) -> st.SearchStrategy[bytes]:
        @st.composite
        def renamed(draw: st.DrawFn) -> bytes:
            index = json.loads(valid)
            key = draw(st.sampled_from(sorted(index["weight_map"])))
            index["weight_map"][key] = draw(st.sampled_from(NAMES))
            return json.dumps(index).encode()

        return st.one_of(renamed(), damaged_file(valid))

    try_file(folder / INDEX, hostile, "Hugging Face's index", EXAMPLES)


def test_shards(folder: Path) -> None:
    def hostile(valid: bytes) -> st.SearchStrategy[bytes]:
        length = struct.unpack("<Q", valid[:8])[0]
        header = damaged_json(json.loads(valid[8 : 8 + length])).map(str.encode)
        inside = header.map(lambda text: struct.pack("<Q", len(text)) + text + valid[8 + length :])
        return st.one_of(inside, damaged_bytes(valid))

    try_file(folder / "model-00002-of-00002.safetensors", hostile, "Hugging Face's shards", EXAMPLES // 2)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "model-x.safetensors"])
def test_the_index_names_files_of_its_folder(name: str, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    key = next(iter(index["weight_map"]))
    valid = (folder / INDEX).read_bytes()
    index["weight_map"][key] = name
    (folder / INDEX).write_text(json.dumps(index))
    try:
        with pytest.raises(UserError, match=r"which is no model\*\.safetensors of its folder"):
            packed(folder)
    finally:
        (folder / INDEX).write_bytes(valid)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", INDEX, "draft.pt"])
def test_a_pipe_keeps_nobody_waiting(name: str, folder: Path, tmp_path: Path) -> None:
    """Links are followed, since the Hugging Face cache consists of them."""
    (folder / name).rename(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    (folder / name).symlink_to(tmp_path / "pipe")
    try:
        with within(SECONDS), pytest.raises(UserError, match=name.replace(".", r"\.")):
            packed(folder)
    finally:
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rewritten(
    valid: bytes, change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED, **more: bytes
) -> bytes:
    """The archive with other records."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as source, zipfile.ZipFile(stream, "w", method) as archive:
        records = [(record.filename, source.read(record)) for record in source.infolist()]
        for name, data in [*records, *more.items()]:
            if (new := change(name, data)) is not None:
                archive.writestr(zipfile.ZipInfo(name), new, method)
    return stream.getvalue()


ONES = torch.ones(4, 4)
CONVERSIONS: list[Callable[[Tensor], Tensor]] = [
    *(Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.long, Tensor.cfloat, nn.Parameter),
    lambda value: ONES[0, :1].expand(value.shape).clone() if value.ndim else value,
    lambda value: torch.ones(1).expand(value.shape) if value.ndim else value,
]
odd_values = st.one_of(
    st.sampled_from([None, 1, 0.5, "text", [], {}, b"bytes", (1, 2), torch.float32, torch.Size([2]), {1, 2}]),
    st.sampled_from([torch.zeros(0), torch.zeros(()), torch.zeros(3, 0, 2), torch.ones(5), torch.ones(2, 2, 2, 2, 2)]),
    st.sampled_from([torch.ones(()).expand(1 << 30), torch.ones(2, 1).expand(2, 1 << 28), ONES.t(), ONES[::2]]),
    st.sampled_from([float("nan"), float("inf"), 1e300]).map(
        lambda number: torch.full((4,), number, dtype=torch.float64)
    ),
    st.sampled_from([torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16]).map(ONES.to),
    st.sampled_from([ONES.to_sparse(), torch.empty(4, 4, device="meta"), nn.Parameter(ONES)]),
)
odd_keys = st.sampled_from(
    ["", "x", "module.x", "con\n", "\x1b[2J", "k" * 9000, 7, None, (1, 2), "layer_heads.99.0.weight"]
)


@st.composite
def odd_state(draw: st.DrawFn, part: Part) -> bytes:
    """A state dict with other values, shapes and keys, wrapped in this and that."""
    state = MODULES[part].state_dict()
    changed: dict[object, object] = dict(state)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(state)))
        what = draw(st.sampled_from(["replace", "replace", "reshape", "remove", "add", "rename", "convert"]))
        value = state[key]
        if what == "replace":
            changed[key] = draw(odd_values)
        elif what == "reshape":
            shape = [draw(st.sampled_from([size, size, 0, 1, 2, 3 * size])) for size in value.shape]
            changed[key] = torch.ones(()).expand(shape) if draw(st.booleans()) else torch.ones(shape)
        elif what == "remove":
            changed.pop(key, None)
        elif what == "add":
            changed[draw(odd_keys)] = draw(odd_values)
        elif what == "rename":
            changed[draw(odd_keys)] = changed.pop(key, value)
        else:
            convert = draw(st.sampled_from(CONVERSIONS))
            changed |= {key: convert(value) for key, value in state.items()}
    data: object = changed
    for name in draw(st.lists(st.sampled_from(["model_state_dict", "model", "state", "config"]), max_size=2)):
        data = {"config": draw(odd_values), name: data}
    return saved(data)


def odd_archive(valid: bytes) -> st.SearchStrategy[bytes]:
    """The zip archive itself, and the pickle in it, damaged."""

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        with zipfile.ZipFile(io.BytesIO(valid)) as archive:
            names = archive.namelist()
        victim = draw(st.sampled_from([names[0]] * 4 + names))
        method = draw(st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))
        more = {
            name: b"x" for name in draw(st.lists(st.sampled_from([*names, "../x", "/etc/x", "a/DATA.PKL"]), max_size=1))
        }
        changed = {name: draw(damaged_bytes(data)) for name, data in records(valid) if name == victim}
        return rewritten(valid, lambda name, data: changed.get(name, data), method, **more)

    @st.composite
    def numbers(draw: st.DrawFn) -> bytes:
        """Sizes, strides and offsets in the pickle."""
        name, data = records(valid)[0]
        at = [i for i, byte in enumerate(data) if byte in (ord("K"), ord("M"))]
        changed = bytearray(data)
        for i in draw(st.lists(st.sampled_from(at), min_size=1, max_size=4)):
            wide = struct.pack("<i", draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 1 << 20, 7])))
            changed[i + 1 : i + (2 if data[i] == ord("K") else 3)] = wide[: 1 if data[i] == ord("K") else 2]
        return rewritten(valid, lambda n, old: bytes(changed) if n == name else old)

    return st.one_of(damaged(), numbers(), numbers(), damaged_bytes(valid))


def records(valid: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(valid)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def calling(function: object, argument: object) -> bytes:
    """A checkpoint whose pickle calls a function."""

    class Call:
        def __reduce__(self) -> tuple[object, ...]:
            return function, (argument,)

    return saved({"model_state_dict": {}, "config": Call()})


def with_pickle(valid: bytes, change: Callable[[bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    return rewritten(valid, lambda name, data: change(data) if name.endswith("data.pkl") else data, method)


def overlapping(valid: bytes, times: int) -> bytes:
    """The archive with its largest record in it many times, all of them the same bytes."""
    stream = io.BytesIO(valid)
    with zipfile.ZipFile(stream, "a") as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        for i in range(times):
            record = copy.copy(largest)
            record.filename = f"archive/data/{i + 1000}"
            archive.filelist.append(record)
        archive._didModify = True  # type: ignore[attr-defined]
    return stream.getvalue()


WIDE = saved({"input_projection.weight": torch.zeros(1 << 20)})  # 4 MB of zeros
BYTES = saved({"input_projection.weight": torch.ones(8, dtype=torch.int8)})
GIGABYTES = 1 << 34


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rewritten(WIDE, lambda _, data: data, zipfile.ZIP_DEFLATED), "is compressed (archive/data.pkl)"),
        (with_pickle(WIDE, lambda data: bytes(64 << 20), zipfile.ZIP_DEFLATED), "is compressed (archive/data.pkl)"),
        (overlapping(WIDE, 1000), "its records overlap"),
        (rewritten(WIDE, lambda _, data: data, **{"archive/DATA.PKL": b"x"}), "holds 2 files named data.pkl"),
        (with_pickle(WIDE, lambda data: bytes(33 << 20)), "at most 33554432 are read"),
        (calling(bytearray, GIGABYTES), "ordinary tensors and plain values (__builtin__.bytearray)"),
        (calling(torch.UntypedStorage, GIGABYTES), "ordinary tensors and plain values (torch.storage.UntypedStorage)"),
        (calling(torch.FloatTensor, GIGABYTES), "ordinary tensors and plain values (torch.FloatTensor)"),
        (calling(os.system, "true"), "ordinary tensors and plain values (posix.system)"),
        (with_pickle(WIDE, lambda _: pickle.dumps({}, 4)), "is of pickle protocol 4, torch.save writes 2"),
        (
            with_pickle(WIDE, lambda data: data.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 1 << 30))),
            "cannot be",
        ),
        (saved({"input_projection.weight": torch.ones(1, 1).expand(1 << 16, 1 << 18)}), "would take 68719476736"),
        (saved({"input_projection.weight": torch.ones(4).to_sparse()}), "torch._utils._rebuild_sparse_tensor"),
        (saved({"input_projection.weight": torch.ones(4, device="meta")}), "_rebuild_meta_tensor_no_storage"),
        (
            saved({"input_projection.weight": torch.ones(4).to(torch.float8_e4m3fn)}),
            "(torch._utils._rebuild_tensor_v3)",
        ),
        (
            saved({"input_projection.weight": torch.tensor([1e300], dtype=torch.float64)}),
            "has 1 of 1 numbers that are NaN",
        ),
        (with_pickle(BYTES, lambda data: data.replace(b"CharStorage", b"QInt8Storage")), "values (torch.QInt8Storage)"),
        (b"PK", "cannot be read as a checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_takes_no_more_memory_than_it_has_bytes(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    before = memory(anew=True)
    with within(SECONDS), pytest.raises(UserError) as error:
        read_checkpoint(file, "draft")
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert memory() - before < 2 * len(content) + (32 << 20)


def test_an_archive_has_one_reading(tmp_path: Path) -> None:
    """Two archives in one file: Python finds the one, PyTorch the other, and only the one was looked at."""
    first, second = (saved({"input_projection.weight": torch.full((4, 4), x)}) for x in (1.0, 2.0))
    file = tmp_path / "x.pt"
    file.write_bytes(first + second)
    assert torch.load(file, weights_only=True)["input_projection.weight"].unique().tolist() == [1]
    assert read_checkpoint(file, "draft").state["input_projection.weight"].unique().tolist() == [2]
    file.write_bytes(first + calling(os.system, "true"))
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(file, "draft")


def test_a_file_that_is_exchanged_is_read_as_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, load = tmp_path / "x.pt", torch.load
    weight = torch.arange(100.0).view(10, 10)
    torch.save({"input_projection.weight": weight[:, 1:], "input_projection.bias": weight[0]}, file)

    def late(*arguments: object, **options: object) -> object:
        file.write_bytes(b"another")
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", late)
    state = read_checkpoint(file, "draft").state
    assert state["input_projection.weight"].equal(weight[:, 1:])
    assert state["input_projection.bias"].untyped_storage().data_ptr() % 64 == 0


@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3)])
def test_tensors_may_share_a_storage_that_is_large_enough(shape: tuple[int, ...], tmp_path: Path) -> None:
    whole = torch.ones(1000)
    state = {
        "input_projection.weight": whole[: torch.Size(shape).numel()].view(shape),
        "input_projection.bias": whole[9:],
    }
    torch.save(state, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt", "draft").state.keys() == state.keys()


@pytest.mark.parametrize("part", ["draft", "head", "codec", "proprio_projector"])
def test_checkpoints(part: Part, folder: Path) -> None:
    name = PROPRIO_FILE if part == "proprio_projector" else f"{part}.pt"

    def hostile(valid: bytes) -> st.SearchStrategy[bytes]:
        state = odd_state(part)
        return st.one_of(state, state, odd_archive(valid))

    try_file(folder / name, hostile, "checkpoints (.pt)", EXAMPLES)
