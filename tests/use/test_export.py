"""What is exported gives the network's own mattes, and smaller weights are judged before they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_pipeline

from lit_matting.backbones import StableDiffusion
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.pipeline import MattingPipeline
from tools.export import main
from tools.exporting.branches import ImageBranch, TextBranch, graphs, shrink_weights
from tools.exporting.graphs import ExportedGraphs, ExportedNetwork, write_graph

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")

PHRASES = ["the red thing", "the leftmost one", "glass"]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as the tool exports it, in both formats."""
    folder = tmp_path_factory.mktemp("export") / "graphs"
    assert main([str(checkpoint), "-o", str(folder), "--format", "onnx", "torch"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_graphs_and_our_refiner_give_the_pipelines_matte(
    exported: Path, matting: MattingPipeline, picture: Callable[..., np.ndarray], kind: str
) -> None:
    network = ExportedNetwork(ExportedGraphs(exported, kind), matting.network)
    composed = MattingPipeline(network, matting.image_size, device="cpu", precision="fp32")
    for size, phrases in (((93, 131), PHRASES), ((40, 200), PHRASES[:1])):
        image = picture(*size)
        for own, other in zip(matting(image, phrases), composed(image, phrases)):
            assert other.alpha.shape == size
            assert np.abs(own.alpha - other.alpha).max() < 1e-3
            assert other.confidence == pytest.approx(own.confidence, abs=1e-3)
        assert np.ptp(own.alpha) > 0.05, "a constant would prove nothing"


@pytest.mark.slow
def test_onnxruntime_alone_gives_the_networks_maps_for_any_batch(
    exported: Path, matting: MattingPipeline, picture: Callable[..., np.ndarray]
) -> None:
    sessions = {
        name: onnxruntime.InferenceSession(str(exported / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("image", "text", "matte")
    }
    about = json.loads((exported / "export.json").read_text())
    assert sessions["image"].get_inputs()[0].shape == ["batch", 3, 64, 64]
    images = torch.stack([torch.from_numpy(picture(64, 64, n)).permute(2, 0, 1) / 255 for n in range(3)])
    numbers = matting.network.backbone.text_encoder.spell(PHRASES)
    with torch.no_grad():
        expected = matting.network(images, PHRASES, refine=False)
    for rows in (slice(0, 1), slice(0, 3)):
        (latent,) = sessions["image"].run(None, {"image": images[rows].numpy()})
        spelled = {f"phrase_{name}": value[rows].numpy() for name, value in numbers.items()}
        text = dict(zip(about["graphs"]["text"]["outputs"], sessions["text"].run(None, spelled)))
        maps = sessions["matte"].run(None, {"latent": latent, **text})
        found = dict(zip(about["graphs"]["matte"]["outputs"], map(torch.from_numpy, maps)))
        assert (found["alpha"] - expected.alpha_lr[rows]).abs().max() < 1e-3
        assert (found["trimap"] - expected.trimap[rows]).abs().max() < 1e-3
        assert (found["grounding"] - expected.grounding[rows]).abs().max() < 1e-3


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(
    exported: Path, checkpoint: Path, tmp_path: Path, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, target in (("outputs/demo/last.ckpt", checkpoint), ("build/demo", exported)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    text = (Path(__file__).resolve().parents[2] / "docs/EXPORT.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, MattingPipeline] = {}
    exec(compile(example, "docs/EXPORT.md", "exec"), scope)
    own, other = (scope[name](photograph, "the red thing").alpha for name in ("own", "matting"))
    assert np.abs(own - other).max() < 1e-3


@pytest.mark.slow
def test_graphs_say_nothing_about_the_machine_they_were_made_on(exported: Path) -> None:
    root = str(Path(__file__).resolve().parents[2]).encode()
    assert not any(root in (exported / f"{name}.onnx").read_bytes() for name in ("image", "text", "matte"))
    assert sorted(path.name for path in exported.parent.iterdir()) == ["graphs"]


@pytest.mark.parametrize(("weights", "error"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_smaller_weights_are_as_near_as_their_bits_allow(checkpoint: Path, weights: str, error: float) -> None:
    network = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32").network
    layer, refiner = network.neck.fuse["8"].layers[2], network.refiner.scales["full_scale"].enter.weight
    whole, untouched = layer.weight.clone(), refiner.clone()
    shrink_weights(network, weights)
    # bf16 errs by a share of each value, int8 by a share of its channel's largest
    scale = whole.abs() if weights == "bf16" else whole.abs().amax((1, 2, 3), keepdim=True)
    difference = (layer.weight - whole).abs()
    assert (difference <= 1.001 * error * scale).all()
    assert difference.max() > 0
    kept = layer.parametrizations.weight.original0
    assert kept.dtype == {"bf16": torch.bfloat16, "int8": torch.int8}[weights]
    assert torch.equal(network.refiner.scales["full_scale"].enter.weight, untouched)


@pytest.mark.slow
def test_a_graph_of_int8_weights_holds_integers_and_runs(checkpoint: Path, tmp_path: Path) -> None:
    import onnx

    network = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32").network
    shrink_weights(network, "int8")
    image = graphs(network, 64)[0]
    write_graph(image, tmp_path, ["onnx"], fold=False)
    tensors = onnx.load(tmp_path / "image.onnx").graph.initializer
    assert sum(np.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.INT8) > 90_000
    assert sum(np.prod(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT) < 5_000
    session = onnxruntime.InferenceSession(str(tmp_path / "image.onnx"), providers=["CPUExecutionProvider"])
    pixels = torch.rand(3, 3, 64, 64)
    (latent,) = session.run(None, {"image": pixels.numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(latent) - ImageBranch(network)(pixels)).abs().max() < 1e-4


@pytest.mark.slow
def test_stable_diffusions_three_graphs_give_its_maps(tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path / "sd")
    network = MattingNetwork(StableDiffusion(str(tmp_path / "sd"), text_tokens=12)).eval().requires_grad_(False)
    for graph in graphs(network, 64):
        write_graph(graph, tmp_path, ["onnx"])
    with torch.no_grad():
        text = network.backbone.encode_text(PHRASES)
        pixels = torch.rand(3, 3, 64, 64)
        latent = network.backbone.encode_image(pixels)
        maps = network(pixels, PHRASES, refine=False)
    numbers = network.backbone.text_encoder.spell(PHRASES)
    sessions = {
        name: onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("text", "image", "matte")
    }
    names = ("tokens", "words", "valid", "pooled")
    found = sessions["text"].run(None, {f"phrase_{name}": value.numpy() for name, value in numbers.items()})
    for value, name in zip(found, names):
        assert np.abs(value.astype(np.float32) - getattr(text, name).float().numpy()).max() < 1e-4
    (seen,) = sessions["image"].run(None, {"image": pixels.numpy()})
    assert np.abs(seen - latent.numpy()).max() < 1e-4
    said = sessions["matte"].run(None, {"latent": seen, **dict(zip(names, found))})
    outputs = dict(zip((output.name for output in sessions["matte"].get_outputs()), map(torch.from_numpy, said)))
    # features, before the untrained grounding head: it standardises flat attention, which enlarges rounding
    torch.testing.assert_close(outputs["features"], maps.features, rtol=1e-3, atol=1e-3)
    assert maps.features.std() > 0.05, "a constant would prove nothing"
    assert (outputs["alpha"] - maps.alpha_lr).abs().max() < 0.05


def test_phrases_as_numbers_have_the_features_of_phrases(matting: MattingPipeline) -> None:
    backbone = matting.network.backbone
    numbers = backbone.text_encoder.spell(PHRASES)
    with torch.no_grad():
        found = TextBranch(matting.network, tuple(numbers))(*numbers.values())
        expected = backbone.encode_text(PHRASES)
    assert all(
        torch.equal(a, getattr(expected, name)) for a, name in zip(found, ("tokens", "words", "valid", "pooled"))
    )


def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, photograph: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("image,phrase\na.png,the red thing\n")
    (tmp_path / "taken").mkdir()
    out = ["-o", str(tmp_path / "out")]
    check = ["--check", str(tmp_path / "pairs.csv")]
    mistakes = {
        (str(checkpoint), "-o", str(tmp_path / "taken")): "exists already",
        (*out,): "give a checkpoint, or `--config`",
        (str(checkpoint), *out, "--weights", "int8"): "`--weights int8` changes mattes: name by `--check`",
        (str(checkpoint), *out, "--weights", "int8", *check, "--allow", "1e-9"): "more than `--allow`",
        (str(tmp_path / "none.ckpt"), *out): "there is no checkpoint",
        ("--config", str(tmp_path / "pairs.csv"), *out): "is neither an experiment nor a backbone",
    }
    for words, sentence in mistakes.items():
        assert main([*words]) == 2, words
        printed = capsys.readouterr().err
        assert sentence in printed, words
        assert printed.count("\n") == 1, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "pairs.csv", "taken"]


@pytest.mark.slow
def test_smaller_weights_that_keep_the_mattes_are_written_with_what_they_cost(
    exported: Path, checkpoint: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("image,phrase\na.png,the red thing\na.png,glass\n")
    words = ["--weights", "int8", "--check", str(tmp_path / "pairs.csv"), "--allow", "0.05"]
    assert main([str(checkpoint), "-o", str(tmp_path / "small"), *words]) == 0
    about = json.loads((tmp_path / "small/export.json").read_text())
    assert about["weights"] == "int8"
    assert 0 < abs(about["cost_of_smaller_weights"]["sad_change"]) <= 0.05

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.onnx"))

    assert size(tmp_path / "small") < size(exported)
