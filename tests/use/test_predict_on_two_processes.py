"""`predict` on two processes: every (image, phrase) once, to files and to shards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_modules.decode import decode_sample
from data_modules.shards import ShardIndex
from lit_matting.pipeline import MattingPipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_image_and_phrase_is_matted_once_over_two_processes(
    experiment: dict[str, Any],
    checkpoint: Path,
    matting: MattingPipeline,
    picture: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    phrases = ["the red thing", "glass"]
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(picture(40 + 10 * number, 60, number)).save(tmp_path / "photos" / f"{number}.png")
    experiment["model"].pop("image_size")
    experiment["trainer"] |= {"devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path)}
    experiment["trainer"]["callbacks"] = [
        {"class_path": "callbacks.PredictionWriter", "init_args": {"folder": str(tmp_path / "files")}},
        {
            "class_path": "data_modules.PredictionShards",
            "init_args": {"folder": str(tmp_path / "shards"), "image_ext": "png", "max_samples": 2},
        },
    ]
    source = {"images": str(tmp_path / "photos"), "phrases": phrases}
    experiment["data"] = {
        "class_path": "data_modules.InterleavedDataModule",
        "init_args": {"image_size": 64, "predict": {"class_path": "data_modules.FolderSource", "init_args": source}},
    }
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(experiment))
    done = subprocess.run(
        [sys.executable, "-m", "lit_matting", "predict", "--config", "predict.yaml", "--ckpt_path", str(checkpoint)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    indices = sorted(path.name for path in (tmp_path / "shards").glob("*.json"))
    assert indices == ["mattes-0.index.json", "mattes-1.index.json"], "each process had its share"
    shards = ShardIndex.load(str(tmp_path / "shards" / "mattes*.index.json"))
    seen = Counter()
    for sample in shards:
        (instance,) = sample.instances
        decoded = decode_sample(sample, (0,), empty_is_error=False)
        name, phrase = sample.meta["source"]["key"], instance.phrases[0].text
        seen[name, phrase] += 1
        image = np.asarray(Image.open(tmp_path / "photos" / name))
        assert np.array_equal(decoded.image, image)
        expected = matting(image, phrase).alpha
        assert np.abs(decoded.targets[0] - 255 * expected).max() <= 1
        file = tmp_path / "files" / f"{name}.{phrase.replace(' ', '-')}.png"
        assert np.array_equal(np.asarray(Image.open(file)), decoded.targets[0])
    assert seen == {(f"{number}.png", phrase): 1 for number in range(3) for phrase in phrases}
    assert len(list((tmp_path / "files").iterdir())) == 6
    assert not list((tmp_path / "shards").glob(".*")), "nothing unfinished is left"
