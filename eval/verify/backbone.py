"""Is the backbone right, however it is run? Checked against timm, transformers and PIL on the same weights and inputs.

Each way of running it is compared by its hidden states and by what the robot would feel: tokens and actions of the
bundle's own heads. Without timm and transformers the reference is the eager backbone, and every row says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, BundleConfig, Precision, torch_dtype
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.verify.components import BATCHES
from rsd_trt.eval.verify.oracle import LEVELS, Oracle, pil_pixels, tower_features
from rsd_trt.eval.verify.result import (
    INFINITE,
    BackboneParity,
    Limit,
    NotMeasured,
    computed_in,
    share_interval,
    worst,
)
from rsd_trt.manifest import Batch
from rsd_trt.models.backbone import Backbone, BackboneInputs, rope_tables
from rsd_trt.models.components import agreeing_steps
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

ORACLE = "timm + transformers"
NO_ORACLE = "install timm and transformers to compare it with theirs"
LIMITS: dict[Precision, Limit] = {
    "fp32": Limit(1e-3, 0.999999, tokens=0.001, steps=0.02),
    "bf16": Limit(INFINITE, 0.9999, tokens=0.02, steps=0.05),
    "fp8": Limit(INFINITE, 0.999, tokens=0.05, steps=0.2),
}
NO_LIMIT = Limit(INFINITE, -1)
LEVEL_LIMIT = 1.001  # PIL rounds its filter to 8 bits: a pixel may come out one level apart

Results = Iterator[BackboneParity | NotMeasured]


@dataclass(frozen=True)
class BackboneRequest:
    """The ways of running the backbone that are compared: every kind in every precision."""

    backbones: tuple[BackboneKind, ...]
    backbone_precisions: tuple[BackbonePrecision, ...]
    device: torch.device


@dataclass(frozen=True)
class Answers:
    """What a backbone and the bundle's heads give for every input, on the host, in float32."""

    final: Tensor  # [n, H], or [n, action tokens, H], after block N and the final norm
    tokens: Tensor  # [n, T, D, L]; of a head that gives none [n, 0]
    actions: Tensor  # [n, T, A]


def verify_backbone(bundle: Bundle, request: BackboneRequest, observations: Sequence[Observation]) -> Results:
    """Preprocessing, towers, Llama blocks, and the whole backbone in every way asked for: one result at a time.

    What computes in bfloat16 is compared with the reference in float32 and in bfloat16. How far from float32 rounding
    alone leads, in 1 - cosine, tokens and steps, is measured on the reference: no way of running may be twice as far.
    From the reference in bfloat16 it may be thrice as far, since what two independent roundings lose adds up.
    """
    config, device = bundle.config, request.device
    precisions = {computed_in(config.backbone, p): p for p in request.backbone_precisions}  # the same twice is run once
    with exact_float32():
        yield from preprocessing(bundle, device, observations)
        references: dict[Precision, tuple[str, Answers]] = {}
        wanted: tuple[Precision, ...] = ("fp32", "bf16") if set(precisions) - {"fp32"} else ("fp32",)
        for dtype in wanted:
            try:
                references[dtype] = yield from open_reference(bundle, dtype, device, observations)
            except torch.OutOfMemoryError as error:
                reason = f"no room for the reference in {dtype}: {str(error).splitlines()[0]}"
                yield NotMeasured("backbone", "reference", dtype, "1", reason)
            release()
        limits = {(reference, dtype): LIMITS[dtype] for reference in references for dtype in LIMITS}
        if len(references) == 2:
            (name, exact), (_, rounded) = references["fp32"], references["bf16"]
            rounding = whole_parity(name, "bf16", "1", f"{name} fp32", exact, rounded, config, NO_LIMIT)
            yield rounding
            limits["fp32", "bf16"] = times_rounding(2, rounding)
            limits["bf16", "bf16"] = times_rounding(3, rounding)
        for kind, (dtype, precision) in product(request.backbones, precisions.items()):
            try:
                launcher = Launcher(bundle, "torch" if kind == "eager" else "graph", device)
                forward = open_forward(launcher, "dynamic", kind, precision)
            except UserError as error:
                yield NotMeasured("backbone", kind, dtype, "1", str(error))
                continue
            for variant, batch in BATCHES.items():
                answers = fast_answers(forward, observations, batch)
                for other, (name, expected) in references.items():
                    if other in ("fp32", dtype) or dtype == "fp8":
                        limit = limits[other, dtype]
                        if (name, other, variant) == (kind, dtype, "1"):
                            yield NotMeasured("backbone", kind, dtype, variant, f"it is the reference: {NO_ORACLE}")
                            continue
                        yield whole_parity(kind, dtype, variant, f"{name} {other}", expected, answers, config, limit)
            del forward
            release()


