"""Give phrases to shards whose data set has none, by an image captioning model.

    python tools/caption.py shards/p3m10k/train.index.json --model Salesforce/blip2-opt-2.7b

Writes <prefix>.captions.jsonl beside the index, one line per instance: {"key", "instance", "text", "kind", "model"}.
Any captioning model that transformers knows works, by hub id or local folder: BLIP-2, BLIP, GIT, ...

To train on them, name the file in the data set's source and let plain templates take part, because a caption names a
thing more precisely than people do:

    init_args:
      shards: shards/p3m10k/train.index.json
      captions: shards/p3m10k/train.captions.jsonl
      templates: ["the {category}", "the foreground"]
      template_probability: 0.3

A run that was stopped goes on where it was. On several GPUs, start it once for each with --part 0/4 ... --part 3/4 and
list all files under captions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_modules.decode import decode_sample
from data_modules.shards import SampleError, ShardIndex
from lit_matting.checks import InputError

Array = np.ndarray

KIND = "caption"
_LEAD = re.compile(
    r"^(?:(?:this is|there is|there are|here is|it is|it's|we see|i see) )?"
    r"(?:(?:an? |the )?(?:close[- ]?up |cropped |blurry |black and white )*"
    r"(?:photo(?:graph)?|picture|image|close[- ]?up)(?: shot)? (?:of|showing) )?(?:an? |the |one )?",
    re.IGNORECASE,
)
# what a neutral crop of a cut-out makes captioners add
_TAIL = re.compile(
    r"\s*,?\s*(?:is )?(?:on|in front of|against|with|isolated on) an? (?:plain |solid |blank )?"
    r"(?:grey|gray|white|neutral) (?:background|backdrop)$",
    re.IGNORECASE,
)


def phrase_from(caption: str) -> str:
    """A caption as a phrase that names a thing: "the ..." without "a photo of"; empty if it has no words.

    Example:
        >>> phrase_from("A photo of an arafed dog with a red collar on a gray background.")
        'the dog with a red collar'
        >>> phrase_from("there are two women")
        'the two women'
        >>> phrase_from(" ... ")
        ''
    """
    text = " ".join(caption.split()).rstrip(".!, ")
    # words that BLIP's training data left in it
    text = re.sub(r"\b(?:arafed|araffe|arafe)\b\s*", "", text, flags=re.IGNORECASE)
    text = _LEAD.sub("", text)
    text = _TAIL.sub("", _LEAD.sub("", text)).strip(" ,")
    if not any(character.isalnum() for character in text):
        return ""
    return f"the {text[0].lower() if not text[:2].isupper() else text[0]}{text[1:]}"


def instance_view(image: Array, alpha: Array, margin: float = 0.1) -> Array:
    """The instance alone on grey, cropped to it: so that the caption is about it and not about what surrounds it.

    Args:
        image: (H, W, 3) uint8 RGB.
        alpha: (H, W) uint8 or uint16.
        margin: Border around it, as a share of its longer side.
    """
    weight = alpha.astype(np.float32) / np.iinfo(alpha.dtype).max
    rows, columns = np.flatnonzero((weight > 0.1).any(axis=1)), np.flatnonzero((weight > 0.1).any(axis=0))
    if not rows.size:  # a veil: nothing to crop to
        rows, columns = np.arange(image.shape[0]), np.arange(image.shape[1])
    edge = round(margin * max(rows[-1] - rows[0], columns[-1] - columns[0]))
    window = np.s_[
        max(rows[0] - edge, 0) : rows[-1] + 1 + edge,
        max(columns[0] - edge, 0) : columns[-1] + 1 + edge,
    ]
    weight = weight[window][..., None]
    return np.rint(weight * image[window] + (1 - weight) * 127).astype(np.uint8)


class Captioner:
    """A captioning model with its processor.

    Args:
        model: Hub id or local folder.
        device: ``cuda``, ``cpu``, ...
        dtype: What the weights are loaded as.
        prompt: What the model is asked to continue, or None.
        max_new_tokens: Length of a caption at most.
        beams: Beams of the search; 1 is greedy. Nothing is sampled: the same image gives the same caption.
        revision: Of a model on the hub.

    Raises:
        InputError: If there is no such model, or it is no captioning model.
    """

    def __init__(
        self,
        model: str,
        device: str,
        dtype: torch.dtype,
        prompt: str | None = None,
        max_new_tokens: int = 24,
        beams: int = 3,
        revision: str | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = {"revision": revision} if revision else {}
        try:
            self.processor = AutoProcessor.from_pretrained(model, **where)
            # safetensors only: a pickled checkpoint runs whatever code it holds
            loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, use_safetensors=True, **where)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"--model {model!r} cannot be loaded as a captioning model: {reason} (give a hub id such as"
                " Salesforce/blip2-opt-2.7b, or a folder that save_pretrained wrote)."
            ) from error
        self.model = loaded.to(device).eval()
        self.device, self.dtype, self.prompt = device, dtype, prompt
        self.options = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Array]) -> list[str]:
        """Return one caption for each (H, W, 3) uint8 RGB image."""
        text = [self.prompt] * len(images) if self.prompt else None
        inputs = self.processor(images=list(images), text=text, return_tensors="pt", padding=True).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        tokens = self.model.generate(**inputs, **self.options)
        asked = inputs.get("input_ids")
        # decoder-only models repeat the question before the answer, encoder-decoder models do not
        if asked is not None and tokens.shape[1] >= asked.shape[1] and torch.equal(tokens[:, : asked.shape[1]], asked):
            tokens = tokens[:, asked.shape[1] :]
        captions = self.processor.batch_decode(tokens, skip_special_tokens=True)
        if self.prompt:
            captions = [caption.removeprefix(self.prompt) for caption in captions]
        return captions


def _views(
    index: ShardIndex, part: tuple[int, int], every: bool, view: str, done: set[tuple[str, str]]
) -> Iterator[tuple[str, str, Array]]:
    """Yield key, instance id and picture of every instance that still needs a caption; each sample is read once."""
    for number in range(part[0], len(index), part[1]):
        sample = index.read(number)
        missing = [
            i
            for i, instance in enumerate(sample.instances)
            if (every or not instance.phrases) and (sample.key, instance.id) not in done
        ]
        if not missing:
            continue
        decoded = decode_sample(sample, missing if view == "instance" else [])
        for i in missing:
            shown = instance_view(decoded.image, decoded.targets[i]) if view == "instance" else decoded.image
            # captioners look at 224 to 384 pixels: a 4K original only costs memory
            factor = 768 / max(shown.shape[:2])
            if factor < 1:
                shown = cv2.resize(shown, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            yield sample.key, sample.instances[i].id, shown


def _resumed(path: Path, settings: dict[str, Any]) -> set[tuple[str, str]]:
    """Instances that an earlier run captioned; a line that was cut short by a kill is taken off the file."""
    if not path.is_file():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    done = set()
    for line in whole.decode("utf-8").splitlines():
        entry = json.loads(line)
        other = {name: entry.get(name) for name in settings if entry.get(name) != settings[name]}
        if other:
            name, value = next(iter(other.items()))
            raise InputError(
                f"{str(path)!r} was begun with {name} {value!r}, not {settings[name]!r}; delete it, or pass --output."
            )
        done.add((entry["key"], entry["instance"]))
    return done


def caption(options: argparse.Namespace) -> tuple[Path, int, int]:
    """Caption a data set; returns the file, the number of captions and of instances without one.

    Raises:
        InputError: If the shards, the model or an earlier file do not fit.
    """
    index = ShardIndex.load(options.shards)
    part = _part(options.part)
    first = Path(options.shards)
    if options.output is None and first.is_dir():
        raise InputError(f"{options.shards!r} is a folder; name its index file, or pass --output.")
    suffix = "" if part[1] == 1 else f".{part[0]}-of-{part[1]}"
    output = Path(options.output or first.with_name(f"{first.name.removesuffix('.index.json')}.captions{suffix}.jsonl"))
    if output.is_file() and not options.overwrite:
        raise InputError(f"{str(output)!r} exists; pass --overwrite, or another --output.")
    partial = output.with_name(f"{output.name}.partial")
    settings = {"model": options.model, "prompt": options.prompt, "view": options.view}
    done = _resumed(partial, settings)
    views = _views(index, part, options.all, options.view, done)
    batch = list(islice(views, options.batch_size))
    if not batch and not done:
        raise InputError(f"every instance in {options.shards!r} has phrases already; pass --all to caption them too.")
    if batch:
        captioner = _load(options)
        # about: instances that have phrases are known only when they are reached
        total = sum(shard.instances for shard in index.shards) // part[1]
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(partial, "a", encoding="utf-8") as file,
            tqdm(total=total, initial=len(done), unit="instance", disable=None) as bar,
        ):
            while batch:
                for (key, instance, _), text in zip(batch, captioner([shown for *_, shown in batch])):
                    # an empty one is kept until the end, so that a later run does not try it again
                    entry = {"key": key, "instance": instance, "text": phrase_from(text), "kind": KIND, **settings}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
                batch = list(islice(views, options.batch_size))
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
    good = [line for line in lines if json.loads(line)["text"]]
    if not good:
        raise InputError(f"none of the {len(lines)} captions has words; is {options.model!r} a captioning model?")
    finished = output.with_name(f".{output.name}.{os.getpid()}")
    finished.write_text("".join(good), encoding="utf-8")
    os.replace(finished, output)
    partial.unlink()
    return output, len(good), len(lines) - len(good)


def _load(options: argparse.Namespace) -> Captioner:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    else:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return Captioner(
        options.model, device, dtype, options.prompt, options.max_new_tokens, options.beams, options.revision
    )


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"--part must be I/N with I from 0 to N - 1, got {text!r} (try 0/1).")
    return int(match[1]), int(match[2])


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="caption.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", help="index file of the shards")
    add("--model", default="Salesforce/blip2-opt-2.7b", help="hub id or local folder (default: %(default)s)")
    add("--revision", help="of a model on the hub")
    add("--prompt", help="what the model is asked to continue, such as 'Question: what is this? Answer:'")
    add("--view", choices=("instance", "image"), default="instance", help="show the model the cut-out, or all of it")
    add("--all", action="store_true", help="also instances that have phrases")
    add("--batch-size", type=int, default=16, metavar="N", help="instances at once (default: %(default)s)")
    add(
        "--max-new-tokens", type=int, default=24, metavar="N", help="length of a caption at most (default: %(default)s)"
    )
    add("--beams", type=int, default=3, metavar="N", help="beams of the search, 1 is greedy (default: %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda where there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: bfloat16 on cuda")
    add("--part", default="0/1", metavar="I/N", help="caption only every N-th image, from I on, for N processes")
    add("--output", metavar="FILE", help="default: <prefix>.captions.jsonl beside the index")
    add("--overwrite", action="store_true", help="replace a finished file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        if min(options.batch_size, options.max_new_tokens, options.beams) < 1:
            raise InputError("--batch-size, --max-new-tokens and --beams must be at least 1.")
        output, count, empty = caption(options)
    except (InputError, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {count} captions by {options.model}" + (f", {empty} instances got none" if empty else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
