"""Sparse 2-D convolution on the pixels that matter: one interface, two backends.

>>> import torch
>>> active = ActiveSet.from_mask(torch.rand(1, 8, 8) > 0.5)
>>> features = gather(torch.rand(1, 3, 8, 8), active)          # (N, 3), batch-major raster order
>>> features = SubmanifoldConv2d(3, 4)(features, active)       # stays on `active`
>>> coarse = SparseConv2d(4, 6)(features, active)              # on `active.strided()`
>>> fine = InverseConv2d(6, 1)(coarse, active)                 # back on `active`
>>> scatter(fine, active, background=torch.zeros(1, 1, 8, 8)).shape
torch.Size([1, 1, 8, 8])
"""

from lit_matting.sparse.active import ActiveSet
from lit_matting.sparse.layers import InverseConv2d, SparseConv2d, SubmanifoldConv2d
from lit_matting.sparse.rows import gather, scatter

__all__ = ["ActiveSet", "InverseConv2d", "SparseConv2d", "SubmanifoldConv2d", "gather", "scatter"]
