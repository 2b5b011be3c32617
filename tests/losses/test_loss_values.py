"""Every loss term against a number worked out by hand, and zero where the prediction is perfect."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_matting.checks import InputError
from lit_matting.losses import (
    AlphaLowResolution,
    CoarseTrimap,
    CoarseTrimapConsistency,
    Refinement,
    SemanticTrimap,
    SemanticTrimapCrossEntropy,
    SoftAlpha,
    SoftGrounding,
)
from lit_matting.losses.base import gradient_sum, laplacian_sum
from lit_matting.losses.soft_grounding import soft_dice_loss
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets

MakeOutput = Callable[..., MattingOutput]
MakeTargets = Callable[..., MattingTargets]


def cells(*values: float) -> Tensor:
    """A 2 x 2 map of one image, row by row."""
    return torch.tensor(values).view(1, 1, 2, 2)


# --- the semantic trimap ----------------------------------------------------------------------------------------------


def test_semantic_trimap_counts_cells_inside_the_band_twice(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    output = make_output(trimap=cells(0.5, 0.25, 1.0, 0.0))
    targets = make_targets(trimap=cells(1.0, 0.5, 1.0, 0.0))
    # sure foreground is off by 1/2, a cell of the band by 1/4, the other two are right
    assert SemanticTrimap()(output, targets).item() == pytest.approx((1 * 0.25 + 2 * 0.0625) / 4)
    assert SemanticTrimap(band_weight=5)(output, targets).item() == pytest.approx((1 * 0.25 + 5 * 0.0625) / 4)


def test_semantic_trimap_is_zero_when_perfect(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    trimap = cells(0.0, 0.5, 0.7, 1.0)
    assert SemanticTrimap()(make_output(trimap=trimap), make_targets(trimap=trimap)).item() == 0.0


def test_semantic_trimap_cross_entropy_of_even_odds_is_log_2(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    output = make_output(trimap=torch.full((1, 1, 2, 2), 0.5))
    targets = make_targets(trimap=cells(0.0, 0.5, 0.7, 1.0))
    assert SemanticTrimapCrossEntropy()(output, targets).item() == pytest.approx(math.log(2))


def test_semantic_trimap_cross_entropy_is_least_at_the_target(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    targets = make_targets(trimap=cells(0.3, 0.5, 0.7, 0.9))
    trimap = cells(0.3, 0.5, 0.7, 0.9).requires_grad_()
    SemanticTrimapCrossEntropy()(make_output(trimap=trimap), targets).backward()
    assert trimap.grad.abs().max() < 1e-6


# --- the coarse trimap ------------------------------------------------------------------------------------------------


def test_coarse_trimap_of_a_head_that_knows_nothing_is_log_3(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    output = make_output(coarse_trimap=torch.zeros(1, 3, 2, 2))
    for classes in ([[0, 0], [0, 2]], [[0, 1], [2, 2]], [[1, 1], [1, 1]]):
        targets = make_targets(coarse_trimap=torch.tensor([classes]))
        assert CoarseTrimap()(output, targets).item() == pytest.approx(math.log(3))


def test_coarse_trimap_weighs_rare_classes_by_one_over_the_root_of_their_share(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    # three blocks of background, each given probability 2 / (2 + 1 + 1); one of foreground, given 1 / 3
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 0] = math.log(2)
    logits[0, 0, 1, 1] = 0.0
    targets = make_targets(coarse_trimap=torch.tensor([[[0, 0], [0, 2]]]))
    common, rare = 1 / math.sqrt(3 / 4), 1 / math.sqrt(1 / 4)
    by_hand = (3 * common * math.log(2) + rare * math.log(3)) / (3 * common + rare)
    assert CoarseTrimap()(make_output(coarse_trimap=logits), targets).item() == pytest.approx(by_hand)


def test_coarse_trimap_bounds_the_weight_of_a_very_rare_class(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    classes = torch.zeros(1, 10, 10, dtype=torch.long)
    classes[0, 3, 4] = 2
    logits = torch.zeros(1, 3, 10, 10)
    logits[0, 0] = math.log(2)  # background 1/2, foreground 1/4
    scale = 0.99 / math.sqrt(0.99) + 0.01 / math.sqrt(0.01)  # brings the mean weight of the hundred blocks to 1
    common, rare = 1 / math.sqrt(0.99) / scale, 1 / math.sqrt(0.01) / scale
    assert rare > 4
    by_hand = (99 * common * math.log(2) + 4 * math.log(4)) / (99 * common + 4)
    value = CoarseTrimap()(make_output(coarse_trimap=logits), make_targets(coarse_trimap=classes))
    assert value.item() == pytest.approx(by_hand)


def test_coarse_trimap_is_zero_when_perfect(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    classes = torch.tensor([[[0, 1], [2, 1]]])
    logits = 200.0 * F.one_hot(classes, 3).permute(0, 3, 1, 2)
    assert CoarseTrimap()(make_output(coarse_trimap=logits), make_targets(coarse_trimap=classes)).item() == 0.0


def test_coarse_trimap_consistency_compares_the_trimap_with_the_alphas_own(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    alpha_lr = cells(0.0, 0.5, 1.0, 0.04)  # implies 0, 1/2, 1, 0
    term = CoarseTrimapConsistency()
    perfect = make_output(trimap=cells(0.0, 0.5, 1.0, 0.0), alpha_lr=alpha_lr)
    assert term(perfect, make_targets()).item() == 0.0
    off = make_output(trimap=cells(0.5, 0.5, 0.6, 0.0), alpha_lr=alpha_lr)
    assert term(off, make_targets()).item() == pytest.approx((0.5 + 0.4) / 4)


# --- soft grounding ---------------------------------------------------------------------------------------------------


def test_soft_grounding_of_even_odds_on_one_cell_of_four(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    output = make_output(grounding=torch.zeros(1, 1, 2, 2))
    targets = make_targets(alpha_lr=cells(1.0, 0.0, 0.0, 0.0))
    # Dice: the map is 1/2 everywhere, so 1 - (2 * 1/2 + 1) / (4 * 1/4 + 1 + 1)
    assert SoftGrounding()(output, targets).item() == pytest.approx(math.log(2) + 1 / 3)
    assert SoftGrounding(dice=0.5)(output, targets).item() == pytest.approx(math.log(2) + 1 / 6)
    assert SoftGrounding(dice=0.0)(output, targets).item() == pytest.approx(math.log(2))


def test_soft_grounding_is_zero_when_perfect_on_a_hard_target(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    target = cells(1.0, 0.0, 0.0, 1.0)
    value = SoftGrounding()(make_output(grounding=400 * target - 200), make_targets(alpha_lr=target))
    assert value.item() == 0.0


def test_soft_grounding_is_least_at_a_soft_target_itself(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    target = cells(0.2, 0.5, 0.9, 0.4)
    logits = target.logit().requires_grad_()
    value = SoftGrounding()(make_output(grounding=logits), make_targets(alpha_lr=target))
    value.backward()
    entropy = -(target * target.log() + (1 - target) * (1 - target).log()).mean()
    assert value.item() == pytest.approx(entropy.item())  # Dice adds nothing
    assert logits.grad.abs().max() < 1e-6


def test_soft_dice_of_an_empty_map_against_an_empty_target_is_zero() -> None:
    nothing = torch.zeros(1, 1, 4, 4)
    assert soft_dice_loss(nothing, nothing).item() == 0.0


def test_soft_alpha_is_the_mean_absolute_error(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    alpha = torch.zeros(1, 1, 16, 16)
    alpha[..., :4] = 0.5
    assert SoftAlpha()(make_output(alpha=alpha), make_targets()).item() == pytest.approx(0.125)
    assert SoftAlpha()(make_output(alpha=alpha), make_targets(alpha=alpha)).item() == 0.0


# --- the low-resolution alpha -----------------------------------------------------------------------------------------


def test_alpha_lr_of_a_constant_error(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    output = make_output(alpha_lr=torch.full((1, 1, 8, 8), 0.1))
    targets = make_targets(alpha_lr=torch.zeros(1, 1, 8, 8))
    # a constant has no detail: of the 3 levels only the rest is left, 2 x 2 cells that count 2^2 times
    by_hand = 0.1 + 0.25 * (4 * 4 * 0.1) / 64
    assert AlphaLowResolution()(output, targets).item() == pytest.approx(by_hand)
    assert AlphaLowResolution(laplacian=0.0)(output, targets).item() == pytest.approx(0.1)
    assert AlphaLowResolution(levels=1)(output, targets).item() == pytest.approx(0.1 + 0.25 * 0.1)


def test_alpha_lr_is_zero_when_perfect(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    alpha_lr = torch.rand(2, 1, 8, 8)
    value = AlphaLowResolution()(make_output(alpha_lr=alpha_lr), make_targets(2, alpha_lr=alpha_lr))
    assert value.item() == 0.0


# --- refinement -------------------------------------------------------------------------------------------------------


def test_refinement_looks_only_inside_the_unknown_region_and_divides_by_its_area(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    alpha = torch.zeros(1, 1, 16, 16)
    alpha[0, 0, 5, 5] = 0.5  # inside
    alpha[0, 0, 12, 2] = 0.9  # outside: not the refiner's to answer for
    unknown = torch.zeros(1, 1, 16, 16)
    unknown[0, 0, 4:8, 5] = 1
    output = make_output(alphas=(alpha,), active=(torch.zeros(1, 16, 16, dtype=torch.bool),))
    targets = make_targets(unknown=unknown)
    # 4 unknown pixels, plus 1; the lone pixel differs from 4 neighbours
    assert Refinement(laplacian=0.0)(output, targets).item() == pytest.approx((0.5 + 0.05 * 4 * 0.5) / 5)
    assert Refinement(laplacian=0.0, gradient=0.0)(output, targets).item() == pytest.approx(0.5 / 5)


def test_refinement_of_a_constant_error_everywhere(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    output = make_output(alphas=(torch.full((1, 1, 16, 16), 0.25),), active=(torch.ones(1, 16, 16, dtype=torch.bool),))
    # L1 of 256 pixels; of the 5 levels only the rest is left, one cell that counts 2^4 times
    assert Refinement()(output, make_targets()).item() == pytest.approx((256 * 0.25 + 16 * 0.25) / 257)


def test_refinement_joins_the_active_pixels_with_the_true_band(
    make_output: MakeOutput, make_targets: MakeTargets
) -> None:
    unknown = torch.zeros(1, 1, 16, 16)
    unknown[0, 0, 0, :4] = 1
    active = torch.zeros(1, 16, 16, dtype=torch.bool)
    active[0, 0, 2:7] = True
    output = make_output(alphas=(torch.full((1, 1, 16, 16), 0.5),), active=(active,))
    value = Refinement(laplacian=0.0, gradient=0.0)(output, make_targets(unknown=unknown))
    assert value.item() == pytest.approx(7 * 0.5 / 8)


def test_refinement_counts_half_scale_half(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    true_alpha = torch.zeros(1, 1, 16, 16)
    true_alpha[..., 8:, :] = 1
    unknown = torch.zeros(1, 1, 16, 16)
    unknown[0, 0, 8, 3] = 1  # one pixel at full scale, and the one at half scale that it lies in
    half, full = torch.full((1, 1, 8, 8), 0.4), torch.full((1, 1, 16, 16), 0.9)
    nothing = tuple(torch.zeros(1, size, size, dtype=torch.bool) for size in (8, 16))
    targets = make_targets(alpha=true_alpha, unknown=unknown)
    term = Refinement(laplacian=0.0, gradient=0.0)
    both = make_output(alphas=(half, full), active=nothing)
    assert term(both, targets).item() == pytest.approx(0.5 * 0.6 / 2 + 1.0 * 0.1 / 2)
    alone = make_output(alphas=(full,), active=nothing[1:])
    assert term(alone, targets).item() == pytest.approx(1.0 * 0.1 / 2)


def test_refinement_is_zero_when_perfect(make_output: MakeOutput, make_targets: MakeTargets, disc: Tensor) -> None:
    half = F.avg_pool2d(disc, 2)
    active = tuple(torch.ones(1, size, size, dtype=torch.bool) for size in (32, 64))
    output = make_output(alphas=(half, disc), active=active)
    assert Refinement()(output, make_targets(alpha=disc, unknown=torch.ones_like(disc))).item() == 0.0


def test_image_without_unknown_pixels_adds_zero(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    output = make_output(alphas=(torch.rand(1, 1, 16, 16),), active=(torch.zeros(1, 16, 16, dtype=torch.bool),))
    assert Refinement()(output, make_targets()).item() == 0.0


def test_refinement_says_when_a_scale_has_no_weight(make_output: MakeOutput, make_targets: MakeTargets) -> None:
    alphas = (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 16, 16))
    active = tuple(torch.zeros(1, size, size, dtype=torch.bool) for size in (8, 16))
    with pytest.raises(InputError, match="one weight for each scale of the refiner, got 1 for 2"):
        Refinement(scale_weights=[1.0])(make_output(alphas=alphas, active=active), make_targets())


# --- pyramids and differences -----------------------------------------------------------------------------------------


def obvious_laplacian(image: np.ndarray, levels: int) -> float:
    """The L1 norm of a Laplacian pyramid (Burt & Adelson 1983), written out pixel by pixel, level l times 2^l."""

    def at(array: np.ndarray, y: int, x: int) -> float:
        return array[min(max(y, 0), array.shape[0] - 1), min(max(x, 0), array.shape[1] - 1)]

    taps = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    total = 0.0
    for level in range(levels - 1):
        height, width = image.shape
        coarse = np.zeros(((height + 1) // 2, (width + 1) // 2))
        for y, x in np.ndindex(coarse.shape):
            for i, j in np.ndindex(5, 5):
                coarse[y, x] += taps[i] * taps[j] * at(image, 2 * y + i - 2, 2 * x + j - 2)
        back = np.zeros((height, width))
        for y, x in np.ndindex(height, width):
            for i, j in np.ndindex(5, 5):  # the blur sees a coarse pixel only where its place is even; 4 keeps the mean
                if (y + i - 2) % 2 == 0 and (x + j - 2) % 2 == 0:
                    back[y, x] += 4 * taps[i] * taps[j] * at(coarse, (y + i - 2) // 2, (x + j - 2) // 2)
        total += 2**level * np.abs(image - back).sum()
        image = coarse
    return total + 2 ** (levels - 1) * np.abs(image).sum()


@pytest.mark.parametrize(("shape", "levels"), [((16, 16), 3), ((13, 10), 4), ((16, 12), 1), ((1, 1), 2), ((9, 16), 5)])
def test_laplacian_sum_equals_the_obvious_pyramid(shape: tuple[int, int], levels: int) -> None:
    images = np.random.default_rng(3).normal(size=(2, *shape))
    fast = laplacian_sum(torch.from_numpy(images)[:, None], levels)
    assert fast.tolist() == pytest.approx([obvious_laplacian(image, levels) for image in images], rel=1e-12)


def test_gradient_sum_counts_every_step_once() -> None:
    image = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0]])[None, None]
    assert gradient_sum(image).item() == pytest.approx((1 + 0) + (0.5 + 0.5) + (0 + 0.5 + 0))
