"""The refiner: the matte at the photograph's own resolution, computed only where it is uncertain.

A matte is 0 or 1 nearly everywhere. Upsampling the low-resolution alpha answers those pixels; the others, a band a few
pixels wide around every boundary plus whatever is transparent, form the *active set*, and only they pass through a
small sparse U-Net (after SparseMat, Sun et al. 2023). Time and memory follow the active pixels, not the image's area.

Without gradients, what would take more memory than it may is worked in horizontal bands that overlap by what the U-Net
sees. A row of a sparse layer has the same bits whatever other rows there are, and so has everything else here, so bands
give exactly the alpha that one go gives. That is shown for the PyTorch backend; spconv's kernels are not ours, and rows
of theirs may differ by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.networks.bands_and_tiles import Tile, full_tiles, plan_bands
from lit_matting.networks.sampling import pixel_places, resample, resample_part, sample_rows
from lit_matting.networks.sparse_unet import SparseUNet
from lit_matting.sparse import ActiveSet, gather, scatter
from lit_matting.targets import REFERENCE_SIZE, dilate, erode, scaled_kernel

FEATHER = 2
"""Pixels from the border of the active set to where a correction counts in full."""
MAP_PIXELS = 2**20
"""Pixels whose activity is decided at a time."""
PIXELS_PER_ACTIVE = 64
"""A band's own maps take about as much memory for so many pixels as everything else for one active pixel."""


@dataclass(frozen=True)
class Refined:
    """What a refiner returns."""

    alpha: Tensor
    """(B, 1, H, W) in [0, 1], at the image's size."""
    alphas: tuple[Tensor, ...]
    """The alpha at each scale that ran, coarse to fine."""
    active: tuple[Tensor, ...]
    """The active pixels of each of them, (B, H_s, W_s) bool."""
    worked: tuple[Tensor, ...] = ()
    """The rows it worked on at each of them, (B,) bool; empty: all. The others hold the enlarged alpha there."""


