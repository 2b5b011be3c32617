"""Parameter groups and schedules, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from lit_matting.checks import InputError
from lit_matting.muon import Muon
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


def test_lookup_tables_are_groups_of_their_own() -> None:
    words, mixer = nn.Embedding(7, 5), nn.MultiheadAttention(4, 2)
    module = nn.ModuleDict({"words": words, "mixer": mixer})
    module.register_parameter("position", nn.Parameter(torch.zeros(3, 5)))
    groups = {group["name"]: group for group in parameter_groups(module, 1e-3, 0.1, {"words": 0.5})}
    tables = {name: group["params"] for name, group in groups.items() if group["tables"]}
    assert set(tables) == {"words/tables", "rest/tables"}
    assert tables["words/tables"][0] is words.weight
    assert tables["rest/tables"][0] is module.position
    assert {group["weight_decay"] for group in groups.values() if group["tables"]} == {0.1}
    assert {id(p) for p in groups["rest"]["params"]} == {id(mixer.in_proj_weight), id(mixer.out_proj.weight)}


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


# --- Muon -----------------------------------------------------------------------------------------


def stepped(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    """Take one step with these gradients of the parameters, in the order of the groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("shape", [(32, 24), (24, 32), (20, 4, 3, 3)])
def test_first_muon_step_is_the_orthogonal_factor_of_the_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.randn(shape)), torch.randn(shape)
    before = weight.detach().clone()
    stepped(Muon([weight], lr=0.01, weight_decay=0.5), [gradient])
    rows, columns = shape[0], math.prod(shape[1:])
    moved = (before * (1 - 0.01 * 0.5) - weight.detach()).reshape(rows, columns)
    left, _, right = torch.linalg.svd(gradient.reshape(rows, columns), full_matrices=False)
    stretched = left.T @ (moved / (0.01 * 0.2 * max(rows, columns) ** 0.5)) @ right.T
    # five Newton-Schulz iterations bring singular values near 1, not to 1 (Jordan: about 0.7 to 1.2)
    assert float(stretched.diagonal().min()) > 0.6
    assert float(stretched.diagonal().max()) < 1.3
    assert float((stretched - stretched.diagonal().diag()).abs().max()) < 0.05
    # of the size of an AdamW step, whose entries are about the learning rate
    assert 0.1 < float(moved.square().mean().sqrt()) / 0.01 < 0.3


def test_muon_leaves_vectors_tables_and_narrow_layers_to_adamw() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"words": nn.Embedding(40, 20), "hidden": nn.Linear(20, 20), "leave": nn.Conv2d(20, 3, 1)})
    groups = parameter_groups(module, 1e-2, 0.1, {})
    muon = Muon(groups, lr=1e-2, betas=(0.8, 0.9))
    assert [(group["name"], group["use_muon"]) for group in muon.param_groups] == [
        ("rest/tables", False),
        ("rest", True),
        ("rest/adamw", False),
        ("rest/no_decay", False),
    ]
    assert [id(p) for p in muon.param_groups[1]["params"]] == [id(module["hidden"].weight)]
    copies = [
        {"params": [nn.Parameter(p.detach().clone()) for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in muon.param_groups
    ]
    adamw = torch.optim.AdamW(copies, lr=1e-2, betas=(0.8, 0.9))
    for _ in range(3):
        gradients = [torch.randn_like(p) for group in muon.param_groups for p in group["params"]]
        stepped(muon, gradients)
        stepped(adamw, gradients)
    for ours, torchs in zip(muon.param_groups, adamw.param_groups, strict=True):
        for parameter, other in zip(ours["params"], torchs["params"], strict=True):
            assert torch.allclose(parameter, other, rtol=1e-5, atol=1e-6) != ours["use_muon"]


def test_muon_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    gradients = [[torch.randn(20, 18), torch.randn(20)] for _ in range(4)]
    straight, first = nn.Linear(18, 20), nn.Linear(18, 20)
    first.load_state_dict(straight.state_dict())
    whole, half = (Muon(parameter_groups(module, 1e-2, 0.1, {}), lr=1e-2) for module in (straight, first))
    for gradient in gradients:
        stepped(whole, gradient)
    for gradient in gradients[:2]:
        stepped(half, gradient)
    second = nn.Linear(18, 20)
    second.load_state_dict(first.state_dict())
    resumed = Muon(parameter_groups(second, 1e-2, 0.1, {}), lr=1e-2)
    resumed.load_state_dict(half.state_dict())
    for gradient in gradients[2:]:
        stepped(resumed, gradient)
    assert torch.equal(second.weight, straight.weight)
    assert torch.equal(second.bias, straight.bias)


def test_muon_says_its_rate_and_decay_as_torch_does() -> None:
    optimizer = Muon([nn.Parameter(torch.zeros(1))], lr=0.3, weight_decay=0.2)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.2)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.2)
