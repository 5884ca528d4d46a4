"""The main model beside the training: it labels every augmented batch, so that each has labels of its own (a consistent
teacher, Beyer et al. 2022)."""

from __future__ import annotations

import torch
from msgspec import structs
from torch import Tensor

from rsd_trt.bundle import Bundle
from rsd_trt.errors import UserError
from rsd_trt.models.backbone import BackboneInputs
from rsd_trt.models.head import Head
from rsd_trt.runtime.preprocess import Preprocessor
from rsd_trt.training.fit import autocast

# What is done to a frame before the draft's transformer sees it is not done again.
AS_SEEN = {"rotate_images": False, "jpeg_quality": None, "center_crop": 1.0, "resampling": "bicubic"}


class Teacher:
    """Backbone and main head of a bundle, on what the draft's transformer sees.

    Raises:
        UserError: the backbone sees another number of pixels than the draft, or the head gives no tokens.
    """

    def __init__(self, bundle: Bundle, texts: tuple[str, ...], side: int, device: torch.device) -> None:
        """texts: the instructions, by index. side: S, of the draft's images."""
        config = bundle.config
        if side != config.backbone.image_size:
            raise UserError(
                f"--live needs a draft that sees what the backbone does: {side} pixels a side, the backbone has "
                f"{config.backbone.image_size}",
                "Leave out: --live",
            )
        if not config.head.gives_tokens:
            raise UserError(f"--live is of heads that give tokens, not of {config.head.kind}", "Leave out: --live")
        control = structs.replace(config.control, **AS_SEEN, camera_size=side)
        self._preprocess = Preprocessor(control, config.backbone, bundle.tokenizer(), device)
        head = bundle.head(device)
        assert isinstance(head, Head)
        self._backbone, self._head, self._codec = bundle.backbone(device), head, bundle.codec(device)
        self._dims, self._conditioned = config.dims, config.head.kind == "conditioned"
        prompts = [torch.tensor(self._preprocess.prompt_tokens(text)) for text in texts]
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
        if device.type == "cuda":
            towers = [block for tower in self._backbone.vision_backbone.values() for block in tower.blocks]  # type: ignore[union-attr]
            for block in [*towers, *self._backbone.llama.layers]:
                block.compile(dynamic=False)

    @torch.no_grad()
    def __call__(self, images: Tensor, state: Tensor, word: Tensor) -> Tensor:
        """Images [B, cameras, S, S, 3] in 0..255, the normalised state [B, 8], indices of instructions [B] -> z
        [B, T, D] of the main head's chunk."""
        proprio = state if self._backbone.config.proprio else None
        pixels = self._preprocess.pixels(images)
        with autocast(images.device):
            hidden = self._backbone(BackboneInputs(pixels, self._tokens[word], self._lengths[word], proprio)).float()
        dims = self._dims
        condition = [torch.zeros(len(word), dims.T, dims.D, dims.C, dtype=torch.int64, device=images.device)]
        choices = self._head(hidden, *condition if self._conditioned else []).argmax(-1)  # [B, L, T*D]
        tokens = choices.view(len(word), dims.L, dims.T, dims.D).permute(0, 2, 3, 1)
        return self._codec.rfsq.lookup(tokens)
