"""The spconv backend gives what the PyTorch backend gives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_matting.sparse import ActiveSet, InverseConv2d, SparseConv2d, SubmanifoldConv2d, spconv_ops

ROOT = Path(__file__).resolve().parents[2]
needs_spconv = pytest.mark.skipif(
    importlib.util.find_spec("spconv") is None,
    reason="needs spconv (pip install '.[dev]' on x86-64 Linux, '.[spconv]' for CUDA)",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS = [
    lambda backend: SubmanifoldConv2d(16, 24, backend=backend),
    lambda backend: SubmanifoldConv2d(16, 8, kernel_size=1, backend=backend),
    lambda backend: SubmanifoldConv2d(16, 8, kernel_size=5, bias=False, backend=backend),
    lambda backend: SparseConv2d(16, 24, backend=backend),
    lambda backend: SparseConv2d(16, 24, kernel_size=2, backend=backend),
    lambda backend: InverseConv2d(16, 24, backend=backend),
    lambda backend: InverseConv2d(16, 24, kernel_size=2, backend=backend),
]
SHAPES = [((1, 1, 1), 1.0), ((1, 1, 7), 0.7), ((2, 41, 33), 0.3), ((1, 8, 8), 1.0), ((2, 5, 5), 0.0)]


def needs_cuda_build() -> None:
    if not spconv_ops.computes_on_cuda():
        pytest.skip("needs the CUDA build of spconv (pip install '.[spconv]')")


def compare(device: str, dtype: torch.dtype, tolerance: float, gradients: bool) -> None:
    torch.manual_seed(0)
    for shape, fraction in SHAPES:
        active = ActiveSet.from_mask((torch.rand(shape) < fraction).to(device))
        for make in LAYERS:
            ours, theirs = make("torch").to(device), make("spconv").to(device)
            theirs.load_state_dict(ours.state_dict())
            rows = len(active.strided() if isinstance(ours, InverseConv2d) else active)
            features = torch.randn(rows, 16, device=device, dtype=dtype, requires_grad=gradients)
            # twice: the second call takes the pairs that the first one left with the set
            for _ in range(2):
                expected, found = ours(features, active), theirs(features, active)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            if gradients:
                upstream = torch.randn_like(expected)
                wanted = [
                    torch.autograd.grad(y, [features, *m.parameters()], upstream)
                    for y, m in ((expected, ours), (found, theirs))
                ]
                for one, other in zip(*wanted):
                    torch.testing.assert_close(other, one, rtol=10 * tolerance, atol=10 * tolerance)


@needs_spconv
def test_values_on_a_cpu_equal_the_torch_backend_in_one_thread() -> None:
    # a process of its own: spconv's CPU code races as soon as it may use a second thread
    code = (
        "import runpy, sys, torch; torch.set_num_threads(1); "
        "runpy.run_path(sys.argv[1])['compare']('cpu', torch.float32, 1e-5, False)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@needs_spconv
@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_values_and_gradients_on_cuda_equal_the_torch_backend(dtype: torch.dtype, tolerance: float) -> None:
    needs_cuda_build()
    compare("cuda", dtype, tolerance, gradients=True)


@needs_cuda
def test_torch_backend_on_cuda_equals_the_cpu() -> None:
    for make in LAYERS:
        mask = torch.rand(2, 41, 33) < 0.3
        here, there = ActiveSet.from_mask(mask), ActiveSet.from_mask(mask.cuda())
        layer = make("torch").double()
        rows = len(here.strided() if isinstance(layer, InverseConv2d) else here)
        features = torch.randn(rows, 16, dtype=torch.float64, requires_grad=True)
        expected = layer(features, here)
        gradients = torch.autograd.grad(expected.square().sum(), [features, *layer.parameters()])
        layer.cuda()
        moved = features.detach().cuda().requires_grad_()
        found = layer(moved, there)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-10, atol=1e-10)
        for one, other in zip(torch.autograd.grad(found.square().sum(), [moved, *layer.parameters()]), gradients):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-10)


def test_the_backend_follows_device_dtype_and_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spconv_ops, "installed", lambda: True)
    monkeypatch.setattr(spconv_ops, "computes_on_cuda", lambda: True)

    class OnCuda:
        is_cuda = True

        def __init__(self, dtype: torch.dtype, rows: int = 4) -> None:
            self.dtype, self.rows = dtype, rows

        def __len__(self) -> int:
            return self.rows

    assert spconv_ops.chosen("auto", OnCuda(torch.float16))
    assert spconv_ops.chosen("auto", OnCuda(torch.float32))
    assert not spconv_ops.chosen("auto", OnCuda(torch.bfloat16))
    assert not spconv_ops.chosen("auto", OnCuda(torch.float32, rows=0))
    assert not spconv_ops.chosen("torch", OnCuda(torch.float32))
    assert not spconv_ops.chosen("auto", torch.zeros(4, 2))
    assert spconv_ops.chosen("spconv", torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"fp16 or fp32, got torch\.bfloat16"):
        spconv_ops.chosen("spconv", OnCuda(torch.bfloat16))
    # the CPU build, which the development extra installs, must not be taken on a GPU
    monkeypatch.setattr(spconv_ops, "computes_on_cuda", lambda: False)
    assert not spconv_ops.chosen("auto", OnCuda(torch.float32))
    with pytest.raises(ValueError, match="its CPU build is installed"):
        spconv_ops.chosen("spconv", OnCuda(torch.float32))


def test_asking_for_spconv_without_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spconv_ops, "installed", lambda: False)
    active = ActiveSet.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not installed \(pip install 'lit_matting\[spconv\]'\)"):
        SubmanifoldConv2d(2, 2, backend="spconv")(torch.zeros(4, 2), active)
    SubmanifoldConv2d(2, 2)(torch.zeros(4, 2), active)
