"""A draft for a policy, from request to bundle: frames and labels, the codec where there is none, training, report.

Everything that takes long is kept in the request's folder: the same command goes on where the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from torch import Tensor

from rsd_trt import host
from rsd_trt.bundle import Bundle, bundle_name, copy_with
from rsd_trt.config import BundleConfig, RsdConfig, VisionDraftConfig
from rsd_trt.errors import UserError, shown
from rsd_trt.eval.plots import can_plot
from rsd_trt.files import check_disk, check_folder, explained, locked, write_atomically
from rsd_trt.models.vision_draft import Resize, VisionDraft, instruction_rows
from rsd_trt.presets import preset
from rsd_trt.recordings import main_fingerprint
from rsd_trt.records import Positive, Record, differing, read_record, to_json, write_record
from rsd_trt.runtime.backends import check_device
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.training.batches import Batches, hold_out
from rsd_trt.training.codec import codec_for
from rsd_trt.training.fit import CHECKPOINT, fit, read_draft
from rsd_trt.training.labels import Labeller, fill
from rsd_trt.training.loop import METRICS, LoopSettings
from rsd_trt.training.measure import measure
from rsd_trt.training.outcome import Cost, Distilled, measured_cost
from rsd_trt.training.request import DistillRequest
from rsd_trt.training.sources import Names, Source, open_source
from rsd_trt.training.store import FACTS, INDEX, Store, StoreFacts
from rsd_trt.training.teacher import Teacher
from rsd_trt.weights import open_tensors

STORED = torch.float16  # of the draft on disk; it is loaded as float32
HELD_OUT_SHARE, LEAST_HELD_OUT, LEAST_EPISODES = 0.1, 2, 4
BATCH = {"cuda": 1024, "cpu": 64}
SAVE_EVERY = 15.0  # s
MEASURE_EVERY = 30.0  # s
MEASURED = 2048  # held-out frames, at the most, while it trains
LOCK, FRAMES, SETTINGS, REPORT, CURVE = ".lock", "frames", "training.json", "report.json", "curve.png"
EMBEDDING = "language_model.model.embed_tokens.weight"


class TrainingSettings(Record, frozen=True):
    """What a checkpoint belongs to: another value of any field is another training."""

    draft: VisionDraftConfig
    batch: Positive
    learning_rate: float
    seed: int
    live: bool
    frames: Positive


@dataclass(frozen=True)
class Progress:
    """Whom to tell how far it is."""

    labelling: Callable[[int, int], None]  # frames done, and in all at the most
    training: Callable[[float, Mapping[str, object]], None]  # share of the limit, and a line of metrics


def distill(request: DistillRequest, progress: Progress) -> Distilled:
    """Distils a draft and writes the bundle.

    Raises:
        UserError: anything that does not fit, or cannot be read, written or run here.
    """
    if request.out.exists() or request.out.is_symlink():
        raise UserError(f"{request.out} exists", "Choose another path, or remove it first")
    bundle = Bundle.open(request.bundle)
    for part in ("backbone", *bundle.parts_of("predict")):
        if not bundle.has(part):
            raise UserError(f"{bundle.path} has no {part}: there is nobody to learn from")
    device = check_device(request.device)
    source = open_source(request.data, bundle, _names(request))
    if len(source.episodes) < LEAST_EPISODES:
        raise UserError(
            f"{request.data} has {len(source.episodes)} episodes: {LEAST_EPISODES} are the least, so that "
            f"{LEAST_HELD_OUT} can be held out",
            "Record more",
        )
    draft = _draft_config(request, bundle.config, source)
    _check_out(request, bundle)
    with _own_folder(request):
        store = _labelled(request, bundle, source, draft, device, progress)
        return _trained(request, bundle, source, store, draft, device, progress)


def _names(request: DistillRequest) -> Names:
    cameras = {}
    for text in request.camera:
        ours, _, theirs = text.partition("=")
        if not ours or not theirs:
            raise UserError(
                f"--camera {text} is not BUNDLE'S=DATA SET'S, such as agentview_image=observation.images.image"
            )
        cameras[ours] = theirs
    return Names(cameras, request.state, request.turn)


def _draft_config(request: DistillRequest, config: BundleConfig, source: Source) -> VisionDraftConfig:
    """The draft that is asked for, else one like the bundle's, else one that suits the backbone."""
    if request.draft is not None:
        chosen = VisionDraftConfig() if request.draft == "small" else preset("openvla-7b", "large").draft
    elif isinstance(config.draft, VisionDraftConfig):
        chosen = config.draft
    else:
        large = config.hidden >= preset("openvla-7b", "large").hidden
        chosen = preset("openvla-7b", "large").draft if large else VisionDraftConfig()
    assert isinstance(chosen, VisionDraftConfig)
    keeps = chosen == config.draft  # a draft like the bundle's reads what that does
    return structs.replace(chosen, state=source.has_state and (chosen.state if keeps else True))


