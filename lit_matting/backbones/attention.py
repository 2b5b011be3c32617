"""Cross-attention that can be read: the probabilities of every ``attn2`` of a diffusers UNet, in float32.

Only cross-attention is replaced. Self-attention keeps its fused kernel, because its maps are hundreds of times larger
(1.8 GB an image at 512 pixels) and nobody looks at them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from lit_matting.checks import InputError


class AttentionStore:
    """Collects the maps of one forward pass, by layer name; the first write of a layer wins.

    Gradient checkpointing runs a layer again during the backward pass. By then the store is closed, so nothing is
    recorded twice and nothing is kept alive.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}
        self._grid: tuple[int, int] | None = None

    @contextmanager
    def recording(self, grid: tuple[int, int]) -> Iterator[None]:
        """Open the store for one forward pass over a latent of ``grid`` (h, w) cells."""
        self.maps, self._grid = {}, grid
        try:
            yield
        finally:
            self._grid = None

    def take(self) -> dict[str, Tensor]:
        """Return the recorded maps, each (B, T, h_l, w_l), and forget them."""
        maps, self.maps = self.maps, {}
        return maps

    def add(self, name: str, mean: Tensor) -> None:
        """Keep ``mean`` (B, N, T), the head average of layer ``name``, if the store is open."""
        if self._grid is None or name in self.maps:
            return
        height, width = self._grid
        shrink = math.isqrt(height * width // mean.shape[1])
        # a level's sides are rounded up when the latent's are odd, as the strided convolutions do
        rows = -(-height // shrink)
        self.maps[name] = mean.transpose(1, 2).unflatten(2, (rows, mean.shape[1] // rows))


class RecordingAttention:
    """A diffusers attention processor that materialises softmax(q k^T) in float32 and hands the head mean to a store.

    ``upcast_attention`` of diffusers is silently undone by autocast, so autocast is switched off around the product and
    the softmax.
    """

    def __init__(self, name: str, store: AttentionStore) -> None:
        self.name = name
        self.store = store

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        heads = attn.heads
        query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * attn.scale
            if attention_mask is not None:  # (B, 1, T), a large negative number on tokens to ignore
                scores = scores + attention_mask.float().unsqueeze(1)
            probabilities = scores.softmax(-1)
            # always computed: a checkpointed layer must do the same work the second time
            self.store.add(self.name, probabilities.mean(1))
        mixed = torch.matmul(probabilities.to(value.dtype), value)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        return mixed / attn.rescale_output_factor


def record_cross_attention(unet: UNet2DConditionModel, store: AttentionStore) -> list[str]:
    """Replace the processors of every cross-attention of ``unet`` and return their layer names, in forward order.

    Raises:
        InputError: If the UNet has no cross-attention, or of a kind that Stable Diffusion does not use.
    """
    processors = dict(unet.attn_processors)
    names = [name for name in processors if name.endswith("attn2.processor")]
    if not names:
        raise InputError("the UNet has no cross-attention (`attn2`): it cannot be driven by a phrase.")
    for name in names:
        _check_plain(name, unet.get_submodule(name.removesuffix(".processor")))
        processors[name] = RecordingAttention(name.removesuffix(".attn2.processor"), store)
    unet.set_attn_processor(processors)
    return [name.removesuffix(".attn2.processor") for name in names]


def _check_plain(name: str, attn: Attention) -> None:
    """Refuse what :class:`RecordingAttention` does not compute, instead of computing something else."""
    extras = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "add_v_proj")
    found = [extra for extra in extras if getattr(attn, extra, None) is not None]
    found += [flag for flag in ("residual_connection", "only_cross_attention") if getattr(attn, flag, False)]
    if found:
        raise InputError(
            f"the UNet's {name} has {', '.join(found)}, which is not recorded here: take a UNet of the Stable Diffusion"
            " family."
        )
