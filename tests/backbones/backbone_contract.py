"""What every backbone must keep. A test class inherits :class:`BackboneContract` and gives ``make``; that is all."""

from __future__ import annotations

import copy
import logging
import pickle
from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor

from lit_matting.backbones import Backbone, BackboneOutput

PHRASES = ["the red umbrella", "a dog left of the glass bowl"]


class BackboneContract(ABC):
    """Tests of the contract in :mod:`lit_matting.backbones.base`."""

    @abstractmethod
    def make(self) -> Backbone:
        """Return a small instance; two calls give the same frozen parts."""

    size = 128
    """Side of the test images, in pixels."""
    has_attention = True

    @pytest.fixture
    def backbone(self) -> Backbone:
        torch.manual_seed(0)
        return self.make().eval()

    @pytest.fixture
    def image(self) -> Tensor:
        return torch.rand(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(3))

    def test_features_have_the_channels_and_strides_it_states(self, backbone: Backbone, image: Tensor) -> None:
        image = image[..., : self.size - backbone.size_multiple]
        features = backbone(image, PHRASES).features
        assert list(features) == list(backbone.channels) == sorted(backbone.channels)
        for stride, feature in features.items():
            expected = (2, backbone.channels[stride], image.shape[-2] // stride, image.shape[-1] // stride)
            assert tuple(feature.shape) == expected
            assert feature.isfinite().all()

    def test_text_features_tell_words_from_the_rest(self, backbone: Backbone) -> None:
        text = backbone.encode_text(PHRASES)
        tokens = backbone.max_tokens
        assert tuple(text.tokens.shape) == (2, tokens, backbone.text_channels)
        assert tuple(text.pooled.shape) == (2, backbone.text_channels)
        assert text.words.dtype == text.valid.dtype == torch.bool
        assert tuple(text.words.shape) == tuple(text.valid.shape) == (2, tokens)
        # every word can be looked at, and the longer phrase has more of them
        assert not (text.words & ~text.valid).any()
        assert 0 < text.words[0].sum() < text.words[1].sum()

    def test_attention_is_a_float32_distribution_over_tokens(self, backbone: Backbone, image: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            attention = backbone(image, PHRASES).attention
        assert bool(attention) == self.has_attention
        for maps in attention.values():
            assert maps.dtype == torch.float32
            assert tuple(maps.shape[:2]) == (2, backbone.max_tokens)
            assert maps.min() >= 0
            torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]), rtol=0, atol=1e-5)

    def test_three_steps_equal_one_call(self, backbone: Backbone, image: Tensor) -> None:
        whole = backbone(image, PHRASES)
        steps = backbone.decode(backbone.encode_image(image), backbone.encode_text(PHRASES))
        assert_same(whole, steps, tolerance=1e-6)

    def test_a_batch_of_two_equals_two_batches_of_one(self, backbone: Backbone, image: Tensor) -> None:
        both = backbone(image, PHRASES)
        for row in range(2):
            alone = backbone(image[row : row + 1], PHRASES[row : row + 1])
            for stride, feature in alone.features.items():
                torch.testing.assert_close(both.features[stride][row : row + 1], feature, rtol=1e-4, atol=1e-4)

    def test_the_phrase_changes_the_features(self, backbone: Backbone, image: Tensor) -> None:
        latent = backbone.encode_image(image)
        one, other = (backbone.decode(latent, backbone.encode_text([phrase] * 2)) for phrase in PHRASES)
        assert any((one.features[stride] - other.features[stride]).abs().max() > 1e-5 for stride in one.features)

    def test_every_trained_parameter_gets_a_gradient(self, backbone: Backbone, image: Tensor) -> None:
        backbone.train()
        output = backbone(image, PHRASES)
        total = sum(feature.square().mean() for feature in output.features.values())
        total = total + output.text.pooled.square().mean()
        total = total + sum((maps * torch.rand_like(maps)).sum() for maps in output.attention.values())
        total.backward()
        idle = [name for name, value in backbone.named_parameters() if value.requires_grad and value.grad is None]
        assert idle == []

    def test_frozen_parts_stay_frozen(self, backbone: Backbone) -> None:
        backbone.train()
        for module in backbone.frozen_modules().values():
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert not any(child.training for child in module.modules())
        assert backbone.training

    def test_frozen_hashes_agree_between_two_builds(self, backbone: Backbone) -> None:
        assert backbone.frozen_hashes() == self.make().frozen_hashes()
        assert set(backbone.frozen_hashes()) == set(backbone.frozen_modules())

    def test_trained_weights_alone_restore_it(self, backbone: Backbone, image: Tensor) -> None:
        frozen = tuple(f"{name}." for name in backbone.frozen_modules())
        trained = {name: value for name, value in backbone.state_dict().items() if not name.startswith(frozen)}
        torch.manual_seed(9)
        other = self.make().eval()
        result = other.load_state_dict(trained, strict=False)
        assert not result.unexpected_keys
        assert all(name.startswith(frozen) for name in result.missing_keys)
        assert_same(backbone(image, PHRASES), other(image, PHRASES))

    def test_copies_answer_for_themselves(self, backbone: Backbone, image: Tensor) -> None:
        expected = backbone(image, PHRASES)
        for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert_same(twin(image, PHRASES), expected)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
        assert_same(backbone(image, PHRASES), expected)

    def test_training_works_after_validation_in_inference_mode(self, backbone: Backbone, image: Tensor) -> None:
        with torch.inference_mode():
            backbone(image, PHRASES)
        backbone.train()
        sum(feature.mean() for feature in backbone(image, PHRASES).features.values()).backward()

    def test_a_phrase_of_any_length_fits(self, backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            text = backbone.encode_text(["the red umbrella " * 40])
        assert tuple(text.tokens.shape[:2]) == (1, backbone.max_tokens)
        assert "cut" in caplog.text

    def test_a_phrase_without_words_is_refused(self, backbone: Backbone) -> None:
        with pytest.raises(ValueError, match="has no words"):
            backbone.encode_text(["..."])

    def test_a_size_that_does_not_fit_is_refused_with_one_that_does(self, backbone: Backbone) -> None:
        multiple = backbone.size_multiple
        with pytest.raises(ValueError, match=rf"multiple of {multiple} .* \(try {2 * multiple}\)"):
            backbone(torch.rand(1, 3, 2 * multiple, 2 * multiple + 1), PHRASES[:1])

    def test_as_many_phrases_as_images(self, backbone: Backbone, image: Tensor) -> None:
        with pytest.raises(ValueError, match="2 images needs as many phrases, got 1"):
            backbone(image, PHRASES[:1])


def assert_same(first: BackboneOutput, second: BackboneOutput, tolerance: float = 0.0) -> None:
    """Compare all features and maps of two outputs."""
    assert list(first.features) == list(second.features)
    assert list(first.attention) == list(second.attention)
    for stride, feature in first.features.items():
        torch.testing.assert_close(feature, second.features[stride], rtol=0, atol=tolerance)
    for name, maps in first.attention.items():
        torch.testing.assert_close(maps, second.attention[name], rtol=0, atol=tolerance)
