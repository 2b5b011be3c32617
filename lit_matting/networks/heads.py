"""The heads: coarse trimap, semantic trimap, grounding, low-resolution alpha."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.backbones import BackboneOutput
from lit_matting.networks.neck import norm


class CoarseTrimapHead(nn.Module):
    """Coarse features (B, C, h', w') -> logits (B, 3, h', w') of background, transition, foreground."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class GroundingHead(nn.Module):
    """Where the phrase's thing is: logits from the cross-attention maps, and from the phrase's likeness to each cell.

    A raw attention map averages 1 / T over T tokens, with most of its mass on the begin token, and can never reach 1.
    So the maps of the phrase's own words are averaged over layers, standardised per image, and given a learned slope
    and offset. The likeness is the scaled cosine between the projected phrase and each cell's projected features; it
    learns from scratch long before cross-attention does, and starts at zero so that pretrained attention speaks first.

    Args:
        channels: Channels of the features.
        text_channels: Channels of the pooled phrase.
        similarity: Use the likeness term.
        similarity_channels: Width of the common space.
        similarity_scale: Its initial slope. 0 for a pretrained backbone.
        attention: Use the attention maps.
        attention_slope: Their initial slope. 0 from scratch, where they are noise at first.
    """

    def __init__(
        self,
        channels: int,
        text_channels: int,
        similarity: bool = True,
        similarity_channels: int = 64,
        similarity_scale: float = 0.0,
        attention: bool = True,
        attention_slope: float = 4.0,
    ) -> None:
        super().__init__()
        if not (similarity or attention):
            raise ValueError("a GroundingHead needs `similarity`, `attention` or both.")
        self.attention = attention
        self.slope = nn.Parameter(torch.tensor([float(attention_slope)])) if attention else None
        self.offset = nn.Parameter(torch.tensor([-2.0 if similarity_scale else 0.0]))
        self.similarity = similarity
        if similarity:
            self.image_projection = nn.Sequential(
                norm(channels), nn.SiLU(), nn.Conv2d(channels, similarity_channels, 1)
            )
            self.text_projection = nn.Linear(text_channels, similarity_channels)
            self.similarity_scale = nn.Parameter(torch.tensor([float(similarity_scale)]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # numbers were of no dimension once; sharding wants one
        for name in ("slope", "offset", "similarity_scale"):
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, backbone: BackboneOutput, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits (B, 1, h, w) on the grid of ``features``, and each layer's word map (B, h_l, w_l)."""
        projected = None
        if self.similarity:
            projected = self.image_projection(features), self.text_projection(backbone.text.pooled)
        # small differences of probabilities and cosines decide here: products in half precision would round them away
        with torch.autocast(features.device.type, enabled=False):
            words = backbone.text.words.float()
            share = words / words.sum(1, keepdim=True).clamp(min=1)
            maps = {name: torch.einsum("bthw,bt->bhw", value, share) for name, value in backbone.attention.items()}
            size = features.shape[-2:]
            logits = self.offset.float().expand(features.shape[0], 1, *size)
            if self.attention and maps:
                resized = [F.interpolate(value[:, None], size=size, mode="bilinear") for value in maps.values()]
                logits = logits + self.slope.float() * standardise(sum(resized) / len(resized))
            if projected is not None:
                image, text = (F.normalize(item.float(), dim=1) for item in projected)
                likeness = torch.einsum("bchw,bc->bhw", image, text)[:, None]
                logits = logits + self.similarity_scale.float() * likeness
        return logits, maps


def standardise(maps: Tensor) -> Tensor:
    """Return maps (B, 1, h, w) with mean 0 and deviation 1 each, in float32; a constant map becomes 0."""
    flat = maps.float().flatten(1)
    deviation = flat.std(1, keepdim=True, unbiased=False)
    # the floor is far below a real map's deviation and far above float32 noise
    return ((flat - flat.mean(1, keepdim=True)) / deviation.clamp(min=1e-6)).view_as(maps)


class TrimapHead(nn.Module):
    """Fine features and grounding -> the soft semantic trimap (B, 1, h, w) in [0, 1].

    Args:
        channels: Channels of the features.
        hidden: Width of the hidden layer.
    """

    def __init__(self, channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = _map_head(channels + 1, hidden, 1)

    def forward(self, features: Tensor, grounding: Tensor) -> Tensor:
        return self.layers(torch.cat([features, grounding.sigmoid().to(features.dtype)], 1)).float().sigmoid()


class AlphaHead(nn.Module):
    """Fine features, trimap and grounding -> the low-resolution alpha, with the trimap as its prior.

    ``alpha = p_foreground + p_unknown sigmoid(h)`` with the tent map of the trimap t: ``p_unknown = 1 - |2t - 1|``,
    ``p_foreground = max(2t - 1, 0)``. Where the trimap is sure, the head has no say; where it is not, the head decides.

    Args:
        channels: Channels of the features.
        hidden: Width of the hidden layer.
        detach_trimap: Keep the alpha's gradient out of the trimap and of the grounding: semantics are then taught by
            their own terms alone.
    """

    def __init__(self, channels: int, hidden: int = 64, detach_trimap: bool = False) -> None:
        super().__init__()
        self.layers = _map_head(channels + 2, hidden, 1)
        self.detach_trimap = detach_trimap

    def forward(self, features: Tensor, trimap: Tensor, grounding: Tensor) -> Tensor:
        if self.detach_trimap:
            trimap, grounding = trimap.detach(), grounding.detach()
        maps = torch.cat([trimap, grounding.sigmoid()], 1).to(features.dtype)
        # The grounding logits are h's starting point: while phrases are still ambiguous, an L1 that starts from nothing
        # settles on the empty matte. They enter as a constant: through them the alpha would pull hardest on grounding.
        share = (self.layers(torch.cat([features, maps], 1)).float() + grounding.detach().float()).sigmoid()
        foreground = (2 * trimap - 1).clamp(min=0)
        unknown = 1 - (2 * trimap - 1).abs()
        return foreground + unknown * share


def _map_head(channels: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, out, 1))
