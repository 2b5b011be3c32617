"""What every loss term must do: teach its own outputs alone, skip what it does not apply to, and average fairly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_matting.losses import (
    AlphaLowResolution,
    CoarseTrimap,
    CoarseTrimapConsistency,
    LossTerm,
    Objective,
    Refinement,
    SemanticTrimap,
    SemanticTrimapCrossEntropy,
    SoftAlpha,
    SoftGrounding,
)
from lit_matting.losses.base import laplacian_sum, masked_mean
from lit_matting.records import MattingOutput
from lit_matting.targets import MattingTargets

WholeCase = Callable[..., tuple[MattingOutput, MattingTargets]]

# the term, the outputs it may teach, and the flag of the samples it applies to
TERMS = [
    (SemanticTrimap(), {"trimap"}, None),
    (SemanticTrimapCrossEntropy(), {"trimap"}, None),
    (CoarseTrimap(), {"coarse_trimap"}, None),
    (CoarseTrimapConsistency(), {"trimap"}, "has_alpha"),
    (SoftGrounding(), {"grounding"}, "has_phrase"),
    (SoftAlpha(), {"alpha"}, "has_alpha"),
    (SoftAlpha(), {"alpha"}, "has_phrase"),
    (AlphaLowResolution(), {"alpha_lr"}, "has_alpha"),
    (Refinement(), {"alphas.0", "alphas.1"}, "has_alpha"),
]


def over(rows: list[tuple[LossTerm, set[str], str | None]]) -> pytest.MarkDecorator:
    names = [f"{type(term).__name__}-{flag or 'all'}" for term, _, flag in rows]
    return pytest.mark.parametrize(("term", "taught", "flag"), rows, ids=names)


every_term = over(TERMS)
every_term_with_a_flag = over([row for row in TERMS if row[2] is not None])


def leaves(output: MattingOutput) -> dict[str, Tensor]:
    """The tensors of an output that can have a gradient, by name."""
    found = {name: getattr(output, name) for name in ("alpha", "alpha_lr", "trimap", "coarse_trimap", "grounding")}
    return {**found, **{f"alphas.{index}": alpha for index, alpha in enumerate(output.alphas)}}


def pick(record: MattingOutput | MattingTargets, index: int) -> MattingOutput | MattingTargets:
    """One image of a record, as a batch of one."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name, value in fields.items():
        if isinstance(value, Tensor):
            fields[name] = value[index : index + 1]
        elif isinstance(value, tuple):
            fields[name] = tuple(item[index : index + 1] for item in value)
    return type(record)(**fields)


