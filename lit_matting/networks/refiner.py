"""The refiner: the matte at the photograph's own resolution, computed only where it is uncertain.

A matte is 0 or 1 nearly everywhere. Upsampling the low-resolution alpha answers those pixels; the others, a band a few
pixels wide around every boundary plus whatever is transparent, form the *active set*, and only they pass through a
small sparse U-Net (after SparseMat, Sun et al. 2023). Time and memory follow the active pixels, not the image's area.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.sparse import ActiveSet, InverseConv2d, SparseConv2d, SubmanifoldConv2d, gather, scatter
from lit_matting.targets import REFERENCE_SIZE, dilate, erode, scaled_kernel


@dataclass(frozen=True)
class Refined:
    """What a refiner returns."""

    alpha: Tensor
    """(B, 1, H, W) in [0, 1], at the image's size."""
    alphas: tuple[Tensor, ...]
    """The alpha at each scale that ran, coarse to fine."""
    active: tuple[Tensor, ...]
    """The active pixels of each of them, (B, H_s, W_s) bool."""


class SparseRefiner(nn.Module):
    """Two-scale sparse refinement.

    The active set is a dilation of the uncertain set, so it has no block structure, and the correction fades to exactly
    0 on its outermost pixels: the result is continuous there, and rectangular holes are impossible by construction.

    Args:
        feature_channels: Channels of the network's features that are handed to each active pixel.
        widths: Channels of the fine and of the coarse level of the sparse U-Net.
        blocks: Residual blocks on its coarse level.
        half_scale_above: Long edge, in pixels, above which half scale is refined before full scale; None: never.
        max_long_edge: Refine at most at this long edge, in pixels, and enlarge the rest of the way; None: no cap.
        kernel_size: Of the dilation, in pixels at 512; scaled down with smaller images.
        alpha_range: Alphas strictly inside are uncertain.
        trimap_range: Trimap values strictly inside are uncertain.
        detach_inputs: Keep the refiner's gradient out of the network before it. From scratch, the gradient of a matte
            that is still in the wrong place harms grounding.
        train_images: Refine at most so many images of a training batch, the first ones; the others keep the enlarged
            alpha. The refiner learns from pixels, of which a few images hold plenty. None: all.
    """

    def __init__(
        self,
        feature_channels: int = 32,
        widths: tuple[int, int] = (32, 64),
        blocks: int = 2,
        half_scale_above: int | None = 1024,
        max_long_edge: int | None = None,
        kernel_size: int = 15,
        alpha_range: tuple[float, float] = (0.01, 0.99),
        trimap_range: tuple[float, float] = (0.25, 0.75),
        detach_inputs: bool = True,
        train_images: int | None = None,
    ) -> None:
        super().__init__()
        self.feature_channels = feature_channels
        self.half_scale_above = half_scale_above
        self.max_long_edge = max_long_edge
        self.kernel_size = kernel_size
        self.alpha_range = alpha_range
        self.trimap_range = trimap_range
        self.detach_inputs = detach_inputs
        self.train_images = train_images
        in_channels = 3 + 1 + 1 + feature_channels
        names = ("full_scale",) if half_scale_above is None else ("half_scale", "full_scale")
        self.scales = nn.ModuleDict({name: SparseUNet(in_channels, widths, blocks) for name in names})

    def forward(
        self, image: Tensor, alpha: Tensor, trimap: Tensor, features: Tensor, box: Tensor | None = None
    ) -> Refined:
        """Refine a low-resolution alpha at the image's size.

        Args:
            image: (B, 3, H, W) RGB in [0, 1].
            alpha: (B, 1, h, w) in [0, 1], the low-resolution matte.
            trimap: (B, 1, h, w) in [0, 1], the soft trimap.
            features: (B, C, h, w) with C = ``feature_channels``. Their gradient is always returned: the projection that
                makes them learns from the refiner alone, so it is before the projection that they are to be detached.
            box: (B, 4) where the image is only a crop of what the maps cover: top, left, height, width in shares of it.
        """
        if self.detach_inputs:
            alpha, trimap = alpha.detach(), trimap.detach()
        # small differences of colour decide here: no half precision, whatever runs around it
        with torch.autocast(image.device.type, enabled=False):
            return self._refine(image.float(), alpha.float(), trimap.float(), features.float(), box)

    def _refine(self, image: Tensor, alpha: Tensor, trimap: Tensor, features: Tensor, box: Tensor | None) -> Refined:
        height, width = image.shape[-2:]
        long_edge = max(height, width)
        if box is not None:
            # a crop is refined as the photograph it was taken from will be: same scales, same kernel
            long_edge = round((image.new_tensor([height, width]) / box[:, 2:].float()).amax().item())
        capped = min(1.0, (self.max_long_edge or long_edge) / long_edge)
        shares = [capped]
        if self.half_scale_above is not None and long_edge * capped > self.half_scale_above:
            shares.insert(0, capped / 2)
        alphas, actives = [], []
        current = alpha
        place = box
        unused = dict(self.scales)
        for share in shares:
            name = "half_scale" if share < capped else "full_scale"
            unused.pop(name)
            size = (max(1, round(height * share)), max(1, round(width * share)))
            scaled = image if size == (height, width) else F.interpolate(image, size=size, mode="area")
            whole = max(1, round(long_edge * share))
            enlarged = resample(current, size, place)
            current, active = self._scale(self.scales[name], scaled, enlarged, trimap, features, box, whole)
            place = None  # from here on the alpha covers the image itself
            alphas.append(current)
            actives.append(active)
        result = current if current.shape[-2:] == (height, width) else resample(current, (height, width))
        if self.training:
            # every parameter takes part in every step, else distributed training waits for its gradient
            for module in unused.values():
                result = result + 0.0 * sum(parameter.sum() for parameter in module.parameters())
        return Refined(result, tuple(alphas), tuple(actives))

    def _scale(
        self,
        unet: SparseUNet,
        image: Tensor,
        alpha: Tensor,
        trimap: Tensor,
        features: Tensor,
        box: Tensor | None,
        long_edge: int,
    ) -> tuple[Tensor, Tensor]:
        mask = self.active_pixels(alpha, resample(trimap, image.shape[-2:], box), long_edge)
        if self.training and self.train_images is not None:
            mask[self.train_images :] = False
        active = ActiveSet.from_mask(mask)
        if len(active) == 0:
            if self.training:
                # nothing to do, but distributed training waits for these gradients
                alpha = alpha + 0.0 * (features.sum() + sum(parameter.sum() for parameter in unet.parameters()))
            return alpha, mask
        fade = feather(mask)
        at = pixel_places(active, image.shape[-2:], box)
        before = gather(alpha, active)
        inputs = torch.cat(
            [
                2 * gather(image, active) - 1,
                2 * before - 1,
                2 * sample_rows(trimap, *at) - 1,
                sample_rows(features, *at),
            ],
            1,
        )
        residual = torch.tanh(unet(inputs, active)) * gather(fade, active)
        moved = before + residual
        # clamped going forward, transparent going backward: a pixel pushed beyond 1 must be able to come back
        refined = moved + (moved.clamp(0, 1) - moved).detach()
        return scatter(refined, active, alpha), mask

    def active_pixels(self, alpha: Tensor, trimap: Tensor, long_edge: int | None = None) -> Tensor:
        """Return the pixels to refine, (B, H, W) bool: a dilation of where alpha or trimap is undecided.

        Args:
            alpha: (B, 1, H, W) in [0, 1].
            trimap: (B, 1, H, W) in [0, 1].
            long_edge: Of the whole image, in pixels, where these are maps of a crop.
        """
        uncertain = (alpha > self.alpha_range[0]) & (alpha < self.alpha_range[1])
        uncertain |= (trimap > self.trimap_range[0]) & (trimap < self.trimap_range[1])
        # beyond the reference size the enlarged maps' own blur grows with the image; the kernel need not
        kernel = scaled_kernel(min(REFERENCE_SIZE, long_edge or max(alpha.shape[-2:])), self.kernel_size)
        return dilate(uncertain.to(alpha.dtype), kernel).squeeze(1) > 0


