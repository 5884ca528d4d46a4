"""The original experiment's `.pt` files, against an independent version of its modules."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import original
import pytest
import torch
from openvla_folder import ActionHead
from original import HIDDEN, A, C, D, K, L, T
from torch import nn

from rsd_trt.config import CodecConfig, Dims, HeadConfig, HiddenDraftConfig
from rsd_trt.errors import UserError
from rsd_trt.importers.original import Part, codec_config, draft_config, fit, head_config, read_checkpoint
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.draft import DraftModel
from rsd_trt.models.head import build_head

DIMS = Dims(T=T, A=A, D=D, L=L, C=C, K=K)
Randomise = Callable[..., None]


def write(path: Path, module: nn.Module, wrapping: str = "bare", **config: object) -> Path:
    """A checkpoint as the experiment's training scripts write it."""
    state = module.state_dict()
    if wrapping == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    data: dict[str, object] = dict(state)
    if wrapping in ("model_state_dict", "model", "module."):
        key = "model" if wrapping == "model" else "model_state_dict"
        data = {key: state, "config": config, "epoch": 3, "val_accuracy": 0.9, "optimizer_state_dict": {"state": {}}}
    torch.save(data, path)
    return path


def hidden() -> torch.Tensor:
    return torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))


def tokens(layers: int) -> torch.Tensor:
    return torch.randint(0, K, (3, T, D, layers), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("wrapping", ["bare", "model_state_dict", "model", "module."])
@torch.no_grad()
def test_a_draft(wrapping: str, randomise: Randomise, tmp_path: Path) -> None:
    theirs = original.RFSQDraftModelWithProjection().eval()
    randomise(theirs)
    checkpoint = read_checkpoint(write(tmp_path / "draft.pt", theirs, wrapping), "draft")
    config = draft_config(checkpoint)
    assert config == HiddenDraftConfig(width=16, mlp_width=24, positions=20)
    ours = DraftModel(config, DIMS, HIDDEN)
    ours.load_state_dict(checkpoint.state)
    torch.testing.assert_close(ours(hidden()), theirs(hidden()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "config"),
    [
        (original.RFSQHead, HeadConfig("rfsq", feature=12, width=16)),
        (original.ConditionedRFSQHead, HeadConfig("conditioned", feature=12, width=16, embedding=4)),
        (original.RFSQClassificationHead, HeadConfig("classification", width=16)),
    ],
)
@torch.no_grad()
def test_a_head(theirs: type[nn.Module], config: HeadConfig, randomise: Randomise, tmp_path: Path) -> None:
    module = theirs().eval()
    randomise(module)
    checkpoint = read_checkpoint(write(tmp_path / "head.pt", module), "head")
    assert head_config(checkpoint) == config
    ours = build_head(config, DIMS, HIDDEN)
    ours.load_state_dict(checkpoint.state)
    inputs = (hidden(), tokens(C)) if config.kind == "conditioned" else (hidden(),)
    torch.testing.assert_close(ours(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layernorm", [False, True])
@torch.no_grad()
def test_a_codec(layernorm: bool, randomise: Randomise, tmp_path: Path) -> None:
    theirs = original.ActionRFSQAE(layernorm)
    randomise(theirs)
    file = write(tmp_path / "codec.pt", theirs, "model_state_dict", use_layernorm=layernorm, num_levels=K)
    checkpoint = read_checkpoint(file, "codec")
    config = codec_config(checkpoint, None)
    assert config == CodecConfig(width=10, scale="layernorm" if layernorm else "plain")
    assert fit({"codec": checkpoint}, T) == Dims(T=T, A=A, D=D, L=L, C=3, K=K)
    ours = Codec(config, DIMS)
    ours.load_state_dict(checkpoint.state)
    expected = theirs.decode_from_indices(tokens(L))
    torch.testing.assert_close(ours.decode(tokens(L)), expected)
    torch.testing.assert_close(Decoder(ours, DIMS)(tokens(L)), expected)
    actions = torch.rand(8, T, A, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(ours.encode(actions), theirs.encode(actions))


def saved(folder: Path, **modules: nn.Module) -> dict[Part, Path]:
    return {part: write(folder / f"{part}.pt", module) for part, module in modules.items()}  # type: ignore[misc]


@torch.no_grad()
def test_dimensions_come_from_all_files_together(tmp_path: Path) -> None:
    files = saved(
        tmp_path,
        draft=original.RFSQDraftModelWithProjection(),
        head=original.ConditionedRFSQHead(),
        codec=original.ActionRFSQAE(False),
    )
    assert fit({part: read_checkpoint(file, part) for part, file in files.items()}, T) == DIMS


@pytest.mark.parametrize(
    ("modules", "chunk", "message"),
    [
        (
            {
                "draft": original.RFSQDraftModelWithProjection(layers=2),
                "head": original.ConditionedRFSQHead(3),
                "codec": original.ActionRFSQAE(False),
            },
            T,
            "head.pt is conditioned on 3 layers, DIR/draft.pt gives 2",
        ),
        (
            {"head": original.RFSQHead(layers=5), "codec": original.ActionRFSQAE(False, layers=4)},
            T,
            "codec.pt has 4 RFSQ layers, DIR/head.pt has 5: they do not fit together",
        ),
        (
            {"head": original.ConditionedRFSQHead(levels=4), "codec": original.ActionRFSQAE(False, levels=3)},
            T,
            "codec.pt has 3 levels, DIR/head.pt has 4: they do not fit together",
        ),
        (
            {"head": original.RFSQHead(), "codec": original.ActionRFSQAE(False, levels=7)},
            T,
            "head.pt gives 72 logits a layer; 4 steps of 6 latent dimensions with 7 levels are 168",
        ),
        (
            {"draft": original.RFSQDraftModelWithProjection(), "codec": original.ActionRFSQAE(False)},
            8,
            "draft.pt gives 72 logits a layer; 8 steps of 6 latent dimensions with 3 levels are 144. "
            "For chunks of 4 steps: --chunk 4",
        ),
    ],
    ids=["condition", "layers", "levels of an embedding", "levels", "steps"],
)
def test_files_that_do_not_fit_each_other(
    modules: dict[str, nn.Module], chunk: int, message: str, tmp_path: Path
) -> None:
    files = saved(tmp_path, **modules)
    with pytest.raises(UserError) as error:
        fit({part: read_checkpoint(file, part) for part, file in files.items()}, chunk)
    assert str(error.value) == f"{tmp_path}/{message.replace('DIR', str(tmp_path))}"


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("content", "part", "message"),
    [
        ({}, "draft", "holds no state dict, neither bare nor under model_state_dict or model"),
        ({"model_state_dict": {"a": 1}}, "draft", "holds no state dict"),
        ([torch.zeros(1)], "draft", "holds no state dict"),
        ({"ema_state_dict": {"a": torch.zeros(1)}}, "draft", "or module; it holds ema_state_dict. Save the weights al"),
        ({"weights": torch.zeros(1)}, "draft", "is of an unknown kind, not a draft: its keys begin with weights. Save"),
        (original.RFSQHead().state_dict(), "draft", "is a head, not a draft"),
        (original.RFSQDraftModelWithProjection().state_dict(), "head", "is a draft, not a head"),
        (original.ActionRFSQAE(True).state_dict(), "head", "is a codec, not a head"),
        ({"config": Evil()}, "head", "holds more than ordinary tensors and plain values"),
    ],
    ids=["empty", "numbers", "list", "an average alone", "unknown", "head", "draft", "codec", "code"],
)
def test_a_file_that_is_something_else(
    content: object, part: Part, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt", part)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip", pickle.dumps({"a": 1}, 2)[:-3]])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert refused(tmp_path / "x.pt", "draft").startswith(f"{tmp_path / 'x.pt'} ")


def test_an_absent_file_and_a_truncated_one(tmp_path: Path) -> None:
    assert refused(tmp_path / "x.pt", "draft") == f"{tmp_path / 'x.pt'} is missing"
    file = write(tmp_path / "x.pt", original.RFSQHead())
    file.write_bytes(file.read_bytes()[:2000])
    assert "cannot be read" in refused(file, "head") or "is damaged" in refused(file, "head")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(bad: float, tmp_path: Path) -> None:
    head = original.RFSQHead()
    with torch.no_grad():
        head.layer_heads[3][0].bias[2] = bad
    message = refused(write(tmp_path / "x.pt", head), "head")
    assert message.endswith("x.pt: layer_heads.3.0.bias has 1 of 16 numbers that are NaN or infinite")


@pytest.mark.parametrize(
    ("saved_as", "scale", "result"),
    [
        (True, None, "layernorm"),
        (False, "plain", "plain"),
        (None, "layernorm", "layernorm"),
        (None, None, "does not say whether it normalises residuals"),
        (True, "plain", "was saved with use_layernorm True: --codec-scale plain does not fit"),
    ],
)
def test_how_a_codec_scales_is_never_guessed(saved_as: bool | None, scale: str, result: str, tmp_path: Path) -> None:
    config = {} if saved_as is None else {"use_layernorm": saved_as}
    file = write(tmp_path / "x.pt", original.ActionRFSQAE(bool(saved_as)), "model", **config)
    codec = read_checkpoint(file, "codec")
    if " " not in result:
        assert codec_config(codec, scale).scale == result  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match=result):
        codec_config(codec, scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module._checkpoint_wrapped_module.", "net._orig_mod."],
)
def test_what_wrappers_put_into_keys_is_no_part_of_them(prefix: str, tmp_path: Path) -> None:
    state = original.RFSQHead().state_dict()
    own = prefix.removeprefix("net.")  # the name that a trainer has for the model, in front of all keys
    inside = {key.replace("layer_heads.", f"layer_heads.{own}"): value for key, value in state.items()}
    for number, saved in enumerate(({prefix + key: value for key, value in state.items()}, inside)):
        torch.save(saved, tmp_path / f"{number}.pt")
        checkpoint = read_checkpoint(tmp_path / f"{number}.pt", "head")
        assert (checkpoint.state.keys(), checkpoint.unread) == (state.keys(), ())
    average = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in state.items()}}
    for saved in (average, {"module": state, "ds_version": "0.15"}):  # of AveragedModel, of DeepSpeed
        torch.save(saved, tmp_path / "x.pt")
        assert read_checkpoint(tmp_path / "x.pt", "head").state.keys() == state.keys()
    oft = ActionHead().state_dict()  # whose own keys begin with model., and one more marks a projector
    for front in ("", "net."):
        torch.save({front + key: value for key, value in oft.items()}, tmp_path / "oft.pt")
        assert read_checkpoint(tmp_path / "oft.pt", "head").state.keys() == oft.keys()
    for other in ("a.weight", "z.weight"):  # not all keys have that name in front
        torch.save({**{f"net.{key}": value for key, value in oft.items()}, other: torch.zeros(1)}, tmp_path / "x.pt")
        told = f"is of an unknown kind, not a head: its keys begin with {', '.join(sorted([other[0], 'net']))}. Save"
        assert told in refused(tmp_path / "x.pt", "head")
    torch.save({**state, f"module.{next(iter(state))}": torch.zeros(1)}, tmp_path / "both.pt")
    assert "feature_proj.0.weight with and without a wrapper's prefix" in refused(tmp_path / "both.pt", "head")


