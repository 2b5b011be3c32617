"""The heads: the trimap as a prior of the alpha, and grounding from attention and from likeness."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones import BackboneOutput, TextFeatures
from lit_matting.networks.heads import AlphaHead, CoarseTrimapHead, GroundingHead, TrimapHead, standardise


def seen(attention: dict[str, Tensor] | None = None, words: list[list[bool]] | None = None) -> BackboneOutput:
    """What a backbone might say about two phrases of up to three tokens."""
    word = torch.tensor(words or [[False, True, False], [False, True, True]])
    text = TextFeatures(tokens=torch.randn(2, 3, 16), words=word, valid=word, pooled=torch.randn(2, 16))
    return BackboneOutput(features={}, attention=attention or {}, text=text)


# --- the alpha's prior ------------------------------------------------------------------------------------------------


def test_alpha_is_the_trimap_where_it_is_sure_and_the_heads_where_it_is_not() -> None:
    head = AlphaHead(16, hidden=8)
    features, grounding = torch.randn(1, 16, 1, 5), torch.zeros(1, 1, 1, 5)
    trimap = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5)
    nn.init.zeros_(head.layers[-1].weight)
    for bias in (-2.0, 0.0, 3.0):
        nn.init.constant_(head.layers[-1].bias, bias)
        s = torch.tensor(bias).sigmoid().item()
        # p_foreground = 0, 0, 0, 1/2, 1 and p_unknown = 0, 1/2, 1, 1/2, 0
        wanted = [0.0, 0.5 * s, s, 0.5 + 0.5 * s, 1.0]
        assert head(features, trimap, grounding).flatten().tolist() == pytest.approx(wanted)


def test_alpha_starts_from_the_grounding_where_the_trimap_is_undecided() -> None:
    head = AlphaHead(16, hidden=8)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    grounding = torch.tensor([-3.0, 0.0, 2.0]).view(1, 1, 1, 3).requires_grad_()
    alpha = head(torch.randn(1, 16, 1, 3), torch.full((1, 1, 1, 3), 0.5), grounding)
    assert torch.allclose(alpha, grounding.sigmoid())
    alpha.sum().backward()
    assert grounding.grad.abs().sum() == 0  # a start, not a handle to pull the grounding by


def test_alpha_never_leaves_its_range() -> None:
    head = AlphaHead(16, hidden=8)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=3.0)
    alpha = head(10 * torch.randn(4, 16, 8, 8), torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8))
    assert alpha.min() >= 0
    assert alpha.max() <= 1


# --- grounding --------------------------------------------------------------------------------------------------------


def test_standardised_map_has_mean_0_and_deviation_1_whatever_its_scale() -> None:
    maps = torch.rand(3, 1, 8, 8)
    result = standardise(maps)
    assert torch.allclose(result.mean((1, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(result.flatten(1).std(1, unbiased=False), torch.ones(3), atol=1e-4)
    assert torch.allclose(standardise(0.025 * maps + 0.5), result, atol=1e-3)


def test_constant_map_says_nothing() -> None:
    # but for what float32 makes of its mean
    assert standardise(torch.full((1, 1, 16, 16), 0.3)).abs().max().item() < 0.05
    assert standardise(torch.zeros(1, 1, 16, 16)).abs().max().item() == 0.0


def test_only_the_phrases_own_words_take_part_in_grounding() -> None:
    attention = torch.rand(2, 3, 4, 4)
    head = GroundingHead(16, 16, similarity=False)
    logits, word_maps = head(seen({"layer": attention}), torch.randn(2, 16, 4, 4))
    # begin and padding tokens hold most of the attention; the first phrase has one word, the second two
    by_hand = torch.stack([attention[0, 1], (attention[1, 1] + attention[1, 2]) / 2])
    assert torch.allclose(word_maps["layer"], by_hand)
    louder = attention.clone()
    louder[:, 0] *= 50
    louder[0, 2] *= 50
    assert torch.equal(head(seen({"layer": louder}), torch.randn(2, 16, 4, 4))[0], logits)


def test_attention_logits_are_slope_times_standardised_map_plus_offset() -> None:
    fine, coarse = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)
    head = GroundingHead(16, 16, similarity=False)
    nn.init.constant_(head.slope, 2.5)
    nn.init.constant_(head.offset, -1.0)
    words = [[False, True, False], [False, True, False]]
    logits, _ = head(seen({"fine": fine, "coarse": coarse}, words), torch.randn(2, 16, 4, 4))
    resized = nn.functional.interpolate(coarse[:, 1:2], size=(4, 4), mode="bilinear", align_corners=False)
    mean = ((fine[:, 1:2] + resized) / 2).flatten(1)
    by_hand = (mean - mean.mean(1, keepdim=True)) / mean.std(1, keepdim=True, unbiased=False)
    assert torch.allclose(logits.flatten(1), 2.5 * by_hand - 1.0, atol=1e-4)


def test_raw_attention_that_averages_one_over_t_can_still_ground() -> None:
    # probabilities near 1/40 everywhere: their order is all that counts
    attention = torch.full((2, 3, 8, 8), 0.025)
    attention[:, 1, 2:4, 2:4] += 0.002
    head = GroundingHead(16, 16, similarity=False)
    found = head(seen({"layer": attention}), torch.randn(2, 16, 8, 8))[0].sigmoid()
    assert found[0, 0, 2:4, 2:4].min() > 0.9
    assert found[0, 0, 5:, 5:].max() < 0.5


def test_attention_stays_in_float32_under_autocast() -> None:
    attention = 0.025 + 0.0005 * torch.randn(2, 3, 16, 16)
    head, features = GroundingHead(16, 16, similarity=False), torch.randn(2, 16, 16, 16)
    plain = head(seen({"layer": attention}), features)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(seen({"layer": attention}), features)[0]
    assert (mixed - plain).abs().mean() < 0.01 * plain.std()


def test_likeness_is_a_cosine_between_phrase_and_cell() -> None:
    head = GroundingHead(16, 16, attention=False, similarity_scale=8.0)
    features, phrases = torch.randn(2, 16, 4, 4), seen()
    logits, _ = head(phrases, features)
    image = head.image_projection(features)
    text = head.text_projection(phrases.text.pooled)
    for b, y, x in ((0, 0, 0), (0, 2, 3), (1, 3, 1)):
        cosine = torch.dot(image[b, :, y, x], text[b]) / (image[b, :, y, x].norm() * text[b].norm())
        assert logits[b, 0, y, x].item() == pytest.approx((8 * cosine + head.offset).item(), abs=1e-4)


def test_likeness_is_silent_at_first_where_attention_is_pretrained() -> None:
    attention, features = {"layer": torch.rand(2, 3, 4, 4)}, torch.randn(2, 16, 4, 4)
    head = GroundingHead(16, 16)
    with_likeness = head(seen(attention), features)[0]
    head.similarity = False
    assert torch.equal(head(seen(attention), features)[0], with_likeness)


def test_grounding_head_without_any_source_is_refused() -> None:
    with pytest.raises(ValueError, match="`similarity`, `attention` or both"):
        GroundingHead(16, 16, similarity=False, attention=False)


# --- the others -------------------------------------------------------------------------------------------------------


def test_coarse_trimap_head_gives_three_logits_per_block() -> None:
    assert CoarseTrimapHead(16)(torch.randn(2, 16, 4, 6)).shape == (2, 3, 4, 6)


def test_trimap_reads_the_grounding_map() -> None:
    head, features = TrimapHead(16, hidden=8), torch.randn(1, 16, 4, 4)
    here, nowhere = (head(features, torch.full((1, 1, 4, 4), logit)) for logit in (5.0, -5.0))
    assert here.shape == (1, 1, 4, 4)
    assert min(here.min(), nowhere.min()) >= 0
    assert max(here.max(), nowhere.max()) <= 1
    assert not torch.allclose(here, nowhere)
