"""Benchmarks: every phrase of every instance of every image exactly once, however many processes share the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data_modules.decode import decode_sample
from data_modules.shard_reader import RawSample, ShardIndex
from data_modules.source import read_captions
from data_modules.stream import received, whole_batches
from data_modules.transforms import INTERPOLATION, full_view, mattes, pictures, show, show_target
from lit_matting.checks import InputError
from lit_matting.records import MattingBatch


class BenchmarkSource:
    """A benchmark in shards.

    Args:
        shards: Index file, folder with one index, glob, brace pattern, URL, or a list of these.
        batch_size: Phrases in a batch.
        image_size: Side of the square input in pixels; `input` takes the data module's, null keeps every image at its
            own size (a batch then holds phrases of one image only).
        max_phrases: Look at so many phrases at most, chosen from all over the benchmark but always the same; null takes
            all.
        phrases_per_instance: Take so many phrases of each instance at most, always the same; null takes all.
        phrase_kinds: Take only phrases of these kinds; null takes all.
        templates: Phrases for instances that have none, with `{category}` where the category belongs.
        captions: Further phrases beside the shards, as JSON lines `{"key", "instance", "text", "kind"}`.
        attach_instances: Whether batches carry the alphas of all instances of the image, by which found and missed are
            told apart.
    """

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int = 8,
        image_size: int | str | None = "input",
        max_phrases: int | None = None,
        phrases_per_instance: int | None = None,
        phrase_kinds: list[str] | None = None,
        templates: list[str] | None = None,
        captions: str | list[str] | None = None,
        attach_instances: bool = True,
    ) -> None:
        if isinstance(image_size, str) and image_size != "input":
            raise InputError(f"`image_size` must be a number of pixels, `input` or null, got {image_size!r}.")
        for name in ("batch_size", "max_phrases", "phrases_per_instance"):
            value = locals()[name]
            if value is not None and value < 1:
                raise InputError(f"`{name}` of '{shards}' must be 1 or more, got {value}.")
        self.shards = shards
        self.batch_size = batch_size
        self.image_size = image_size
        self.max_phrases, self.phrases_per_instance = max_phrases, phrases_per_instance
        self.phrase_kinds = frozenset(phrase_kinds) if phrase_kinds is not None else None
        self.templates = tuple(templates or ())
        self.captions = [captions] if isinstance(captions, str) else list(captions or [])
        self.attach_instances = attach_instances


@dataclass(frozen=True)
class Question:
    """One phrase of one instance of one image."""

    sample: int
    instance: int
    text: str
    kind: str


class BenchmarkLoader:
    """Hands out one process's share of a benchmark.

    All processes get the same number of batches where that is possible without showing anything twice (a larger batch
    is split in two if need be), because some collective operations wait for every process in every step.
    """

    interpolation = INTERPOLATION
    """How images and alphas get to `image_size`."""

    def __init__(
        self,
        name: str,
        source: BenchmarkSource,
        index: ShardIndex,
        input_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.name, self.source = name, source
        self.origin = f"{index.dataset}/{index.split}".rstrip("/")
        """What the shards call themselves, whatever `name` this run gives them."""
        size = input_size if isinstance(source.image_size, str) else source.image_size
        self.image_size = size
        """Side of the square that images and alphas are resized to, in pixels; None where each keeps its own size."""
        questions = list_questions(source, index)
        if not questions:
            kinds = "" if source.phrase_kinds is None else f" of kind {', '.join(sorted(source.phrase_kinds))}"
            raise InputError(f"benchmark '{name}' has no phrases{kinds}; add `templates` or change `phrase_kinds`.")
        batches = even_batches(questions, source.batch_size, world_size, one_image=size is None)
        self.questions = len(questions)
        """Phrases of the whole benchmark, over all processes."""
        self.batches = batches[rank::world_size]
        self.loader = whole_batches(
            _Batches(name, index, self.batches, size, source.attach_instances), workers, prefetch
        )

    def __iter__(self) -> Iterator[MattingBatch]:
        yield from received(self.loader)

    def __len__(self) -> int:
        return len(self.batches)


def list_questions(source: BenchmarkSource, index: ShardIndex) -> list[Question]:
    """Return the questions of a benchmark in the order of its shards."""
    by_sample: list[list[Question]] = []
    captions = read_captions(source.captions)
    for sample in range(len(index)):
        questions: list[Question] = []
        header = index.read_header(sample)
        header.add_phrases(captions)
        for number, instance in enumerate(header.instances):
            phrases = [
                (p.text, p.kind)
                for p in instance.phrases
                if source.phrase_kinds is None or p.kind in source.phrase_kinds
            ]
            if not instance.phrases:
                category = instance.category or "foreground"
                phrases = [(text.replace("{category}", category), "template") for text in source.templates]
            if source.phrases_per_instance is not None and len(phrases) > source.phrases_per_instance:
                chosen = np.random.default_rng((0, sample, number)).permutation(len(phrases))
                phrases = [phrases[k] for k in sorted(chosen[: source.phrases_per_instance])]
            questions += [Question(sample, number, text, kind) for text, kind in phrases]
        by_sample.append(questions)
    total = sum(map(len, by_sample))
    if source.max_phrases is not None and total > source.max_phrases:
        kept, left = set(), source.max_phrases
        # whole images, so that questions which differ only in their phrase stay together
        for sample in np.random.default_rng(0).permutation(len(by_sample)).tolist():
            by_sample[sample] = by_sample[sample][:left]
            left -= len(by_sample[sample])
            kept.add(sample)
            if left == 0:
                break
        by_sample = [questions if sample in kept else [] for sample, questions in enumerate(by_sample)]
    return [question for questions in by_sample for question in questions]


def even_batches(
    questions: Sequence[Question], batch_size: int, world_size: int, one_image: bool = False
) -> list[list[Question]]:
    """Cut questions into batches whose number divides by ``world_size`` wherever there are enough questions."""
    batches: list[list[Question]] = []
    for question in questions:
        full = not batches or len(batches[-1]) == batch_size
        if full or (one_image and batches[-1][-1].sample != question.sample):
            batches.append([])
        batches[-1].append(question)
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[largest]
        if len(batch) < 2:
            break
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


class _Batches(Dataset[MattingBatch]):
    def __init__(
        self, name: str, index: ShardIndex, batches: list[list[Question]], size: int | None, instances: bool
    ) -> None:
        self.name, self.index, self.batches, self.size, self.instances = name, index, batches, size, instances

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> MattingBatch:
        questions = self.batches[number]
        samples = {question.sample: self.index.read(question.sample) for question in questions}
        opened = {sample: self._open(raw, questions, sample) for sample, raw in samples.items()}
        asked = [samples[question.sample].instances[question.instance] for question in questions]
        attached = None
        if self.instances:
            stacked = {sample: torch.stack(list(alphas.values())) for sample, (_, alphas) in opened.items()}
            attached = tuple(stacked[question.sample] for question in questions)
        return MattingBatch(
            image=torch.stack([opened[question.sample][0] for question in questions]),
            target=torch.stack([opened[question.sample][1][question.instance][None] for question in questions]),
            has_alpha=torch.tensor([instance.kind == "alpha" for instance in asked]),
            prompts=tuple(question.text for question in questions),
            prompt_kinds=tuple(question.kind for question in questions),
            keys=tuple(f"{self.name}/{raw.shard}/{raw.key}" for raw in (samples[q.sample] for q in questions)),
            instance=torch.tensor([question.instance for question in questions]),
            categories=tuple(instance.category for instance in asked),
            instances=attached,
            dataset=self.name,
            iteration=-1,
        )

    def _open(
        self, raw: RawSample, questions: Sequence[Question], sample: int
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        asked = {question.instance for question in questions if question.sample == sample}
        wanted = range(len(raw.instances)) if self.instances else sorted(asked)
        decoded = decode_sample(raw, wanted, empty_is_error=False)
        view = full_view(decoded.image)
        height, width = decoded.image.shape[:2] if self.size is None else (self.size, self.size)
        alphas = {
            number: mattes([show_target(view, target, height, width, raw.instances[number].kind != "alpha")])[0, 0]
            for number, target in decoded.targets.items()
        }
        return pictures([show(view, decoded.image, height, width)])[0], alphas
