"""One training step and one prediction of the whole network on Stable Diffusion 2.1's architecture; prints JSON.

Run by test_full_size.py in a process of its own, so that peak memory is this program's alone.
"""

from __future__ import annotations

import json
import resource
import time

import torch

from lit_matting.backbones import StableDiffusion
from lit_matting.losses import (
    AlphaLowResolution,
    CoarseTrimap,
    Objective,
    Refinement,
    SemanticTrimap,
    SoftGrounding,
)
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.networks.refiner import SparseRefiner
from lit_matting.targets import targets_for


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    report: dict[str, object] = {}
    started = time.process_time()
    torch.manual_seed(0)
    backbone = StableDiffusion(None, "sd21", unet_precision="bf16")
    network = MattingNetwork(backbone, refiner=SparseRefiner()).train()
    report["unet_parameters"] = sum(parameter.numel() for parameter in backbone.unet.parameters())
    report["build_s"] = time.process_time() - started
    report["build_gib"] = peak_gib()

    terms = {
        "stm": SemanticTrimap(),
        "ctm": CoarseTrimap(),
        "sg": SoftGrounding(),
        "alpha_lr": AlphaLowResolution(),
        "r": Refinement(),
    }
    objective = Objective(terms)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    image = torch.rand(1, 3, 512, 512)
    y, x = torch.meshgrid(torch.arange(512.0), torch.arange(512.0), indexing="ij")
    alpha = ((150 - (y - 250).hypot(x - 260)) / 20).clamp(0, 1)[None, None]
    before = backbone.unet.conv_in.weight.detach().clone()

    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(image, ["the red umbrella"])
    loss, values = objective(output, targets_for(alpha, torch.ones(1, dtype=torch.bool), (64, 64), (16, 16)))
    loss.backward()
    optimizer.step()
    report["step_s"] = time.process_time() - started
    report["losses"] = {name: float(value.detach()) for name, value in values.items()}
    report["without_gradient"] = [
        name for name, parameter in network.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    report["unet_moved"] = bool((backbone.unet.conv_in.weight.detach() != before).any())
    report["maps"] = len(output.attention)
    del output, loss, values
    optimizer.zero_grad(set_to_none=True)
    report["step_gib"] = peak_gib()

    network.eval()
    started = time.process_time()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        output = network(image, ["the red umbrella"])
    report["predict_s"] = time.process_time() - started
    fields = ("trimap", "coarse_trimap", "grounding", "alpha_lr", "alpha")
    report["shapes"] = {name: list(getattr(output, name).shape) for name in fields}
    report["finite"] = all(bool(getattr(output, name).isfinite().all()) for name in fields)
    report["peak_gib"] = peak_gib()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
