"""A checkpoint alone rebuilds its network; what it may not say is refused before anything of it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_modules.shards import InstanceEntry, ShardWriter
from lit_matting.backbones import StableDiffusion
from lit_matting.checkpoints import Checkpoint, build_network, check_classes, read_checkpoint, store_threshold
from lit_matting.checks import InputError
from lit_matting.cli import main
from lit_matting.module import LitMatting
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.pipeline import MattingPipeline
from lit_matting.sharing import read_folder, write_folder


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Writes the checkpoint with something changed."""

    def write(change: Callable[[dict[str, Any]], None]) -> Path:
        content = torch.load(checkpoint, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "altered.ckpt")
        return tmp_path / "altered.ckpt"

    return write


def test_the_network_is_rebuilt_from_the_checkpoint_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no relative path of the training run leads anywhere
    network = build_network(read_checkpoint(checkpoint))
    module = LitMatting.load_from_checkpoint(checkpoint, map_location="cpu")
    expected = module.network.state_dict()
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert network.refiner.scales["full_scale"].leave.weight.abs().max() > 0, "not just freshly built"
    assert not network.training


def test_what_is_only_for_training_is_not_needed(altered: Callable[..., Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["losses"] = {"mine": {"class_path": "my_project.losses.Mine"}}
        content["hyper_parameters"]["optimizer"] = {"class_path": "my_project.Shampoo"}
        content["hyper_parameters"]["initial_weights"] = "outputs/stage1/that/is/gone.ckpt"
        del content["optimizer_states"], content["loops"], content["callbacks"]

    build_network(read_checkpoint(altered(change)))


def test_a_file_that_runs_code_when_unpickled_is_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"lit_matting": {}, "state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.ckpt", "plain.ckpt"):
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(InputError, match="could run code"):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_a_checkpoint_of_another_project_is_told_apart(tmp_path: Path, altered: Callable[..., Path]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(
        InputError, match=r"other\.ckpt' was not made by this project \(it has no `lit_matting` entry\)"
    ):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"list\.ckpt' was not made by this project"):
        read_checkpoint(tmp_path / "list.ckpt")
    for name in ("text.ckpt", "empty.ckpt"):
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match=r"trained from Python.*MattingPipeline\(network, image_size\)"):
        read_checkpoint(altered(lambda content: content.pop("hyper_parameters")))


def test_half_a_checkpoint_is_damaged(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"half\.ckpt'.*damaged"):
        read_checkpoint(tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_head", "os._exit"),
        ("alpha_head", {"class_path": "subprocess.Popen"}),
        ("neck", {"class_path": "lit_matting.networks.neck.Neck", "init_args": {"channels": ["os.system"]}}),
        ("neck", "lit_matting.networks.neck.torch.hub.load"),
        ("alpha_head", "lit_matting.networks.neck.norm"),
        ("backbone", {"class_path": "lit_matting.backbones.stable_diffusion.UNet2DConditionModel"}),
    ],
)
def test_a_name_that_leads_out_of_the_package_is_refused(altered: Callable[..., Path], key: str, value: Any) -> None:
    path = altered(lambda content: content["hyper_parameters"].update({key: value}))
    with pytest.raises(InputError, match=f"the checkpoint's `network.{key}"):
        read_checkpoint(path)


def test_a_trusted_package_may_be_named() -> None:
    parts = {"backbone": {"class_path": "json.JSONDecoder"}}
    with pytest.raises(InputError, match=r"trust=\('json',\)"):
        check_classes(parts)
    check_classes(parts, trust=("json",))


def test_file_names_and_numbers_are_no_names_of_classes() -> None:
    check_classes({"pretrained": "models/sd21", "file": "model.safetensors", "scale": 0.18215, "none": None})


