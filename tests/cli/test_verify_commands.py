"""`rsd-trt export`, `verify` and `verify-backbone` as a user meets them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from command import rsd_trt

from rsd_trt import host
from rsd_trt.bundle import Bundle
from rsd_trt.cli.export import choose_distribution
from rsd_trt.config import COMPONENTS
from rsd_trt.errors import UserError
from rsd_trt.eval.verify import components, inputs
from rsd_trt.eval.verify.result import BackboneParity, Parity, backbone_table, parity_table
from rsd_trt.manifest import usable
from rsd_trt.trt import Distribution, Target

ONE_LINE = "error: "


def message(result: Result) -> str:
    """The last line of stderr, of a user error: exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count(ONE_LINE) == 1
    return result.stderr[result.stderr.index(ONE_LINE) + len(ONE_LINE) :].removesuffix("\n")


def test_export_builds_and_then_keeps(tiny_bundle: Path, tmp_path: Path) -> None:
    command = ("export", tiny_bundle, "-o", tmp_path, "--component", "decoder", "--target", "rtx")
    made = rsd_trt(*command, "--compute-capability", "8.9,12.0", "--json")
    assert made.exit_code == 0, made.output
    rows = json.loads(made.stdout)
    assert [(row["artefact"], row["built"], row["reason"]) for row in rows] == [
        (f"decoder fp32 batch {batch} ({kind})", True, "there was none")
        for batch in ("1", "dynamic")
        for kind in ("onnx", "rtx")
    ]
    assert all(Path(file).is_file() for row in rows for file in row["files"])
    again = rsd_trt(*command, "--compute-capability", "8.9,12.0")
    assert again.exit_code == 0
    assert "built" not in again.stdout
    assert again.stdout.count("fresh") == 4
    assert f"manifest: {tmp_path / 'tiny' / 'manifest.json'}" in again.stdout
    engine = usable(Bundle.open(tiny_bundle), tmp_path, ("decoder", "fp32", "1", "rtx"))[0].engine
    assert engine is not None
    assert engine.compute_capabilities == ("8.9", "12.0")
    info = json.loads(rsd_trt("info", tiny_bundle, "--engines", tmp_path, "--json").stdout)
    assert [row["reason"] for row in info["exports"]] == ["fresh"] * 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target", "rtx", "--compute-capability", "9.0"), "does not build for compute capability 9.0 (known: "),
        (("--target", "rtx", "--version-compatible"), "are for --target tensorrt"),
        (
            ("--target", "onnx", "--compute-capability", "8.9"),
            "no engine is to be built. Use: --target rtx or tensorrt",
        ),
        (("--target", "rtx", "--report"), "TensorRT engines need an NVIDIA GPU, and none is usable here"),
    ],
)
def test_what_export_cannot_build_is_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.setattr(host, "gpu", lambda: None)
    error = message(rsd_trt("export", tiny_bundle, "-o", tmp_path / "engines", *arguments))
    assert text in error
    assert "\n" not in error
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("target", "installed", "gpu", "found"),
    [
        ("onnx", ("tensorrt", "rtx"), True, None),
        ("auto", ("tensorrt", "rtx"), True, "tensorrt"),
        ("auto", ("tensorrt", "rtx"), False, "rtx"),
        ("auto", ("rtx",), True, "rtx"),
        ("auto", ("tensorrt",), False, None),
        ("auto", (), True, None),
        ("tensorrt", ("tensorrt",), False, "tensorrt"),
    ],
)
def test_the_distribution_that_is_built_with(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
    installed: tuple[Target, ...],
    gpu: bool,
    found: Target | None,
) -> None:
    def find(wanted: Target) -> Distribution:
        if wanted not in installed:
            raise UserError(f"{wanted} is missing.")
        return Distribution(wanted, pytest)

    monkeypatch.setattr("rsd_trt.trt.find_distribution", find)
    monkeypatch.setattr(host, "gpu", lambda: host.Gpu("NVIDIA L4", "8.9", "") if gpu else None)
    distribution = choose_distribution(target)
    assert (distribution.target if distribution else None) == found
    told = capsys.readouterr().err
    assert told.startswith("ONNX only: ") == (found is None and target == "auto")
    assert "rtx is missing." in told or found is not None or target == "onnx"


def test_verify_passes_what_is_equal(tiny_bundle: Path, exported: Callable[..., Path]) -> None:
    command = ("verify", tiny_bundle, "--engines", exported("fp32"), "--device", "cpu", "-n", 192)
    result = rsd_trt(*command, "--json")
    assert result.exit_code == 0, result.output  # of the default's backends, the others cannot run here
    record = json.loads(result.stdout)
    assert {*record} == {"command", "bundle", "bundle_sha256", "hardware", "versions", "rows"}
    assert record["bundle_sha256"] == Bundle.open(tiny_bundle).fingerprint
    assert (record["hardware"], record["versions"]) == (host.hardware("cpu"), host.versions())
    rows = [row for row in record["rows"] if row["status"] != "not measured"]
    assert {(row["backend"], row["status"]) for row in rows} == {("ort", "passed")}
    assert len(rows) == 2 * len(COMPONENTS)
    table = rsd_trt(*command, "--backend", "ort,graph")
    assert message(table).startswith("--backend graph was asked for and could not be measured: backend graph needs")
    assert table.stdout.count("passed") == 2 * len(COMPONENTS)
    assert "not measured: graph draft, graph head, graph decoder, graph propose, graph predict: backend" in table.stdout


