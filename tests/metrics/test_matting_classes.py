"""One battery for the five torchmetrics classes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from lit_matting.metrics import functional
from lit_matting.metrics.matting import MAD, MSE, SAD, Conn, Grad

CLASSES = [
    (SAD, functional.sad),
    (MSE, functional.mse),
    (MAD, functional.mad),
    (Grad, functional.grad),
    (Conn, functional.conn),
]


@pytest.fixture
def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four predictions and truths of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(12, 17), (20, 20), (31, 9), (20, 20)]
    return [tuple(torch.from_numpy(rng.random(size)) for _ in range(2)) for size in sizes]


@pytest.mark.parametrize(("metric", "function"), CLASSES)
class TestMatteErrors:
    def test_ragged_images_give_the_mean_of_the_function(self, metric, function, pairs) -> None:
        score = metric(keep_samples=True)
        score.update([pred for pred, _ in pairs[:3]], [alpha for _, alpha in pairs[:3]])
        score.update([pairs[3][0]], [pairs[3][1]])
        expected = [function(pred, alpha) for pred, alpha in pairs]
        assert score.compute().item() == pytest.approx(sum(expected) / 4, rel=1e-12)
        assert score.per_sample().tolist() == pytest.approx(expected, rel=1e-12)

    def test_a_stacked_batch_equals_a_list(self, metric, function, pairs) -> None:
        stacked, listed = metric(), metric()
        preds, alphas = zip(pairs[1], pairs[3])
        stacked.update(
            torch.stack([pairs[1][0], pairs[3][0]])[:, None], torch.stack([pairs[1][1], pairs[3][1]])[:, None]
        )
        listed.update([pairs[1][0], pairs[3][0]], [pairs[1][1], pairs[3][1]])
        assert stacked.compute() == listed.compute()
        assert len(preds) == len(alphas) == 2

    def test_regions_are_passed_on(self, metric, function, pairs) -> None:
        region = torch.rand(pairs[0][0].shape) < 0.5
        score = metric()
        score.update([pairs[0][0]], [pairs[0][1]], [region])
        assert score.compute().item() == pytest.approx(function(*pairs[0], region), rel=1e-12)

    def test_a_call_returns_the_batch_value_and_accumulates(self, metric, function, pairs) -> None:
        score = metric()
        first = score([pairs[0][0]], [pairs[0][1]])
        second = score([pairs[1][0]], [pairs[1][1]])
        assert first.item() == pytest.approx(function(*pairs[0]), rel=1e-12)
        assert score.compute().item() == pytest.approx((first.item() + second.item()) / 2, rel=1e-12)

    def test_half_precision_comes_close(self, metric, function, pairs) -> None:
        score = metric()
        score.update([pairs[0][0].half()], [pairs[0][1].half()])
        # connectivity jumps where rounding moves a pixel over a threshold
        assert score.compute().item() == pytest.approx(function(*pairs[0]), rel=0.1 if metric is Conn else 0.01)

    def test_reset_pickle_and_copy(self, metric, function, pairs) -> None:
        score = metric(keep_samples=True)
        score.update([pairs[0][0]], [pairs[0][1]])
        for twin in (pickle.loads(pickle.dumps(score)), copy.deepcopy(score)):
            assert twin.compute() == score.compute()
        score.reset()
        score.update([pairs[1][0]], [pairs[1][1]])
        assert score.compute().item() == pytest.approx(function(*pairs[1]), rel=1e-12)
        assert len(score.per_sample()) == 1


def test_lists_of_different_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="as many predictions"):
        SAD().update([torch.zeros(2, 2)], [])


def test_samples_that_were_not_kept_are_said_to_be_missing() -> None:
    with pytest.raises(ValueError, match="keep_samples=True"):
        SAD().per_sample()


def test_several_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        SAD().update(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
