"""A training step and a prediction on tensors without contents: what they would hold and compute."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lit_matting.module import LitMatting
from lit_matting.networks.inference import matte_at_native_size
from lit_matting.networks.refiner import Refined, SparseRefiner
from lit_matting.records import MattingBatch
from tools.planning.memory import FusedAttentionOnCPU, MemoryTracker

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TEACHER = "teacher"
"""The part that only training has."""
MEASURED_ROWS = 150_000
"""Pixels that the refiner is measured on at most; its memory and time grow in proportion."""


@dataclass
class Step:
    """What one training step, or one prediction, holds and computes."""

    peak: int = 0
    """Bytes alive at the worst moment."""
    moment: str = ""
    """Which moment that is."""
    flops: int = 0
    flops_by_part: dict[str, int] = field(default_factory=dict)
    """Of the forward pass."""
    kept_by_part: dict[str, int] = field(default_factory=dict)
    """Bytes that a part's forward pass leaves behind for the backward pass."""
    optimizer: int = 0
    """Bytes of the optimizer's states."""
    gradients: int = 0


@dataclass(frozen=True)
class RefinerCost:
    """What the refiner needs for its images."""

    kept: int
    forward_peak: int
    backward_peak: int
    inference_peak: int
    forward_flops: int
    step_flops: int


def parts_of(model: LitMatting) -> dict[str, list[nn.Module]]:
    """Return the rows of the table: part -> its modules."""
    network, backbone = model.network, model.network.backbone
    # by the names that backbones use; what has another name is a row of its own
    names = {
        "image_encoder": "image encoder",
        "features": "image encoder",
        "text_encoder": "text encoder",
        "adapter": "text correction",
        "unet": "UNet",
    }
    parts: dict[str, list[nn.Module]] = {}
    for name, module in backbone.named_children():
        parts.setdefault(names.get(name, name.replace("_", " ")), []).append(module)
    parts["neck"] = [network.neck]
    heads = (network.coarse_trimap_head, network.grounding_head, network.trimap_head, network.alpha_head)
    parts["heads"] = [*heads, *([network.project] if network.project is not None else [])]
    if network.refiner is not None:
        parts["refiner"] = [network.refiner]
    if model.teacher is not None:
        # what it shares with the student is in the rows above
        theirs, shared = model.teacher.network, model.teacher.shared
        parts[TEACHER] = [module for name, module in theirs.backbone.named_children() if name not in shared]
        parts[TEACHER] += [module for module in theirs.children() if module is not theirs.backbone]
    return {name: modules for name, modules in parts.items() if any(True for m in modules for _ in m.parameters())}


def training_step(
    model: LitMatting, batch: int, size: int, precision: str, cost: RefinerCost | None, foreach: bool
) -> Step:
    """Return what training on ``batch`` images of ``size`` pixels takes, in its steady state.

    Two steps, as Lightning takes them: the first step's gradients live until the second one's loss is there.

    Args:
        model: On the meta device; it stays as it is.
        batch: Images per process.
        size: Side, in pixels.
        precision: Of the trainer.
        cost: Of the refiner, if there is one.
        foreach: Let the optimizer work on all parameters at once, as it does on a GPU.
    """
    model = _copy(model)
    result = Step()
    with _without_contents(model) as (tracker, counter), _stand_in(model.network.refiner, cost):
        model.train()
        model.log = model.log_dict = lambda *call, **options: None  # type: ignore[method-assign]
        optimizer = model.make_optimizer([item for item in model.parameters() if item.requires_grad])
        if foreach and "foreach" in optimizer.defaults:
            for group in optimizer.param_groups:
                group["foreach"] = True
        for index in range(2):
            data = random_batch(batch, size)
            tracker.restart()
            watched = contextlib.nullcontext()
            if index:
                watched = _watch(model, tracker, result, result.flops_by_part, counter)
            with counter, watched, torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST):
                tracker.moment = "forward pass"
                loss = model.training_step(data, index)
                optimizer.zero_grad()
                tracker.moment = "backward pass"
            result.flops = counter.get_total_flops()
            with counter:
                loss.backward()
            result.flops += counter.get_total_flops()
            del loss, data
            tracker.moment = "optimizer's step"
            optimizer.step()
        result.peak, result.moment = tracker.peak, tracker.peak_moment
        result.optimizer = _bytes(value for state in optimizer.state.values() for value in state.values())
        result.gradients = _bytes(item.grad for item in model.parameters())
    if cost is not None:
        result.flops += cost.step_flops
        result.flops_by_part["refiner"] = cost.forward_flops
    return result