def test_a_network_of_a_newer_version_is_said_to_be_one(altered: Callable[..., Path]) -> None:
    def unknown_class(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["backbone"]["class_path"] = "lit_matting.backbones.Gigantic"

    with pytest.raises(InputError, match=r"Gigantic', which this version of lit_matting does not have"):
        read_checkpoint(altered(unknown_class))

    def unknown_argument(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["backbone"]["init_args"]["rotary"] = True

    with pytest.raises(InputError, match=r"cannot build the network.*rotary"):
        build_network(read_checkpoint(altered(unknown_argument)))


def test_weights_that_do_not_fit_are_named(altered: Callable[..., Path]) -> None:
    def smaller(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["neck"]["init_args"]["channels"] = 16

    with pytest.raises(InputError, match="do not fit its own network"):
        build_network(read_checkpoint(altered(smaller)))

    def fewer(content: dict[str, Any]) -> None:
        del content["state_dict"]["network.grounding_head.offset"]

    with pytest.raises(InputError, match=r"1 are missing \(first: grounding_head.offset\), 0 are unexpected"):
        build_network(read_checkpoint(altered(fewer)))


def test_weights_for_another_frozen_backbone_are_refused_from_a_checkpoint_and_from_a_folder(tmp_path: Path) -> None:
    from tiny_models import TINY_TEXT, TINY_UNET, TINY_VAE

    parts = {"unet": TINY_UNET, "vae": TINY_VAE, "text_encoder": TINY_TEXT}
    (tmp_path / "tiny.json").write_text(json.dumps(parts))
    backbone = {
        "class_path": "lit_matting.backbones.StableDiffusion",
        "init_args": {"pretrained": None, "architecture": str(tmp_path / "tiny.json")},
    }
    network = MattingNetwork(StableDiffusion(**backbone["init_args"]), refiner=None)
    hashes = network.backbone.frozen_hashes()
    assert set(hashes) == {"image_encoder", "text_encoder"}
    frozen = tuple(f"backbone.{name}." for name in hashes)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(frozen)}
    source = Checkpoint({"backbone": backbone, "refiner": None}, weights, 64, frozen=hashes)
    write_folder(source, tmp_path / "shared")
    assert read_folder(tmp_path / "shared", "shared").frozen == hashes
    MattingPipeline.from_pretrained(tmp_path / "shared")

    other = {**hashes, "text_encoder": "0" * 64}
    write_folder(dataclasses.replace(source, frozen=other), tmp_path / "shared")
    with pytest.raises(InputError, match=r"another text_encoder than StableDiffusion\(.*instead of 00000000\): give"):
        MattingPipeline.from_pretrained(tmp_path / "shared")


def test_a_stored_threshold_is_read_back_and_changes_nothing_else(
    checkpoint: Path, altered: Callable[..., Path]
) -> None:
    path = altered(lambda content: None)
    assert read_checkpoint(path).threshold is None
    store_threshold(path, 0.25)
    assert read_checkpoint(path).threshold == 0.25
    before, after = (torch.load(p, weights_only=True) for p in (checkpoint, path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before["state_dict"][name], value) for name, value in after["state_dict"].items())
    assert sorted(item.name for item in path.parent.iterdir()) == ["altered.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("averaging", ["callbacks.EMA", "lightning.pytorch.callbacks.EMAWeightAveraging"])
def test_after_training_with_weight_averaging_the_averaged_weights_are_used(
    experiment: dict[str, Any], tmp_path: Path, averaging: str
) -> None:
    rng = np.random.default_rng(0)
    left = np.tile(np.repeat(np.uint8([255, 0]), 32), (64, 1))
    with ShardWriter(tmp_path / "shards", prefix="train", dataset="train", split="train", tool="test 1") as writer:
        for number in range(4):
            instances = [
                InstanceEntry(id=name, target=alpha, kind="alpha", phrases=[(f"the {name} half", "position")])
                for name, alpha in {"left": left, "right": 255 - left}.items()
            ]
            image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            writer.write(f"{number:06d}", image=image, image_ext="png", instances=instances)
    experiment["trainer"] |= {"max_steps": 3, "max_epochs": -1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    experiment["trainer"]["callbacks"] = [
        {"class_path": averaging, "init_args": {"decay": 0.9}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path), "filename": "last", "every_n_train_steps": 3},
        },
    ]
    experiment["trainer"]["default_root_dir"] = str(tmp_path)
    experiment["model"].pop("image_size")  # the data say it
    source = {"shards": str(tmp_path / "shards" / "train.index.json"), "batch_size": 2}
    experiment["data"] = {
        "class_path": "data_modules.InterleavedDataModule",
        "init_args": {
            "image_size": 64,
            "train": {"halves": {"class_path": "data_modules.ShardSource", "init_args": source}},
            "schedule": {
                "class_path": "data_modules.InterleavedSchedule",
                "init_args": {"cycle": ["halves"], "insert_every": 0, "insert": []},
            },
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(experiment))
    assert main(["fit", "--config", str(tmp_path / "fit.yaml")]) == 0

    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "network.neck.project.8.weight"
    averaged, latest = content["state_dict"][name], content["current_model_state"][name]
    assert not torch.equal(averaged, latest)
    pipeline = MattingPipeline.from_checkpoint(tmp_path / "last.ckpt", device="cpu", precision="fp32")
    used = pipeline.network.state_dict()
    assert torch.equal(used[name.removeprefix("network.")], averaged)
    assert read_checkpoint(tmp_path / "last.ckpt").origin["step"] == 3