def _check_out(request: DistillRequest, bundle: Bundle) -> None:
    """Raises UserError if the new bundle has no name or no room: said before the training, not after it."""
    if not bundle_name(request.out):
        raise UserError(f"-o {request.out} has no letter or digit to name a bundle by")
    check_folder(request.out.parent)
    check_disk(request.out, sum(file.stat().st_size for file in bundle.files))


@contextmanager
def _own_folder(request: DistillRequest) -> Iterator[None]:
    """The folder for what is kept, which no other process writes meanwhile."""
    folder = request.folder

    def refuse() -> None:
        raise UserError(f"another distillation writes {folder}", "Wait for it, or choose another --work")

    with explained(folder):
        if folder.is_dir() and not _is_ours(folder):
            raise UserError(f"--work {folder} holds other files", "Choose a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, refuse):
            if request.fresh:
                Store.remove(folder / FRAMES)
                for name in (SETTINGS, REPORT, CURVE, METRICS, CHECKPOINT):
                    (folder / name).unlink(missing_ok=True)
            yield


def _is_ours(folder: Path) -> bool:
    """Whether a distillation was kept here, or nothing is: one may have been killed before it had written anything."""
    if (folder / FRAMES / FACTS).exists():
        return True
    if (folder / SETTINGS).exists():
        with suppress(UserError):
            read_record(TrainingSettings, folder / SETTINGS)
            return True
    return all(file.is_dir() or file.name in (LOCK, INDEX) for file in folder.rglob("*"))


def _labelled(
    request: DistillRequest,
    bundle: Bundle,
    source: Source,
    draft: VisionDraftConfig,
    device: torch.device,
    progress: Progress,
) -> Store:
    """All frames with their labels, on disk."""
    config = bundle.config
    dims, control = config.dims, config.control
    with_tokens = source.tokens if source.labelled else config.head.gives_tokens
    facts = StoreFacts(
        source=source.facts,
        fingerprint=main_fingerprint(bundle),
        cameras=control.cameras,
        side=draft.side,
        steps=dims.T,
        tokens=(dims.D, dims.L) if with_tokens else None,
        precision=None if source.labelled else request.backbone_precision,
    )
    store = Store(request.folder / FRAMES, facts)
    episodes = source.episodes
    missing = store.missing(episodes)
    if not missing:
        return store
    check_disk(store.folder, sum(episodes[i].frames for i in missing) * store.frame_bytes)
    resize = Resize(source.size, draft.side, control.rotate_images, control.center_crop).to(device)
    labeller = None
    if not source.labelled:
        how = (request.backbone, request.backbone_precision)
        labeller = Labeller(bundle, source.size, device, request.label_batch, *how)
    fill(store, source, labeller, resize, dims.K, progress.labelling)
    return store


def _trained(
    request: DistillRequest,
    bundle: Bundle,
    source: Source,
    store: Store,
    draft_config: VisionDraftConfig,
    device: torch.device,
    progress: Progress,
) -> Distilled:
    """Everything behind the labels."""
    config, folder = bundle.config, request.folder
    if len(np.unique(store.start_of)) < LEAST_EPISODES:
        raise UserError(
            f"{request.data} has fewer than {LEAST_EPISODES} episodes, of other initial states each, in which the main "
            "head was asked",
            "Record more: rsd-trt eval --mode baseline --record",
        )
    held_out = hold_out(store, HELD_OUT_SHARE, LEAST_HELD_OUT, request.seed)
    transform = bundle.transform(device)
    codec, errors = codec_for(bundle, store, device)
    settings = TrainingSettings(
        draft=draft_config,
        batch=min(request.batch or BATCH[device.type], int((~held_out).sum())),
        learning_rate=request.lr,
        seed=request.seed,
        live=request.live,
        frames=len(store),
    )
    _check_settings(folder / SETTINGS, settings)
    ahead = config.rsd.check_steps or config.rsd.n_action_steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        draft = VisionDraft(draft_config, config.dims, config.control, config.hidden)
    draft = draft.to(device)
    words = instruction_words(bundle, store.instructions, draft_config.instruction).to(device)
    teacher = Teacher(bundle, store.instructions, draft_config.side, device) if request.live else None
    batches = Batches(store, held_out, codec, transform, words, draft.normalised, device, request.seed, teacher)
    limits = LoopSettings(
        minutes=request.minutes if request.steps is None else None,
        steps=request.steps,
        learning_rate=request.lr,
        log_every=MEASURE_EVERY / 3,
        save_every=SAVE_EVERY,
    )
    how = (limits, settings.batch, MEASURE_EVERY, MEASURED, ahead)
    with host.GpuMeter(device) as gpu:
        fitted = fit(draft, codec, transform, batches, folder, *how, progress.training)
    draft.load_state_dict(read_draft(folder))
    draft = draft.to(STORED).float().eval()
    found = measure(draft, codec, transform, batches, ahead)
    config = _new_config(config, draft_config, bundle_name(request.out), found.likelihood)
    parts: dict[str, dict[str, Tensor]] = {"draft": _stored(draft, STORED)}
    if new_codec := not bundle.has("codec"):
        parts["codec"] = _stored(codec, torch.float32)
    del batches, teacher
    curve = _picture(folder)
    made = copy_with(bundle, config, request.out, parts)
    labelled = sum(episode.seconds for episode in store.episodes)
    result = Distilled(
        bundle=made.path,
        folder=folder,
        curve=curve,
        episodes=len(store.episodes),
        frames=len(store),
        unlabelled=sum(episode.frames for episode in source.episodes) - len(store),
        label_rate=None if source.labelled or not labelled else len(store) / labelled,
        draft=draft_config,
        parameters=sum(p.numel() for p in draft.parameters()),
        steps=fitted.step,
        seconds=fitted.elapsed,
        samples_per_second=fitted.samples_per_second,
        gpu_busy=gpu.mean,
        held_out=found,
        rsd=config.rsd,
        codec=errors,
        new_codec=new_codec,
        cost=Cost(reason="not measured: stopped before"),
        device=str(device),
    )
    _report(result)  # whatever ends the rest: the same command would say that there is the bundle
    result = replace(result, cost=measured_cost(made, device, request.backbone, request.backbone_precision))
    _report(result)
    return result


def _report(result: Distilled) -> None:
    write_atomically(result.folder / REPORT, json.dumps(result.to_json(), indent=1) + "\n")


def _new_config(config: BundleConfig, draft: VisionDraftConfig, name: str, likelihood: float) -> BundleConfig:
    """The configuration with the new draft. Thresholds of likelihoods are of one draft: that which accepts becomes
    that of this one, and nothing says any more what is sure. A rule that was chosen for a draft of the other kind says
    nothing about this one: it becomes the default."""
    rsd = config.rsd
    if not isinstance(config.draft, VisionDraftConfig):
        first = RsdConfig()
        rsd = structs.replace(
            rsd, rule=first.rule, tolerance=first.tolerance, threshold=None, sure=None, by_age=first.by_age
        )
    elif rsd.rule == "likelihood":
        rsd = structs.replace(rsd, threshold=likelihood, sure=None, by_age=())
    return structs.replace(config, name=name, draft=draft, rsd=rsd)


def _check_settings(path: Path, settings: TrainingSettings) -> None:
    """Writes the settings, or raises UserError if there are others."""
    if not path.exists():
        write_record(path, settings)
        return
    for key, there, here in differing(to_json(read_record(TrainingSettings, path)), to_json(settings)):
        raise UserError(
            f"{path} is of another training: {key} is {shown(there)} there, {shown(here)} here",
            "Start over: --fresh, or take another --work",
        )


def instruction_words(bundle: Bundle, texts: tuple[str, ...], rows: int) -> Tensor:
    """What the draft reads of each instruction [instructions, rows, E]: of the backbone only embeddings are read."""
    config = bundle.config
    preprocess = Preprocessor(config.control, config.backbone, bundle.tokenizer(), torch.device("cpu"))
    entry = bundle.weights("backbone").get(EMBEDDING)
    if entry is None:
        raise UserError(f"{bundle.path}: its backbone has no {EMBEDDING}")
    with open_tensors(entry.file) as tensors:
        embeddings = tensors.get_tensor(EMBEDDING)
    tokens = (torch.tensor(preprocess.prompt_tokens(text)) for text in texts)
    return torch.stack([instruction_rows(embeddings[ids], rows) for ids in tokens])


def _stored(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}


def _picture(folder: Path) -> Path | None:
    """The learning curve, where matplotlib is installed."""
    if not can_plot():
        return None
    from rsd_trt.training.curve import learning_curve

    lines = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    learning_curve(lines, folder / CURVE)
    return folder / CURVE
