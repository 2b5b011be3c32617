"""The tiny diffusion backbone keeps the contract, and its parts begin as they should."""

from __future__ import annotations

import torch
from backbone_contract import BackboneContract

from lit_matting.backbones import Backbone, TinyDiffusion
from lit_matting.backbones.tiny import ConvStem, WordEncoder


class TestTinyDiffusion(BackboneContract):
    def make(self) -> Backbone:
        return TinyDiffusion()


def test_the_begin_token_can_be_looked_at_but_is_no_word() -> None:
    text = WordEncoder(16, max_tokens=4)(["the red umbrella", "it"])
    assert text.valid.tolist() == [[True, True, True, True], [True, True, False, False]]
    assert text.words.tolist() == [[False, True, True, True], [False, True, False, False]]


def test_the_pooled_phrase_is_the_mean_of_its_words_without_begin_and_padding() -> None:
    text = WordEncoder(16, max_tokens=6)(["the red umbrella"])
    torch.testing.assert_close(text.pooled[0], text.tokens[0, 1:4].mean(0))


def test_attention_to_the_words_differs_from_cell_to_cell() -> None:
    torch.manual_seed(0)
    backbone = TinyDiffusion((16, 32), stem_channels=8, text_channels=16, max_tokens=6).eval()
    output = backbone(torch.rand(1, 3, 64, 64), ["red star"])
    for maps in output.attention.values():
        # what the begin token does not take; without it the words' shares would add up to 1 in every cell
        share = maps[0, output.text.words[0]].sum(0)
        assert share.max() < 1
        assert share.std() > 1e-4


def test_an_untrained_stem_is_the_stem_without_its_blocks() -> None:
    deep, shallow = ConvStem(16, blocks=2), ConvStem(16, blocks=0)
    shallow.load_state_dict({name: value for name, value in deep.state_dict().items() if "blocks" not in name})
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(deep(image), shallow(image), rtol=0, atol=0)
