"""Distillation terms: values worked out by hand, and what they must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lit_matting.checks import InputError
from lit_matting.losses import AttentionDistillation, FeatureDistillation, OutputDistillation
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets

Make = Callable[..., MattingOutput]
MakeTargets = Callable[..., MattingTargets]


def test_outputs_are_compared_by_squares_and_by_amounts(make_output: Make, make_targets: MakeTargets) -> None:
    full = torch.full
    teacher = make_output(
        features=full((1, 4, 2, 2), 1.0), trimap=full((1, 1, 2, 2), 0.2), alpha_lr=full((1, 1, 2, 2), 0.9)
    )
    ours = make_output(
        features=full((1, 4, 2, 2), 3.0), trimap=full((1, 1, 2, 2), 0.5), alpha_lr=full((1, 1, 2, 2), 0.4)
    )
    targets = make_targets(teacher=teacher)
    # (3 - 1)^2 + (0.5 - 0.2)^2 + |0.4 - 0.9|
    assert OutputDistillation()(ours, targets).item() == pytest.approx(4 + 0.09 + 0.5)
    shares = OutputDistillation(features=0.5, trimap=2, alpha_lr=0)
    assert shares(ours, targets).item() == pytest.approx(2 + 0.18)


def test_hard_masks_are_distilled_too(make_output: Make, make_targets: MakeTargets) -> None:
    maps = {"trimap": torch.ones(2, 1, 2, 2), "alpha_lr": torch.ones(2, 1, 2, 2), "features": torch.ones(2, 4, 2, 2)}
    zero = {name: torch.zeros_like(value) for name, value in maps.items()}
    targets = make_targets(batch=2, has_alpha=torch.tensor([False, True]), teacher=make_output(**maps))
    assert OutputDistillation()(make_output(**zero), targets).item() == 3


def test_necks_of_different_width_are_refused_unless_left_out(make_output: Make, make_targets: MakeTargets) -> None:
    maps = {"trimap": torch.ones(1, 1, 2, 2), "alpha_lr": torch.ones(1, 1, 2, 2)}
    targets = make_targets(teacher=make_output(**maps, features=torch.ones(1, 8, 2, 2)))
    ours = make_output(**maps, features=torch.ones(1, 4, 2, 2))
    with pytest.raises(InputError, match="the student has 4 channels and the teacher 8: set `features: 0`"):
        OutputDistillation()(ours, targets)
    assert OutputDistillation(features=0)(ours, targets).item() == 0


def test_feature_distance_is_two_less_twice_the_correlation(make_output: Make, make_targets: MakeTargets) -> None:
    ours, theirs = torch.randn(2, 1, 6, 4, 4)
    correlation = torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]
    targets = make_targets(teacher=make_output(pyramid={8: theirs}))
    value = FeatureDistillation()(make_output(pyramid={8: ours}), targets)
    assert value.item() == pytest.approx(2 * (1 - correlation.item()), abs=1e-4)


def test_feature_distance_ignores_the_scale_of_a_level(make_output: Make, make_targets: MakeTargets) -> None:
    features = torch.randn(1, 6, 4, 4)
    targets = make_targets(teacher=make_output(pyramid={8: features}))
    value = FeatureDistillation()(make_output(pyramid={8: 100 * features + 7}), targets)
    assert value.item() == pytest.approx(0, abs=1e-5)


def test_levels_are_averaged_and_those_of_other_width_left_out(make_output: Make, make_targets: MakeTargets) -> None:
    same = torch.randn(1, 4, 4, 4)
    theirs = {8: same, 16: torch.randn(1, 6, 2, 2), 32: torch.randn(1, 8, 1, 1)}
    ours = {8: -same, 16: theirs[16], 32: torch.randn(1, 4, 1, 1)}
    targets = make_targets(teacher=make_output(pyramid=theirs))
    # opposite at one level (2 - 2 x -1 = 4), equal at the other, not compared at the last
    assert FeatureDistillation()(make_output(pyramid=ours), targets).item() == pytest.approx(2, abs=1e-4)
    with pytest.raises(InputError, match="no level at which student and teacher have the same width"):
        FeatureDistillation()(make_output(pyramid={32: ours[32]}), targets)


def test_attention_is_compared_as_distributions_over_the_cells(make_output: Make, make_targets: MakeTargets) -> None:
    theirs = torch.tensor([[[0.3, 0.1]]])  # 3/4, 1/4
    ours = torch.tensor([[[0.01, 0.01]]])  # 1/2, 1/2, whatever share the words have
    targets = make_targets(teacher=make_output(attention={"layer": theirs}))
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert AttentionDistillation()(make_output(attention={"layer": ours}), targets).item() == pytest.approx(by_hand)


def test_attention_on_a_finer_grid_is_compared_on_the_coarser(make_output: Make, make_targets: MakeTargets) -> None:
    coarse = torch.rand(1, 2, 2)
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    targets = make_targets(teacher=make_output(attention={"a": coarse, "b": fine}))
    value = AttentionDistillation()(make_output(attention={"a": fine, "b": coarse, "mine": coarse}), targets)
    assert value.item() == pytest.approx(0, abs=1e-6)


def test_attention_without_a_common_layer_is_refused(make_output: Make, make_targets: MakeTargets) -> None:
    targets = make_targets(teacher=make_output(attention={"a": torch.rand(1, 2, 2)}))
    with pytest.raises(InputError, match="no attention layer that student and teacher have in common"):
        AttentionDistillation()(make_output(attention={"b": torch.rand(1, 2, 2)}), targets)


@pytest.mark.parametrize("term", [OutputDistillation(), FeatureDistillation(), AttentionDistillation()])
def test_teacher_that_agrees_costs_nothing_and_a_batch_is_the_mean_of_its_images(
    term: torch.nn.Module, make_output: Make, make_targets: MakeTargets
) -> None:
    def fields(output: MattingOutput, rows: slice) -> MattingOutput:
        return output._map(lambda tensor: tensor[rows])

    def random() -> MattingOutput:
        return make_output(
            trimap=torch.rand(2, 1, 2, 2),
            alpha_lr=torch.rand(2, 1, 2, 2),
            features=torch.randn(2, 4, 2, 2),
            pyramid={8: torch.randn(2, 4, 2, 2)},
            attention={"layer": torch.rand(2, 2, 2)},
        )

    teacher, ours = random(), random()
    whole = term(ours, make_targets(batch=2, teacher=teacher))
    parts = [
        term(fields(ours, slice(i, i + 1)), make_targets(teacher=fields(teacher, slice(i, i + 1)))) for i in (0, 1)
    ]
    assert whole.item() == pytest.approx(sum(parts).item() / 2, rel=1e-5)
    assert whole > 0.01
    assert term(teacher, make_targets(batch=2, teacher=teacher)).item() == pytest.approx(0, abs=1e-6)
