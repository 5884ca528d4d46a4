"""The configuration and its JSON form."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from msgspec import structs

from rsd_trt.config import PROTOCOLS, SIZES, BundleConfig, ControlConfig, Quantiles, Size, protocol_name, with_protocol
from rsd_trt.errors import UserError, did_you_mean, installing, missing_extra
from rsd_trt.presets import preset
from rsd_trt.records import from_text, to_json

Path = tuple[str | int, ...]


def tiny() -> dict[str, Any]:
    """The tiny preset as it lies on disk, with the optional sections filled in."""
    config = preset("tiny", "tiny")
    control = structs.replace(
        config.control,
        action_quantiles=Quantiles((-1.0,) * 7, (1.0,) * 7, (True,) * 7),
        proprio_quantiles=Quantiles((-1.0,) * 8, (1.0,) * 8, (True,) * 8),
    )
    return json.loads(json.dumps(to_json(structs.replace(config, control=control))))


def section(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def load(data: object) -> BundleConfig:
    return from_text(BundleConfig, json.dumps(data), "b/config.json")


@pytest.mark.parametrize("size", SIZES)
def test_presets_survive_json(size: Size) -> None:
    config = preset(size, "name")
    assert load(json.loads(json.dumps(to_json(config)))) == config


def test_optional_sections_survive_json() -> None:
    assert json.loads(json.dumps(to_json(load(tiny())))) == tiny()


def test_openvla_preset_has_the_published_numbers() -> None:
    config = preset("openvla-7b", "name")
    dino, siglip = config.backbone.towers
    language = config.backbone.language
    assert (dino.width, dino.blocks, dino.heads, dino.patch, dino.prefix_tokens) == (1024, 23, 16, 14, 5)
    assert (siglip.width, siglip.blocks, siglip.heads, siglip.mlp_width, siglip.prefix_tokens) == (
        1152,
        26,
        16,
        4304,
        0,
    )
    assert (dino.layer_scale, siglip.layer_scale, dino.gelu, siglip.gelu) == (True, False, "exact", "exact")
    assert structs.astuple(language) == (4096, 11008, 32, 32, 32064, 1e-6, 1e4)
    assert (config.hidden, config.backbone.image_size, config.control.suffix_token) == (4096, 224, 29871)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("control", "cameras"), ["camera"] * 500),
        (("control", "max_steps"), {str(i): 1 for i in range(5000)}),
        (("control", "action_quantiles", "q01"), [0.0] * 5000),
        (("rsd", "by_age"), [1.0] * 5000),
    ],
    ids=lambda x: ".".join(x) if isinstance(x, tuple) else "",
)
def test_lists_are_bounded_before_anything_is_made_of_them(path: Path, values: object) -> None:
    data = tiny()
    section(data, path[:-1])[path[-1]] = values
    with pytest.raises(
        UserError, match=rf"{re.escape('.'.join(map(str, path)))} is .*must be of length <= \d+"
    ) as error:
        load(data)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        ((), "nam", "name"),
        (("backbone", "towers", 0), "widht", "width"),
        (("rsd",), "tolerence", "tolerance"),
        (("control", "action_quantiles"), "q10", "q01"),
    ],
)
def test_unknown_keys_are_refused_with_what_was_meant(path: Path, wrong: str, right: str) -> None:
    data = tiny()
    section(data, path)[wrong] = 1
    with pytest.raises(UserError) as error:
        load(data)
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in (*path, wrong)).lstrip(".")
    assert str(error.value) == f"b/config.json: unknown key {place}; did you mean {right!r}?"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "the top level is [], not an object"),
        (("name",), 3, "name is 3, not a string"),
        (("trained",), 1, "trained is 1, not true or false"),
        (("dims", "T"), "8", "dims.T is '8', not a whole number"),
        (("dims", "T"), True, "dims.T is True, not a whole number"),
        (
            ("backbone", "towers", 0, "mean"),
            [0.5],
            "backbone.towers[0].mean is [0.5], which must be of length 3",
        ),
        (("backbone", "towers", 1, "std"), [0.5, 0.5, "x"], "backbone.towers[1].std[2] is 'x', not a number"),
        (("backbone", "towers", 0, "gelu"), "tahn", "backbone.towers[0].gelu is 'tahn'; did you mean 'tanh'?"),
        (("backbone", "dtype"), ["float32"], "backbone.dtype is ['float32']"),
        (("rsd", "tolerance"), [0.1, None] + [0.1] * 4, "rsd.tolerance[1] is None, not a number"),
        (("rsd", "token_share"), float("nan"), "cannot be read: JSON is malformed"),
        (("rsd", "token_share"), float("inf"), "cannot be read: JSON is malformed"),
        pytest.param(("rsd", "token_share"), 10**400, "rsd.token_share is 1000", id="huge"),
        (("rsd", "rule"), "action", "rsd.rule is 'action'; did you mean 'actions'?"),
        (("control", "suffix_token"), "x", "control.suffix_token is 'x', not a whole number or null"),
        (("control", "cameras"), "agentview_image", "control.cameras is 'agentview_image', not a list"),
        (
            ("control", "max_steps", "libero_goal"),
            "300",
            "control.max_steps.libero_goal is '300', not a whole number",
        ),
    ],
)
def test_wrong_types_name_the_key_and_the_value(path: Path, value: object, message: str) -> None:
    data = tiny()
    if path:
        section(data, path[:-1])[path[-1]] = value
    else:
        data = value  # type: ignore[assignment]
    with pytest.raises(UserError) as error:
        load(data)
    assert str(error.value).startswith(f"b/config.json{' ' if message.startswith('cannot') else ': '}{message}")


@pytest.mark.parametrize("path", [("name",), ("backbone",), ("backbone", "language", "hidden"), ("draft", "kind")])
def test_missing_keys_are_named(path: Path) -> None:
    data = tiny()
    del section(data, path[:-1])[path[-1]]
    with pytest.raises(UserError, match=f"b/config.json: the key {'.'.join(map(str, path))} is missing"):
        load(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "format_version 2"),
        (("rsd", "draft_block"), 3, "unknown key rsd.draft_block"),
        (("rsd", "check_steps"), 9, "check_steps 9 is not in 1..8"),
        (("rsd", "rule"), "likelihood", "rsd.rule likelihood needs rsd.threshold"),
        (("rsd", "sure"), -0.5, "rsd.sure -0.5 is below rsd.threshold None"),
        (("rsd", "rule"), "frist", "rsd.rule is 'frist'; did you mean 'first'?"),
        (("rsd", "threshold"), 0.5, "threshold is 0.5, which must be <= 0.0"),
        (("rsd", "by_age"), [1, -1], "by_age[1] is -1, which must be >= 0.0"),
        (("control", "limits"), {"low": [1.0] * 7}, "control.limits of dx are 1.0 to 1.0: low must be below high"),
        (("control", "limits"), {"low": [0.0] * 6}, "which must be of length >= 7"),
        (("draft", "side"), 33, "draft.side 33 must be a multiple of draft.patch 16"),
        (("draft", "kind"), "early", "draft.kind is 'early'"),
        (("rsd", "n_action_steps"), 0, "n_action_steps is 0, which must be >= 1"),
        (("rsd", "n_action_steps"), 9, "n_action_steps 9 is not in 1..8"),
        (("rsd", "refresh"), 0, "refresh is 0, which must be >= 1"),
        (("rsd", "tolerance"), [0.1] * 7, "which must be of length <= 6"),
        (("rsd", "tolerance"), [0.1] * 5 + [-0.1], "tolerance[5] is -0.1, which must be >= 0.0"),
        (("rsd", "tolerance"), [0.1] * 5 + [2.1], "tolerance[5] is 2.1, which must be <= 2.0"),
        (("rsd", "tolerance"), [1e308] * 6, "tolerance[0] is 1e+308, which must be <= 2.0"),
        (("rsd", "token_share"), 1.1, "token_share is 1.1, which must be <= 1.0"),
        (("dims", "A"), 6, "dims.A 6 must be 7"),
        (("dims", "C"), 9, "dims.C 9 is more than dims.L 8"),
        (("dims", "K"), 0, "dims.K"),
        (("backbone", "image_size"), 33, "does not divide evenly"),
        (("backbone", "towers", 0, "heads"), 3, "does not divide evenly"),
        (("backbone", "towers", 0, "heads"), 0, "heads"),
        (("backbone", "towers", 0, "patch"), 0, "patch"),
        (("backbone", "towers", 0, "patch"), 8, "[2, 4] patches a side"),
        (("backbone", "towers"), [], "towers"),
        (("backbone", "language", "heads"), 3, "an even multiple of language.heads 3"),
        (("backbone", "language", "heads"), 0, "heads"),
        (("control", "center_crop"), 0.0, "center_crop is 0.0, which must be > 0.0"),
        (("control", "center_crop"), 1.1, "center_crop is 1.1, which must be <= 1.0"),
        (("control", "cameras"), [], "control.cameras is [], which must be of length >= 1"),
        (("control", "prompt"), "do it", "lacks {instruction}"),
        (("control", "action_quantiles", "q99"), [1.0] * 8, "control.action_quantiles has lists of [7, 8] numbers"),
        (("control", "proprio_quantiles", "mask"), [True], "control.proprio_quantiles has lists of [1, 8] numbers"),
    ],
)
def test_values_out_of_range_are_refused(path: Path, value: object, message: str) -> None:
    data = tiny()
    section(data, path[:-1])[path[-1]] = value
    with pytest.raises(UserError) as error:
        load(data)
    assert message in str(error.value)
    assert str(error.value).startswith("b/config.json")


@pytest.mark.parametrize(
    ("protocol", "rotate", "settle", "spatial", "long"), [("oft", True, 10, 220, 520), ("original", False, 0, 300, 300)]
)
def test_protocols(protocol: str, rotate: bool, settle: int, spatial: int, long: int) -> None:
    control = with_protocol(ControlConfig(cameras=("x",), gripper="openvla"), protocol)
    assert (control.rotate_images, control.settle_steps) == (rotate, settle)
    assert (control.max_steps["libero_spatial"], control.max_steps["libero_10"]) == (spatial, long)
    assert (control.cameras, control.gripper) == (("x",), "openvla")
    assert protocol_name(control) == protocol


def test_another_protocol_is_custom() -> None:
    assert protocol_name(structs.replace(ControlConfig(), settle_steps=3)) == "custom"
    assert protocol_name(ControlConfig()) == "oft"
    assert set(PROTOCOLS) == {"oft", "original"}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("wdith", ["width", "heads"], "; did you mean 'width'?"),
        ("zzz", ["width", "heads"], " (one of: heads, width)"),
    ],
)
def test_did_you_mean(name: str, options: list[str], expected: str) -> None:
    assert did_you_mean(name, options) == expected


def test_a_missing_extra_names_the_command() -> None:
    assert str(missing_extra("LIBERO", "libero")) == (
        "LIBERO is not installed. Install it: pip install 'rsd-trt[libero]', or in a clone pip install -e '.[libero]'"
    )
    assert installing("trt", "lean").startswith("pip install 'rsd-trt[trt]' or 'rsd-trt[lean]', or ")
