"""The paper's figure, as one straight line: backbone -> neck -> heads -> refiner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from lit_matting.backbones import Backbone, BackboneOutput, TextFeatures
from lit_matting.networks.heads import AlphaHead, CoarseTrimapHead, GroundingHead, TrimapHead
from lit_matting.networks.neck import Neck
from lit_matting.networks.refiner import Refined, SparseRefiner
from lit_matting.records import Detail, MattingOutput

NeckFactory = Callable[[dict[int, int], int], Neck]
HeadFactory = Callable[[int], nn.Module]
GroundingFactory = Callable[[int, int], GroundingHead]


class MattingNetwork(nn.Module):
    """Image and phrase in; coarse trimap, grounding map, semantic trimap, low-resolution alpha and refined alpha out.

    Args:
        backbone: (image, phrases) -> feature pyramid, attention maps, text features.
        neck: Called with the backbone's channels and its number of tokens.
        coarse_trimap_head: Called with the neck's channels.
        grounding_head: Called with the neck's and the text's channels.
        trimap_head: Called with the neck's channels.
        alpha_head: Called with the neck's channels.
        refiner: The sparse refiner, or None to stop at the enlarged low-resolution alpha.
        coarse_stride: Stride, in pixels, of the coarse trimap's level; the backbone's nearest is taken.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: NeckFactory = Neck,
        coarse_trimap_head: HeadFactory = CoarseTrimapHead,
        grounding_head: GroundingFactory = GroundingHead,
        trimap_head: HeadFactory = TrimapHead,
        alpha_head: HeadFactory = AlphaHead,
        refiner: SparseRefiner | None = None,
        coarse_stride: int = 32,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck(backbone.channels, backbone.max_tokens)
        width = self.neck.channels
        self.fine_stride = self.neck.strides[0]
        self.coarse_stride = min(self.neck.strides, key=lambda stride: abs(stride - coarse_stride))
        self.coarse_trimap_head = coarse_trimap_head(width)
        self.grounding_head = grounding_head(width, backbone.text_channels)
        self.trimap_head = trimap_head(width)
        self.alpha_head = alpha_head(width)
        self.refiner = refiner
        self.project = None if refiner is None else nn.Conv2d(width, refiner.feature_channels, 1)

    def forward(
        self,
        image: Tensor,
        phrases: Sequence[str],
        refine: bool = True,
        detail: Detail | None = None,
        phrases_per_image: int = 1,
        latent: Tensor | None = None,
    ) -> MattingOutput:
        """Return everything about each (image, phrase) pair.

        Args:
            image: (B, 3, H, W) RGB in [0, 1]; sides a multiple of the backbone's ``size_multiple``.
            phrases: B phrases.
            refine: Run the refiner; otherwise the alpha is the enlarged low-resolution one.
            detail: Native-resolution crops to refine instead of the image itself (training of the refiner).
            phrases_per_image: Rows ``[k P, (k + 1) P)`` hold the same image: it is encoded once for all of them.
            latent: The B / P images encoded, where that is already known.

        Raises:
            ValueError: If the number of phrases is not B, B is no multiple of P, or a side does not suit the backbone.
        """
        if len(phrases) != image.shape[0] or len(phrases) % phrases_per_image:
            raise ValueError(
                f"a batch of {image.shape[0]} images, {phrases_per_image} phrases to each, needs as many phrases, a"
                f" multiple of {phrases_per_image}; got {len(phrases)}."
            )
        self.backbone.check_size(*image.shape[-2:])
        if latent is None:
            latent = self.backbone.encode_image(image[::phrases_per_image])
        if phrases_per_image > 1:
            latent = latent.repeat_interleave(phrases_per_image, 0)
        return self.matte(image, latent, self.backbone.encode_text(phrases), refine, detail)

    def matte(
        self, image: Tensor, latent: Tensor, text: TextFeatures, refine: bool = True, detail: Detail | None = None
    ) -> MattingOutput:
        """The same from an encoded image and encoded phrases; ``image`` may be larger than what was encoded."""
        seen: BackboneOutput = self.backbone.decode(latent, text)
        levels = self.neck(seen)
        features = levels[self.fine_stride]

        coarse_trimap = self.coarse_trimap_head(levels[self.coarse_stride])
        grounding, attention = self.grounding_head(seen, features)
        trimap = self.trimap_head(features, grounding)
        alpha_lr = self.alpha_head(features, trimap, grounding)

        refined: Refined | None = None
        if refine and self.refiner is not None:
            source = features.detach() if self.refiner.detach_inputs else features
            pixels = image if detail is None else detail.image
            box = None if detail is None else detail.box
            refined = self.refiner(pixels, alpha_lr, trimap, self.project(source), box)
        return MattingOutput(
            alpha=enlarge(alpha_lr, image.shape[-2:]) if refined is None else refined.alpha,
            alpha_lr=alpha_lr,
            trimap=trimap,
            coarse_trimap=coarse_trimap,
            grounding=grounding,
            alphas=() if refined is None else refined.alphas,
            active=() if refined is None else refined.active,
            refined=() if refined is None else refined.worked,
            attention=attention,
            features=features,
            pyramid=seen.features,
        )


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps (B, C, h, w) bilinearly to ``size``: what a pixel gets where nothing is refined."""
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
