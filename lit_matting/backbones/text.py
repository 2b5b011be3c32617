"""Text encoders: phrases -> token features, which tokens are words, and the phrase as a whole."""

from __future__ import annotations

import logging
import math
import re
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones.base import TextFeatures
from lit_matting.backbones.image import DTYPES, Precision
from lit_matting.checks import InputError, check_prompt

if TYPE_CHECKING:
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

MAX_TOKENS = 40
"""Tokens of a phrase, begin and end included. CLIP's own 77 are rarely used and cost cross-attention twice as much."""


class TextEncoder(nn.Module, ABC):
    """Base of text encoders."""

    channels: int
    """C of :class:`TextFeatures`."""
    max_tokens: int
    """T of :class:`TextFeatures`: every phrase is padded or cut to this many tokens."""
    frozen: bool
    """True for loaded weights that are never trained."""

    @abstractmethod
    def forward(self, phrases: Sequence[str]) -> TextFeatures:
        """Return the features of phrases."""

    def spell(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """Return phrases as numbers, by name, each (B, ...) on the CPU: what :meth:`read` takes.

        Raises:
            InputError: If the encoder does not tell its numbers from its features.
        """
        raise InputError(f"{type(self).__name__} cannot be exported: it has no `spell` and `read`.")

    def read(self, **numbers: Tensor) -> TextFeatures:
        """Return the features of spelled phrases, computed from tensors alone: what an exported graph holds."""
        raise InputError(f"{type(self).__name__} cannot be exported: it has no `spell` and `read`.")


class TextAdapter(nn.Module):
    """A learned correction of frozen text features, ``c + gamma MLP(c)`` with gamma starting at 1e-4 (VPD)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))
        self.gamma = nn.Parameter(torch.full((channels,), 1e-4))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.gamma * self.mlp(tokens)


class Vocabulary(Protocol):
    """What :class:`CLIPWords` needs of a tokenizer."""

    begin: int
    """Id of the begin token."""
    end: int
    """Id of the end token."""

    def encode(self, phrase: str) -> list[int]:
        """Return the ids of a phrase's words, without begin and end."""

    def id_of(self, token: str) -> int:
        """Return the id of a token as the vocabulary spells it."""


class CLIPVocabulary:
    """CLIP's byte-pair vocabulary, from transformers' tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin: int = tokenizer.bos_token_id
        self.end: int = tokenizer.eos_token_id

    def encode(self, phrase: str) -> list[int]:
        return self.tokenizer(phrase, add_special_tokens=False, verbose=False)["input_ids"]

    def id_of(self, token: str) -> int:
        ids: dict[str, int] = self.tokenizer.get_vocab()
        # a lone character ends a word in CLIP's spelling, except where it was added as a special token
        for spelling in (token, token + "</w>"):
            if spelling in ids:
                return ids[spelling]
        raise InputError(f"`pad_token` {token!r} is not in the tokenizer's vocabulary of {len(ids)} tokens.")


class HashedVocabulary:
    """A stand-in for CLIP's vocabulary where there are no files: each word's id is its checksum.

    Only for random weights (``pretrained: null``): a pretrained text encoder would read noise. Ids lie where CLIP's do:
    "!" is 0, begin and end are the last two (49406 and 49407).

    Args:
        size: Number of ids.
    """

    def __init__(self, size: int = 49408) -> None:
        self.size = size
        self.begin, self.end = size - 2, size - 1

    def encode(self, phrase: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", phrase.lower())
        return [1 + zlib.crc32(word.encode()) % (self.size - 3) for word in words]

    def id_of(self, token: str) -> int:
        special = {"!": 0, "<|startoftext|>": self.begin, "<|endoftext|>": self.end}
        if token not in special:
            raise InputError(f"`pad_token` must be '!' or '<|endoftext|>' without a real vocabulary, got {token!r}.")
        return special[token]


@dataclass(frozen=True)
class Words:
    """Phrases as numbers."""

    ids: Tensor
    """(B, T) int64: begin, the words, end, padding."""
    words: Tensor
    """(B, T) bool: the phrase's own tokens."""
    ends: Tensor
    """(B,) int64: where the end token is."""
    cut: tuple[bool, ...]
    """Which phrases did not fit."""

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: everything up to the end token."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) <= self.ends[:, None]


class CLIPWords:
    """Phrases -> token ids of one length, with a record of what is a word.

    A phrase that is too long loses its last words and keeps its end token, which is what CLIP reads a phrase by. CLIP
    is causal: the features of the first 40 tokens are the same whether a phrase is padded to 40 or to 77.

    Args:
        vocabulary: Words -> ids.
        max_tokens: T, begin and end included.
        pad_token: What fills a short phrase: "!" for Stable Diffusion 2 (OpenCLIP pads with 0), "<|endoftext|>" for
            Stable Diffusion 1. The features of padding differ completely, and the UNet looks at them.
    """

    def __init__(self, vocabulary: Vocabulary, max_tokens: int = MAX_TOKENS, pad_token: str = "<|endoftext|>") -> None:
        if max_tokens < 3:
            raise InputError(f"`text_tokens` must be at least 3 (begin, one word, end), got {max_tokens}.")
        self.vocabulary = vocabulary
        self.max_tokens = max_tokens
        self.pad = vocabulary.id_of(pad_token)

    def __call__(self, phrases: Sequence[str]) -> Words:
        room = self.max_tokens - 2
        ids = torch.full((len(phrases), self.max_tokens), self.pad, dtype=torch.long)
        ends = torch.zeros(len(phrases), dtype=torch.long)
        cut = []
        for index, phrase in enumerate(phrases):
            spelled = self.vocabulary.encode(phrase)
            cut.append(len(spelled) > room)
            row = [self.vocabulary.begin, *spelled[:room], self.vocabulary.end]
            ids[index, : len(row)] = torch.tensor(row)
            ends[index] = len(row) - 1
        place = torch.arange(self.max_tokens)
        return Words(ids, (place > 0) & (place < ends[:, None]), ends, tuple(cut))


class PhraseCache:
    """Remembers the features of phrases: data sets repeat theirs, and a frozen encoder repeats its answers.

    Least recently used phrases are dropped first. Features stay on the device they were computed on.

    Args:
        size: Phrases to remember; 0 remembers none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: OrderedDict[str, tuple[TextFeatures, bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def look_up(
        self, phrases: Sequence[str], encode: Callable[[list[str]], tuple[TextFeatures, Sequence[bool]]]
    ) -> tuple[TextFeatures, list[bool]]:
        """Return the features of phrases and which of them were cut; ``encode`` is asked about unknown ones only."""
        missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._known]
        found = {phrase: self._known[phrase] for phrase in phrases if phrase in self._known}
        if missing:
            # a validation's inference mode must not leave tensors behind that training may not use
            with torch.inference_mode(False), torch.no_grad():
                features, cut = encode(missing)
            for index, phrase in enumerate(missing):
                row = features._map(lambda tensor, index=index: tensor[index].clone())
                found[phrase] = (row, cut[index])
        for phrase in phrases:
            self._known[phrase] = found[phrase]
            self._known.move_to_end(phrase)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        rows = [found[phrase][0] for phrase in phrases]
        stacked = TextFeatures(
            **{
                name: torch.stack([getattr(row, name) for row in rows])
                for name in ("tokens", "words", "valid", "pooled")
            }
        )
        return stacked, [found[phrase][1] for phrase in phrases]

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()


class FrozenTextEncoder(TextEncoder):
    """Base of loaded text encoders: remembers what it has encoded, counts what it had to cut.

    Args:
        cache_size: Phrases whose features are remembered.
    """

    frozen = True

    def __init__(self, cache_size: int) -> None:
        super().__init__()
        self.cache = PhraseCache(cache_size)
        self.seen = 0
        """Phrases encoded so far in this process, repetitions included."""
        self.truncated = 0
        """How many of them were longer than ``max_tokens``."""

    @abstractmethod
    def encode(self, phrases: list[str]) -> tuple[TextFeatures, Sequence[bool]]:
        """Return the features of phrases, float32, and which of them did not fit. Called without gradients."""

    def forward(self, phrases: Sequence[str]) -> TextFeatures:
        """Return the features of phrases, float32, on the encoder's device.

        Raises:
            InputError: If a phrase has no words.
        """
        phrases = [check_prompt(phrase) for phrase in phrases]
        features, cut = self.cache.look_up(phrases, self.encode)
        self._count(phrases, cut)
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTextEncoder:
        # moved to another device or precision: what is remembered no longer fits
        self.cache.clear()
        return super()._apply(fn, recurse)

    def _count(self, phrases: Sequence[str], cut: Sequence[bool]) -> None:
        for phrase, was_cut in zip(phrases, cut):
            self.seen += 1
            self.truncated += was_cut
            # the 1st, 10th, 100th, ...: enough to see the rate, never a flood
            if was_cut and math.log10(self.truncated).is_integer():
                log.warning(
                    "cut %r to %d tokens (`text_tokens`); %d of %d phrases so far were too long.",
                    phrase,
                    self.max_tokens,
                    self.truncated,
                    self.seen,
                )


class CLIPEncoder(FrozenTextEncoder):
    """A frozen CLIP text encoder: the last layer's normalised states, and the end token's as the phrase as a whole.

    Stable Diffusion 2 reads the penultimate of OpenCLIP's 24 layers; its published encoder simply has 23.

    Args:
        model: transformers' CLIPTextModel.
        vocabulary: Words -> ids.
        max_tokens: T, begin and end included.
        layers: Use only the first so many layers, then the final normalisation. None: all the model has.
        pad_token: See :class:`CLIPWords`. None: "!" for OpenCLIP models, "<|endoftext|>" for OpenAI's, told apart by
            their activation (``gelu`` and ``quick_gelu``).
        precision: Of the model's weights and arithmetic; features are float32.
        cache_size: Phrases whose features are remembered, about 160 KB each at 40 tokens.
    """

    def __init__(
        self,
        model: CLIPTextModel,
        vocabulary: Vocabulary,
        max_tokens: int = MAX_TOKENS,
        layers: int | None = None,
        pad_token: str | None = None,
        precision: Precision = "fp32",
        cache_size: int = 1024,
    ) -> None:
        super().__init__(cache_size)
        config = model.config
        if max_tokens > config.max_position_embeddings:
            raise InputError(
                f"`text_tokens` is {max_tokens}, but the text encoder has {config.max_position_embeddings} positions."
            )
        largest = max(vocabulary.begin, vocabulary.end)
        if largest >= config.vocab_size:
            raise InputError(
                f"the tokenizer has token ids up to {largest}, but the text encoder only {config.vocab_size} of them:"
                " they belong to different models."
            )
        # transformers 5.6 removed one level of nesting
        stack = getattr(model, "text_model", model).encoder
        if layers is not None:
            if not 1 <= layers <= len(stack.layers):
                raise InputError(f"`text_layers` must be between 1 and the model's {len(stack.layers)}, got {layers}.")
            stack.layers = stack.layers[:layers]
            config.num_hidden_layers = layers
        self.channels: int = config.hidden_size
        self.max_tokens = max_tokens
        if pad_token is None:
            pad_token = "!" if config.hidden_act == "gelu" else "<|endoftext|>"
        self.words = CLIPWords(vocabulary, max_tokens, pad_token)
        self.model = model.to(DTYPES[precision]).eval().requires_grad_(False)

    def encode(self, phrases: list[str]) -> tuple[TextFeatures, Sequence[bool]]:
        words = self.words(phrases)
        device = next(self.model.parameters()).device
        return self.read(ids=words.ids.to(device), ends=words.ends.to(device)), words.cut

    def spell(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        words = self.words([check_prompt(phrase) for phrase in phrases])
        return {"ids": words.ids, "ends": words.ends}

    def read(self, ids: Tensor, ends: Tensor) -> TextFeatures:  # type: ignore[override]
        with torch.autocast(ids.device.type, enabled=False):
            states = self.model(input_ids=ids).last_hidden_state.float()
        place = torch.arange(ids.shape[1], device=ids.device)
        return TextFeatures(
            tokens=states,
            words=(place > 0) & (place < ends[:, None]),
            valid=place <= ends[:, None],
            # not the model's own pooled output: files of Stable Diffusion 2 name a wrong end token
            pooled=states[torch.arange(ends.shape[0], device=ids.device), ends],
        )