@dataclass(frozen=True)
class Seen:
    """What the refiner reads beside the alpha that it refines."""

    image: Tensor
    """(B, 3, H, W), or some lines of it."""
    trimap: Tensor
    """(B, 1, h, w)."""
    features: Tensor
    """(B, C, h, w)."""
    box: Tensor | None
    """(B, 4), the part of the maps that the image covers; None: all."""

    def of(self, rows: list[int] | slice) -> Seen:
        """Return the same of some rows of the batch."""
        box = None if self.box is None else self.box[rows]
        return Seen(self.image[rows], self.trimap[rows], self.features[rows], box)


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
        train_images: Refine at most so many rows (image and phrase) of a training batch, the first ones; the others
            keep the enlarged alpha and have no part in the loss. The refiner learns from pixels, of which a few rows
            hold plenty. None: all.
        max_active_pixels: Active pixels worked at a time where no gradient is asked for, of all images of a batch
            together; beyond, in bands, with exactly the same alpha. With the default widths an active pixel takes about
            1 kB, so the default is 0.3 GB. None: no limit.
        dense_above: Where no gradient is asked for, tiles of 256 pixels of which more than this share is active are
            worked by dense convolutions, which are faster there, with the same alpha up to rounding. None: never.
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
        max_active_pixels: int | None = 2**18,
        dense_above: float | None = 0.8,
    ) -> None:
        super().__init__()
        if max_active_pixels is not None and max_active_pixels < 1:
            raise InputError(f"`max_active_pixels` must be at least 1, or null for no limit, got {max_active_pixels}.")
        if train_images is not None and train_images < 1:
            raise InputError(f"`train_images` must be at least 1, or null for all, got {train_images}.")
        self.feature_channels = feature_channels
        self.half_scale_above = half_scale_above
        self.max_long_edge = max_long_edge
        self.kernel_size = kernel_size
        self.alpha_range = alpha_range
        self.trimap_range = trimap_range
        self.detach_inputs = detach_inputs
        self.train_images = train_images
        if dense_above is not None and not 0 <= dense_above <= 1:
            raise InputError(f"`dense_above` must be in [0, 1], or null for never, got {dense_above}.")
        self.max_active_pixels = max_active_pixels
        self.dense_above = dense_above
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
            return self._refine(Seen(image.float(), trimap.float(), features.float(), box), alpha.float())

    def _refine(self, seen: Seen, alpha: Tensor) -> Refined:
        chosen = None
        if self.training and self.train_images is not None:
            chosen = torch.arange(len(alpha), device=alpha.device) < self.train_images
        size = seen.image.shape[-2:]
        long_edges = [max(size)]
        if seen.box is not None:
            # a crop is refined as the photograph it was taken from will be: same scales, same kernel
            photographs = seen.image.new_tensor(size) / seen.box[:, 2:].float()
            long_edges = [round(edge) for edge in photographs.amax(1).tolist()]
        alike: dict[tuple[tuple[float, int], ...], list[int]] = {}
        for row, long_edge in enumerate(long_edges):
            alike.setdefault(self._plan(long_edge), []).append(row)
        if len(alike) == 1:
            return self._refine_alike(seen, alpha, long_edges[0], chosen)
        parts = []
        for rows in alike.values():
            some = None if chosen is None else chosen[rows]
            parts.append((rows, self._refine_alike(seen.of(rows), alpha[rows], long_edges[rows[0]], some)))
        return _together(parts, alpha, seen.box)

    def _plan(self, long_edge: int) -> tuple[tuple[float, int], ...]:
        """Return at what share of its size an image is refined, coarse to fine, and the kernel's size at each."""
        capped = min(1.0, (self.max_long_edge or long_edge) / long_edge)
        halved = self.half_scale_above is not None and long_edge * capped > self.half_scale_above
        shares = (capped / 2, capped) if halved else (capped,)
        return tuple((share, self._kernel(max(1, round(long_edge * share)))) for share in shares)

    def _refine_alike(self, seen: Seen, alpha: Tensor, long_edge: int, chosen: Tensor | None) -> Refined:
        """Refine images, or crops of photographs, of one plan: that of ``long_edge``; of the rows those ``chosen``."""
        height, width = seen.image.shape[-2:]
        plan = self._plan(long_edge)
        alphas, actives = [], []
        current = alpha
        place = seen.box
        unused = dict(self.scales)
        for name, (share, _) in zip(("half_scale", "full_scale")[-len(plan) :], plan):
            unet = unused.pop(name)
            size = (max(1, round(height * share)), max(1, round(width * share)))
            scaled = seen
            if size != (height, width):
                scaled = replace(seen, image=F.interpolate(seen.image, size=size, mode="area"))
            enlarged = resample(current, size, place)
            current, active = self._scale(unet, scaled, enlarged, max(1, round(long_edge * share)), chosen)
            place = None  # from here on the alpha covers the image itself
            alphas.append(current)
            actives.append(active)
        result = current if current.shape[-2:] == (height, width) else resample(current, (height, width))
        if self.training:
            # every parameter takes part in every step, else distributed training waits for its gradient
            for module in unused.values():
                result = result + 0.0 * sum(parameter.sum() for parameter in module.parameters())
        worked = () if chosen is None else (chosen,) * len(plan)
        return Refined(result, tuple(alphas), tuple(actives), worked)

    def _scale(
        self, unet: SparseUNet, seen: Seen, alpha: Tensor, long_edge: int, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mask = self._mask(alpha, seen, long_edge)
        if chosen is not None:
            mask &= chosen[:, None, None]
        if not torch.is_grad_enabled():
            halo = max(*unet.halo(), FEATHER)
            tiles, rest = full_tiles(mask, self.dense_above, halo)
            before = alpha.clone() if tiles else alpha
            self._in_bands(unet, seen, alpha, mask, rest)
            for tile in tiles:
                wide = tile.around(halo)
                refined = self._in_tile(unet, wide, seen, before, mask)
                tile.of(alpha).copy_(wide.part(tile, refined))
            return alpha, mask
        active = ActiveSet.from_mask(mask)
        if len(active) == 0:
            if self.training:
                # nothing to do, but distributed training waits for these gradients
                alpha = alpha + 0.0 * (seen.features.sum() + sum(parameter.sum() for parameter in unet.parameters()))
            return alpha, mask
        places, weight = pixel_places(active, mask.shape[1:], seen.box), gather(feather(mask), active)
        rows = self._rows(unet, active, seen, alpha, places, weight)
        return scatter(rows, active, alpha), mask

    @torch.no_grad()
    def _mask(self, alpha: Tensor, seen: Seen, long_edge: int) -> Tensor:
        """Return the active pixels (B, H, W); decided for a few lines at a time, to hold few maps of the whole size."""
        batch, _, height, width = alpha.shape
        margin = self._kernel(long_edge) // 2
        mask = torch.empty((batch, height, width), dtype=torch.bool, device=alpha.device)
        step = max(MAP_PIXELS // (batch * width), 2 * margin)
        for first in range(0, height, step):
            end = min(first + step, height)
            top, bottom = max(first - margin, 0), min(end + margin, height)
            lines = resample_part(seen.trimap, (height, width), slice(top, bottom), slice(0, width), seen.box)
            part = self.active_pixels(alpha[:, :, top:bottom], lines, long_edge)
            mask[:, first:end] = part[:, first - top : end - top]
        return mask

    def _in_bands(self, unet: SparseUNet, seen: Seen, alpha: Tensor, mask: Tensor, rest: Tensor) -> None:
        """Refine ``alpha`` (B, 1, H, W) in place, in as few bands as the budget allows.

        Of the active pixels (B, H, W) those of ``rest`` are worked.
        """
        batch, height, width = mask.shape
        halo = unet.halo()
        halo = (max(halo[0], FEATHER), max(halo[1], FEATHER))
        per_line = (rest.sum((0, 2)) + batch * width / PIXELS_PER_ACTIVE).tolist()
        bands = plan_bands(per_line, self.max_active_pixels, halo)
        above = alpha[:, :, :0]
        for band, following in zip(bands, [*bands[1:], None]):
            # the lines above are refined already, but every band starts from what they were before
            source = alpha[:, :, band.first : band.bottom]
            if above.shape[2]:
                source = torch.cat([above, source], 2)
            if following is not None:
                above = source[:, :, following.top - band.top : band.end - band.top].clone()
            active = ActiveSet.from_mask(rest[:, band.top : band.bottom])
            if len(active) == 0:
                continue
            places = pixel_places(active, (height, width), seen.box, band.top)
            weight = gather(feather(mask[:, band.top : band.bottom]), active)
            lines = replace(seen, image=seen.image[:, :, band.top : band.bottom])
            rows = self._rows(unet, active, lines, source, places, weight)
            refined = scatter(rows, active, source)
            alpha[:, :, band.first : band.end] = refined[:, :, band.first - band.top : band.end - band.top]

    def _rows(
        self,
        unet: SparseUNet,
        active: ActiveSet,
        seen: Seen,
        alpha: Tensor,
        places: tuple[Tensor, Tensor, Tensor],
        weight: Tensor,
    ) -> Tensor:
        """Return the refined alpha (N, 1) of the active pixels of an image, or of a band of it."""
        before = gather(alpha, active)
        inputs = torch.cat(
            [
                2 * gather(seen.image, active) - 1,
                2 * before - 1,
                2 * sample_rows(seen.trimap, *places) - 1,
                sample_rows(seen.features, *places),
            ],
            1,
        )
        residual = torch.tanh(unet(inputs, active)) * weight
        moved = before + residual
        # clamped going forward, transparent going backward: a pixel pushed beyond 1 must be able to come back
        return moved + (moved.clamp(0, 1) - moved).detach()

    def _in_tile(self, unet: SparseUNet, tile: Tile, seen: Seen, alpha: Tensor, mask: Tensor) -> Tensor:
        """Return the refined alpha (1, 1, h, w) of a tile, by dense convolutions."""
        one = seen.of(slice(tile.image, tile.image + 1))
        maps = torch.cat([one.trimap, one.features], 1)
        before, active = tile.of(alpha), tile.of(mask)
        enlarged = resample_part(maps, seen.image.shape[-2:], tile.rows, tile.columns, one.box)
        inputs = torch.cat([2 * tile.of(seen.image) - 1, 2 * before - 1, 2 * enlarged[:, :1] - 1, enlarged[:, 1:]], 1)
        residual = torch.tanh(unet.dense(inputs, active)) * feather(active)
        return torch.where(active[:, None], (before + residual).clamp(0, 1), before)

    def active_pixels(self, alpha: Tensor, trimap: Tensor, long_edge: int | None = None) -> Tensor:
        """Return the pixels to refine, (B, H, W) bool: a dilation of where alpha or trimap is undecided.

        Args:
            alpha: (B, 1, H, W) in [0, 1].
            trimap: (B, 1, H, W) in [0, 1].
            long_edge: Of the whole image, in pixels, where these are maps of a crop.
        """
        uncertain = (alpha > self.alpha_range[0]) & (alpha < self.alpha_range[1])
        uncertain |= (trimap > self.trimap_range[0]) & (trimap < self.trimap_range[1])
        return dilate(uncertain, self._kernel(long_edge or max(alpha.shape[-2:]))).squeeze(1)

    def _kernel(self, long_edge: int) -> int:
        # beyond the reference size the enlarged maps' own blur grows with the image; the kernel need not
        return scaled_kernel(min(REFERENCE_SIZE, long_edge), self.kernel_size)


def _together(parts: list[tuple[list[int], Refined]], alpha: Tensor, box: Tensor) -> Refined:
    """Return the rows of several plans as one batch, (rows, what became of them) each, in the batch's own order.

    Where a row has no half scale it holds ``alpha`` enlarged, and is not among those worked on there. Rows that a cap
    on the long edge gives different sizes are enlarged to the largest.
    """
    order = torch.tensor([row for rows, _ in parts for row in rows], device=alpha.device).argsort()
    alphas, actives, worked = [], [], []
    for scale in range(-max(len(part.alphas) for _, part in parts), 0):
        found = [part.alphas[scale].shape[-2:] for _, part in parts if len(part.alphas) >= -scale]
        size = (max(height for height, _ in found), max(width for _, width in found))
        batch: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows, part in parts:
            here = torch.zeros(len(rows), dtype=torch.bool, device=alpha.device)
            if len(part.alphas) < -scale:
                batch.append((resample(alpha[rows], size, box[rows]), here.new_zeros(len(rows), *size), here))
                continue
            map_, active = part.alphas[scale], part.active[scale]
            if map_.shape[-2:] != size:
                map_, active = resample(map_, size), F.interpolate(active[:, None].float(), size)[:, 0] > 0
            batch.append((map_, active, part.worked[scale] if part.worked else ~here))
        for items, these in zip((alphas, actives, worked), zip(*batch)):
            items.append(torch.cat(these)[order])
    result = torch.cat([part.alpha for _, part in parts])[order]
    return Refined(result, tuple(alphas), tuple(actives), tuple(worked))


def feather(mask: Tensor) -> Tensor:
    """Return the weight of a correction, (B, 1, H, W): 0 on the outermost active pixels, 1 two pixels further in.

    The image's border is no border of the active set: nothing is pasted beyond it.
    """
    inside, weight = mask[:, None], torch.zeros(mask[:, None].shape, device=mask.device)
    for _ in range(FEATHER):
        inside = erode(inside, 3)
        weight += inside
    return weight.div_(FEATHER)
