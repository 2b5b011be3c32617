"""The numbers in docs/METHOD.md are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import LightningCLI

from lit_matting.backbones.architecture import read_architecture
from lit_matting.backbones.text import TextAdapter
from lit_matting.cli import main
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.networks.refiner import SparseRefiner

ROOT = Path(__file__).resolve().parents[2]


def count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def table() -> dict[str, tuple[int | None, int]]:
    """Part -> parameters at full size and in the demo, as the documentation has them."""
    rows = {}
    for line in (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[4].replace(",", "").isdigit():
            full = cells[2].replace(",", "")
            rows[cells[0]] = (int(full) if full.isdigit() else None, int(cells[4].replace(",", "")))
    return rows


class Sizes(nn.Module):
    """As much of Stable Diffusion 2.1 as the rest of the network asks for."""

    channels = {8: 320, 16: 640, 32: 1280, 64: 1280}  # noqa: RUF012
    max_tokens = 40
    text_channels = 1024


def parts(network: MattingNetwork) -> dict[str, int]:
    return {
        "neck": count(network.neck),
        "coarse trimap head": count(network.coarse_trimap_head),
        "grounding head": count(network.grounding_head),
        "trimap head": count(network.trimap_head),
        "alpha head": count(network.alpha_head),
        "feature projection": count(network.project),
        "refiner": count(network.refiner),
    }


def test_parameters_at_full_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_architecture("sd21")["unet"])
        network = MattingNetwork(Sizes(), refiner=SparseRefiner())  # type: ignore[arg-type]
        adapter = TextAdapter(1024)
    assert count(unet) == 865_910_724
    trunk = count(unet) - count(unet.conv_norm_out) - count(unet.conv_out)
    built = {"UNet without its output layers": trunk, "text correction": count(adapter), **parts(network)}
    documented = {part: full for part, (full, _) in table().items() if full is not None}
    assert built == documented


def test_parameters_of_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(ROOT / "configs" / "experiment" / "demo.yaml")]) == 0
    network = built[0].model.network
    backbone = network.backbone
    counted = {
        "image encoder": count(backbone.image_encoder),
        "text encoder": count(backbone.text_encoder),
        "text correction": count(backbone.adapter),
        "UNet without its output layers": count(backbone.unet),
        **parts(network),
    }
    assert counted == {part: demo for part, (_, demo) in table().items()}
