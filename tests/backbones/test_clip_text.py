"""Phrases to token features: ids, words, padding, the cache, and parity with transformers used directly."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_text_model, write_tokenizer
from transformers import CLIPTextModel

from lit_matting.backbones.text import CLIPEncoder, CLIPVocabulary, CLIPWords, HashedVocabulary
from lit_matting.checks import InputError


@pytest.fixture
def vocabulary(tmp_path: Path) -> CLIPVocabulary:
    return CLIPVocabulary(write_tokenizer(tmp_path))


def reference_states(model: CLIPTextModel, folder: Path, phrase: str, pad_token: str, length: int) -> torch.Tensor:
    """Transformers' tokenizer and model, straight."""
    tokenizer = write_tokenizer(folder, pad_token)
    ids = tokenizer(phrase, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).last_hidden_state


def test_only_the_phrases_own_tokens_are_words(vocabulary: CLIPVocabulary) -> None:
    words = CLIPWords(vocabulary, max_tokens=8)(["the red cat", "red"])
    begin, end = vocabulary.begin, vocabulary.end
    the, red, cat = (vocabulary.id_of(token) for token in ("the</w>", "red</w>", "cat</w>"))
    assert words.ids[0].tolist() == [begin, the, red, cat, end, end, end, end]
    assert words.words.int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert words.valid.int().tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert words.ends.tolist() == [4, 2]


def test_exclamation_mark_padding_is_id_zero_and_no_word(vocabulary: CLIPVocabulary) -> None:
    words = CLIPWords(vocabulary, max_tokens=6, pad_token="!")(["red"])
    assert words.ids[0, 3:].tolist() == [0, 0, 0]
    assert not words.words[0, 3:].any()


def test_a_long_phrase_keeps_its_end_token(vocabulary: CLIPVocabulary) -> None:
    words = CLIPWords(vocabulary, max_tokens=5)(["the red cat the red", "the red cat"])
    assert words.ids[0, -1] == vocabulary.end
    assert words.ids[0, 1:4].tolist() == words.ids[1, 1:4].tolist()
    assert words.cut == (True, False)


@pytest.mark.parametrize("pad_token", ["!", "<|endoftext|>"])
def test_features_equal_transformers_used_directly(tmp_path: Path, pad_token: str) -> None:
    model = tiny_text_model()
    encoder = CLIPEncoder(model, CLIPVocabulary(write_tokenizer(tmp_path)), max_tokens=12, pad_token=pad_token)
    features = encoder(["the red cat", "a small dog, left of the cat"])
    for row, phrase in enumerate(["the red cat", "a small dog, left of the cat"]):
        expected = reference_states(model, tmp_path, phrase, pad_token, 12)[0]
        torch.testing.assert_close(features.tokens[row], expected, rtol=0, atol=1e-5)


def test_pooled_is_the_state_of_the_end_token(tmp_path: Path) -> None:
    # an end token that the configuration names right, so that transformers pools the same place
    model = tiny_text_model()
    tokenizer = write_tokenizer(tmp_path)
    encoder = CLIPEncoder(model, CLIPVocabulary(tokenizer), max_tokens=16)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids).pooler_output
    torch.testing.assert_close(encoder(["the cat"]).pooled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("activation", "pad_token"), [("gelu", "!"), ("quick_gelu", "<|endoftext|>")])
def test_padding_defaults_to_what_the_family_was_trained_with(
    vocabulary: CLIPVocabulary, activation: str, pad_token: str
) -> None:
    encoder = CLIPEncoder(tiny_text_model(hidden_act=activation), vocabulary)
    assert encoder.words.pad == vocabulary.id_of(pad_token)


def test_padding_changes_only_the_states_after_the_end(vocabulary: CLIPVocabulary) -> None:
    model = tiny_text_model()
    first = CLIPEncoder(model, vocabulary, 12, pad_token="!")(["red cat"])
    second = CLIPEncoder(model, vocabulary, 12, pad_token="<|endoftext|>")(["red cat"])
    torch.testing.assert_close(first.tokens[first.valid], second.tokens[second.valid], rtol=0, atol=1e-6)
    assert (first.tokens[~first.valid] - second.tokens[~second.valid]).abs().max() > 0.1


