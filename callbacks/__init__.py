"""Lightning callbacks: what happens around training, judging and predicting."""

from callbacks.benchmark_report import BenchmarkReport
from callbacks.loss_ramp import LossRamp
from callbacks.prediction_writer import PredictionWriter
from callbacks.sample_journal import SampleJournal

__all__ = ["BenchmarkReport", "LossRamp", "PredictionWriter", "SampleJournal"]
