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
from typing import Literal

import torch
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.config import BackboneKind, BackbonePrecision, BundleConfig
from rsd_trt.errors import Unavailable, UserError
from rsd_trt.eval.verify.backbone_result import LIMITS, NO_LIMIT, Arithmetic, BackboneParity, Limit, worst
from rsd_trt.eval.verify.components import DYNAMIC_ROWS, NotMeasured
from rsd_trt.eval.verify.oracle import Oracle, last_positions, tower_features
from rsd_trt.eval.verify.pixels import preprocessing
from rsd_trt.manifest import Batch
from rsd_trt.models.backbone import Backbone, BackboneInputs
from rsd_trt.models.components import agreeing_steps
from rsd_trt.runtime.backends import Launcher, open_forward
from rsd_trt.runtime.forward import Forward
from rsd_trt.runtime.observation import Observation
from rsd_trt.runtime.preprocess import Preprocessor

ORACLE = "timm + transformers"


@dataclass(frozen=True)
class Answers:
    """What a backbone and the bundle's heads give for every input, on the host, in float32."""

    early: Tensor  # [n, H] after block k
    final: Tensor  # [n, H] after block N
    draft_tokens: Tensor  # [n, T, D, C]
    tokens: Tensor  # [n, T, D, L]
    actions: Tensor  # [n, T, A]


def verify_backbone(
    bundle: Bundle,
    kinds: Sequence[BackboneKind],
    precisions: Sequence[BackbonePrecision],
    device: torch.device,
    observations: Sequence[Observation],
) -> Iterator[BackboneParity | NotMeasured]:
    """Preprocessing, towers, Llama blocks, and the whole backbone in every way asked for: one result at a time.

    What computes in bfloat16 is compared with the reference in float32 and in bfloat16. How far from float32 rounding
    alone leads, in 1 - cosine, is measured on the reference: no way of running may be twice as far. From the reference
    in bfloat16 it may be thrice as far, since what two independent roundings lose adds up.
    """
    stored = bundle.config.backbone.dtype
    arithmetics: dict[BackbonePrecision, Arithmetic] = {"bundle": stored, "bf16": "bfloat16", "fp8": "fp8"}
    ways = {arithmetics[precision]: precision for precision in precisions}  # the same twice is run once
    with exact_float32():
        yield from preprocessing(bundle, device, observations)
        references: dict[Arithmetic, tuple[str, Answers]] = {}
        for arithmetic in ("float32", "bfloat16") if set(ways) - {"float32"} else ("float32",):
            try:
                references[arithmetic] = yield from open_reference(bundle, arithmetic, device, observations)
            except torch.OutOfMemoryError as error:
                reason = f"no room for the reference in {arithmetic}: {str(error).splitlines()[0]}"
                yield NotMeasured("backbone", "reference", arithmetic, "1", reason)
            release()
        limits = {(name, arithmetic): LIMITS[arithmetic] for name in references for arithmetic in LIMITS}
        if len(references) == 2:
            (name, exact), (_, rounded) = references["float32"], references["bfloat16"]
            rounding = compare(name, "bfloat16", "1", f"{name} float32", exact, rounded, bundle.config, NO_LIMIT)
            yield rounding
            limits["float32", "bfloat16"] = Limit(float("inf"), 1 - 2 * (1 - rounding.cosine))
            limits["bfloat16", "bfloat16"] = Limit(float("inf"), 1 - 3 * (1 - rounding.cosine))
        for kind, (arithmetic, precision) in product(kinds, ways.items()):
            if (kind, arithmetic) == ("eager", "fp8"):
                continue  # eager is what the others are compared with
            try:
                forward = open_forward(
                    Launcher(bundle, "torch" if kind == "eager" else "graph", device), "dynamic", kind, precision
                )
            except UserError as error:
                yield NotMeasured(
                    "backbone", kind, arithmetic, "1", str(error), failed=not isinstance(error, Unavailable)
                )
                continue
            batches: tuple[tuple[Batch, int], ...] = (("1", 1), ("dynamic", DYNAMIC_ROWS))
            for batch, rows in batches:
                answers = ask(forward, observations, rows)
                for other, (name, expected) in references.items():
                    if other in ("float32", arithmetic) or arithmetic == "fp8":
                        limit, reference = limits[other, arithmetic], f"{name} {other}"
                        yield compare(kind, arithmetic, batch, reference, expected, answers, bundle.config, limit)
            del forward
            release()


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


def open_reference(
    bundle: Bundle,
    arithmetic: Literal["float32", "bfloat16"],
    device: torch.device,
    observations: Sequence[Observation],
) -> Generator[BackboneParity | NotMeasured, None, tuple[str, Answers]]:
    """The eager towers and blocks beside timm's and transformers'; returns the reference's name and answers."""
    config = bundle.config
    shape, k = replace(config.backbone, dtype=arithmetic), config.rsd.draft_block
    backbone = bundle.backbone(device, getattr(torch, arithmetic))
    preprocess = Preprocessor(config.control, shape, bundle.tokenizer(), device)
    inputs = [preprocess([observation]) for observation in observations]
    limit = LIMITS[arithmetic]
    try:
        oracle = Oracle(backbone)
    except Unavailable as error:
        for component in ("towers", "language"):
            yield NotMeasured(component, "eager", arithmetic, "1", str(error))
        return "eager", answer(bundle, device, partial(eager_states, backbone, k), inputs)
    with torch.inference_mode():
        for i, tower in enumerate(backbone.vision_backbone.values()):
            pixels = [x.pixels[:, :, i].flatten(0, 1) for x in inputs]
            errors = worst((tower(x).flatten(1), tower_features(oracle.towers[i], x).flatten(1)) for x in pixels)
            any_scale = replace(limit, max_abs=float("inf"))
            yield part(f"towers.{i}", arithmetic, "timm", len(inputs), errors, any_scale)
        errors = worst(language_pair(backbone, oracle, x) for x in inputs)
        yield part("language", arithmetic, "transformers", len(inputs), errors, limit)
    return ORACLE, answer(bundle, device, partial(oracle_states, oracle, k), inputs)


