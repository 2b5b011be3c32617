"""Loss terms: the five of the paper, under their names there, alternatives as further classes, and distillation."""

from lit_matting.losses.alpha_lr import AlphaLowResolution
from lit_matting.losses.base import LossTerm
from lit_matting.losses.coarse_trimap import CoarseTrimap, CoarseTrimapConsistency
from lit_matting.losses.distillation import AttentionDistillation, FeatureDistillation, OutputDistillation
from lit_matting.losses.objective import Objective
from lit_matting.losses.refinement import Refinement
from lit_matting.losses.semantic_trimap import SemanticTrimap, SemanticTrimapCrossEntropy
from lit_matting.losses.soft_grounding import SoftAlpha, SoftGrounding

__all__ = [
    "AlphaLowResolution",
    "AttentionDistillation",
    "CoarseTrimap",
    "CoarseTrimapConsistency",
    "FeatureDistillation",
    "LossTerm",
    "Objective",
    "OutputDistillation",
    "Refinement",
    "SemanticTrimap",
    "SemanticTrimapCrossEntropy",
    "SoftAlpha",
    "SoftGrounding",
]