def prediction(model: LitMatting, batch: int, size: int, precision: str, cost: RefinerCost | None) -> Step:
    """Return what matting ``batch`` photographs of ``size`` pixels takes; arguments as of :func:`training_step`."""
    model = _copy(model)
    model.teacher = None
    result = Step()
    with _without_contents(model) as (tracker, counter), _stand_in(model.network.refiner, cost):
        model.eval()
        tracker.moment = "forward pass"
        image = torch.rand(batch, 3, size, size)
        tracker.restart()
        autocast = torch.autocast("cpu", AUTOCAST.get(precision), enabled=precision in AUTOCAST)
        with counter, torch.no_grad(), autocast, _watch(model, tracker, Step(), result.flops_by_part, counter):
            matte_at_native_size(model.network, image, phrases(batch), size)
        result.flops = counter.get_total_flops()
        result.peak, result.moment = tracker.peak, tracker.peak_moment
    if cost is not None:
        result.flops += cost.forward_flops
        result.flops_by_part["refiner"] = cost.forward_flops
    return result


def _copy(model: LitMatting) -> LitMatting:
    """Return a copy of the model, with a teacher of its own."""
    copied = copy.deepcopy(model)
    if model.teacher is not None:
        copied.teacher = copy.copy(model.teacher)
        copied.teacher.network = copy.deepcopy(model.teacher.network)
        for name in model.teacher.shared:
            copied.teacher.network.backbone.set_submodule(name, copied.network.backbone.get_submodule(name))
    return copied


def phrases(count: int) -> list[str]:
    """Return different phrases, so that none comes from a cache."""
    return [f"the red umbrella number {index}" for index in range(count)]


def random_batch(count: int, size: int) -> MattingBatch:
    """Return a batch of noise."""
    return MattingBatch(
        image=torch.rand(count, 3, size, size),
        target=torch.rand(count, 1, size, size),
        has_alpha=torch.ones(count, dtype=torch.bool),
        prompts=tuple(phrases(count)),
        prompt_kinds=("",) * count,
        keys=("",) * count,
        instance=torch.zeros(count, dtype=torch.long),
    )


def _bytes(tensors: Any) -> int:
    return sum(item.numel() * item.element_size() for item in tensors if isinstance(item, Tensor))


@contextlib.contextmanager
def _without_contents(model: LitMatting) -> Iterator[tuple[MemoryTracker, FlopCounterMode]]:
    """Turn the model's tensors into ones without contents that say they are on a processor, so that autocast acts."""
    tracker = MemoryTracker()
    flops: dict[Any, Callable[..., int]] = {}
    aten = torch.ops.aten

    def attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
        # four products, and the forward pass's first once more: 2.5 times its two
        return 5 * sdpa_flop_count(query, key, value) // 2

    flops[aten._scaled_dot_product_flash_attention_for_cpu] = attention
    flops[aten._scaled_dot_product_flash_attention_for_cpu_backward] = attention_backward
    with FakeTensorMode(allow_non_fake_inputs=True):
        # in a list, a module that student and teacher share is once
        everything = nn.ModuleList([model] if model.teacher is None else [model, model.teacher.network])
        _give_contents(everything)
        for tensor in (*everything.parameters(), *everything.buffers()):
            tracker.add(tensor)
        with tracker, FusedAttentionOnCPU():
            yield tracker, FlopCounterMode(display=False, custom_mapping=flops)


def _give_contents(model: nn.Module) -> None:
    """Replace every tensor by a new one on the processor: one without contents where those are made."""
    for module in model.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad))
        for key, value in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty_like(value, device="cpu"))


@contextlib.contextmanager
def _watch(
    model: LitMatting,
    tracker: MemoryTracker,
    result: Step,
    flops: dict[str, int] | None = None,
    counter: FlopCounterMode | None = None,
) -> Iterator[None]:
    """Note what each part's forward pass leaves behind, and what it computes."""
    handles = []
    for name, modules in parts_of(model).items():
        for module in modules:
            before: list[tuple[int, int]] = []

            def enter(*_: Any, before: list[tuple[int, int]] = before) -> None:
                before.append((tracker.live, counter.get_total_flops() if counter else 0))

            def leave(*_: Any, before: list[tuple[int, int]] = before, name: str = name) -> None:
                live, computed = before.pop()
                result.kept_by_part[name] = result.kept_by_part.get(name, 0) + tracker.live - live
                if flops is not None and counter is not None:
                    flops[name] = flops.get(name, 0) + counter.get_total_flops() - computed

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the refiner: its tensors' sizes depend on their contents, so it is run, on a small image -------------------------


