"""A photograph and a phrase in, a finished cut-out out.

    matting = MattingPipeline.from_checkpoint("outputs/demo/last.ckpt")
    result = matting("photo.jpg", "the red umbrella")
    result.cutout.save("umbrella.png")

Reading and writing pictures is in ``pictures``, what is made of a matte in ``results``, loading in ``checkpoints`` and
``sharing``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor

from lit_matting.checkpoints import Checkpoint, build_network, read_checkpoint, trained_weights
from lit_matting.checks import InputError, check_prompt
from lit_matting.confidence import Calibration, best_threshold, confidence_of
from lit_matting.devices import DTYPES, Precision, pick_device, pick_precision, place
from lit_matting.networks.inference import square
from lit_matting.networks.matting_network import MattingNetwork, enlarge
from lit_matting.pictures import Photo, read_photo
from lit_matting.results import MattingResult
from lit_matting.sharing import download, model_card, origin_of, read_folder, report_summary, write_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EncodedPhoto:
    """A photograph the network has looked at: give it instead of the photograph to ask further phrases cheaply."""

    photo: Photo
    latent: Tensor
    """(1, C, h, w), on the pipeline's device."""


class MattingPipeline(ModelHubMixin):
    """Cuts out of photographs what phrases name.

    Made by :meth:`from_checkpoint` or :meth:`from_pretrained`; from a network of your own by the constructor.

    Args:
        network: The network; it is put into eval mode.
        image_size: Side, in pixels, of the square it sees.
        device: Where to run; None takes CUDA, then Apple's MPS, then the CPU.
        precision: Of the network (the refiner is always float32); None takes bf16 where the device and the
            size of the network make it faster, else fp32.
        threshold: The calibrated confidence below which a thing is not there; None: not calibrated.
        source: The checkpoint the network came from, which :meth:`save_pretrained` needs.
    """

    def __init__(
        self,
        network: MattingNetwork,
        image_size: int,
        device: str | torch.device | None = None,
        precision: Precision | None = None,
        threshold: float | None = None,
        source: Checkpoint | None = None,
    ) -> None:
        network.backbone.check_size(image_size, image_size)
        self.device = pick_device(device)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        self.precision: Precision = pick_precision(self.device, precision, parameters)
        self.network = network.eval().requires_grad_(False)
        self.image_size = image_size
        self.threshold = threshold
        self._source = source
        self._ready = False
        # the backbone collects attention maps in one place: one image at a time, whatever the server does
        self._lock = threading.Lock()

    # --- making one -------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device | None = None,
        precision: Precision | None = None,
        trust: Sequence[str] = (),
    ) -> MattingPipeline:
        """Return the pipeline of what `python -m lit_matting fit` wrote.

        Args:
            path: A ``.ckpt`` file; nothing in it is run.
            device: See the class.
            precision: See the class.
            trust: Packages besides this one whose classes the checkpoint may name, for networks with parts of your own.

        Raises:
            InputError: If the checkpoint is missing, damaged, unsafe or not made by this project.
        """
        return cls._from(read_checkpoint(path, trust), device, precision, trust)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        precision: Precision | None = None,
        trust: Sequence[str] = (),
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> MattingPipeline:
        """Return the pipeline that :meth:`save_pretrained` wrote, from a folder or from the Hugging Face hub.

        Args:
            folder_or_id: A folder, or `user/name` of a model on the hub.
            device: See the class.
            precision: See the class.
            trust: Packages besides this one whose classes the configuration may name.
            revision: Branch, tag or commit on the hub.
            cache_dir: Where downloads are kept.
            force_download: Download again what is already there.
            local_files_only: Do not download.
            token: Of the hub, for private models.

        Raises:
            InputError: If there is no such folder or model, or it was not made by this project.
        """
        folder = Path(folder_or_id)
        if folder.is_file():
            raise InputError(f"{os.fspath(folder_or_id)!r} is a file: open it with MattingPipeline.from_checkpoint.")
        if not folder.is_dir():
            folder = download(
                os.fspath(folder_or_id),
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        return cls._from(read_folder(folder, os.fspath(folder_or_id)), device, precision, trust)

    @classmethod
    def _from(
        cls, source: Checkpoint, device: str | torch.device | None, precision: Precision | None, trust: Sequence[str]
    ) -> MattingPipeline:
        # before minutes of loading: a wrong device or precision is cheap to find out
        pick_precision(pick_device(device), precision)
        network = build_network(source, trust)
        source.weights = {}  # the network has them; a mapped file must not stay open behind it
        return cls(network, source.image_size, device, precision, source.threshold, source)

    # --- using it ---------------------------------------------------------------------------------

    def __call__(
        self,
        image: Any,
        phrase: str | Sequence[str] | Sequence[str | Sequence[str]],
        clean_colours: bool = True,
        batch_size: int = 8,
    ) -> Any:
        """Return what the phrase names, cut out: a result, or a list of results where a list was given.

        Args:
            image: A path, a PIL image, an array (H, W, 3), a tensor (3, H, W), or what :meth:`encode` returned; or a
                list of them, of any sizes.
            phrase: What to cut out. For one image a list gives a list of results, and the image is encoded once. For a
                list of images: one phrase for all of them, or a list as long, each a phrase or a list of phrases.
            clean_colours: Estimate the thing's own colours when the cut-out is asked for; False keeps the photograph's.
            batch_size: Pairs of image and phrase that go through the network at once.

        Returns:
            :class:`MattingResult`; nested in lists as the arguments are.

        Raises:
            InputError: If an image cannot be used, a phrase has no words, the lists differ in length, or the batch size
                is below 1.
        """
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {batch_size}.")
        if isinstance(image, (list, tuple)):
            if not isinstance(phrase, str) and len(phrase) != len(image):
                raise InputError(
                    f"{len(image)} images need one phrase, or as many, got {len(phrase)}; for several phrases of every"
                    " image give a list of lists."
                )
            phrases = [phrase] * len(image) if isinstance(phrase, str) else list(phrase)
            return self._several(list(image), phrases, clean_colours, batch_size)
        return self._several([image], [phrase], clean_colours, batch_size)[0]

    def _several(self, images: list[Any], phrases: list[Any], clean_colours: bool, batch_size: int) -> list[Any]:
        asked = [
            [check_prompt(phrase, "phrase") for phrase in ([item] if isinstance(item, str) else item)]
            for item in phrases
        ]
        results: list[list[MattingResult]] = [[] for _ in images]
        # a group of images at a time: their pixels are the memory that counts
        for start in range(0, len(images), batch_size):
            group = range(start, min(start + batch_size, len(images)))
            encoded = dict(zip(group, self._encode([images[index] for index in group])))
            pairs = [(index, phrase) for index in group for phrase in asked[index]]
            for first in range(0, len(pairs), batch_size):
                some = pairs[first : first + batch_size]
                made = self._mattes([(encoded[index], phrase) for index, phrase in some], clean_colours)
                for (index, _), result in zip(some, made):
                    results[index].append(result)
        return [made[0] if isinstance(item, str) else made for item, made in zip(phrases, results)]

    def encode(self, image: Any) -> EncodedPhoto:
        """Return a photograph the network has looked at, to be given instead of the photograph for several phrases.

        Raises:
            InputError: If the image cannot be used.
        """
        return self._encode([image])[0]

    def _encode(self, images: Sequence[Any]) -> list[EncodedPhoto]:
        encoded: dict[int, EncodedPhoto] = {}
        fresh: dict[int, Photo] = {}
        for index, image in enumerate(images):
            if isinstance(image, EncodedPhoto):
                encoded[index] = image
            else:
                fresh[index] = read_photo(image)
        if fresh:
            small = torch.cat([square(self._pixels(photo), self.image_size) for photo in fresh.values()])
            with self._running():
                latents = self.network.backbone.encode_image(small).split(1)
            encoded.update((index, EncodedPhoto(photo, row)) for (index, photo), row in zip(fresh.items(), latents))
        return [encoded[index] for index in range(len(images))]

    def _pixels(self, photo: Photo) -> Tensor:
        return torch.from_numpy(photo.as_float()).to(self.device).permute(2, 0, 1)[None].contiguous()

    def _mattes(self, pairs: Sequence[tuple[EncodedPhoto, str]], clean_colours: bool) -> list[MattingResult]:
        latent = torch.cat([encoded.latent for encoded, _ in pairs])
        with self._running():
            text = self.network.backbone.encode_text([phrase for _, phrase in pairs])
            # the photographs differ in size, and only the refiner looks at them: it follows, one at a time
            seen = latent.new_zeros(1).expand(len(pairs), 3, self.image_size, self.image_size)
            output = self.network.matte(seen, latent, text, refine=False)
            confidences = confidence_of(output.grounding.float().sigmoid(), output.alpha_lr).tolist()
            alphas = [
                self._refined(encoded.photo, output.alpha_lr[[row]], output.trimap[[row]], output.features[[row]])
                for row, (encoded, _) in enumerate(pairs)
            ]
        results = []
        for row, (encoded, phrase) in enumerate(pairs):
            alpha = alphas[row].numpy()
            if encoded.photo.opacity is not None:
                alpha = alpha * encoded.photo.opacity
            results.append(
                MattingResult(
                    alpha=alpha,
                    phrase=phrase,
                    confidence=confidences[row],
                    threshold=self.threshold,
                    photo=encoded.photo,
                    trimap_lr=output.trimap[row, 0].float().cpu().numpy(),
                    grounding_lr=output.grounding[row, 0].float().sigmoid().cpu().numpy(),
                    clean_colours=clean_colours,
                )
            )
        return results

    def _refined(self, photo: Photo, alpha: Tensor, trimap: Tensor, features: Tensor) -> Tensor:
        """Return the alpha (H, W) at the photograph's own size, on the CPU."""
        if self.network.refiner is None:
            matte = enlarge(alpha, photo.size)
        else:
            matte = self.network.refiner(self._pixels(photo), alpha, trimap, self.network.project(features)).alpha
        return matte[0, 0].float().clamp(0, 1).cpu()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One pass through the network: alone, without gradients, in the pipeline's precision."""
        dtype = DTYPES[self.precision]
        # not inference_mode: a backbone may keep what it computed, and train on it later
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32"):
            self._prepare()
            yield

    def _prepare(self) -> None:
        """Bring the network to its device, and the layers that run in half precision into it, once."""
        if self._ready:
            return
        place(self.network, self.device, self.precision)
        self._ready = True

    def calibrate(self, examples: Iterable[tuple[Any, str, bool]]) -> Calibration:
        """Find the confidence that best tells present things from absent ones, and use it from now on.

        Give phrases for things that are in the image and phrases for things that are not, at least a few dozen of each
        and none of them from training. The cut is in the middle of the widest gap among those with the best balanced
        accuracy. :meth:`save_pretrained` keeps it; :func:`lit_matting.checkpoints.store_threshold` writes it into a
        checkpoint.

        Args:
            examples: (image, phrase, whether the thing is there).

        Raises:
            InputError: If there are not both kinds of examples.
        """
        measured = [(self(image, phrase).confidence, bool(present)) for image, phrase, present in examples]
        calibration = best_threshold(measured)
        self.threshold = calibration.threshold
        return calibration

    # --- saying what it is ------------------------------------------------------------------------

    def describe(self) -> str:
        """Return in a few lines what runs, where and how."""
        backbone = self.network.backbone
        millions = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        refiner = self.network.refiner
        lines = {
            "model": f"{backbone.name}, {millions:.3g} million parameters",
            "sees": f"{self.image_size} x {self.image_size} pixels",
            "refines": "nothing, the matte is enlarged" if refiner is None else "at the photograph's own size",
            "device": f"{self.device}{f' ({name})' if name else ''}, PyTorch {torch.__version__}",
            "precision": f"{self.precision}, the refiner in fp32" if self.precision != "fp32" else "fp32",
            "found": "not calibrated" if self.threshold is None else f"confidence of at least {self.threshold:.3f}",
        }
        return "\n".join(f"{name:<10}{value}" for name, value in lines.items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.network.backbone.name}, {self.device}, {self.precision})"

    # --- keeping it -------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write the folder that :meth:`from_pretrained` reads: weights, configuration, model card.

        Args:
            save_directory: The folder; made if missing. A model card that is there stays.
            options: ``model_card_kwargs``, arguments of :meth:`generate_model_card`, and what the base class takes.

        Raises:
            InputError: If the pipeline cannot be saved, or the card's report is refused.
        """
        for_card = options.get("model_card_kwargs") or {}
        self.generate_model_card(**for_card)  # what it refuses is refused before anything is written
        card = Path(save_directory) / "README.md"
        if for_card and card.exists():
            log.warning("the model card %s was there before and stays; remove it for a new one.", card)
        return super().save_pretrained(Path(save_directory), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and configuration; the base class adds the model card, and can push the folder to the hub."""
        if self._source is None:
            raise InputError(
                "this pipeline was made from a network in memory, whose construction nobody wrote down: only pipelines"
                " from a checkpoint or a folder can be saved."
            )
        if self._ready and self.precision != "fp32":
            log.warning(
                "the weights were converted to %s by an earlier call and are saved like that; to keep them whole, save"
                " before the first call or load with precision='fp32'.",
                self.precision,
            )
        weights = trained_weights(self.network)
        write_folder(dataclasses.replace(self._source, weights=weights, threshold=self.threshold), save_directory)

    def generate_model_card(
        self,
        license: str | None = None,
        results: dict[str, Any] | None = None,
        notes: str = "",
        report: str | os.PathLike[str] | None = None,
        **_: Any,
    ) -> ModelCard:
        """Return the model card; :meth:`save_pretrained` passes its ``model_card_kwargs`` here.

        Args:
            license: Of the weights, as the hub spells it, for example `apache-2.0`.
            results: What was measured and how much it was.
            notes: Further text.
            report: The `report.json` of `python -m lit_matting test` for this checkpoint: its protocol and main scores.

        Raises:
            InputError: If the report is none, or judged another checkpoint.
        """
        about = {
            "Backbone": self.network.backbone.name,
            **origin_of(self._source),
            "Input of the network": f"{self.image_size} x {self.image_size} pixels; the matte has the image's own size",
            "Confidence threshold": "not calibrated" if self.threshold is None else f"{self.threshold:.4f}",
            "Licence of the weights": license or "not stated",
        }
        scores = "" if report is None else report_summary(report, self._source)
        return model_card(about, license, results or {}, notes, scores)