def times_rounding(times: int, rounding: BackboneParity) -> Limit:
    """The limits of what may be so many times as far from the reference as rounding alone, or as the table's."""
    usual = LIMITS["bf16"]
    tokens, steps = (times * x[1] if x else 1.0 for x in (rounding.token_interval, rounding.steps_interval))
    return Limit(
        INFINITE, 1 - times * (1 - rounding.cosine), tokens=max(usual.tokens, tokens), steps=max(usual.steps, steps)
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products of float32 numbers: without TF32, which PyTorch uses for convolutions unless told otherwise."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def release() -> None:
    """Gives the memory of what is not referenced any more back to the device, and compiled code back to the heap."""
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def preprocessing(bundle: Bundle, device: torch.device, observations: Sequence[Observation]) -> Results:
    """The preprocessor's pixels beside PIL's, in float32."""
    control, config = bundle.config.control, bundle.config.backbone
    preprocess = Preprocessor(control, config, bundle.tokenizer(), device, torch.float32)
    std = torch.tensor([tower.std for tower in config.towers])[:, :, None, None]
    found, expected = [], []
    try:
        for observation in observations:
            found += [*preprocess.pixels(torch.from_numpy(observation.images[None]).to(device))[0].cpu()]
            expected += [pil_pixels(image, control, config) for image in observation.images]
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed. Install it: pip install pillow"
        yield NotMeasured("preprocessing", "eager", "fp32", "1", reason)
        return
    pairs = list(zip(found, expected, strict=True))
    levels, _ = worst(((x * std * LEVELS).flatten(1), (y * std * LEVELS).flatten(1)) for x, y in pairs)
    _, cosine = worst((x.flatten(1), y.flatten(1)) for x, y in pairs)
    exceeded = () if levels <= LEVEL_LIMIT else (f"levels {levels:.3g} > {LEVEL_LIMIT:g}",)
    count = len(observations)
    yield BackboneParity("preprocessing", "eager", "fp32", "1", "PIL", count, levels, cosine, exceeded=exceeded)


def open_reference(
    bundle: Bundle, dtype: Precision, device: torch.device, observations: Sequence[Observation]
) -> Generator[BackboneParity | NotMeasured, None, tuple[str, Answers]]:
    """The eager towers and blocks beside timm's and transformers'; returns the reference's name and answers."""
    config = bundle.config
    backbone = bundle.backbone(device, torch_dtype(dtype))
    preprocess = Preprocessor(config.control, config.backbone, bundle.tokenizer(), device, torch_dtype(dtype))
    inputs = [preprocess([observation]) for observation in observations]
    try:
        oracle = Oracle(backbone)
    except Unavailable as error:
        for component in ("towers", "language"):
            yield NotMeasured(component, "eager", dtype, "1", str(error))
        return "eager", reference_answers(bundle, device, partial(eager_state, backbone), inputs)

    def part(component: str, whose: str, errors: tuple[float, float], limit: Limit) -> BackboneParity:
        name, exceeded = f"{whose} {dtype}", limit.exceeded(*errors)
        return BackboneParity(component, "eager", dtype, "1", name, len(inputs), *errors, exceeded=exceeded)

    with torch.inference_mode():
        for i, tower in enumerate(backbone.vision_backbone.values()):
            pixels = [x.pixels[:, :, i].flatten(0, 1) for x in inputs]
            errors = worst((tower(x).flatten(1), tower_features(oracle.towers[i], x).flatten(1)) for x in pixels)
            yield part(f"towers.{i}", "timm", errors, replace(LIMITS[dtype], max_abs=INFINITE))  # of any scale
        errors = worst(language_pair(backbone, oracle, x) for x in inputs)
        yield part("language", "transformers", errors, LIMITS[dtype])
    return ORACLE, reference_answers(bundle, device, oracle.hidden, inputs)


def eager_state(backbone: Backbone, inputs: BackboneInputs) -> Tensor:
    """The hidden states after block N and the final norm."""
    return backbone(inputs)


def language_pair(backbone: Backbone, oracle: Oracle, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
    """Every position after the last block and the final norm, of the same embedded sequence."""
    stream, _ = backbone.embed(inputs)
    expected = oracle.states(stream)[-1].flatten(1)
    rope = rope_tables(backbone.config.language, stream)
    for block in backbone.llama.layers:
        stream = block(stream, rope)
    return backbone.llama.norm(stream).flatten(1), expected


def reference_answers(
    bundle: Bundle,
    device: torch.device,
    state: Callable[[BackboneInputs], Tensor],
    inputs: Sequence[BackboneInputs],
) -> Answers:
    """What the bundle's head makes of hidden states, an input at a time."""
    read = open_head(bundle, device)
    with torch.inference_mode():
        return joined([read(state(x)) for x in inputs])


def open_head(bundle: Bundle, device: torch.device) -> Callable[[Tensor], Answers]:
    """What gives the answers of the bundle's head, in eager float32, to what `Backbone` gives."""
    config, dims = bundle.config, bundle.config.dims
    predict = Launcher(bundle, "torch", device).open("predict", "dynamic")

    def read(final: Tensor) -> Answers:
        final, count = final.float(), len(final)
        given = {"hidden": final}
        if config.head.kind == "conditioned":  # as in a query that is due
            given["condition"] = torch.zeros(count, dims.T, dims.D, dims.C, dtype=torch.int64, device=device)
        chunk = predict.run(given)
        return Answers(final, chunk.get("tokens", torch.zeros(count, 0)), chunk["actions"])

    return read


def fast_answers(forward: Forward, observations: Sequence[Observation], batch: int) -> Answers:
    """A forward's answers, `batch` observations at a time."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(observations), batch):
            seen = observations[start : start + batch]
            main = forward.full(seen)
            tokens = torch.zeros(len(seen), 0) if main.tokens is None else torch.tensor(main.tokens)
            parts.append(Answers(forward.hidden.clone(), tokens, torch.tensor(main.actions)))
    return joined(parts)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers to all inputs, on the host."""
    return Answers(*(torch.cat([getattr(x, field.name) for x in parts]).cpu() for field in fields(Answers)))


def whole_parity(
    backend: str,
    dtype: Precision,
    batch: Batch,
    reference: str,
    expected: Answers,
    found: Answers,
    config: BundleConfig,
    limit: Limit,
) -> BackboneParity:
    """A way of running the whole backbone beside a reference."""
    max_abs, cosine = worst([(found.final.flatten(1), expected.final.flatten(1))])
    error = (found.actions - expected.actions).abs()
    steps = steps_beyond_tolerance(found, expected, config)
    mismatch = token_mismatch(found.tokens, expected.tokens)
    step_interval = share_interval(steps, error[..., 0].numel())
    token_interval = share_interval(max(mismatch), expected.tokens[..., 0].numel()) if mismatch else None
    return BackboneParity(
        component="backbone",
        backend=backend,
        precision=dtype,
        batch=batch,
        reference=reference,
        inputs=len(expected.final),
        max_abs=max_abs,
        cosine=cosine,
        token_mismatch=mismatch,
        action_max_abs=float(error.max()),
        action_mean_abs=float(error.mean()),
        steps_beyond_tolerance=steps,
        token_interval=token_interval,
        steps_interval=step_interval,
        exceeded=limit.exceeded(max_abs, cosine, token_interval, step_interval),
    )


def steps_beyond_tolerance(found: Answers, expected: Answers, config: BundleConfig) -> float:
    """Share of the chunks' steps that differ by more than the bundle's tolerance."""
    agree = agreeing_steps(found.actions, expected.actions, torch.tensor(config.rsd.tolerance))
    return float((~agree).double().mean())


def token_mismatch(found: Tensor, expected: Tensor) -> tuple[float, ...] | None:
    """Share of different tokens [n, T, D, layers] in each layer; None of a head that gives none."""
    if found.numel() == 0 or expected.numel() == 0:
        return None
    return tuple((found != expected).double().mean((0, 1, 2)).tolist())