class SparseUNet(nn.Module):
    """Submanifold convolutions on the active pixels and on the active 2 x 2 blocks; zero at the start.

    Args:
        in_channels: Channels of an active pixel.
        widths: Channels of the fine and of the coarse level.
        blocks: Residual blocks on the coarse level.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int] = (32, 64), blocks: int = 2) -> None:
        super().__init__()
        fine, coarse = widths
        self.enter = SubmanifoldConv2d(in_channels, fine)
        self.down = SparseConv2d(fine, coarse)
        self.blocks = nn.ModuleList(SparseBlock(coarse) for _ in range(blocks))
        self.up = InverseConv2d(coarse, fine)
        self.join = SubmanifoldConv2d(2 * fine, fine)
        self.narrow = SubmanifoldConv2d(fine, max(8, fine // 2))
        self.leave = SubmanifoldConv2d(max(8, fine // 2), 1, kernel_size=1)
        # an untrained refiner is the identity
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, rows: Tensor, active: ActiveSet) -> Tensor:
        """Map rows (N, ``in_channels``) of the active pixels to corrections (N, 1)."""
        fine = F.leaky_relu(self.enter(rows, active), 0.1)
        coarse = F.leaky_relu(self.down(fine, active), 0.1)
        for block in self.blocks:
            coarse = block(coarse, active.strided())
        back = F.leaky_relu(self.up(coarse, active), 0.1)
        joined = F.leaky_relu(self.join(torch.cat([fine, back], 1), active), 0.1)
        return self.leave(F.leaky_relu(self.narrow(joined, active), 0.1), active)


class SparseBlock(nn.Module):
    """Two submanifold convolutions with a residual connection, normalised per pixel.

    Per pixel, not per batch: batch statistics would differ between ranks and with the number of active pixels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first = SubmanifoldConv2d(channels, channels)
        self.second = SubmanifoldConv2d(channels, channels)

    def forward(self, rows: Tensor, active: ActiveSet) -> Tensor:
        hidden = F.leaky_relu(self.first(self.norm(rows), active), 0.1)
        return rows + self.second(hidden, active)