def eager_states(backbone: Backbone, k: int, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
    """The hidden states [B, H] after block k and after block N."""
    state = backbone.run(inputs, until=k)
    return backbone.hidden(state), backbone.hidden(backbone.resume(state, backbone.config.language.blocks))


def oracle_states(oracle: Oracle, k: int, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
    """The same of the oracle."""
    stream = oracle.embed(inputs)
    states, rows = oracle.states(stream), torch.arange(len(stream), device=stream.device)
    last = last_positions(inputs, stream)
    return states[k][rows, last], states[-1][rows, last]


def language_pair(backbone: Backbone, oracle: Oracle, inputs: BackboneInputs) -> tuple[Tensor, Tensor]:
    """Every position after the last block and the final norm, of the same embedded sequence."""
    state = backbone.embed(inputs)
    stream = backbone.resume(state, backbone.config.language.blocks).stream
    return backbone.llama.norm(stream).flatten(1), oracle.states(state.stream)[-1].flatten(1)


def answer(
    bundle: Bundle,
    device: torch.device,
    states: Callable[[BackboneInputs], tuple[Tensor, Tensor]],
    inputs: Sequence[BackboneInputs],
) -> Answers:
    """What the bundle's heads make of hidden states, an input at a time."""
    read = heads(bundle, device)
    with torch.inference_mode():
        return joined([read(*states(x)) for x in inputs])


def heads(bundle: Bundle, device: torch.device) -> Callable[[Tensor, Tensor], Answers]:
    """What gives the answers of the bundle's heads, in eager float32, to hidden states [B, H] after block k and N."""
    launcher = Launcher(bundle, "torch", device)
    propose, predict = launcher.open("propose", "dynamic"), launcher.open("predict", "dynamic")
    tolerance = torch.tensor(bundle.config.rsd.tolerance, device=device)

    def read(early: Tensor, final: Tensor) -> Answers:
        early, final = early.float(), final.float()
        draft = propose.run({"hidden": early})
        given = {"hidden": final, "coarse_actions": draft["actions"], "tolerance": tolerance}
        if bundle.config.head.kind == "conditioned":
            given["condition"] = draft["tokens"]
        plan = predict.run(given)
        return Answers(early, final, draft["tokens"], plan["tokens"], plan["actions"])

    return read


def ask(forward: Forward, observations: Sequence[Observation], rows: int) -> Answers:
    """A forward's answers, `rows` observations at a time."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(observations), rows):
            batch = observations[start : start + rows]
            forward.early(batch)
            draft = torch.tensor(forward.draft().tokens)
            forward.late(range(len(batch)))
            main = forward.main()
            early, final = (state.float().clone() for state in forward.hidden())
            parts.append(Answers(early, final, draft, torch.tensor(main.tokens), torch.tensor(main.actions)))
    return joined(parts)


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers to all inputs, on the host."""
    return Answers(*(torch.cat([getattr(x, field.name) for x in parts]).cpu() for field in fields(Answers)))


def compare(
    backend: str,
    arithmetic: Arithmetic,
    batch: Batch,
    reference: str,
    expected: Answers,
    found: Answers,
    config: BundleConfig,
    limit: Limit,
) -> BackboneParity:
    """A way of running the backbone beside a reference."""
    max_abs, cosine = worst([(found.final, expected.final)])
    early_max_abs, early_cosine = worst([(found.early, expected.early)])
    error = (found.actions - expected.actions).abs()
    return BackboneParity(
        component="backbone",
        backend=backend,
        precision=arithmetic,
        batch=batch,
        reference=reference,
        rows=len(expected.final),
        max_abs=max_abs,
        cosine=cosine,
        early_max_abs=early_max_abs,
        early_cosine=early_cosine,
        draft_flips=flips(found.draft_tokens, expected.draft_tokens),
        flips=flips(found.tokens, expected.tokens),
        action_max_abs=float(error.max()),
        action_mean_abs=float(error.mean()),
        steps_apart=steps_apart(found, expected, config),
        exceeded=limit.exceeded(max_abs, cosine, early_cosine),
    )


def part(
    component: str, arithmetic: Arithmetic, reference: str, rows: int, errors: tuple[float, float], limit: Limit
) -> BackboneParity:
    """A part of the eager backbone beside its reference."""
    max_abs, cosine = errors
    name = f"{reference} {arithmetic}"
    return BackboneParity(
        component, "eager", arithmetic, "1", name, rows, max_abs, cosine, exceeded=limit.exceeded(max_abs, cosine)
    )


def steps_apart(found: Answers, expected: Answers, config: BundleConfig) -> float:
    """Share of the plans' steps that differ by more than the bundle's tolerance."""
    agree = agreeing_steps(found.actions, expected.actions, torch.tensor(config.rsd.tolerance))
    return float((~agree).double().mean())


def flips(found: Tensor, expected: Tensor) -> tuple[float, ...]:
    """Share of different tokens [n, T, D, layers] in each layer."""
    return tuple((found != expected).float().mean((0, 1, 2)).tolist())
