"""The five matting errors as torchmetrics: batched, over images of any size, summed over processes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_matting.checks import check_shape
from lit_matting.metrics import functional
from lit_matting.metrics.functional import Dialect, Normalize
from lit_matting.metrics.mattes import Matte, Region


class MatteError(Metric):
    """The mean over images of one error per image; subclasses say which.

    Every image counts alike, whatever its size. An image is judged at the size it comes in: resize predictions to the
    truth before, never the truth.

    Args:
        keep_samples: Keep the error of every image for :meth:`per_sample`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor
    scores: list[Tensor] | Tensor

    def __init__(self, keep_samples: bool = False) -> None:
        super().__init__()
        # a sum of many float32 errors drifts; Apple GPUs have nothing better
        precision = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.set_dtype(precision)
        self.keep_samples = keep_samples
        self.add_state("total", torch.zeros((), dtype=precision), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("scores", [], dist_reduce_fx="cat")

    @abstractmethod
    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""

    def update(
        self,
        pred: Tensor | Sequence[Matte],
        alpha: Tensor | Sequence[Matte],
        region: Tensor | Sequence[Region] | None = None,
    ) -> None:
        """Add images.

        Args:
            pred: (B, 1, H, W) or (B, H, W) in [0, 1] or uint8, or a list of (H, W) of different sizes.
            alpha: The truth, the same.
            region: Bool masks of the same form, where to sum; default: everywhere.
        """
        preds, alphas = _images(pred, "pred"), _images(alpha, "alpha")
        regions = [None] * len(alphas) if region is None else _images(region, "region")
        if not len(preds) == len(alphas) == len(regions):
            raise ValueError(
                f"{type(self).__name__}.update needs as many predictions as truths and regions, got {len(preds)},"
                f" {len(alphas)} and {len(regions)}."
            )
        scores = [self.measure(*items) for items in zip(preds, alphas, regions)]
        scores = torch.tensor(scores, dtype=self.total.dtype, device=self.total.device)
        self.total += scores.sum()
        self.count += len(scores)
        if self.keep_samples:
            self.scores.append(scores)

    def compute(self) -> Tensor:
        """Return the mean error over the images of all processes; NaN without any."""
        return self.total / self.count

    def per_sample(self) -> Tensor:
        """Return the error of each image, (N,), process after process; needs ``keep_samples``.

        A collective operation: every process must call it.
        """
        if not self.keep_samples:
            raise ValueError(f"{type(self).__name__} keeps no samples: give keep_samples=True.")
        with self.sync_context():
            scores = [self.scores] if isinstance(self.scores, Tensor) else self.scores
            return torch.cat([self.total.new_zeros(0), *scores])


class SAD(MatteError):
    """Sum of absolute differences in thousands, averaged over images; see :func:`lit_matting.metrics.functional.sad`.

    Example:
        >>> import torch
        >>> sad = SAD()
        >>> sad.update(torch.ones(2, 1, 100, 100), torch.zeros(2, 1, 100, 100))
        >>> sad.compute().item()
        10.0
    """

    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""
        return functional.sad(pred, alpha, region)


class MSE(MatteError):
    """Mean squared difference, averaged over images; see :func:`lit_matting.metrics.functional.mse`."""

    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""
        return functional.mse(pred, alpha, region)


class MAD(MatteError):
    """Mean absolute difference, averaged over images; see :func:`lit_matting.metrics.functional.mad`."""

    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""
        return functional.mad(pred, alpha, region)


class Grad(MatteError):
    """Gradient error in thousands, averaged over images; see :func:`lit_matting.metrics.functional.grad`.

    Args:
        normalize: "minmax" or "none".
        dialect: "matlab", "python_port" or "p3m".
        keep_samples: Keep the error of every image for :meth:`per_sample`.
    """

    def __init__(
        self, normalize: Normalize = "minmax", dialect: Dialect = "matlab", keep_samples: bool = False
    ) -> None:
        super().__init__(keep_samples)
        self.normalize: Normalize = normalize
        self.dialect: Dialect = dialect

    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""
        return functional.grad(pred, alpha, region, self.normalize, self.dialect)


class Conn(MatteError):
    """Connectivity error in thousands, averaged over images; see :func:`lit_matting.metrics.functional.conn`.

    Args:
        dialect: "matlab", "python_port" or "p3m".
        keep_samples: Keep the error of every image for :meth:`per_sample`.
    """

    def __init__(self, dialect: Dialect = "matlab", keep_samples: bool = False) -> None:
        super().__init__(keep_samples)
        self.dialect: Dialect = dialect

    def measure(self, pred: Matte, alpha: Matte, region: Region) -> float:
        """Return the error of one image."""
        return functional.conn(pred, alpha, region, self.dialect)


def _images(mattes: Tensor | Sequence[Matte], name: str) -> Sequence[Matte]:
    if isinstance(mattes, Tensor):
        if mattes.ndim == 4:
            check_shape(mattes, ("B", 1, "H", "W"), name)
            mattes = mattes.squeeze(1)
        check_shape(mattes, ("B", "H", "W"), name)
    return mattes