def test_verify_fails_what_is_not(
    tiny_bundle: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = {key: components.Tolerance(-1, -1, -1, -1) for key in components.TOLERANCES}
    monkeypatch.setattr(components, "TOLERANCES", strict)
    command = ("verify", tiny_bundle, "--engines", exported("fp32"), "--backend", "ort", "--device", "cpu", "-n", 192)
    result = rsd_trt(*command)
    assert message(result) == "10 of 10 comparisons failed"
    assert result.stdout.count("FAILED: ") == 10
    printed = rsd_trt(*command, "--json")
    assert message(printed) == "10 of 10 comparisons failed"
    assert {row["status"] for row in json.loads(printed.stdout)["rows"]} == {"failed"}


def test_verify_compares_the_backbone(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = inputs.random_observations(Bundle.open(tiny_bundle).config.control, 32)
    monkeypatch.setattr(inputs, "libero_observations", lambda suite, control: seen)
    command = (
        "verify-backbone",
        tiny_bundle,
        "--device",
        "cpu",
        "--backbone",
        "eager,graph",
        "--libero",
        "libero_goal",
    )
    result = rsd_trt(*command, "--json")
    assert message(result).startswith("--backbone graph was asked for and could not be measured: backbone graph needs")
    record = json.loads(result.stdout)
    rows = record["rows"]
    assert record["shown"] == "32 first scenes of libero_goal"
    whole = [row for row in rows if row["component"] == "backbone"]
    assert [row["status"] for row in whole if (row["backend"], row["batch"]) == ("eager", "dynamic")] == ["passed"]
    assert [row["status"] for row in whole if row["backend"] == "graph"] == ["not measured"]
    table = rsd_trt(*command)
    assert table.stdout.count("passed") == sum(row["status"] == "passed" for row in rows)
    assert "not measured: graph backbone: backbone graph needs a CUDA device" in table.stdout
    assert rsd_trt(*command[:4], *command[6:]).exit_code == 0  # all that may run here


def test_what_fp8_changes_is_said(tiny_bundle: Path) -> None:
    one = rsd_trt("verify-backbone", tiny_bundle, "--backbone-precision", "bundle,fp8", "--device", "cpu", "-n", 32)
    assert message(one).startswith("--backbone-precision fp8 was asked for and could not be measured")
    assert "what fp8 changes on the bundle's own scenes: --libero SUITE" in one.stdout
    assert "32 images of noise" in one.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("verify", "--backend", "trt,graph"), "nothing could be measured"),
        (("verify",), "nothing could be measured: nothing of "),
        (("verify", "--hidden", "missing.safetensors"), "missing.safetensors cannot be read as safetensors"),
    ],
)
def test_what_cannot_be_checked_is_one_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = arguments
    error = message(rsd_trt(name, tiny_bundle, "--engines", tmp_path, "--device", "cpu", *options))
    assert error.startswith(text)
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [80, 200])
def test_no_number_of_a_table_is_cut(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """What does not fit is left out as a column, or stands below."""
    from rich.console import Console

    numbers = (1.1234e-5, 2.3456e-6, 3.4567e-7)
    parity = Parity(
        "propose", "ort", "fp32", "dynamic", 64, *numbers, 0.999999,
        (0.01234, 0.0), 0.3125, 2.2e-6, (0.011, 0.013), (0.213, 0.434), (),
    )  # fmt: skip
    whole = BackboneParity(
        "backbone", "compiled", "bf16", "dynamic", "timm + transformers fp32", 64, 1.1e-5, 0.99999,
        (0.02,), 0.3, 0.1, 0.05, (0.018, 0.0225), (0.04, 0.0625),
    )  # fmt: skip
    for table, shown in (
        (parity_table([parity]), ("1.1e-05", "1.234%", "1.300", "31.2%", "43.4", "passed")),
        (backbone_table([whole], "64 scenes"), ("1.1e-05", "0.999990", "2.000%", "2.250", "5.0%", "6.2", "64 scenes")),
    ):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert "\u2026" not in text
        assert all(number in text for number in shown), text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("export", "--target", "tensort"), "'tensort' is unknown; did you mean 'tensorrt'?"),
        (("export", "--component", "heads"), "'heads' is unknown; did you mean 'head'?"),
        (("export", "--precision", "fp8"), "'fp8' is unknown"),
        (("verify", "-n", "191"), "191 is not in the range"),
        (("verify", "--backend", "grahp"), "'grahp' is unknown; did you mean 'graph'?"),
        (("verify", "--backend", ","), "the list is empty"),
        (("verify", "--libero", "libero_goal"), "No such option"),
        (("verify", "--backbone", "eager"), "No such option"),
        (("verify-backbone", "--hidden", "x"), "No such option"),
        (("verify-backbone", "--engines", "x"), "No such option"),
        (("verify-backbone", "--backbone", "graph,eagre"), "'eagre' is unknown; did you mean 'eager'?"),
        (("verify-backbone", "--backbone-precision", "fp16"), "'fp16' is unknown"),
        (("verify-backbone", "--libero", "libero_goal", "-n", "32"), "it cannot be used with --libero"),
    ],
)
def test_wrong_usage_is_exit_code_two(tiny_bundle: Path, arguments: tuple[str, ...], text: str) -> None:
    name, *options = arguments
    found = rsd_trt(name, tiny_bundle, *options)
    assert (found.exit_code, found.stdout) == (2, "")
    assert text.lower() in found.stderr.lower()