def refiner_cost(
    refiner: SparseRefiner, images: int, size: int, active: float, channels: Mapping[int, int]
) -> RefinerCost:
    """Run the refiner on real numbers and return what ``images`` images of ``size`` pixels take.

    Large ones are measured on fewer and smaller images: memory and time grow with the pixels.
    """
    side, count = size, images
    while count > 1 and count * side * side * active > MEASURED_ROWS:
        count = (count + 1) // 2
    while side > 128 and count * side * side * active > MEASURED_ROWS:
        side //= 2
    scale = images / count * (size / side) ** 2
    real = copy.deepcopy(refiner).train()
    _give_contents(real)
    for parameter in real.parameters():
        nn.init.constant_(parameter, 0.01)
    refine_share(real, active)
    if real.half_scale_above is not None and side <= real.half_scale_above < size:
        real.half_scale_above = side - 1
    low = max(4, side // min(channels))
    image, maps = torch.rand(count, 3, side, side), torch.rand(count, 1, low, low)
    counter = FlopCounterMode(display=False)
    with MemoryTracker() as tracker:
        features = torch.rand(count, refiner.feature_channels, low, low, requires_grad=True)
        before = tracker.live
        tracker.restart()
        with counter:
            refined = real(image, maps, maps, features)
        forward_flops, forward_peak = counter.get_total_flops(), tracker.peak - before
        outputs = sum(item.numel() * item.element_size() for item in (*refined.alphas, *refined.active))
        kept = tracker.live - before - outputs
        gradient = torch.ones_like(refined.alpha)
        tracker.restart()
        live = tracker.live
        with counter:
            refined.alpha.backward(gradient)
        backward_peak, backward_flops = tracker.peak - live, counter.get_total_flops()
        del refined, gradient
        before = tracker.live
        tracker.restart()
        with torch.no_grad():
            real.eval()(image, maps, maps, features)
        inference_peak = tracker.peak - before
    numbers = (kept, forward_peak, backward_peak, inference_peak, forward_flops, forward_flops + backward_flops)
    return RefinerCost(*(max(0, round(scale * number)) for number in numbers))


def refine_share(refiner: SparseRefiner, active: float) -> None:
    """Have a refiner work on a share of the pixels, whatever is uncertain."""
    find = refiner.active_pixels

    def some(*call: Any, **named: Any) -> Tensor:
        found = find(*call, **named)  # its own temporaries belong to the bill
        found.zero_()[:, : max(1, round(active * found.shape[1]))] = True
        return found

    refiner.active_pixels = some  # type: ignore[method-assign]


class _Holds(torch.autograd.Function):
    """Holds as many bytes as the refiner would until the backward pass."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kept: int, forward_peak: int, backward_peak: int) -> Tensor:
        torch.empty(forward_peak, dtype=torch.uint8)
        ctx.held = torch.empty(kept, dtype=torch.uint8) if torch.is_grad_enabled() or features.requires_grad else None
        ctx.backward_peak, ctx.shape = backward_peak, features.shape
        return features.new_zeros(features.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        torch.empty(ctx.backward_peak, dtype=torch.uint8)
        ctx.held = None
        return gradient.new_zeros(ctx.shape), None, None, None


@contextlib.contextmanager
def _stand_in(refiner: SparseRefiner | None, cost: RefinerCost | None) -> Iterator[None]:
    """Let something that only takes the refiner's memory stand in for it."""
    if refiner is None or cost is None:
        yield
        return

    def forward(image: Tensor, alpha: Tensor, trimap: Tensor, features: Tensor, box: Tensor | None = None) -> Refined:
        training = torch.is_grad_enabled()
        kept, peak = (cost.kept, cost.forward_peak) if training else (0, cost.inference_peak)
        held = _Holds.apply(features, kept, peak, cost.backward_peak)
        held = held + 0.0 * sum(parameter.sum() for parameter in refiner.parameters())
        height, width = image.shape[-2:]
        sizes = [(height, width)]
        if refiner.half_scale_above is not None and max(height, width) > refiner.half_scale_above:
            sizes.insert(0, (height // 2, width // 2))
        alphas = tuple(
            torch.empty(image.shape[0], 1, *size, requires_grad=False) + held[:, None, None, None] for size in sizes
        )
        return Refined(
            alphas[-1], alphas, tuple(torch.empty(image.shape[0], *size, dtype=torch.bool) for size in sizes)
        )

    refiner.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del refiner.forward
