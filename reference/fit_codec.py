"""The codec: an autoencoder whose latent survives noise, with scales that leave room for correction."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rsd_trt.config import ARM_DIMS, BundleConfig
from rsd_trt.errors import UserError
from rsd_trt.models.codec import Codec

log = logging.getLogger(__name__)

# A layer reaches three times as far as what the layer before leaves when it chooses the nearest level, so that the
# layers behind can also make good a neighbouring choice. The last layer's half step is (1/3)^7 / 6 = 8e-5.
SCALE_RATIO = 1 / 3
LATENT_NOISE = 0.1  # standard deviation that decoding is trained to bear: small latent errors, small action errors
NOISE_WEIGHT = 0.03
UNIFORM_SHARE = 0.5  # of a batch is uniform noise over all actions, so that everything decodes
LARGEST_ERROR = 1e-2  # of any of the data's actions, in action units


@dataclass(frozen=True)
class CodecSettings:
    """How the codec is fitted."""

    steps: int = 12000
    batch: int = 4096
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class CodecErrors:
    """Reconstruction errors over the data's actions, by the number of layers that are decoded."""

    largest: tuple[float, ...]
    mean: tuple[float, ...]
    wrong_grippers: tuple[float, ...]  # share of the gripper signs that are wrong
    largest_uniform: float  # with all layers, over uniform noise


def fit_codec(config: BundleConfig, actions: Tensor, settings: CodecSettings) -> Codec:
    """actions [S, A] -> a codec with static scales.

    Raises:
        UserError: an action is off by more than `LARGEST_ERROR`, or a gripper's sign is wrong, with all layers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        codec = Codec(config.codec, config.dims)
    assert codec.rfsq.scales is not None, "the reference policy's codec has static scales"
    codec.rfsq.scales.copy_(SCALE_RATIO ** torch.arange(config.dims.L))
    codec = codec.to(actions.device)
    parameters = [*codec.encoder.parameters(), *codec.decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    generator = torch.Generator(actions.device).manual_seed(settings.seed)
    uniform = round(settings.batch * UNIFORM_SHARE)
    for step in range(settings.steps):
        chosen = torch.randint(len(actions), (settings.batch - uniform,), generator=generator, device=actions.device)
        x = torch.cat([actions[chosen], _uniform(uniform, config.dims.A, generator)])
        z = codec.encoder(x)
        noisy = z + LATENT_NOISE * torch.randn(z.shape, generator=generator, device=z.device)
        clean_loss = (codec.decoder(z) - x).square().mean()
        noisy_loss = (codec.decoder(noisy) - x).square().mean()
        # Noise shapes the latent first; the last steps are for accuracy alone.
        weight = NOISE_WEIGHT * max(0.0, 1 - 1.25 * step / settings.steps)
        optimiser.zero_grad(set_to_none=True)
        (clean_loss + weight * noisy_loss).backward()
        optimiser.step()
        schedule.step()
        if step % 1000 == 0:
            log.info("codec step %d: mse %.2e, with noise %.2e", step, clean_loss.item(), noisy_loss.item())
    codec = codec.requires_grad_(False).eval()
    errors = codec_errors(codec, actions)
    log.info("codec: %s", asdict(errors))
    if errors.largest[-1] > LARGEST_ERROR or errors.wrong_grippers[-1] > 0:
        raise UserError(
            f"the codec is off by up to {errors.largest[-1]:.3g} (limit {LARGEST_ERROR}) with "
            f"{errors.wrong_grippers[-1]:.3g} of the grippers wrong. Fit it longer: --codec-steps {2 * settings.steps}"
        )
    return codec


@torch.no_grad()
def codec_errors(codec: Codec, actions: Tensor) -> CodecErrors:
    """Reconstruction errors over actions [S, A]."""
    tokens = codec.encode(actions[:, None])  # [S, 1, D, L]
    largest, mean, wrong = [], [], []
    for n in range(1, tokens.shape[-1] + 1):
        decoded = codec.decode(tokens, n)[:, 0]
        error = (decoded - actions).abs()
        largest.append(float(error.max()))
        mean.append(float(error.mean()))
        wrong.append(float(((decoded[:, ARM_DIMS] > 0) != (actions[:, ARM_DIMS] > 0)).float().mean()))
    generator = torch.Generator(actions.device).manual_seed(0)
    noise = _uniform(len(actions), actions.shape[1], generator)
    uniform = float((codec.decode(codec.encode(noise[:, None]))[:, 0] - noise).abs().max())
    return CodecErrors(tuple(largest), tuple(mean), tuple(wrong), uniform)


def _uniform(count: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, width, generator=generator, device=generator.device) * 2 - 1