@pytest.mark.parametrize(
    "beside",
    [
        {"extra_state": {"config": {"use_layernorm": True}}},
        {"hyper_parameters": {"use_layernorm": 1}},
        {"cfg": [{"model": {"codec": {"use_layernorm": True}}}]},
        {"use_layernorm": True},
    ],
)
def test_a_configuration_may_lie_anywhere(beside: dict[str, object], tmp_path: Path) -> None:
    state = original.ActionRFSQAE(True).state_dict()
    torch.save({"state_dict": state, **beside}, tmp_path / "x.pt")
    codec = read_checkpoint(tmp_path / "x.pt", "codec")
    assert codec_config(codec, None).scale == "layernorm"
    with pytest.raises(UserError, match="was saved with use_layernorm True"):
        codec_config(codec, "plain")
    for also, told in (
        (False, "with the opposite elsewhere in it"),
        ("maybe", "layernorm 'maybe': true or"),
        (2, "layernorm 2: true or"),
    ):
        torch.save({"state_dict": state, **beside, "also": {"use_layernorm": also}}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=told):
            codec_config(read_checkpoint(tmp_path / "x.pt", "codec"), None)


def test_other_sets_of_weights_in_a_file_are_named(tmp_path: Path) -> None:
    state = original.RFSQHead().state_dict()
    average = {key: value + 1 for key, value in state.items()}
    shadow = {"decay": 0.9, "shadow_params": list(average.values())}  # as torch_ema saves it
    knot: list[object] = []
    knot.append(knot)
    others = {"ema_state_dict": average, "ema": shadow, "swa": {"module": average}, "epoch": 1, "knot": knot}
    torch.save({**others, "model_state_dict": state}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt", "head")
    assert checkpoint.unread == ("ema_state_dict", "ema", "swa")
    assert all(torch.equal(checkpoint.state[key], value) for key, value in state.items())


def test_a_tensor_of_another_rank(tmp_path: Path) -> None:
    state = original.RFSQDraftModelWithProjection().state_dict()
    state["decoder.position_encoding"] = torch.zeros(1)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"decoder.position_encoding is \[1\], which has no axis 1"):
        draft_config(read_checkpoint(tmp_path / "x.pt", "draft"))


def refused(file: Path, part: Part) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(file, part)
    assert "\n" not in str(error.value)
    return str(error.value)
