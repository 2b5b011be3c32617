"""Lightning callbacks: what happens around training, judging and predicting."""

from callbacks.benchmark_report import BenchmarkReport
from callbacks.ema import EMA
from callbacks.gradient_norms import GradientNorms
from callbacks.loggers import tensorboard_if_installed
from callbacks.loss_ramp import LossRamp
from callbacks.prediction_writer import PredictionWriter
from callbacks.preemption import Preemption
from callbacks.preview import Preview
from callbacks.sample_journal import SampleJournal

__all__ = [
    "EMA",
    "BenchmarkReport",
    "GradientNorms",
    "LossRamp",
    "PredictionWriter",
    "Preemption",
    "Preview",
    "SampleJournal",
    "tensorboard_if_installed",
]