@every_term
def test_gradient_reaches_the_terms_own_outputs_and_no_other(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    term(output, targets).backward()
    reached = {name for name, leaf in leaves(output).items() if leaf.grad is not None and leaf.grad.abs().sum() > 0}
    assert reached == taught
    # and the term says so, which is how the model knows what it needs
    assert {name.split(".")[0] for name in taught} <= set(term.needs)


@every_term_with_a_flag
def test_sample_the_term_does_not_apply_to_changes_nothing(
    term: LossTerm, taught: set[str], flag: str, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    targets = dataclasses.replace(targets, **{flag: torch.tensor([True, False])})
    value = term(output, targets)
    assert value.item() == pytest.approx(term(pick(output, 0), pick(targets, 0)).item(), rel=1e-6)
    value.backward()
    for name in taught:
        gradient = leaves(output)[name].grad
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0


@every_term_with_a_flag
def test_batch_the_term_does_not_apply_to_gives_an_attached_zero(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    value = term(output, dataclasses.replace(targets, **{flag: torch.tensor([False, False])}))
    assert value.item() == 0.0
    value.backward()
    for name in taught:
        # a gradient of zeros, not none at all: distributed training waits for it
        assert torch.equal(leaves(output)[name].grad, torch.zeros_like(leaves(output)[name]))


@every_term
def test_batch_of_two_is_the_mean_of_two_batches_of_one(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    alone = [term(pick(output, index), pick(targets, index)).item() for index in (0, 1)]
    assert alone[0] != alone[1]
    assert term(output, targets).item() == pytest.approx(sum(alone) / 2, rel=1e-6)


@every_term
def test_order_of_the_batch_does_not_matter(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    turned = [
        type(record)(**{
            field.name: tuple(item.flip(0) for item in value) if isinstance(value, tuple) else value.flip(0)
            for field in dataclasses.fields(record)
            if isinstance(value := getattr(record, field.name), (Tensor, tuple))
        })
        for record in (output, targets)
    ]  # fmt: skip
    assert term(*turned).item() == pytest.approx(term(output, targets).item(), rel=1e-6)


@every_term
def test_values_are_those_of_float32_under_autocast(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    plain = term(output, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(term(output, targets), plain)


@every_term
def test_half_precision_outputs_are_accepted(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case()
    rounded = output.to(torch.bfloat16)
    value = term(dataclasses.replace(rounded, active=output.active), targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(term(output, targets).item(), rel=0.02)


@every_term
def test_gradient_equals_the_difference_quotient(
    term: LossTerm, taught: set[str], flag: str | None, whole_case: WholeCase
) -> None:
    output, targets = whole_case(batch=1)
    for name in taught:
        leaf = leaves(output)[name]
        # in a random direction; float32 outputs bound how small the step may be
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
        step = 2e-3

        def at(shift: float, name: str = name, direction: Tensor = direction) -> float:
            head, _, index = name.partition(".")
            moved = leaves(output)[name].detach() + shift * direction
            if index:
                alphas = tuple(moved if i == int(index) else alpha for i, alpha in enumerate(output.alphas))
                return term(dataclasses.replace(output, alphas=alphas), targets).item()
            return term(dataclasses.replace(output, **{head: moved}), targets).item()

        (gradient,) = torch.autograd.grad(term(output, targets), leaf)
        quotient = (at(step) - at(-step)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(quotient, rel=0.05, abs=2e-3)


def test_infinite_value_of_an_ignored_image_does_no_harm() -> None:
    values = torch.tensor([1.0, float("inf"), 3.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_laplacian_sum_of_a_difference_is_the_distance_of_two_pyramids() -> None:
    # linear: scaling scales, and a batch is its images
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    together = laplacian_sum(images, 4)
    assert together.tolist() == pytest.approx([laplacian_sum(image[None], 4).item() for image in images])
    assert laplacian_sum(-3 * images, 4).tolist() == pytest.approx((3 * together).tolist())


# --- the objective ----------------------------------------------------------------------------------------------------


def five_terms() -> dict[str, LossTerm]:
    return {
        "stm": SemanticTrimap(),
        "ctm": CoarseTrimap(),
        "sg": SoftGrounding(),
        "alpha_lr": AlphaLowResolution(),
        "r": Refinement(),
    }


def test_default_weights_are_the_papers() -> None:
    assert [term.weight for term in five_terms().values()] == [10, 0.1, 0.5, 10, 1]


def test_total_is_exactly_the_weighted_sum_of_the_terms(whole_case: WholeCase) -> None:
    output, targets = whole_case()
    total, values = Objective(five_terms())(output, targets)
    stm, ctm, sg, alpha_lr, r = (values[name] for name in ("stm", "ctm", "sg", "alpha_lr", "r"))
    assert torch.equal(total, 10 * stm + 0.1 * ctm + 0.5 * sg + 10 * alpha_lr + 1 * r)
    for name, term in five_terms().items():
        assert torch.equal(values[name], term(output, targets))


def test_ramps_multiply_the_weights(whole_case: WholeCase) -> None:
    output, targets = whole_case()
    objective = Objective(five_terms())
    objective.ramps.update(alpha_lr=0.25, r=0.0)
    total, values = objective(output, targets)
    by_hand = 10 * values["stm"] + 0.1 * values["ctm"] + 0.5 * values["sg"] + 2.5 * values["alpha_lr"]
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_every_output_has_a_gradient_even_if_no_term_needs_it(whole_case: WholeCase) -> None:
    output, targets = whole_case()
    total, _ = Objective({"ctm": CoarseTrimap()})(output, targets)
    total.backward()
    for name, leaf in leaves(output).items():
        assert (leaf.grad.abs().sum() > 0) == (name == "coarse_trimap")


def test_masks_alone_teach_semantics_and_grounding_but_no_alpha(whole_case: WholeCase) -> None:
    output, targets = whole_case()
    targets = dataclasses.replace(targets, has_alpha=torch.tensor([False, False]))
    total, values = Objective(five_terms())(output, targets)
    total.backward()
    assert values["alpha_lr"].item() == values["r"].item() == 0.0
    taught = {name for name, leaf in leaves(output).items() if leaf.grad.abs().sum() > 0}
    assert taught == {"trimap", "coarse_trimap", "grounding"}


def test_refinement_averages_over_the_rows_that_were_refined(whole_case: WholeCase) -> None:
    output, targets = whole_case(batch=4)
    refined = torch.tensor([True, True, True, False])
    targets = dataclasses.replace(targets, has_alpha=torch.tensor([True, False, True, True]))
    value = Refinement()(dataclasses.replace(output, refined=(refined, refined)), targets)
    each = Refinement().per_image(output, targets)
    torch.testing.assert_close(value, (each[0] + each[2]) / 2)
    value.backward()
    assert output.alphas[1].grad.flatten(1).any(1).tolist() == [True, False, True, False]


def test_refinement_leaves_a_scale_out_for_rows_that_do_not_have_it(whole_case: WholeCase) -> None:
    output, targets = whole_case(batch=2)
    rows = (torch.tensor([True, False]), torch.tensor([True, True]))
    value = Refinement().per_image(dataclasses.replace(output, refined=rows), targets)
    full_only = dataclasses.replace(output, alphas=output.alphas[1:], active=output.active[1:])
    expected = torch.stack([Refinement().per_image(output, targets)[0], Refinement().per_image(full_only, targets)[1]])
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert output.alphas[0].grad.flatten(1).any(1).tolist() == [True, False]
