"""Work, against hand-made sums and against what torch counts as it computes; and the bounds that it implies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneConfig, BundleConfig, HeadConfig
from rsd_trt.errors import UserError
from rsd_trt.eval.profile import roofline
from rsd_trt.eval.profile.roofline import (
    STAGES,
    Bound,
    Machine,
    Work,
    attention,
    measure_machine,
    patches,
    product,
    stage_work,
)
from rsd_trt.models.codec import Codec, Decoder
from rsd_trt.models.components import ActionTransform, Predict
from rsd_trt.models.fast.backbone import FusedBackbone
from rsd_trt.models.head import build_head
from rsd_trt.presets import preset

OPENVLA = preset("openvla-7b", "openvla-7b")
TINY = preset("tiny", "tiny")
PROMPT = 28
RATES = {"fp32": 5e13, "bf16": 8e14, "fp8": 1.6e15}
MACHINE = Machine(bytes_per_s=4e12, flops_per_s=RATES, matrix_side=8192, copied_bytes=1)


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    assert product(3, 5, 7, "fp32") == Work(4 * (5 * 7 + 3 * 5 + 3 * 7), {"fp32": 2 * 3 * 5 * 7})
    assert product(3, 5, 7, "fp8") == Work(5 * 7 + 3 * 5 + 2 * 3 * 7, {"fp8": 2 * 3 * 5 * 7})
    assert attention(2, 9, 8, "bf16") == Work(2 * 8 * (2 * 9 + 2 * 2), {"bf16": 4 * 2 * 9 * 8})


def test_work_adds_up() -> None:
    both = product(1, 2, 3, "bf16") * 2 + product(1, 2, 3, "fp8")
    assert both.flops == {"bf16": 24, "fp8": 12}
    assert both.total_flops == 36
    assert both.bytes == 2 * 2 * (6 + 2 + 3) + (6 + 2 + 2 * 3)
    assert sum((), Work()) == Work()


def blocks_of(count: int) -> BackboneConfig:
    """OpenVLA's backbone with so many blocks."""
    return structs.replace(OPENVLA.backbone, language=structs.replace(OPENVLA.backbone.language, blocks=count))


def test_a_7b_query_by_hand() -> None:
    """The 31 blocks that compute all positions: q, k, v, o 4096 x 4096; gate, up, down 4096 x 11008."""
    found = stage_work(OPENVLA, 1, PROMPT, "bf16")
    positions, weights = 256 + PROMPT, 4 * 4096**2 + 3 * 4096 * 11008
    flops = 2 * positions * weights + 4 * positions**2 * 4096
    # inputs and outputs of the products, and of attention, in 2 bytes
    moved = positions * (4096 + 3 * 4096 + 4 * 4096 + 2 * 4096 + 4096 + 2 * 11008 + 11008 + 4096)
    one, fewer = (
        stage_work(structs.replace(OPENVLA, backbone=blocks_of(n)), 1, PROMPT, "bf16")["blocks"] for n in (32, 31)
    )
    assert one.bytes - fewer.bytes == 2 * (weights + moved)
    last = 2 * positions * 4096 * 8192 + 4 * positions * 4096 + 2 * (2 * 4096**2 + 3 * 4096 * 11008)
    assert found["blocks"].flops == {"bf16": 31 * flops + last}
    assert found["preprocess"] == Work(3 * 256**2 + 2 * 2 * 3 * 224**2)


def test_fp8_halves_the_weights_of_the_mlps_of_all_blocks_but_the_last() -> None:
    narrow, wide = (stage_work(OPENVLA, 1, PROMPT, dtype) for dtype in ("fp8", "bf16"))
    assert narrow["vision"] == wide["vision"]
    assert narrow["blocks"].total_flops == wide["blocks"].total_flops
    assert set(narrow["blocks"].flops) == {"bf16", "fp8"}
    weights = 31 * 3 * 4096 * 11008
    inputs = 31 * (PROMPT + 256) * (4096 + 11008)
    assert wide["blocks"].bytes - narrow["blocks"].bytes == weights + inputs


def test_more_images_and_tokens_are_more_work_on_the_same_weights() -> None:
    one, two = stage_work(OPENVLA, 1, PROMPT, "bf16"), stage_work(OPENVLA, 2, PROMPT, "bf16")
    assert two["vision"].total_flops == 2 * one["vision"].total_flops
    assert one["vision"].bytes < two["vision"].bytes < 2 * one["vision"].bytes
    assert two["blocks"].total_flops > 1.8 * one["blocks"].total_flops
    assert one["predict"] == two["predict"]


