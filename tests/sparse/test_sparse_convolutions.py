"""Sparse convolutions against the masked dense convolution, which is their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_matting.sparse import (
    ActiveSet,
    InverseConv2d,
    SparseConv2d,
    SubmanifoldConv2d,
    gather,
    rulebook,
    scatter,
    torch_ops,
)

SHAPES = [(1, 1, 1), (1, 1, 7), (2, 5, 1), (1, 2, 2), (3, 9, 12), (2, 40, 33)]
FRACTIONS = [0.0, 0.05, 0.5, 1.0]
Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@pytest.fixture(params=[(shape, fraction) for shape in SHAPES for fraction in FRACTIONS], ids=str)
def mask(request: pytest.FixtureRequest) -> Tensor:
    shape, fraction = request.param
    return torch.rand(shape) < fraction


def at(image: Tensor, mask: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1)[mask]


def cells(mask: Tensor) -> Tensor:
    """2x2 cells with an active pixel, by max pooling."""
    return F.max_pool2d(mask[:, None].double(), 2, ceil_mode=True)[:, 0] > 0


def dense_same(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return at(F.conv2d(image * mask[:, None], weight, bias, padding=weight.shape[-1] // 2), mask)


def dense_down(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    even = F.pad(image * mask[:, None], (0, image.shape[3] % 2, 0, image.shape[2] % 2))
    return at(F.conv2d(even, weight, bias, stride=2, padding=weight.shape[-1] // 3), cells(mask))


def dense_up(coarse: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = weight.shape[-1] // 3
    masked = coarse * cells(mask)[:, None]
    image = F.conv_transpose2d(masked, weight.transpose(0, 1), bias, stride=2, padding=padding, output_padding=padding)
    return at(image[:, :, : mask.shape[1], : mask.shape[2]], mask)


def layers() -> Iterator[tuple[nn.Module, Dense, bool]]:
    """Layers with their dense twins, and whether they read the coarse set."""
    yield SubmanifoldConv2d(5, 4), dense_same, False
    yield SubmanifoldConv2d(5, 4, kernel_size=1), dense_same, False
    yield SubmanifoldConv2d(6, 1, kernel_size=1), dense_same, False
    yield SubmanifoldConv2d(3, 6, kernel_size=5), dense_same, False
    yield SubmanifoldConv2d(1, 1), dense_same, False
    yield SubmanifoldConv2d(16, 1, bias=False), dense_same, False
    yield SubmanifoldConv2d(2, 9), dense_same, False
    for kernel_size in (2, 3):
        yield SparseConv2d(5, 4, kernel_size=kernel_size), dense_down, False
        yield SparseConv2d(9, 2, kernel_size=kernel_size, bias=False), dense_down, False
        yield InverseConv2d(5, 4, kernel_size=kernel_size), dense_up, True
        yield InverseConv2d(2, 9, kernel_size=kernel_size, bias=False), dense_up, True


def image_for(layer: nn.Module, mask: Tensor, coarse: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    support = cells(mask) if coarse else mask
    return torch.randn(support.shape[0], layer.in_channels, *support.shape[1:], dtype=dtype), support


def assert_equal_to_dense(mask: Tensor) -> None:
    active = ActiveSet.from_mask(mask)
    for layer, dense, coarse in layers():
        image, support = image_for(layer, mask, coarse, torch.float32)
        expected = dense(image, mask, layer.weight, layer.bias)
        torch.testing.assert_close(layer(at(image, support), active), expected, rtol=1e-5, atol=1e-5)
    for layer, dense, coarse in layers():
        layer = layer.double()
        image, support = image_for(layer, mask, coarse, torch.float64)
        image.requires_grad_()
        results = []
        for output in (dense(image, mask, layer.weight, layer.bias), layer(at(image, support), active)):
            upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).cos().view_as(output)
            results.append(torch.autograd.grad(output, [image, *layer.parameters()], upstream))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_values_and_gradients_equal_the_masked_dense_convolution(mask: Tensor) -> None:
    assert_equal_to_dense(mask)


@pytest.mark.parametrize("block", [7, 64, 300])
def test_values_do_not_depend_on_how_the_work_is_cut_into_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(rulebook, "BLOCK_ROWS", block)
    monkeypatch.setattr(rulebook, "_GRID_PIXELS", 100)
    monkeypatch.setattr(torch_ops, "_BUFFER_BYTES", 1)
    assert_equal_to_dense(torch.rand(2, 45, 38) < 0.6)


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_gradients_are_right_when_only_some_are_wanted(wants: tuple[bool, bool]) -> None:
    mask = torch.rand(1, 12, 11) < 0.5
    active = ActiveSet.from_mask(mask)
    for layer, dense, coarse in layers():
        layer = layer.double()
        image, support = image_for(layer, mask, coarse, torch.float64)
        image.requires_grad_(wants[0])
        layer.requires_grad_(wants[1])
        wanted = [tensor for tensor in (image, *layer.parameters()) if tensor.requires_grad]
        expected = torch.autograd.grad(dense(image, mask, layer.weight, layer.bias).sin().sum(), wanted)
        found = torch.autograd.grad(layer(at(image, support), active).sin().sum(), wanted)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradcheck_passes() -> None:
    mask = torch.rand(1, 3, 4) < 0.6
    active = ActiveSet.from_mask(mask)
    for layer in (SubmanifoldConv2d(2, 3), SubmanifoldConv2d(4, 1), SparseConv2d(2, 3), InverseConv2d(3, 2)):
        layer = layer.double()
        rows = len(active.strided() if isinstance(layer, InverseConv2d) else active)
        features = torch.randn(rows, layer.in_channels, dtype=torch.float64)

        def run(rows: Tensor, *parameters: Tensor, layer: nn.Module = layer) -> Tensor:
            names = [name for name, _ in layer.named_parameters()]
            return torch.func.functional_call(layer, dict(zip(names, parameters)), (rows, active))

        inputs = [features.requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
        assert torch.autograd.gradcheck(run, inputs)


# two threads on a busy machine wait for each other most of the time
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fifty_repetitions_give_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # a little more than one block
        active = ActiveSet.from_mask(torch.rand(1, 36, 36) < 0.9)
        same, down, up = SubmanifoldConv2d(8, 24), SparseConv2d(24, 12), InverseConv2d(12, 1)
        features = torch.randn(len(active), 8, requires_grad=True)
        parameters = [features, *down.parameters(), *up.parameters(), *same.parameters()]

        def run() -> list[Tensor]:
            result = up(down(same(features, active), active), active)
            return [result.detach(), *torch.autograd.grad(result.square().sum(), parameters)]

        first = run()
        for _ in range(49):
            assert all(torch.equal(one, other) for one, other in zip(first, run()))
    finally:
        torch.set_num_threads(before)


def test_threads_that_share_a_set_and_a_layer_do_not_disturb_each_other() -> None:
    mask = torch.rand(1, 90, 80) < 0.4
    layer = SubmanifoldConv2d(8, 8)
    narrow = SubmanifoldConv2d(8, 1)
    inputs = [torch.randn(int(mask.sum()), 8, requires_grad=True) for _ in range(16)]

    def run(features: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor]:
        result = narrow(layer(features, active), active)
        return result.detach(), torch.autograd.grad(result.square().sum(), features)[0]

    alone = [run(features, ActiveSet.from_mask(mask)) for features in inputs]
    for _ in range(3):
        shared = ActiveSet.from_mask(mask)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, inputs, [shared] * len(inputs)))
        for expected, found in zip(alone, together):
            assert torch.equal(expected[0], found[0])
            assert torch.equal(expected[1], found[1])


def test_a_band_of_an_image_gives_the_same_bits_as_the_whole() -> None:
    # what lets the refiner work in bands: halo of one row per layer, even start because of the half resolution
    mask = torch.rand(1, 150, 70) < 0.4
    stack = [SubmanifoldConv2d(8, 32), SubmanifoldConv2d(32, 24), SubmanifoldConv2d(24, 1), SubmanifoldConv2d(1, 1)]
    mix = SubmanifoldConv2d(8, 1, kernel_size=1)
    down, up = SparseConv2d(8, 16), InverseConv2d(16, 1)
    image = torch.randn(1, 8, 150, 70)

    def run(mask: Tensor, image: Tensor) -> Tensor:
        active = ActiveSet.from_mask(mask)
        rows = at(image, mask)
        hidden = rows
        for layer in stack:
            hidden = layer(hidden, active).relu()
        result = torch.zeros(1, *mask.shape[1:], 3)
        result[mask] = torch.cat((hidden, mix(rows, active), up(down(rows, active), active)), 1)
        return result

    with torch.no_grad():
        whole = run(mask, image)
        for start, end in ((0, 20), (20, 23), (24, 90), (90, 150)):
            first, last = max(start - 4, 0), min(end + 4, 150)
            band = run(mask[:, first:last], image[:, :, first:last])
            assert torch.equal(band[:, start - first : end - first], whole[:, start:end])


def test_a_batch_gives_the_same_bits_as_its_images_one_by_one() -> None:
    mask = torch.rand(3, 30, 20) < torch.tensor([0.2, 0.0, 0.9])[:, None, None]
    layer, down, up = SubmanifoldConv2d(6, 5), SparseConv2d(6, 5), InverseConv2d(5, 4)
    image = torch.randn(3, 6, 30, 20)

    def run(mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        active, rows = ActiveSet.from_mask(mask), at(image, mask)
        return layer(rows, active), up(down(rows, active), active)

    single = [run(mask[i : i + 1], image[i : i + 1]) for i in range(3)]
    for together, parts in zip(run(mask, image), zip(*single)):
        assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_stay_half_and_come_close(dtype: torch.dtype) -> None:
    mask = torch.rand(1, 30, 30) < 0.5
    active = ActiveSet.from_mask(mask)
    for layer, dense, coarse in layers():
        image, support = image_for(layer, mask, coarse, torch.float32)
        rows = at(image, support).to(dtype).requires_grad_()
        result = layer(rows, active)
        result.sum().backward()
        assert (result.dtype, rows.grad.dtype, layer.weight.grad.dtype) == (dtype, dtype, torch.float32)
        torch.testing.assert_close(result.float(), dense(image, mask, layer.weight, layer.bias), rtol=0.05, atol=0.05)


def test_autocast_changes_neither_values_nor_gradients() -> None:
    active = ActiveSet.from_mask(torch.rand(1, 20, 20) < 0.5)
    layer, down, up = SubmanifoldConv2d(6, 6), SparseConv2d(6, 8), InverseConv2d(8, 1)
    features = torch.randn(len(active), 6, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result = up(down(layer(features, active), active), active)
            found.append([result, *torch.autograd.grad(result.sum(), [features, layer.weight, down.weight])])
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(*found))


def test_large_results_can_be_changed_in_place_and_still_give_gradients() -> None:
    # large results come from another allocator
    active = ActiveSet.from_mask(torch.ones(1, 210, 210, dtype=torch.bool))
    layer = SubmanifoldConv2d(2, 32)
    image = torch.randn(1, 2, 210, 210, requires_grad=True)
    result = scatter(layer(gather(image, active), active).relu_(), active).mul_(2)
    dense = 2 * F.conv2d(image, layer.weight, layer.bias, padding=1).relu()
    torch.testing.assert_close(result, dense, rtol=1e-5, atol=1e-5)
    wanted = [image, layer.weight]
    for one, other in zip(torch.autograd.grad(result.mean(), wanted), torch.autograd.grad(dense.mean(), wanted)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_state_dict_holds_plain_convolution_weights_and_moves_between_backends() -> None:
    for layer, _, _ in layers():
        size = layer.kernel_size
        state = layer.state_dict()
        assert state["weight"].shape == (layer.out_channels, layer.in_channels, size, size)
        twin = type(layer)(layer.in_channels, layer.out_channels, size, bias="bias" in state, backend="spconv")
        twin.load_state_dict(state)
        assert list(twin.state_dict()) == list(state)


def test_compiling_around_a_layer_changes_nothing() -> None:
    layer = SubmanifoldConv2d(3, 4)
    active = ActiveSet.from_mask(torch.rand(1, 8, 8) < 0.5)
    features = torch.randn(len(active), 3)

    def run(features: Tensor) -> Tensor:
        return layer(features * 2, active).relu() + 1

    assert torch.equal(torch.compile(run, backend="eager")(features), run(features))


def test_mistakes_are_named() -> None:
    active = ActiveSet.from_mask(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`features` must have shape"):
        SubmanifoldConv2d(3, 4)(torch.zeros(5, 3), active)
    with pytest.raises(ValueError, match="must be floating point"):
        SubmanifoldConv2d(3, 4)(torch.zeros(4, 3, dtype=torch.int64), active)
    with pytest.raises(ValueError, match="must be odd, got 2"):
        SubmanifoldConv2d(3, 4, kernel_size=2)
    with pytest.raises(ValueError, match="must be 2 or 3, got 5"):
        SparseConv2d(3, 4, kernel_size=5)
    with pytest.raises(ValueError, match="must be 2, got 1"):
        SparseConv2d(3, 4, stride=1)
    with pytest.raises(ValueError, match="must be 2 or 3, got 1"):
        InverseConv2d(3, 4, kernel_size=1)
    with pytest.raises(ValueError, match="'auto', 'torch' or 'spconv', got 'cuda'"):
        SubmanifoldConv2d(3, 4, backend="cuda")
