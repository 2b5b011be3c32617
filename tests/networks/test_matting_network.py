"""The whole network: shapes, batches, phrases, and which loss teaches which part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from data_modules import transforms
from lit_matting.losses import AlphaLowResolution, CoarseTrimap, LossTerm, Refinement, SemanticTrimap, SoftGrounding
from lit_matting.networks.heads import AlphaHead
from lit_matting.networks.inference import INTERPOLATION, matte_at_native_size, square
from lit_matting.networks.matting_network import MattingNetwork, enlarge
from lit_matting.networks.neck import Neck
from lit_matting.records import Detail, MattingOutput
from lit_matting.targets import targets_for

MakeNetwork = Callable[..., MattingNetwork]
PHRASES = ("the red umbrella", "a dog")


def assert_alike(one: MattingOutput, other: MattingOutput, tolerance: float = 1e-4) -> None:
    for name in ("alpha", "alpha_lr", "trimap", "coarse_trimap", "grounding", "features"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=tolerance), name


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_outputs_have_the_shapes_of_the_records(make_network: MakeNetwork) -> None:
    output = make_network()(torch.rand(2, 3, 64, 96), PHRASES)
    assert output.alpha.shape == (2, 1, 64, 96)
    assert output.alpha_lr.shape == output.trimap.shape == output.grounding.shape == (2, 1, 8, 12)
    assert output.coarse_trimap.shape == (2, 3, 4, 6)  # this backbone has strides 8 and 16 only
    assert output.features.shape == (2, 16, 8, 12)
    assert [tuple(alpha.shape) for alpha in output.alphas] == [(2, 1, 64, 96)]
    assert [tuple(active.shape) for active in output.active] == [(2, 64, 96)]
    assert {tuple(maps.shape) for maps in output.attention.values()} == {(2, 4, 6)}
    for name in ("alpha", "alpha_lr", "trimap"):
        assert 0 <= getattr(output, name).min() <= getattr(output, name).max() <= 1


def test_outputs_are_float32_under_autocast(make_network: MakeNetwork) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = make_network()(torch.rand(2, 3, 64, 64), PHRASES)
    for name in ("alpha", "alpha_lr", "trimap", "grounding"):
        assert getattr(output, name).dtype == torch.float32, name


def test_network_without_a_refiner_gives_the_enlarged_alpha(make_network: MakeNetwork) -> None:
    output = make_network(refiner=None)(torch.rand(2, 3, 64, 64), PHRASES)
    assert torch.equal(output.alpha, enlarge(output.alpha_lr, (64, 64)))
    assert output.alphas == output.active == ()


def test_refiner_can_be_left_out_of_a_pass(make_network: MakeNetwork) -> None:
    network, image = make_network(), torch.rand(2, 3, 64, 64)
    plain, refined = network(image, PHRASES, refine=False), network(image, PHRASES)
    assert plain.alphas == ()
    assert torch.equal(plain.alpha, enlarge(refined.alpha_lr, (64, 64)))
    assert not torch.equal(refined.alpha, plain.alpha)


def test_neck_can_use_the_finest_levels_only(make_network: MakeNetwork) -> None:
    network = make_network(neck=partial(Neck, channels=16, levels=1))
    assert network.neck.strides == [8]
    assert network(torch.rand(1, 3, 64, 64), PHRASES[:1]).coarse_trimap.shape == (1, 3, 8, 8)


def test_coarse_trimap_takes_the_level_nearest_to_the_asked_stride(make_network: MakeNetwork) -> None:
    assert make_network(coarse_stride=8).coarse_stride == 8
    assert make_network(coarse_stride=32).coarse_stride == 16


# --- images and phrases -----------------------------------------------------------------------------------------------


def test_each_pair_is_answered_alike_alone_and_in_a_batch(make_network: MakeNetwork) -> None:
    network, image = make_network(), torch.rand(2, 3, 64, 64)
    together = network(image, PHRASES)
    for index in (0, 1):
        alone = network(image[index : index + 1], PHRASES[index : index + 1])
        assert torch.allclose(alone.alpha, together.alpha[index : index + 1], atol=1e-4)
        assert torch.allclose(alone.grounding, together.grounding[index : index + 1], atol=1e-4)


def test_phrase_decides_what_is_found(make_network: MakeNetwork) -> None:
    image = torch.rand(1, 3, 64, 64).expand(2, -1, -1, -1)
    output = make_network()(image, PHRASES)
    assert (output.grounding[0] - output.grounding[1]).abs().max() > 0.01


def test_two_phrases_of_one_image_equal_two_copies_of_the_image(make_network: MakeNetwork) -> None:
    network = make_network()
    pictures = torch.rand(2, 3, 64, 64)
    image = pictures.repeat_interleave(2, 0)
    phrases = ("a dog", "the red umbrella", "smoke", "the thing on the left")
    assert_alike(network(image, phrases, phrases_per_image=2), network(image, phrases))


def test_image_is_encoded_once_for_all_its_phrases(make_network: MakeNetwork) -> None:
    network, encoded = make_network(), []
    network.backbone.image_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    network(torch.rand(2, 3, 64, 64).repeat_interleave(3, 0), ("a", "b", "c", "d", "e", "f"), phrases_per_image=3)
    assert encoded == [2]


@pytest.mark.parametrize(("phrases", "per_image"), [(1, 1), (3, 1), (2, 4)])
def test_phrases_that_do_not_match_the_images_are_refused(
    make_network: MakeNetwork, phrases: int, per_image: int
) -> None:
    with pytest.raises(ValueError, match=rf"a batch of 2 images, {per_image} phrases to each.*got {phrases}"):
        make_network()(torch.rand(2, 3, 64, 64), ["a dog"] * phrases, phrases_per_image=per_image)


def test_image_size_the_backbone_cannot_take_is_refused(make_network: MakeNetwork) -> None:
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        make_network()(torch.rand(1, 3, 60, 64), ["a dog"])


# --- crops and photographs --------------------------------------------------------------------------------------------


def test_detail_refines_the_crop_and_leaves_the_rest_of_the_output_alone(make_network: MakeNetwork) -> None:
    network, image = make_network(), torch.rand(2, 3, 64, 64)
    crop = Detail(torch.rand(2, 3, 40, 40), torch.zeros(2, 1, 40, 40), torch.tensor([[0.1, 0.2, 0.5, 0.5]] * 2))
    output, whole = network(image, PHRASES, detail=crop), network(image, PHRASES)
    assert output.alpha.shape == (2, 1, 40, 40)
    for name in ("alpha_lr", "trimap", "coarse_trimap", "grounding"):
        assert torch.equal(getattr(output, name), getattr(whole, name))


@pytest.mark.parametrize("size", [(64, 64), (75, 131), (200, 40)])
def test_photograph_of_any_size_gets_a_matte_of_exactly_its_size(
    make_network: MakeNetwork, size: tuple[int, int]
) -> None:
    output = matte_at_native_size(make_network(), torch.rand(1, 3, *size), PHRASES[:1], 64)
    assert output.alpha.shape == (1, 1, *size)
    assert output.alpha_lr.shape == (1, 1, 8, 8)


def test_several_phrases_for_one_photograph_equal_one_by_one(make_network: MakeNetwork) -> None:
    network, photograph = make_network(), torch.rand(1, 3, 75, 131)
    together = matte_at_native_size(network, photograph, PHRASES, 64)
    assert together.alpha.shape == (2, 1, 75, 131)
    for index, phrase in enumerate(PHRASES):
        alone = matte_at_native_size(network, photograph, [phrase], 64)
        assert torch.allclose(together.alpha[index], alone.alpha[0], atol=1e-4)


def test_photograph_of_the_networks_own_size_is_not_resampled(make_network: MakeNetwork) -> None:
    network, photograph = make_network(), torch.rand(1, 3, 64, 64)
    assert_alike(matte_at_native_size(network, photograph, PHRASES[:1], 64), network(photograph, PHRASES[:1]), 0.0)


@pytest.mark.parametrize("size", [(64, 64), (65, 200), (128, 64), (1013, 700), (40, 300), (30, 20)])
def test_network_sees_a_photograph_as_it_saw_the_training_data(size: tuple[int, int]) -> None:
    photograph = torch.rand(2, 3, *size)
    seen = square(photograph, 64)
    assert seen.shape == (2, 3, 64, 64)
    for given, shown in zip(photograph, seen):
        expected = transforms.resize(given.permute(1, 2, 0).numpy(), 64, 64)
        assert torch.allclose(shown.permute(1, 2, 0), torch.from_numpy(expected), atol=2e-6)
    assert INTERPOLATION == transforms.INTERPOLATION


# --- which loss teaches which part ------------------------------------------------------------------------------------

HEADS = ("coarse_trimap_head", "grounding_head", "trimap_head", "alpha_head", "project", "refiner")


def taught(network: MattingNetwork, term: LossTerm, disc: Callable[..., Tensor]) -> set[str]:
    """Names of the network's parts that the term has a gradient for."""
    alpha = disc(64).expand(2, -1, -1, -1)
    output = network.train()(torch.rand(2, 3, 64, 64), PHRASES)
    targets = targets_for(alpha, torch.tensor([True, True]), (8, 8), tuple(output.coarse_trimap.shape[-2:]))
    term(output, targets).backward()
    parts = set()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().sum() > 0:
            parts.add(".".join(name.split(".")[:3]) if name.startswith("neck") else name.split(".")[0])
    return parts


