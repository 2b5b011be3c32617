"""Lightning callbacks: what happens around training, judging and predicting."""

from callbacks.loss_ramp import LossRamp
from callbacks.prediction_writer import PredictionWriter

__all__ = ["LossRamp", "PredictionWriter"]
