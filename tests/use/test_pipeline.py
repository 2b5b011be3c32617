"""The pipeline gives exactly what the network gives, for every way of asking."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_pipeline

from lit_matting.backbones import StableDiffusion
from lit_matting.checkpoints import build_network, read_checkpoint
from lit_matting.checks import InputError
from lit_matting.devices import pick_device, pick_precision
from lit_matting.networks.inference import matte_at_native_size
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.pipeline import MattingPipeline

PHRASES = ["the red thing", "the leftmost one", "glass"]


def network_says(matting: MattingPipeline, image: np.ndarray, phrases: list[str]) -> np.ndarray:
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().float() / 255
    with torch.no_grad():
        output = matte_at_native_size(matting.network, tensor, phrases, matting.image_size)
    return output.alpha[:, 0].numpy()


@pytest.mark.parametrize("size", [(93, 131), (64, 64), (1, 1), (3, 200), (257, 30)])
def test_the_matte_is_the_networks_at_exactly_the_photographs_size(
    matting: MattingPipeline, picture: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    image = picture(*size)
    result = matting(image, PHRASES[0])
    assert result.alpha.shape == size
    assert result.alpha.dtype == np.float32
    assert np.array_equal(result.alpha, network_says(matting, image, PHRASES[:1])[0])
    assert np.ptp(result.alpha) > 0.05 or min(size) == 1, "a constant would prove nothing"


def test_half_scale_and_full_scale_of_a_large_photograph_agree_with_the_network(
    matting: MattingPipeline, picture: Callable[..., np.ndarray]
) -> None:
    image = picture(200, 1100)
    assert np.array_equal(matting(image, "x").alpha, network_says(matting, image, ["x"])[0])


def test_several_phrases_are_the_same_as_one_after_the_other_and_encode_the_image_once(
    matting: MattingPipeline, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, seen = matting.network.backbone, []
    encode = backbone.encode_image
    monkeypatch.setattr(backbone, "encode_image", lambda image: seen.append(len(image)) or encode(image))
    together = matting(photograph, PHRASES)
    assert seen == [1]
    encoded = matting.encode(photograph)
    again = [matting(encoded, phrase) for phrase in PHRASES]
    assert seen == [1, 1]
    expected = network_says(matting, photograph, PHRASES)
    for row, (first, second) in enumerate(zip(together, again)):
        assert first.phrase == PHRASES[row]
        assert np.abs(first.alpha - second.alpha).max() < 1e-4
        assert np.abs(first.alpha - expected[row]).max() < 1e-4
        assert first.confidence == pytest.approx(second.confidence, abs=1e-4)
    assert np.abs(together[0].alpha - together[1].alpha).max() > 0.01, "the phrase must matter"


def test_a_list_of_mixed_sizes_is_the_same_as_one_by_one(
    matting: MattingPipeline, picture: Callable[..., np.ndarray]
) -> None:
    images = [picture(40, 50, 1), picture(90, 31, 2), picture(64, 64, 3)]
    for batch_size in (1, 2, 8):
        results = matting(images, PHRASES, batch_size=batch_size)
        for image, phrase, result in zip(images, PHRASES, results):
            assert np.abs(result.alpha - matting(image, phrase).alpha).max() < 1e-4
    nested = matting(images, [PHRASES, PHRASES[0], []])
    assert [len(item) if isinstance(item, list) else item.phrase for item in nested] == [3, PHRASES[0], 0]
    assert [result.phrase for result in matting(images, "glass")] == ["glass"] * 3
    assert matting([], "glass") == []


def test_images_and_phrases_that_do_not_match_are_refused(matting: MattingPipeline, photograph: np.ndarray) -> None:
    with pytest.raises(InputError, match="2 images need one phrase, or as many, got 3"):
        matting([photograph, photograph], PHRASES)
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        matting([photograph], PHRASES[0], batch_size=0)
    with pytest.raises(InputError, match=r"`phrase` has no words: got ' \?!'"):
        matting(photograph, " ?!")
    with pytest.raises(InputError, match=r"`phrase` has no words"):
        matting(photograph, ["glass", ""])


def test_the_same_photograph_from_every_source_has_the_same_matte(
    matting: MattingPipeline, photograph: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.png")
    tensor = torch.from_numpy(photograph).permute(2, 0, 1)
    expected = matting(photograph, "x").alpha
    for source in (
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        Image.open(tmp_path / "a.png"),
        tensor,
        tensor[None].float() / 255,
    ):
        assert np.abs(matting(source, "x").alpha - expected).max() < 1e-5


def test_a_photograph_turned_by_its_camera_has_the_upright_matte(
    matting: MattingPipeline, photograph: np.ndarray, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(photograph).copy()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(matting(tmp_path / "a.png", "x").alpha, matting(photograph, "x").alpha)


def test_what_was_transparent_stays_transparent(matting: MattingPipeline, photograph: np.ndarray) -> None:
    opacity = np.full(photograph.shape[:2], 255, np.uint8)
    opacity[:, :40] = 0
    opacity[:, 40:50] = 51
    result = matting(np.dstack([photograph, opacity]), "x")
    shown = np.rint(photograph * (opacity[..., None] / 255) + 255 - opacity[..., None]).astype(np.uint8)
    assert np.abs(result.alpha - matting(shown, "x").alpha * (opacity / np.float32(255))).max() < 1e-4


def test_half_precision_is_as_near_to_full_as_autocast_is(
    checkpoint: Path, matting: MattingPipeline, photograph: np.ndarray
) -> None:
    full = matting(photograph, PHRASES[0]).alpha
    tensor = torch.from_numpy(photograph).permute(2, 0, 1)[None].contiguous().float() / 255
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = matte_at_native_size(build_network(read_checkpoint(checkpoint)), tensor, PHRASES[:1], 64).alpha[0, 0]
    half = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="bf16")
    error, usual = np.abs(half(photograph, PHRASES[0]).alpha - full).mean(), np.abs(autocast.numpy() - full).mean()
    assert 0 < error < 1.5 * usual
    assert usual < 0.01
    assert half.network.neck.project["8"].weight.dtype == torch.bfloat16
    assert half.network.refiner.scales["full_scale"].leave.weight.dtype == torch.float32
    assert "bf16, the refiner in fp32" in half.describe()


def test_in_bf16_the_frozen_autoencoder_is_bf16_too_and_sees_nearly_the_same(
    photograph: np.ndarray, tmp_path: Path
) -> None:
    save_tiny_pipeline(tmp_path / "sd")

    def latent(precision: str) -> tuple[torch.Tensor, torch.dtype]:
        network = MattingNetwork(StableDiffusion(str(tmp_path / "sd"), text_tokens=12))
        matting = MattingPipeline(network, 64, device="cpu", precision=precision)
        return matting.encode(photograph).latent, network.backbone.image_encoder.dtype

    (full, full_dtype), (half, half_dtype) = latent("fp32"), latent("bf16")
    assert (full_dtype, half_dtype, half.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert 0 < (half - full).abs().mean() < 0.02 * full.abs().mean()


def test_what_a_cache_remembers_of_another_precision_never_comes_out_of_a_pipeline(
    photograph: np.ndarray, tmp_path: Path
) -> None:
    save_tiny_pipeline(tmp_path / "sd")

    def network(cached: int) -> MattingNetwork:
        return MattingNetwork(StableDiffusion(str(tmp_path / "sd"), text_tokens=12, cached_latents=cached))

    shared = network(8)
    for precision in ("fp32", "bf16"):  # the second finds what the first one remembered
        expected = MattingPipeline(network(0), 64, device="cpu", precision=precision).encode(photograph).latent
        matting = MattingPipeline(shared, 64, device="cpu", precision=precision)
        assert torch.equal(matting.encode(photograph).latent, expected)
        assert torch.equal(matting.encode(photograph).latent, expected), "remembered"


def test_device_and_precision_are_chosen_and_checked() -> None:
    cpu = torch.device("cpu")
    assert pick_precision(cpu, parameters=2_000_000) == "fp32"
    assert pick_precision(torch.device("mps")) == "fp32"
    with pytest.raises(InputError, match="one of fp32, bf16, fp16, got 'half'"):
        pick_precision(cpu, "half")
    with pytest.raises(InputError, match="fp16 is slower"):
        pick_precision(cpu, "fp16")
    with pytest.raises(InputError, match="`device` 'gpu' is unknown"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda:0' is not available"):
            pick_device("cuda:0")


@pytest.mark.parametrize(("able", "expected"), [((), "fp32"), (("amx_tile",), "bf16"), (("avx512_bf16",), "bf16")])
def test_a_large_network_runs_in_bf16_where_the_processor_is_made_for_it(
    able: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda there=name in able: there, raising=False)
    assert pick_precision(torch.device("cpu")) == expected
    assert pick_precision(torch.device("cpu"), parameters=2_000_000) == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_card_that_would_emulate_bf16_runs_in_fp32(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision(torch.device("cuda"), parameters=2_000_000) == expected


def test_a_pipeline_says_what_it_is(matting: MattingPipeline) -> None:
    lines = dict(line.split(maxsplit=1) for line in matting.describe().splitlines())
    assert lines["sees"] == "64 x 64 pixels"
    assert lines["device"].startswith("cpu")
    assert lines["precision"] == "fp32"
    assert lines["found"] == "not calibrated"
    millions = sum(parameter.numel() for parameter in matting.network.parameters()) / 1e6
    assert lines["model"] == f"TinyDiffusion, {millions:.3g} million parameters"


def test_a_saved_folder_gives_the_same_mattes(checkpoint: Path, photograph: np.ndarray, tmp_path: Path) -> None:
    matting = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32")
    matting.threshold = 0.125
    matting.save_pretrained(
        tmp_path / "model", model_card_kwargs={"license": "apache-2.0", "results": {"soft IoU": 0.74}}
    )
    again = MattingPipeline.from_pretrained(tmp_path / "model", device="cpu", precision="fp32")
    assert np.array_equal(again(photograph, "glass").alpha, matting(photograph, "glass").alpha)
    assert again.threshold == 0.125
    assert again.image_size == 64
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| soft IoU | 0.74 |" in card
    assert "| Backbone | TinyDiffusion |" in card
    assert sorted(item.name for item in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again.save_pretrained(tmp_path / "twice")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "twice")]
    assert weights[0] == weights[1]


def test_saving_after_a_call_in_half_precision_says_that_weights_were_rounded(
    checkpoint: Path, photograph: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matting = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="bf16")
    with caplog.at_level(logging.WARNING):
        matting.save_pretrained(tmp_path / "before")
        assert not caplog.records
        matting(photograph, "x")
        matting.save_pretrained(tmp_path / "after")
    assert "converted to bf16" in caplog.text


def test_folders_that_are_no_models_are_refused(
    checkpoint: Path, photograph: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"was not made by save_pretrained: it has no config\.json"):
        MattingPipeline.from_pretrained(tmp_path)
    MattingPipeline.from_checkpoint(checkpoint).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("lit_matting.networks.heads.AlphaHead", "subprocess.Popen"))
    with pytest.raises(InputError, match=r"network.alpha_head.*names 'subprocess\.Popen'"):
        MattingPipeline.from_pretrained(tmp_path / "model")
    config.write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="was not made by save_pretrained of lit_matting"):
        MattingPipeline.from_pretrained(tmp_path / "model")
    config.write_text(text)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="are damaged"):
        MattingPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"'no/where/at/all' is neither a file or folder here nor a model"):
        MattingPipeline.from_pretrained("no/where/at/all")
    tried = re.escape(f"it was not downloaded to '{tmp_path}' earlier, and the hub was not asked")
    with pytest.raises(InputError, match=rf"'nobody/nothing' is neither a file or folder here .*: {tried}"):
        MattingPipeline.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"last.ckpt' is a file: open it with MattingPipeline.from_checkpoint"):
        MattingPipeline.from_pretrained(checkpoint)


def test_pushing_to_the_hub_uploads_the_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.hub_mixin as mixin

    uploaded: dict[str, list[str]] = {}

    class Hub:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> object:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **_: object) -> str:
            uploaded[repo_id] = sorted(item.name for item in Path(folder_path).iterdir())
            return "url"

    monkeypatch.setattr(mixin, "HfApi", Hub)
    assert MattingPipeline.from_checkpoint(checkpoint).push_to_hub("me/matting") == "url"
    assert uploaded == {"me/matting": ["README.md", "config.json", "model.safetensors"]}


def test_a_network_in_memory_can_be_used_but_not_saved(
    checkpoint: Path, photograph: np.ndarray, tmp_path: Path
) -> None:
    matting = MattingPipeline(build_network(read_checkpoint(checkpoint)), 64, device="cpu", precision="fp32")
    assert matting(photograph, "x").alpha.shape == (93, 131)
    with pytest.raises(InputError, match="made from a network in memory"):
        matting.save_pretrained(tmp_path / "model")


def test_calibration_sets_what_found_means(checkpoint: Path, picture: Callable[..., np.ndarray]) -> None:
    matting = MattingPipeline.from_checkpoint(checkpoint, device="cpu", precision="fp32")
    image = picture(64, 64)
    asked = [f"thing number {number}" for number in range(12)]
    confidences = [matting(image, phrase).confidence for phrase in asked]
    cut = sorted(confidences)[6]
    calibration = matting.calibrate([(image, phrase, value >= cut) for phrase, value in zip(asked, confidences)])
    assert calibration.balanced_accuracy == 1
    assert [matting(image, phrase).found for phrase in asked] == [value >= cut for value in confidences]


def test_threads_do_not_disturb_each_other(matting: MattingPipeline, picture: Callable[..., np.ndarray]) -> None:
    images = [picture(40 + 8 * number, 60, number) for number in range(4)]
    expected = [matting(image, "x").alpha for image in images]
    found: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = matting(images[number], "x").alpha

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[number], expected[number]) for number in range(4))


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        pytest.skip("needs /proc/self/statm to measure memory")
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_does_not_grow_over_200_calls(matting: MattingPipeline, picture: Callable[..., np.ndarray]) -> None:
    def call(number: int) -> None:
        # sizes and phrases that never come again, so that nothing cached by either can hide
        result = matting(picture(60 + number % 40, 70 + number % 30, number), f"thing number {number}")
        result.composite("white")

    for number in range(60):
        call(number)
    gc.collect()
    before = resident_bytes()
    for number in range(60, 260):
        call(number)
    gc.collect()
    assert resident_bytes() - before < 8e6


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.process_time(); import lit_matting; spent = time.process_time() - start;"
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'lightning', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy; assert spent < 0.2, spent"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
