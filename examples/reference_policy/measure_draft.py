"""What a draft with eyes of its own is worth, on frames of episodes that nothing was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.reference_policy.data import Batches
from examples.reference_policy.fit_policy import RsdModel
from rsd_trt.config import ARM_DIMS, BundleConfig
from rsd_trt.models.codec import Codec
from rsd_trt.models.components import agreeing_steps
from rsd_trt.models.vision_draft import VisionDraft
from rsd_trt.training.batches import other_episodes
from rsd_trt.training.targets import corrected_targets, decode_z

TOLERANCES = (0.1, 0.2, 0.4)
STALE = 0.2  # tolerance beyond which main says something else
AHEAD = 4  # steps that the rules compare
AGES = range(1, 9)  # steps
MOVED, STILL = 0.01, 0.002  # m that the bowl has moved on its support, and has not
FALSE_REJECTS = 0.1
BATCH = 256
GRIPPER_STEP = 10.0  # what a wrong gripper sign counts as, in action units


@dataclass(frozen=True)
class Said:
    """What main and a draft say of F frames."""

    main: Tensor  # [F, T, A]
    main_tokens: Tensor  # [F, T*D] of L0
    nearest: Tensor  # [F, T*D], the L0 levels nearest to main's latents
    hidden: Tensor  # [F, T, A], the chunk of the draft that reads main's hidden state
    guess: Tensor  # [F, T, A]
    likelihood: Tensor  # [F, T*D, K], log-probabilities of L0
    blind: Tensor  # [F, T, A], with the frames of another episode
    blind_likelihood: Tensor
    accuracy: Tensor  # [C]


@torch.no_grad()
def measure_draft(
    draft: VisionDraft,
    model: RsdModel,
    codec: Codec,
    config: BundleConfig,
    batches: Batches,
    words: Tensor,
    frames: int | None = None,
) -> dict[str, object]:
    """Held-out numbers by name, over at most `frames` frames; words [tasks, rows, E].

    agreement, hidden, blind: share of frames whose first step lies within `TOLERANCES` of main's. by_step: agreement of
    each step at 0.2. accuracy: by layer, of the corrected targets. With all frames also `stale`: how well rules tell,
    without running main, that main would say something else than a chunk of `AGES` steps ago says of this step.
    """
    index = batches.held_out
    if frames is not None:
        index = index[torch.linspace(0, len(index) - 1, min(frames, len(index)), device=index.device).long()]
    if not len(index):
        return {"frames": 0}
    said = ask(draft, model, codec, config, batches, words, index)

    def agreement(chunk: Tensor) -> list[float]:
        return [round(float(_agree(chunk, said.main, t)[:, 0].float().mean()), 4) for t in TOLERANCES]

    report: dict[str, object] = {
        "frames": len(index),
        "agreement": agreement(said.guess),
        "blind": agreement(said.blind),
        "hidden": agreement(said.hidden),
        "by_step": _rounded(_agree(said.guess, said.main, STALE).float().mean(0)),
        "accuracy": _rounded(said.accuracy),
        "by_task": {
            str(int(task)): round(float(_agree(said.guess, said.main, STALE)[chosen, 0].float().mean()), 3)
            for task in batches.data.task[index].unique()
            if (chosen := batches.data.task[index] == task).any()
        },
    }
    if frames is None:
        report["stale"] = staleness(said, batches, index, config)
    return report


def ask(
    draft: VisionDraft,
    model: RsdModel,
    codec: Codec,
    config: BundleConfig,
    batches: Batches,
    words: Tensor,
    index: Tensor,
) -> Said:
    """What main and the draft say of the frames `index` [F], in float32."""
    from examples.reference_policy.fit_vision_draft import fitted

    table, dims, side = codec.rfsq.table(), (config.dims.T, config.dims.D), draft.config.side
    data = batches.data
    strangers = other_episodes(data.end.cpu().numpy(), data.task.cpu().numpy(), index.cpu().numpy())
    others = torch.from_numpy(strangers).to(index.device)
    found: dict[str, list[Tensor]] = {}
    for some, strange in zip(index.split(BATCH), others.split(BATCH), strict=True):
        images, state = batches.see(some, augmented=False)
        out = model(batches.read(some, images, state))
        choices = out.head.argmax(-1)
        z = decode_z(choices, table, dims)
        word = words[batches.data.task[some]]
        logits = draft.classify(draft.see(fitted(images, side), state, word)[0])
        foreign = batches.see(strange, augmented=False)[0]
        unseen = draft.classify(draft.see(fitted(foreign, side), state, word)[0])

        def chunk(logits: Tensor) -> Tensor:
            return codec.decoder(decode_z(logits.argmax(-1), table, dims))

        right = logits.argmax(-1) == corrected_targets(z, logits, table)
        parts = {
            "main": codec.decoder(z),
            "main_tokens": choices[:, 0],
            "nearest": (z.flatten(1)[..., None] - table[0]).abs().argmin(-1),
            "hidden": chunk(out.draft),
            "guess": chunk(logits),
            "likelihood": logits[:, 0].log_softmax(-1),
            "blind": chunk(unseen),
            "blind_likelihood": unseen[:, 0].log_softmax(-1),
            "accuracy": right.float().mean(2),
        }
        for name, value in parts.items():
            found.setdefault(name, []).append(value)
    joined = {name: torch.cat(values) for name, values in found.items()}
    joined["accuracy"] = joined["accuracy"].mean(0)
    return Said(**joined)


def staleness(said: Said, batches: Batches, index: Tensor, config: BundleConfig) -> dict[str, object]:
    """AUC, and hits at 10% false rejects, of each rule's doubt in a chunk of some steps ago.

    The truth is whether main's own first step now lies within 0.2 of that chunk's step for now. `all`: over every pair;
    `event`: pairs between which the bowl has moved on its support and main says something else, against pairs
    between which it has not and main says the same.
    """
    data, dims = batches.data, config.dims
    row, end = data.row[index], data.end[index]
    key = {(int(e), int(r)): i for i, (e, r) in enumerate(zip(end.tolist(), row.tolist(), strict=True))}
    apart = data.scene[index, :3] - data.scene[index, 3:]  # from plate to bowl
    shares: dict[str, float] = {}
    doubts: dict[str, list[Tensor]] = {}
    truths, events, quiets = [], [], []
    for age in AGES:
        pairs = [(i, j) for (e, r), i in key.items() if (j := key.get((e, r - age))) is not None]
        if not pairs or age >= dims.T:
            continue
        now, then = torch.tensor(pairs, device=index.device).T
        stale, fresh = said.main[then, age:], said.main[now]
        other = ~_agree(stale[:, :1], fresh[:, :1], STALE)[:, 0]
        shares[str(age)] = round(float(other.float().mean()), 4)
        moved = (apart[now] - apart[then]).norm(dim=1)
        rows = row[now][:, None] - torch.arange(age + 1, device=index.device)
        open_all = (data.actions[rows][..., ARM_DIMS] < 0).all(1)
        truths.append(other)
        events.append(open_all & (moved > MOVED))
        quiets.append(~open_all | (moved < STILL))
        for name, value in _doubts(said, now, then, age, dims.D).items():
            doubts.setdefault(name, []).append(value)
    if not truths:
        return {"pairs": 0}
    truth, event, quiet = torch.cat(truths), torch.cat(events), torch.cat(quiets)
    hit, calm = event & truth, quiet & ~truth
    report: dict[str, object] = {"pairs": len(truth), "stale_by_age": shares, "events": int(hit.sum())}
    for name, values in doubts.items():
        doubt = torch.cat(values)
        report[name] = {"all": _auc(doubt[truth], doubt[~truth]), "event": _auc(doubt[hit], doubt[calm])}
    return report


def _doubts(said: Said, now: Tensor, then: Tensor, age: int, latents: int) -> dict[str, Tensor]:
    """Each rule's doubt [pairs] in what is left of the chunks of frames `then`, at frames `now`."""
    ahead = min(AHEAD, said.main.shape[1] - age)
    steps = ahead * latents
    past = slice(age * latents, age * latents + steps)

    def unlikely(likelihood: Tensor, tokens: Tensor) -> Tensor:
        return -likelihood[now, :steps].gather(-1, tokens[then, past, None])[..., 0].mean(1)

    def apart(guess: Tensor, summed: bool) -> Tensor:
        delta = guess[now, :ahead] - said.main[then, age : age + ahead]
        arm = delta[..., :ARM_DIMS].sum(1).abs().amax(1) if summed else delta[:, 0, :ARM_DIMS].abs().amax(1)
        signs = (guess[now, 0, ARM_DIMS] > 0) != (said.main[then, age, ARM_DIMS] > 0)
        return arm + GRIPPER_STEP * signs

    return {
        "likelihood": unlikely(said.likelihood, said.main_tokens),
        "likelihood_nearest": unlikely(said.likelihood, said.nearest),
        "likelihood_blind": unlikely(said.blind_likelihood, said.main_tokens),
        "first": apart(said.guess, summed=False),
        "path": apart(said.guess, summed=True),
        "path_blind": apart(said.blind, summed=True),
        "hidden_first": apart(said.hidden, summed=False),
        "hidden_path": apart(said.hidden, summed=True),
        "oracle_path": apart(said.main, summed=True),
    }


def _auc(positive: Tensor, negative: Tensor) -> dict[str, float] | None:
    """Area under the curve, and the share of the positives above the negatives' 90% quantile."""
    if not len(positive) or not len(negative):
        return None
    values = torch.cat([positive, negative]).double().cpu()
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    above = counts.cumsum(0)
    ranks = (above - (counts - 1) / 2)[inverse]  # ties share their mean rank
    n, m = len(positive), len(negative)
    area = (float(ranks[:n].sum()) - n * (n + 1) / 2) / (n * m)
    limit = negative.double().sort().values[min(m - 1, int((1 - FALSE_REJECTS) * m))]
    return {"auc": round(area, 4), "hits": round(float((positive.double() > limit).double().mean()), 4)}


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    return agreeing_steps(a, b, torch.full((ARM_DIMS,), tolerance, device=a.device))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