NECK = {"neck.project.8", "neck.fuse.8", "neck.project.16", "neck.fuse.16"}
COARSE_NECK = {"neck.project.16", "neck.fuse.16"}


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        (SemanticTrimap(), {"backbone", *NECK, "grounding_head", "trimap_head"}),
        (CoarseTrimap(), {"backbone", *COARSE_NECK, "coarse_trimap_head"}),
        (SoftGrounding(), {"backbone", *NECK, "grounding_head"}),
        (AlphaLowResolution(), {"backbone", *NECK, "grounding_head", "trimap_head", "alpha_head"}),
        (Refinement(), {"project", "refiner"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LossTerm) else "",
)
def test_each_loss_teaches_the_parts_it_is_for_and_no_other(
    make_network: MakeNetwork, disc: Callable[..., Tensor], term: LossTerm, parts: set[str]
) -> None:
    assert taught(make_network(), term, disc) == parts


def test_refinement_teaches_everything_before_it_if_asked(
    make_network: MakeNetwork, make_refiner: Callable, disc: Callable[..., Tensor]
) -> None:
    network = make_network(refiner=make_refiner(detach_inputs=False))
    everything = {"backbone", *NECK, "grounding_head", "trimap_head", "alpha_head", "project", "refiner"}
    assert taught(network, Refinement(), disc) == everything


def test_alpha_leaves_the_trimap_to_its_own_losses_if_asked(
    make_network: MakeNetwork, disc: Callable[..., Tensor]
) -> None:
    network = make_network(alpha_head=partial(AlphaHead, detach_trimap=True))
    assert "trimap_head" not in taught(network, AlphaLowResolution(), disc)
