"""Captioning shards, with a tiny random BLIP-2."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from release_fixtures import alpha, picture

import tools.caption as caption_module
from data_modules.shards import InstanceEntry, ShardWriter
from data_modules.source import read_captions
from tools.caption import instance_view, main, phrase_from

WORDS = ["dog", "cat", "red", "blue", "with", "a", "of", "on", "horse", "person", "flower", "glass", "smoke"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BLIP-2 of about a hundred thousand random weights, saved as any other model is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("model")
    names = ["<pad>", "</s>", "<unk>", "<image>", *WORDS]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=32, patch_size=16, **size).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=16, vocab_size=len(names), **size).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(names), hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=names.index("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    network = Blip2ForConditionalGeneration(config)
    # large weights, so that what is seen decides what is said
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.5)
    network.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "shards", "train", "p3m", max_samples=3) as writer:
        for number in range(7):
            instances = [
                InstanceEntry(str(i), alpha(10 * number + i), category="person") for i in range(1 + number % 2)
            ]
            if number == 6:
                instances[0].phrases = [("the girl in red", "basic")]
            writer.write(f"p{number}", picture(number), "png", instances)
    return tmp_path / "shards/train.index.json"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(shards: Path, model: str, *more: str, status: int = 0) -> None:
    base = [str(shards), "--model", model, "--device", "cpu", "--max-new-tokens", "6", "--batch-size", "4"]
    assert main([*base, *more]) == status


def test_every_instance_without_phrases_gets_a_caption_of_that_model(shards: Path, model: str) -> None:
    _run(shards, model)
    lines = _lines(shards.with_name("train.captions.jsonl"))
    expected = {(f"p{n}", str(i)) for n in range(6) for i in range(1 + n % 2)}
    assert {(line["key"], line["instance"]) for line in lines} == expected
    assert len(lines) == len(expected)
    assert {line["model"] for line in lines} == {model}
    assert {line["kind"] for line in lines} == {"caption"}
    said = {word for line in lines for word in line["text"].split()}
    assert said <= {*WORDS, "the"}
    assert all(line["text"].startswith("the ") for line in lines)
    assert len({line["text"] for line in lines}) > 1, "captions must depend on the image"
    assert not list(shards.parent.glob("*.partial"))
    _run(shards, model, "--overwrite", "--batch-size", "1")
    assert _lines(shards.with_name("train.captions.jsonl")) == lines, "a caption must not depend on its batch"


def test_the_training_source_reads_the_captions(shards: Path, model: str) -> None:
    _run(shards, model, "--view", "image", "--prompt", "a dog of")
    captions = read_captions([str(shards.with_name("train.captions.jsonl"))])
    assert captions[("p1", "1")][0].kind == "caption"
    assert captions[("p1", "0")] == captions[("p1", "1")], "the whole image has one caption"


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(
    shards: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(shards, model)
    output = shards.with_name("train.captions.jsonl")
    whole = output.read_text()
    output.unlink()
    partial = output.with_name("train.captions.jsonl.partial")
    lines = whole.splitlines(keepends=True)
    # a kill in the middle of the fifth line
    partial.write_text("".join(lines[:4]) + lines[4][:20])
    asked = []
    real = caption_module.Captioner.__call__

    def counted(self: Any, images: Any) -> list[str]:
        asked.append(len(images))
        return real(self, images)

    monkeypatch.setattr(caption_module.Captioner, "__call__", counted)
    _run(shards, model)
    assert sum(asked) == len(lines) - 4
    assert output.read_text() == whole


def test_parts_divide_the_images_among_processes(shards: Path, model: str) -> None:
    _run(shards, model)
    whole = {(line["key"], line["instance"], line["text"]) for line in _lines(shards.with_name("train.captions.jsonl"))}
    found = []
    for part in range(2):
        _run(shards, model, "--part", f"{part}/2")
        found += _lines(shards.with_name(f"train.captions.{part}-of-2.jsonl"))
    assert {(line["key"], line["instance"]) for line in found} == {item[:2] for item in whole}
    assert len(found) == len(whole)


def test_mistakes_are_told_in_one_sentence(
    shards: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*more: str, by: str = model) -> str:
        capsys.readouterr()
        _run(shards, by, *more, status=2)
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    assert "cannot be loaded as a captioning model" in said(by=str(tmp_path / "empty"))
    assert "--part must be I/N" in said("--part", "2/2")
    shards.with_name("train.captions.jsonl.partial").write_text(
        json.dumps({"key": "p0", "instance": "0", "text": "the dog", "kind": "caption", "model": "other"}) + "\n"
    )
    assert "was begun with model 'other'" in said()
    shards.with_name("train.captions.jsonl.partial").unlink()
    _run(shards, model)
    assert "exists; pass --overwrite" in said()
    with ShardWriter(tmp_path / "named", "train") as writer:
        writer.write("a", picture(1), "png", [InstanceEntry("0", alpha(1), phrases=[("the cup", "basic")])])
    assert main([str(tmp_path / "named/train.index.json"), "--model", model]) == 2
    assert "has phrases already; pass --all" in capsys.readouterr().err


def test_the_view_holds_the_instance_and_nothing_else() -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    image[20:40, 30:60] = (255, 0, 0)
    matte = np.zeros((60, 80), np.uint8)
    matte[20:40, 30:60] = 255
    view = instance_view(image, matte)
    assert view.shape == (20 + 2 * 3, 30 + 2 * 3, 3)
    assert np.array_equal(view[3:-3, 3:-3], image[20:40, 30:60])
    assert set(view[:3].ravel()) == {127}
    wide = instance_view(image, matte.astype(np.uint16) * 257)
    assert np.array_equal(view, wide)


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("a woman in a hat", "the woman in a hat"),
        ("The cat.", "the cat"),
        ("a close up of a dog", "the dog"),
        ("there is a man wearing a suit", "the man wearing a suit"),
        ("a black and white photo of a girl", "the girl"),
        ("an image showing a lion, against a white background", "the lion"),
        ("USB stick", "the USB stick"),
        ("", ""),
        ("a photo of", "the photo of"),
    ],
)
def test_captions_become_phrases(caption: str, phrase: str) -> None:
    assert phrase_from(caption) == phrase


def test_examples_in_the_docstrings_are_true() -> None:
    found = doctest.testmod(caption_module)
    assert found.attempted > 0
    assert found.failed == 0