def test_the_first_forty_states_do_not_depend_on_the_length_padded_to(vocabulary: CLIPVocabulary) -> None:
    model = tiny_text_model()
    short, long = (CLIPEncoder(model, vocabulary, length)(["the red cat"]).tokens for length in (40, 77))
    torch.testing.assert_close(short, long[:, :40], rtol=0, atol=1e-6)


def test_fewer_layers_means_earlier_states_then_the_final_norm(vocabulary: CLIPVocabulary) -> None:
    model = tiny_text_model()
    ids = CLIPWords(vocabulary, 12, "!")(["the red cat"]).ids
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = model.final_layer_norm(states[2])
    penultimate = CLIPEncoder(model, vocabulary, 12, layers=2)(["the red cat"]).tokens
    torch.testing.assert_close(penultimate, expected, rtol=0, atol=1e-5)


def test_more_layers_than_there_are_is_refused(vocabulary: CLIPVocabulary) -> None:
    with pytest.raises(InputError, match="`text_layers` must be between 1 and the model's 3, got 23"):
        CLIPEncoder(tiny_text_model(), vocabulary, layers=23)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="belong to different models"):
        CLIPEncoder(tiny_text_model(), HashedVocabulary())


def test_known_phrases_are_not_encoded_again(vocabulary: CLIPVocabulary) -> None:
    model = tiny_text_model()
    encoder = CLIPEncoder(model, vocabulary)
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = encoder(["the red cat", "the cat", "the red  cat "])
    again = encoder(["the cat", "the red cat"])
    assert calls == [2]
    assert torch.equal(first.tokens[0], again.tokens[1])
    assert torch.equal(first.tokens[0], first.tokens[2])


def test_the_cache_forgets_the_phrase_unused_for_longest(vocabulary: CLIPVocabulary) -> None:
    encoder = CLIPEncoder(tiny_text_model(), vocabulary, cache_size=2)
    encoder(["red"])
    encoder(["cat"])
    encoder(["red"])
    encoder(["the"])
    assert list(encoder.cache._known) == ["red", "the"]
    # a batch larger than the cache is still answered in full
    assert encoder(["a", "b", "c", "d"]).tokens.shape[0] == 4
    assert len(encoder.cache) == 2


def test_phrases_first_seen_in_validation_serve_training(vocabulary: CLIPVocabulary) -> None:
    encoder = CLIPEncoder(tiny_text_model(), vocabulary)
    with torch.inference_mode():
        encoder(["the red cat"])
    weight = torch.ones(32, requires_grad=True)
    (encoder(["the red cat"]).tokens * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_changing_precision_empties_the_cache(vocabulary: CLIPVocabulary) -> None:
    encoder = CLIPEncoder(tiny_text_model(), vocabulary)
    encoder(["red"])
    encoder.to(torch.bfloat16)
    assert len(encoder.cache) == 0
    assert encoder(["red"]).tokens.dtype == torch.float32


def test_autocast_around_the_encoder_changes_nothing(vocabulary: CLIPVocabulary) -> None:
    plain = CLIPEncoder(tiny_text_model(), vocabulary, cache_size=0)
    expected = plain(["the red cat"]).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(["the red cat"]).tokens, expected)


def test_cut_phrases_are_counted_and_named_in_the_log(
    vocabulary: CLIPVocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = CLIPEncoder(tiny_text_model(), vocabulary, max_tokens=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            encoder(["the red cat", "red cat"])
    assert (encoder.seen, encoder.truncated) == (6, 3)
    assert len(caplog.records) == 1
    assert "'the red cat' to 4 tokens (`text_tokens`); 1 of 1" in caplog.text


def test_a_phrase_without_words_is_refused(vocabulary: CLIPVocabulary) -> None:
    with pytest.raises(InputError, match="has no words"):
        CLIPEncoder(tiny_text_model(), vocabulary)(["red", "  !? "])


def test_hashed_vocabulary_keeps_words_apart_from_special_ids() -> None:
    vocabulary = HashedVocabulary()
    ids = vocabulary.encode("The red, RED umbrella")
    assert len(ids) == 5
    assert ids[1] == ids[3]
    assert all(0 < index < vocabulary.begin for index in ids)
    assert (vocabulary.begin, vocabulary.end, vocabulary.id_of("!")) == (49406, 49407, 0)