def counted(run: Callable[[], object]) -> int:
    """FLOPs as torch counts them; attention as the two products that it is."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("images", [1, 2])
def test_the_backbone_as_torch_counts_it(bundle: Bundle, images: int) -> None:
    config = bundle.config
    backbone = FusedBackbone(bundle.backbone())
    found = stage_work(config, images, PROMPT, "fp32")
    side = config.backbone.image_size
    pixels, tokens = torch.zeros(1, images, 2, 3, side, side), torch.zeros(1, PROMPT, dtype=torch.int64)
    assert counted(lambda: backbone.embed(pixels, tokens, torch.zeros(1, 8))) == found["vision"].total_flops
    stream = torch.zeros(1, PROMPT + images * patches(config) + 1, config.hidden)
    last = torch.tensor([stream.shape[1] - 1])
    assert counted(lambda: backbone.language(stream, last)) == found["blocks"].total_flops


@pytest.mark.parametrize("kind", ["rfsq", "conditioned", "classification"])
def test_heads_as_torch_counts_them(kind: str) -> None:
    config: BundleConfig = structs.replace(TINY, head=HeadConfig(kind, feature=32, width=16, embedding=4))  # type: ignore[arg-type]
    dims, hidden = config.dims, torch.zeros(1, config.hidden)
    found = stage_work(config, 1, PROMPT, "fp32")
    decoder, transform = Decoder(Codec(config.codec, dims), dims), ActionTransform(config.control, dims)
    predict = Predict(build_head(config.head, dims, config.hidden), decoder, transform)
    condition = (torch.zeros(1, dims.T, dims.D, dims.C, dtype=torch.int64),) if kind == "conditioned" else ()
    assert counted(lambda: predict(hidden, *condition)) == found["predict"].total_flops


def test_the_weights_are_nearly_all_that_is_read_at_batch_1(bundle: Bundle) -> None:
    """Biases and norms are what the count leaves out."""
    head = bundle.component("head")
    weights = 4 * sum(p.numel() for p in head.parameters() if p.dim() > 1)
    assert weights < stage_work(bundle.config, 1, PROMPT, "fp32")["predict"].bytes < 1.2 * weights


MOVING = Work(4_000_000_000)  # for 1 ms
COMPUTING = Work(4_000_000_000, {"bf16": 1_600_000_000_000})  # for 2 ms


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([MOVING], Bound(1.0, "memory")),
        ([Work(4_000_000_000, {"bf16": 400_000_000_000})], Bound(1.0, "memory")),
        ([COMPUTING], Bound(2.0, "compute")),
        ([Work(0, {"bf16": 800_000_000_000, "fp8": 1_600_000_000_000})], Bound(2.0, "compute")),
        ([MOVING, COMPUTING], Bound(3.0, "compute")),
        ([MOVING, COMPUTING, MOVING], Bound(4.0, "memory")),
    ],
)
def test_a_bound_is_the_longer_of_moving_and_computing_and_adds_up(parts: list[Work], expected: Bound) -> None:
    found = MACHINE.bound(parts)
    assert (found.ms, found.by) == (pytest.approx(expected.ms), expected.by)


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "CPU_COPY", 1 << 20)
    monkeypatch.setattr(roofline, "CPU_SIDE", 64)
    found = measure_machine(torch.device("cpu"), ["fp32", "bf16"])
    assert 1e7 < found.bytes_per_s < 1e13
    assert set(found.flops_per_s) == {"fp32", "bf16"}
    assert all(1e6 < rate < 1e14 for rate in found.flops_per_s.values())
    assert (found.matrix_side, found.copied_bytes) == (64, 1 << 20)


def test_a_full_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(roofline, "_copy", full)
    with pytest.raises(UserError, match=r"cpu has too little memory free to be measured: CUDA out of memory\. Tried"):
        measure_machine(torch.device("cpu"), ["fp32"])


def test_the_published_counts_are_those_of_today() -> None:
    """OpenVLA-7B with one image; the published bundle has no proprioception."""
    published = json.loads((Path(__file__).parents[3] / "docs" / "results" / "h200" / "stages.json").read_text("utf-8"))
    rows = [row for row in published["rows"] if row["what"] in STAGES and row["images"] == 1]
    assert rows
    for row in rows:
        work = stage_work(OPENVLA, 1, row["prompt_tokens"], row["precision"])[row["what"]]
        assert (work.bytes, work.total_flops) == (row["bytes"], row["flops"]), row
    parts = [row for row in published["rows"] if row["what"].startswith("blocks") and row["images"] == 1]
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        work = stage_work(OPENVLA, 1, first["prompt_tokens"], first["precision"])["blocks"]
        assert (work.bytes, work.total_flops) == tuple(first[x] + second[x] for x in ("bytes", "flops"))