def feather(mask: Tensor) -> Tensor:
    """Return the weight of a correction, (B, 1, H, W): 0 on the outermost active pixels, 1 two pixels further in.

    The image's border is no border of the active set: nothing is pasted beyond it.
    """
    inside = mask[:, None].float()
    once = erode(inside, 3)
    return 0.5 * (once + erode(once, 3))


def resample(maps: Tensor, size: tuple[int, int], box: Tensor | None = None) -> Tensor:
    """Resample maps (B, C, h, w) bilinearly to ``size``, or the part of them inside ``box`` (B, 4)."""
    if box is None:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    top, left, height, width = box.to(maps.dtype).unbind(1)
    y = (torch.arange(size[0], device=maps.device) + 0.5) / size[0] * height[:, None] + top[:, None]
    x = (torch.arange(size[1], device=maps.device) + 0.5) / size[1] * width[:, None] + left[:, None]
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(maps, 2 * grid - 1, mode="bilinear", padding_mode="border", align_corners=False)


def pixel_places(active: ActiveSet, size: tuple[int, int], box: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return image number (N,) and vertical and horizontal place (N,), in shares of the maps, of every active pixel."""
    image, row, column = active.coordinates.long().unbind(1)
    y, x = (row + 0.5) / size[0], (column + 0.5) / size[1]
    if box is not None:
        top, left, height, width = box.to(y.dtype)[image].unbind(1)
        y, x = top + y * height, left + x * width
    return image, y, x


def sample_rows(maps: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample maps (B, C, h, w) bilinearly at N places and return rows (N, C).

    The same values as enlarging the maps and gathering, without ever holding C full-size maps: at 24 megapixels those
    would take 3 GB.
    """
    batch, channels, height, width = maps.shape
    table = maps.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    y, x = (y * height - 0.5).clamp(0, height - 1), (x * width - 0.5).clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    dy, dx = (y - top)[:, None], (x - left)[:, None]
    top, left = top.long(), left.long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    start = image * (height * width)
    upper = torch.lerp(table[start + top * width + left], table[start + top * width + right], dx)
    lower = torch.lerp(table[start + bottom * width + left], table[start + bottom * width + right], dx)
    return torch.lerp(upper, lower, dy)
