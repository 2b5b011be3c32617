"""Recording cross-attention: same result, nothing recorded twice, nothing large kept, float32 under autocast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_models import TINY_TEXT, TINY_UNET, tiny_text_model, tiny_unet, tiny_vae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_matting.backbones import DiffusionBackbone
from lit_matting.backbones.attention import AttentionStore, RecordingAttention, record_cross_attention
from lit_matting.backbones.base import TextFeatures
from lit_matting.backbones.image import VAEEncoder
from lit_matting.backbones.text import CLIPEncoder, HashedVocabulary
from lit_matting.checks import InputError

TOKENS = 40


def make_backbone(unet: UNet2DConditionModel | None = None, **options: Any) -> DiffusionBackbone:
    torch.manual_seed(0)
    text_encoder = CLIPEncoder(tiny_text_model(), HashedVocabulary(TINY_TEXT["vocab_size"]))
    return DiffusionBackbone(VAEEncoder(tiny_vae()), text_encoder, unet or tiny_unet(), **options).eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 16, 24), torch.randn(2, TOKENS, 32)


def test_recording_equals_the_fused_kernel_in_every_layer() -> None:
    unet = tiny_unet()
    recorded = copy.deepcopy(unet)
    states = torch.randn(2, TOKENS, 32)
    # what diffusers makes of a mask: a bias, one row for all queries
    bias = torch.where(torch.arange(TOKENS) < torch.tensor([[5], [9]]), 0.0, -10000.0)[:, None]
    for name in record_cross_attention(recorded, AttentionStore()):
        fused, plain = (model.get_submodule(f"{name}.attn2") for model in (unet, recorded))
        cells = torch.randn(2, 24, fused.to_q.in_features)
        for mask in (None, bias):
            with torch.no_grad():
                expected = fused(cells, encoder_hidden_states=states, attention_mask=mask)
                found = plain(cells, encoder_hidden_states=states, attention_mask=mask)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_padding_mask_keeps_attention_off_padding(inputs: tuple[Tensor, Tensor]) -> None:
    latent, states = inputs
    mask = torch.arange(TOKENS) < torch.tensor([[5], [9]])
    unet = tiny_unet()
    recorded, store = copy.deepcopy(unet), AttentionStore()
    record_cross_attention(recorded, store)
    arguments = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    with torch.no_grad(), store.recording((16, 24)):
        expected = unet(latent, 1, **arguments).sample
        found = recorded(latent, 1, **arguments).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for maps in store.take().values():
        assert maps[0, 5:].max() == 0
        assert maps[0, :5].sum(0).min() > 0.999


def test_only_cross_attention_is_replaced() -> None:
    unet = tiny_unet()
    names = record_cross_attention(unet, AttentionStore())
    kinds = {name: type(processor) for name, processor in unet.attn_processors.items()}
    assert len(kinds) == 32
    assert sum(kind is RecordingAttention for kind in kinds.values()) == 16 == len(names)
    for name, kind in kinds.items():
        assert kind is (RecordingAttention if ".attn2." in name else AttnProcessor2_0)


def test_a_unet_without_cross_attention_is_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    with pytest.raises(InputError, match="no cross-attention"):
        record_cross_attention(unet, AttentionStore())


def test_attention_of_another_kind_is_refused_instead_of_miscomputed() -> None:
    unet = tiny_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.residual_connection = True
    with pytest.raises(InputError, match=r"mid_block.*attn2.*has residual_connection"):
        record_cross_attention(unet, AttentionStore())


def test_maps_have_the_grid_of_their_level_on_wide_images(inputs: tuple[Tensor, Tensor]) -> None:
    latent, states = inputs
    unet, store = tiny_unet(), AttentionStore()
    record_cross_attention(unet, store)
    with torch.no_grad(), store.recording((16, 24)):
        unet(latent, 1, encoder_hidden_states=states)
    sizes = {name: tuple(maps.shape[-2:]) for name, maps in store.take().items()}
    assert sizes["down_blocks.0.attentions.0.transformer_blocks.0"] == (16, 24)
    assert sizes["up_blocks.2.attentions.1.transformer_blocks.0"] == (8, 12)
    assert sizes["mid_block.attentions.0.transformer_blocks.0"] == (2, 3)


def test_a_map_lies_the_way_the_image_does() -> None:
    # one bright latent cell far off the diagonal: the finest map must change around it, not around its mirror image
    latent, states = torch.zeros(1, 4, 16, 24), torch.randn(1, TOKENS, 32)
    unet, store = tiny_unet(), AttentionStore()
    record_cross_attention(unet, store)

    def first_map() -> Tensor:
        with torch.no_grad(), store.recording((16, 24)):
            unet(latent, 1, encoder_hidden_states=states)
        return store.take()["down_blocks.0.attentions.0.transformer_blocks.0"]

    plain = first_map()
    latent[0, :, 3, 20] = 30
    change = (first_map() - plain).abs().sum(1)[0]
    row, column = divmod(int(change.argmax()), 24)
    assert abs(row - 3) <= 2
    assert abs(column - 20) <= 2


def test_autocast_leaves_probabilities_in_float32(inputs: tuple[Tensor, Tensor]) -> None:
    latent, states = inputs
    unet, store = tiny_unet(), AttentionStore()
    record_cross_attention(unet, store)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), store.recording((16, 24)):
        unet(latent, 1, encoder_hidden_states=states)
    for maps in store.take().values():
        assert maps.dtype == torch.float32
        # 40 probabilities rounded to bfloat16 miss 1 by about 1e-3
        torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]), rtol=0, atol=1e-6)


# --- gradient checkpointing ---------------------------------------------------------------------


def loss_of(backbone: DiffusionBackbone, latent: Tensor, states: Tensor) -> Tensor:
    """A number that depends on the features and on every attention map."""
    everything = torch.ones(states.shape[:2], dtype=torch.bool)
    text = TextFeatures(tokens=states, words=everything, valid=everything, pooled=states[:, 0])
    output = backbone.decode(latent, text)
    assert all(maps.requires_grad for maps in output.attention.values())
    draw = torch.Generator().manual_seed(5)
    total = sum(feature.square().mean() for feature in output.features.values())
    return total + sum((maps * torch.rand(maps.shape, generator=draw)).sum() for maps in output.attention.values())


def test_checkpointing_gives_the_same_gradients_and_records_once(
    inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    kept: list[str] = []
    add: Callable[..., None] = AttentionStore.add

    def counted(store: AttentionStore, name: str, mean: Tensor) -> None:
        before = len(store.maps)
        add(store, name, mean)
        calls.append(name)
        kept.extend([name] * (len(store.maps) - before))

    monkeypatch.setattr(AttentionStore, "add", counted)
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone(gradient_checkpointing=checkpointing).train()
        calls.clear()
        kept.clear()
        loss_of(backbone, *inputs).backward()
        # the layers ran again in the backward pass, and were not recorded again
        assert len(calls) == (32 if checkpointing else 16)
        assert len(kept) == 16
        assert not backbone.store.maps
        gradients.append({name: value.grad for name, value in backbone.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_maps_that_carry_no_gradient_while_their_layer_trains_are_refused(inputs: tuple[Tensor, Tensor]) -> None:
    backbone = make_backbone().train()
    reentrant = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    backbone.unet.enable_gradient_checkpointing(reentrant)
    with pytest.raises(InputError, match=r"down_blocks.0.*carries no gradient.*`use_reentrant=False`"):
        loss_of(backbone, inputs[0].requires_grad_(), inputs[1])
    # without gradients there is nothing to miss, and a frozen UNet has none
    with torch.no_grad():
        backbone(torch.rand(1, 3, 64, 64), ["the cat"])
    make_backbone(train_unet=False, adapt_text=False).train()(torch.rand(1, 3, 64, 64), ["the cat"])


def test_an_interrupted_pass_leaves_nothing_behind(inputs: tuple[Tensor, Tensor]) -> None:
    backbone = make_backbone()
    loss_of(backbone, *inputs)
    with pytest.raises(RuntimeError):
        loss_of(backbone, inputs[0], torch.randn(2, TOKENS, 31))
    expected = float(loss_of(make_backbone(), *inputs).detach())
    assert float(loss_of(backbone, *inputs).detach()) == expected


# --- memory -------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Watches every operation's results."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_maps_of_a_512_pixel_image_take_4_megabytes_and_self_attention_none() -> None:
    # the layers of Stable Diffusion 2.1 on its 64 x 64 latent; widths do not matter to the maps
    latent, states = torch.randn(1, 4, 64, 64), torch.randn(1, TOKENS, 32)
    unet, store = tiny_unet(), AttentionStore()
    record_cross_attention(unet, store)
    with torch.no_grad(), LargestTensor() as largest, store.recording((64, 64)):
        unet(latent, 1, encoder_hidden_states=states)
    maps = store.take()
    cells = 5 * 64**2 + 5 * 32**2 + 5 * 16**2 + 8**2
    assert sum(value.numel() * value.element_size() for value in maps.values()) == cells * TOKENS * 4 == 4_311_040
    # cross-attention of all heads of one layer is the largest thing that ever exists; self-attention's map would be
    # 2 x 4096 x 4096, fifty times that
    heads = TINY_UNET["attention_head_dim"][0]
    wide = 2 * 4 * TINY_UNET["block_out_channels"][0]  # the feed-forward layer's two halves
    assert largest.elements == max(heads * 64**2 * TOKENS, wide * 64**2)


def test_nothing_is_kept_after_the_maps_are_taken(inputs: tuple[Tensor, Tensor]) -> None:
    backbone = make_backbone()
    with torch.no_grad():
        backbone(torch.rand(1, 3, 64, 64), ["the cat"])
    assert backbone.store.maps == {}
    assert backbone._before_upsampling == []


# --- compilation --------------------------------------------------------------------------------


def small_unet() -> UNet2DConditionModel:
    """Two levels: dynamo needs seconds for each layer."""
    return tiny_unet(
        block_out_channels=[16, 32],
        attention_head_dim=[2, 4],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_the_maps_of_a_compiled_pass_are_those_of_an_eager_one(
    inputs: tuple[Tensor, Tensor], checkpointing: bool
) -> None:
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(3)
        backbone = make_backbone(small_unet(), gradient_checkpointing=compiled and checkpointing).train()
        if compiled:
            # the store is written inside of what is checkpointed, which dynamo leaves to Python: parts are compiled
            backbone.decode = torch.compile(backbone.decode, backend="aot_eager", fullgraph=not checkpointing)
        loss_of(backbone, *inputs).backward()
        gradients.append({name: value.grad for name, value in backbone.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
    of_maps = [name for name in gradients[1] if name.endswith("attn2.to_q.weight")]
    assert len(of_maps) == 4
    assert all(gradients[1][name].any() for name in of_maps)


@pytest.mark.slow
def test_the_pass_compiles_as_one_graph(inputs: tuple[Tensor, Tensor]) -> None:
    backbone = make_backbone(small_unet())
    text = backbone.encode_text(["the red cat", "a dog"])
    compiled = torch.compile(backbone.decode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = backbone.decode(inputs[0], text)
        found = compiled(inputs[0], text)
        again = compiled(inputs[0] + 1, text)
    assert list(found.attention) == list(expected.attention)
    for stride, feature in expected.features.items():
        torch.testing.assert_close(found.features[stride], feature, rtol=0, atol=1e-5)
    for name, maps in expected.attention.items():
        torch.testing.assert_close(found.attention[name], maps, rtol=0, atol=1e-6)
    # the second call computed anew, not what the first had recorded
    assert all((again.attention[name] - found.attention[name]).abs().max() > 0 for name in again.attention)
