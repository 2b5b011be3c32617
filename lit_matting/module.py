"""LitMatting: the network, its objective and its judges as one LightningModule."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn as nn
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_matting.backbones import Backbone
from lit_matting.checks import InputError
from lit_matting.losses import LossTerm, Objective
from lit_matting.metrics.referring import ReferringScore
from lit_matting.networks.heads import AlphaHead, CoarseTrimapHead, GroundingHead, TrimapHead
from lit_matting.networks.inference import INTERPOLATION, matte_at_native_size
from lit_matting.networks.matting_network import GroundingFactory, HeadFactory, MattingNetwork, NeckFactory, enlarge
from lit_matting.networks.neck import Neck
from lit_matting.networks.refiner import SparseRefiner
from lit_matting.optimization import Cosine, LearningRateSchedule, parameter_groups
from lit_matting.records import MattingBatch, MattingOutput
from lit_matting.sharding import shard
from lit_matting.targets import MattingTargets, targets_for
from lit_matting.teacher import Teacher

log = logging.getLogger(__name__)


class LitMatting(pl.LightningModule):
    """Text-driven matting: trains, validates, tests and predicts.

    Args:
        backbone: (image, phrases) -> feature pyramid and attention maps.
        losses: Name -> loss term. State the whole map: a second config file replaces it, it does not merge.
        image_size: Side, in pixels, of the square the network sees; taken from the data.
        neck: Fuses the pyramid.
        coarse_trimap_head: Classifies blocks of the coarse level.
        grounding_head: Finds the phrase's thing.
        trimap_head: Draws the soft semantic trimap.
        alpha_head: Estimates the low-resolution alpha.
        refiner: Refines the alpha at full resolution; null stops at the enlarged low-resolution alpha.
        coarse_stride: Stride, in pixels, of the coarse trimap.
        optimizer: Any torch optimizer.
        schedule: Learning-rate schedule over the trainer's steps.
        learning_rate_scales: Prefix of parameter names -> factor on the learning rate, for example
            ``network.backbone.unet: 0.1``.
        trainable: Prefixes of the modules to train; everything else is frozen and kept in eval mode. Null trains all
            but the backbone's own frozen parts.
        trimap_kernel: Kernel of the target trimap, in pixels of the network's input; null scales 15 at 512.
        initial_weights: Checkpoint whose weights to start from (the previous stage); optimizer and steps start anew.
        teacher: Checkpoint of the network to distil from. The student starts from its weights, block by block, unless
            ``initial_weights`` says otherwise; only training reads it.
    """

    interpolation = INTERPOLATION
    """How an image that is not `image_size` pixels square is resized for the network; protocols ask for it."""

    def __init__(
        self,
        backbone: Backbone,
        losses: dict[str, LossTerm],
        image_size: int,
        neck: NeckFactory = Neck,
        coarse_trimap_head: HeadFactory = CoarseTrimapHead,
        grounding_head: GroundingFactory = GroundingHead,
        trimap_head: HeadFactory = TrimapHead,
        alpha_head: HeadFactory = AlphaHead,
        refiner: SparseRefiner | None = None,
        coarse_stride: int = 32,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: LearningRateSchedule = Cosine(),  # noqa: B008 (stateless)
        learning_rate_scales: dict[str, float] | None = None,
        trainable: list[str] | None = None,
        trimap_kernel: int | None = None,
        initial_weights: str | None = None,
        teacher: str | None = None,
    ) -> None:
        super().__init__()
        # Under the command line the hyperparameters are the plain config that built the parts. Without it they would be
        # the built modules themselves, pickled a second time into every checkpoint: nothing is saved then.
        if _given_hyperparameters.get() is not None:
            # where a run began and who taught it is no part of the model
            self.save_hyperparameters(ignore=["initial_weights", "teacher"])
        self.network = MattingNetwork(
            backbone,
            neck,
            coarse_trimap_head,
            grounding_head,
            trimap_head,
            alpha_head,
            refiner,
            coarse_stride,
        )
        self.objective = Objective(losses)
        self._check_losses()
        backbone.check_size(image_size, image_size)
        self.image_size = image_size
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.learning_rate_scales = learning_rate_scales or {}
        self.trainable = trainable
        self.trimap_kernel = trimap_kernel
        self._sharded = False
        self._given_weights = False
        self.strict_loading = False  # frozen parts are not in checkpoints; load_state_dict checks the rest itself
        self._freeze()
        self.teacher = None if teacher is None else Teacher.from_checkpoint(teacher, self.network)
        if initial_weights is not None:
            self._start_from(initial_weights)
        elif self.teacher is not None:
            self.teacher.start(self.network)
            self._given_weights = True
        self.val_score = ReferringScore(baselines=False)
        names = ("alpha", "alpha_lr", "trimap", "grounding")
        self.test_scores = nn.ModuleDict({name: ReferringScore(baselines=name == "alpha") for name in names})
        self.train()  # the trainer keeps the modes it finds: frozen modules must be in eval mode before it starts

    # --- what trains ------------------------------------------------------------------------------

    def _check_losses(self) -> None:
        for name, term in self.objective.terms.items():
            if "alphas" in term.needs and self.network.refiner is None:
                raise InputError(
                    f"`model.losses.{name}` ({type(term).__name__}) scores the refiner, but `model.refiner` is null:"
                    f" give a refiner or drop the term."
                )

    def _check_teacher(self) -> None:
        taught = [name for name, term in self.objective.terms.items() if term.needs_teacher]
        if taught and self.teacher is None:
            raise InputError(
                f"`model.losses.{taught[0]}` compares with a teacher: add --model.teacher CKPT, a checkpoint of the"
                " trained network."
            )
        if self.teacher is not None and not taught:
            raise InputError(
                "`model.teacher` is given, but none of the losses compares with it: add a distillation term, or start"
                " from its weights by `model.initial_weights`."
            )

    def _freeze(self) -> None:
        if self.trainable is None:
            return
        named = dict(self.named_modules())
        for prefix in self.trainable:
            if prefix not in named:
                known = ", ".join(
                    sorted(name for name in named if name.count(".") == 1 and name.startswith("network."))
                )
                raise InputError(
                    f"`model.trainable` names {prefix!r}, which is no part of the model; there are {known}."
                )
        for name, parameter in self.named_parameters():
            if not any(name.startswith(prefix + ".") for prefix in self.trainable):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> LitMatting:
        """Set training mode on what is trained; frozen modules stay in eval mode."""
        super().train(mode)
        if mode and self.trainable is not None:
            for module in self.modules():
                parameters = list(module.parameters())
                if parameters and not any(parameter.requires_grad for parameter in parameters):
                    module.eval()  # with all inside: dropout has no parameters of its own
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_teacher()
        precision = self.trainer.precision
        if precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise InputError(
                f"`trainer.precision` must be 32-true, bf16-mixed or 16-mixed, got {precision}: the losses, the refiner"
                " and the attention probabilities stay in float32."
            )
        self.network.backbone.frozen_hashes()  # now: a strategy may spread the weights over processes later

    def configure_model(self) -> None:
        """Spread the trained weights over the processes, where the strategy is ModelParallelStrategy (FSDP2)."""
        if self.device_mesh is None or self._sharded:
            return
        if averaging := self._averaging():
            raise InputError(
                f"{type(averaging[0]).__name__} cannot average weights that are spread over processes: drop it from"
                " `trainer.callbacks`, or train with configs/trainer/ddp8.yaml."
            )
        shard(self.network, self.device_mesh["data_parallel"])
        self._sharded = True

    def _averaging(self) -> list[WeightAveraging]:
        """Return the trainer's callbacks that keep an average; where weights are sharded, callbacks.EMA keeps none."""
        averaging = [item for item in self.trainer.callbacks if isinstance(item, WeightAveraging)]
        return [item for item in averaging if item._average_model is not None]

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        # here and not earlier: a checkpoint to go on from has been read by now, whatever the strategy
        if self._given_weights or self.trainer.ckpt_path:
            return
        # in the order in which they read each other: what comes after the last trained one waits for a later stage
        parts = [(name, part) for name, part in self.network.named_children() if name != "backbone"]
        flags = [[weight.requires_grad for weight in part.parameters()] for _, part in parts]
        last = max((index for index, trained in enumerate(flags) if any(trained)), default=0)
        frozen = [name for (name, _), trained in zip(parts[: last + 1], flags) if not all(trained)]
        if frozen:
            raise InputError(
                f"`model.trainable` leaves {', '.join(frozen)} as built, with random weights: add"
                " --model.initial_weights CKPT, a checkpoint of the stage before."
            )

    def configure_optimizers(self) -> Any:
        probe = self.make_optimizer([nn.Parameter(torch.zeros(1))])
        defaults = probe.defaults
        groups = parameter_groups(self, defaults["lr"], defaults.get("weight_decay", 0.0), self.learning_rate_scales)
        optimizer = self.make_optimizer(groups)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise InputError("`trainer.max_steps` must be set: the learning-rate schedule needs to know the last step.")
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    # --- steps ------------------------------------------------------------------------------------

    def forward(self, image: Tensor, phrases: Sequence[str]) -> MattingOutput:
        """Return the network's output for images (B, 3, H, W) in [0, 1] of any size and B phrases."""
        return matte_at_native_size(self.network, image, phrases, self.image_size)

    def targets(self, batch: MattingBatch, output: MattingOutput) -> MattingTargets:
        """Return what the losses compare ``output`` with."""
        targets = targets_for(
            batch.target,
            batch.has_alpha,
            grid=tuple(output.trimap.shape[-2:]),
            coarse_grid=tuple(output.coarse_trimap.shape[-2:]),
            kernel_size=self.trimap_kernel,
            has_phrase=torch.tensor([bool(prompt) for prompt in batch.prompts], device=batch.target.device),
        )
        if batch.detail is None:
            return targets
        # the refiner worked on native-resolution crops: its truth lies there
        crop = targets_for(batch.detail.target, batch.has_alpha, (1, 1), (1, 1))
        return dataclasses.replace(targets, alpha=crop.alpha, unknown=crop.unknown)

    @property
    def refining(self) -> bool:
        """Whether a term with a weight above zero needs the refiner at this step."""
        terms = self.objective.terms.items()
        return any("alphas" in term.needs and term.weight * self.objective.ramps[name] > 0 for name, term in terms)

    def training_step(self, batch: MattingBatch, batch_index: int) -> Tensor:
        refine = self.refining
        latent = None if self.teacher is None else self.teacher.latent(self.network, batch)
        output = self.network(
            batch.image,
            batch.prompts,
            refine=refine,
            detail=batch.detail,
            phrases_per_image=batch.phrases_per_image,
            latent=latent,
        )
        targets = self.targets(batch, output)
        if self.teacher is not None:
            targets = dataclasses.replace(targets, teacher=self.teacher(batch, output, latent))
        total, values = self.objective(output, targets)
        if not refine and self.network.refiner is not None and not self._sharded:
            # the refiner waits for its turn, but distributed training must see its parameters
            idle = [*self.network.refiner.parameters(), *self.network.project.parameters()]
            total = total + 0.0 * sum(parameter.sum() for parameter in idle if parameter.requires_grad)
        logged = {f"loss/{name}": value.detach() for name, value in values.items()}
        self.log_dict(logged, batch_size=len(batch))
        self.log("loss/total", total.detach(), batch_size=len(batch), prog_bar=True)
        return total

    def validation_step(self, batch: MattingBatch, batch_index: int, dataloader_idx: int = 0) -> None:
        output = self._judged(batch)
        _update(self.val_score, output.alpha, batch)

    def on_validation_epoch_end(self) -> None:
        card = self.val_score.compute()["overall"]
        for name in ("grounding_accuracy", "soft_iou", "band_mae"):
            if card.get(name) is not None:
                self.log(f"metric/{name}", float(card[name]), prog_bar=name != "band_mae", rank_zero_only=True)
        self.val_score.reset()

    def test_step(self, batch: MattingBatch, batch_index: int, dataloader_idx: int = 0) -> None:
        output = self._judged(batch)
        size = output.alpha.shape[-2:]
        mattes = {
            "alpha": output.alpha,
            "alpha_lr": enlarge(output.alpha_lr, size),
            "trimap": enlarge(output.trimap, size),
            "grounding": enlarge(output.grounding.float().sigmoid(), size),
        }
        for name, matte in mattes.items():
            _update(self.test_scores[name], matte, batch)

    def predict_step(self, batch: MattingBatch, batch_index: int, dataloader_idx: int = 0) -> MattingOutput:
        output = matte_at_native_size(self.network, batch.image, batch.prompts, self.image_size)
        return output if batch.opacity is None else dataclasses.replace(output, alpha=output.alpha * batch.opacity)

    def _judged(self, batch: MattingBatch) -> MattingOutput:
        if batch.instances is None:
            raise InputError(
                f"the batch of {batch.dataset or 'the benchmark'} holds no instances, by which found and missed are"
                " told apart: use data_modules.BenchmarkSource for `data.val` and `data.test`."
            )
        return matte_at_native_size(self.network, batch.image, batch.prompts, self.image_size)

    # --- checkpoints ------------------------------------------------------------------------------

    def _frozen_prefixes(self) -> tuple[str, ...]:
        return tuple(f"network.backbone.{name}." for name in self.network.backbone.frozen_modules())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the backbone's loaded, never trained parts out, and say which backbone the rest belongs to."""
        frozen = self._frozen_prefixes()
        for key in ("state_dict", "current_model_state"):
            if frozen and key in checkpoint:
                checkpoint[key] = {
                    name: value for name, value in checkpoint[key].items() if not name.startswith(frozen)
                }
        backbone = self.network.backbone
        checkpoint["lit_matting"] = {
            "backbone": backbone.name,
            "frozen": backbone.frozen_hashes(),
            "image_size": self.image_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the backbone's frozen parts are those the checkpoint was trained with.

        Training that goes on from a checkpoint with an average, and keeps none itself, is warned about.

        Raises:
            InputError: If the frozen parts are others.
        """
        self.network.backbone.check_frozen(checkpoint.get("lit_matting", {}).get("frozen", {}), "the checkpoint")
        resuming = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if resuming and "current_model_state" in checkpoint and not self._averaging():
            log.warning(
                "The checkpoint was written with weight averaging, which this run has not: it goes on from the averaged"
                " weights instead of those of the last step; add callbacks.EMA to `trainer.callbacks` (where weights"
                " are not sharded) to go on as before."
            )

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; keys of the backbone's frozen parts may be missing, anything else may not.

        Raises:
            InputError: If weights are missing, unexpected or of another size.
        """
        frozen = self._frozen_prefixes()
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            raise InputError(
                "the checkpoint was trained with another network than the config describes:"
                f" {str(error).splitlines()[-1].strip()}"
            ) from error
        self._given_weights = True
        missing = [key for key in result.missing_keys if not (frozen and key.startswith(frozen))]
        if missing or result.unexpected_keys:
            raise InputError(
                "the checkpoint was trained with another network than the config describes:"
                f" {len(missing)} weights are missing (first: {(missing or ['-'])[0]}),"
                f" {len(result.unexpected_keys)} are unexpected (first: {(result.unexpected_keys or ['-'])[0]})."
            )
        return result

    def _start_from(self, path: str) -> None:
        try:
            # mapped, not read: of optimizer states and an average, in every process, nothing reaches memory
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise InputError(f"`model.initial_weights`: there is no file {path!r}.") from error
        except Exception as error:  # whatever a file of another kind makes the unpickler stumble over
            raise InputError(f"`model.initial_weights`: {path!r} is no checkpoint that torch can read.") from error
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise InputError(f"`model.initial_weights`: {path!r} holds no `state_dict`; give a checkpoint of a run.")
        self.load_state_dict(checkpoint["state_dict"])
        try:
            about = checkpoint.get("lit_matting", {})
            self.network.backbone.check_frozen(about.get("frozen", {}), f"`model.initial_weights` {path!r}")
        except InputError as error:  # a beginning, not a result: what follows can learn the difference
            log.warning("%s", error)
        log.info("started from the weights of %s", path)


def _update(score: ReferringScore, alpha: Tensor, batch: MattingBatch) -> None:
    score.update(
        alpha.float().squeeze(1),
        batch.instances,
        batch.instance,
        batch.keys,
        batch.prompts,
        batch.prompt_kinds,
        batch.categories,
    )
