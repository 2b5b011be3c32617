"""Parameter groups and schedules, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from lit_matting.checks import InputError
from lit_matting.optimization import Constant, Cosine, LearningRateSchedule, Polynomial, parameter_groups


def model() -> nn.Module:
    parts = {
        "backbone": nn.ModuleDict({"unet": nn.Linear(2, 3), "adapter": nn.Linear(3, 3)}),
        "head": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    }
    module = nn.ModuleDict(parts)
    module.register_parameter("gamma", nn.Parameter(torch.zeros(5)))
    return module


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    module = model()
    module["backbone"]["adapter"].requires_grad_(False)
    groups = parameter_groups(module, 1e-3, 0.1, {"backbone": 0.5})
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_matrices_and_kernels_decay_and_vectors_do_not() -> None:
    groups = {group["name"]: group for group in parameter_groups(model(), 1e-3, 0.1, {})}
    assert set(groups) == {"rest", "rest/no_decay"}
    assert {parameter.ndim for parameter in groups["rest"]["params"]} == {2, 4}
    assert {parameter.ndim for parameter in groups["rest/no_decay"]["params"]} == {1}
    assert (groups["rest"]["weight_decay"], groups["rest/no_decay"]["weight_decay"]) == (0.1, 0.0)


def test_longest_matching_prefix_scales_the_learning_rate() -> None:
    module = model()
    groups = parameter_groups(module, 1e-3, 0.1, {"backbone": 0.1, "backbone.unet": 0.01})
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rate[id(module["backbone"]["unet"].weight)] == pytest.approx(1e-5)
    assert rate[id(module["backbone"]["adapter"].weight)] == pytest.approx(1e-4)
    assert rate[id(module["head"][0].weight)] == pytest.approx(1e-3)
    assert rate[id(module.gamma)] == pytest.approx(1e-3)


def test_prefix_ends_at_a_dot() -> None:
    with pytest.raises(InputError, match=r"names \['back'\], but no trainable parameter starts like that"):
        parameter_groups(model(), 1e-3, 0.1, {"back": 0.1})


def test_prefix_of_frozen_parameters_only_is_refused() -> None:
    module = model()
    module["backbone"].requires_grad_(False)
    with pytest.raises(InputError, match=r"`model.learning_rate_scales` names \['backbone'\].*they start with.*head"):
        parameter_groups(module, 1e-3, 0.1, {"backbone": 0.1})


def test_scale_of_a_part_that_another_backbone_had_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.ModuleDict({"network": model()})
    scales = {"network.backbone.unet": 0.1, "network.backbone.transformer": 0.5}
    groups = parameter_groups(module, 1e-3, 0.1, scales)
    assert {group["name"] for group in groups} == {
        name for part in ("network.backbone.unet", "rest") for name in (part, f"{part}/no_decay")
    }
    (record,) = caplog.records
    assert "names 'network.backbone.transformer', but nothing that is trained in this backbone" in record.message
    with pytest.raises(InputError, match=r"names \['network.haed'\]"):
        parameter_groups(module, 1e-3, 0.1, {**scales, "network.haed": 1.0})


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), {0: 1, 50: 1, 100: 1}),
        (Constant(warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 100: 1}),
        (Cosine(), {0: 1, 25: 0.5 * (1 + math.cos(math.pi / 4)), 50: 0.5, 100: 0, 150: 0}),
        (Cosine(final=0.1), {0: 1, 50: 0.55, 100: 0.1}),
        (Cosine(warmup_steps=20), {0: 0.05, 19: 1, 20: 1, 60: 0.5, 100: 0}),
        (Polynomial(), {0: 1, 50: 0.5**0.9, 100: 0}),
        (Polynomial(warmup_steps=50, power=2), {24: 0.5, 75: 0.25, 100: 0}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LearningRateSchedule) else "",
)
def test_schedule_of_100_steps_by_hand(schedule: LearningRateSchedule, factors: dict[int, float]) -> None:
    for step, factor in factors.items():
        assert schedule.factor(step, 100) == pytest.approx(factor, abs=1e-12), step


def test_run_that_ends_within_its_warmup_never_divides_by_zero() -> None:
    assert Cosine(warmup_steps=10).factor(4, 5) == pytest.approx(0.5)
    assert Cosine(warmup_steps=10).factor(10, 10) == pytest.approx(1.0)
