"""Inputs for vision-language models without an image processor: random patches of the right number, for speed work."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twinweight.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def image_inputs(model: PreTrainedModel, ids: Tensor, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs for `generate`: one image of `size` (width, height) at the start of each row of text ids [batch, tokens].

    For models of the Qwen-VL kind: patches [sum of t*h*w, channels * temporal * patch * patch], `image_grid_thw` [batch, 3],
    and one image token per merged patch. Raises ConfigError for other models.
    """
    config = model.config
    vision = getattr(config, "vision_config", None)
    token = getattr(config, "image_token_id", None)
    if vision is None or token is None or not hasattr(vision, "spatial_merge_size"):
        raise ConfigError(f"--image needs a vision-language model of the Qwen-VL kind, this is {type(model).__name__}")
    unit = vision.patch_size * vision.spatial_merge_size
    width, height = (max(unit, round(side / unit) * unit) for side in size)
    grid = (1, height // vision.patch_size, width // vision.patch_size)
    channels = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    batch = ids.shape[0]
    pixels = torch.randn(batch * math.prod(grid), channels, generator=generator).to(model.dtype)
    start = torch.full((batch, 1), config.vision_start_token_id)
    end = torch.full((batch, 1), config.vision_end_token_id)
    image = torch.full((batch, math.prod(grid) // vision.spatial_merge_size**2), token)
    rows = torch.cat((start, image, end, ids), dim=1)
    inputs = {
        "input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([grid] * batch), "mm_token_type_ids": (rows == token).int(),
    }  # fmt: skip
    return {name: value.to(model.device) for name, value in inputs.items()}
