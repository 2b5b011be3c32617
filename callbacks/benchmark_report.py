"""The report of a test: what was measured, how, with what, and pictures of where it fails."""

from __future__ import annotations

import datetime
import logging
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from callbacks.sample_pictures import SamplePicture, SamplePictures, nearest, page
from lit_matting.checks import InputError
from lit_matting.files import write_whole
from lit_matting.metrics.protocol import Observed, Protocol, deviations, load_protocol
from lit_matting.metrics.referring import ReferringScore
from lit_matting.metrics.report import (
    environment,
    file_digest,
    found_table,
    kind_table,
    overview_table,
    sample_rows,
    to_csv,
    to_json,
)
from lit_matting.metrics.score_card import ReferringSample, score_card
from lit_matting.records import MattingBatch

log = logging.getLogger(__name__)

LOGGED = (
    "found_rate",
    "grounding_accuracy",
    "strict_accuracy",
    "swap_accuracy",
    "soft_iou",
    "sad",
    "band_mae",
)


class BenchmarkReport(pl.Callback):
    """Write report.json, per_sample.csv, report.md and samples.png when a test ends.

    Scores whatever the module collects in ``module.test_scores`` (name -> ReferringScore, the final matte first). The
    first lines of report.md say whether the run followed the protocol, and how it deviates if not.

    Args:
        folder: Where the files go; made if missing.
        protocol: Name of a locked protocol (refmatte-test, refmatte-rw100, ...) or path of a YAML file of your own;
            null reports without one.
        split_file: The release's file that lists the split, to have its digest in the report and held against the
            protocol's.
        boundary: Compute the gradient and connectivity errors of the final matte too; without them a run follows no
            locked protocol.
        pictures: How many of the worst and how many of the median samples to show; 0 writes no pictures.
        picture_size: Longest side of a picture in pixels.
    """

    def __init__(
        self,
        folder: str = "outputs/report",
        protocol: str | None = None,
        split_file: str | None = None,
        boundary: bool = True,
        pictures: int = 16,
        picture_size: int = 160,
    ) -> None:
        self.folder = Path(folder)
        self.protocol: Protocol | None = load_protocol(protocol) if protocol else None
        if split_file and not Path(split_file).is_file():
            raise InputError(f"`split_file`: there is no file {split_file!r}.")
        self.split_file = Path(split_file) if split_file else None
        self.boundary = boundary
        self.pictures, self.picture_size = pictures, picture_size

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and the scores from nothing."""
        scores = _scores(pl_module)
        for score in scores.values():
            score.reset()
        next(iter(scores.values())).boundary = self.boundary
        self._kept = SamplePictures(self.pictures, side=self.picture_size, seed=trainer.global_rank)
        self._sizes: set[tuple[int, int]] = set()
        self._start = time.perf_counter(), time.process_time()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: MattingBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remember the sizes, and pictures of what may be among the worst or the median samples."""
        score = next(iter(_scores(pl_module).values()))
        self._sizes.update(tuple(matte.shape) for matte in score.latest)
        if not self.pictures:
            return
        for sample, image, target, matte in zip(score.newest(), batch.image, batch.target, score.latest):
            found = "found" if sample.quality("found") else "missed"
            caption = (
                f'"{sample.prompt}" · {found} · SAD {sample.quality("sad"):.3g}'
                f" · soft IoU {sample.quality('soft_iou'):.2f} · {sample.key}"
            )
            self._kept.offer(sample.quality("sad"), caption, image, target[0], matte)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the samples of all processes and let the first one write."""
        samples = {name: score.gather() for name, score in _scores(pl_module).items()}
        final = next(iter(samples.values()))
        if not final:
            log.warning("the test saw no samples: no report is written.")
            return
        average = self.protocol.average if self.protocol else "phrase"
        cards = {name: score_card(items, average) for name, items in samples.items()}
        overall = next(iter(cards.values()))["overall"]
        logged = {f"metric/{name}": overall[name] for name in LOGGED if overall[name] == overall[name]}
        pl_module.log_dict(logged, sync_dist=True)
        median = statistics.median(sample.quality("sad") for sample in final)
        run = self._run(trainer, pl_module)
        gathered = _gather_objects((self._sizes, self._kept.share(median), run["memory_bytes"]))
        if not trainer.is_global_zero:
            return
        sizes = frozenset(size for share, _, _ in gathered for size in share)
        run["memory_bytes"] = [memory for _, _, memory in gathered]
        if self.pictures:
            worst = [picture for _, (share, _), _ in gathered for picture in share]
            middle = [picture for _, (_, share), _ in gathered for picture in share]
            self._write_page(worst, nearest(middle, median, self.pictures), median)
        self._write(samples, cards, self._observed(trainer, pl_module, sizes), run)

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        wall, processor = self._start
        run: dict[str, Any] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
            "processes": trainer.world_size,
            "device": str(module.device),
            "precision": str(trainer.precision),
            "memory_bytes": {"resident": _peak_resident_bytes()},
        }
        if module.device.type == "cuda":
            run["device"] = torch.cuda.get_device_name(module.device)
            run["memory_bytes"]["cuda"] = torch.cuda.max_memory_allocated(module.device)
        checkpoint = trainer.ckpt_path
        if trainer.is_global_zero:
            known = bool(checkpoint) and Path(str(checkpoint)).is_file()
            run["checkpoint"] = str(checkpoint) if checkpoint else None
            run["checkpoint_sha256"] = file_digest(Path(str(checkpoint))) if known else None
        return run

    def _observed(self, trainer: pl.Trainer, module: pl.LightningModule, sizes: frozenset[tuple[int, int]]) -> Observed:
        """Return what this run did; of loaders that do not say what they hand out, nothing is known."""
        loaders = trainer.test_dataloaders
        sources = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        if not all(hasattr(source, name) for source in sources for name in ("origin", "image_size", "interpolation")):
            sources = []
        image_size = getattr(module, "image_size", None)
        resized = {source.interpolation for source in sources if source.image_size is not None}
        if any(source.image_size != image_size for source in sources):
            # these are resized a second time, for the network
            resized.add(getattr(module, "interpolation", "not known"))
        return Observed(
            image_size=image_size,
            metric_sizes=sizes,
            source_sizes=frozenset(source.image_size or "native" for source in sources),
            interpolations=frozenset(resized),
            datasets=frozenset(source.origin for source in sources),
            boundary=self.boundary,
            errors=next(iter(_scores(module).values())).errors,
            split_sha256=file_digest(self.split_file) if self.split_file else None,
        )

    def _write_page(self, worst: list[SamplePicture], middle: list[SamplePicture], median: float) -> None:
        worst = sorted(worst, key=lambda picture: -picture.error)[: self.pictures]
        middle = sorted(middle, key=lambda picture: picture.error)
        columns = [
            (f"the {len(worst)} worst by SAD: image, truth, matte, difference", worst),
            (f"{len(middle)} about the median SAD of {median:.3g}", middle),
        ]
        write_whole(page(columns, self.picture_size), self.folder / "samples.png")

    def _write(
        self,
        samples: Mapping[str, list[ReferringSample]],
        cards: Mapping[str, dict[str, Any]],
        observed: Observed,
        run: dict[str, Any],
    ) -> None:
        final = next(iter(samples.values()))
        differences = deviations(self.protocol, final, observed) if self.protocol else []
        counts = {
            "phrases": len(final),
            "images": len({sample.key for sample in final}),
            "instances": len({(sample.key, sample.instance) for sample in final}),
            "datasets": sorted(observed.datasets) or sorted({sample.key.split("/")[0] for sample in final}),
        }
        report = {
            "statement": self._statement(counts, differences),
            "protocol": vars(self.protocol) if self.protocol else None,
            "deviations": differences,
            "counts": counts,
            "image_size": observed.image_size,
            "metric_sizes": sorted(observed.metric_sizes)[:16],
            "source_sizes": sorted(map(str, observed.source_sizes)),
            "interpolations": sorted(observed.interpolations),
            "boundary": observed.boundary,
            "split_sha256": observed.split_sha256,
            "scores": dict(cards),
            "run": run,
            "versions": environment(),
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        write_whole(to_csv(sample_rows(samples)), self.folder / "per_sample.csv")
        write_whole(_markdown(report, bool(self.pictures)).encode(), self.folder / "report.md")
        # last, so that a report.json means that everything beside it is there
        write_whole(to_json(report), self.folder / "report.json")
        log.info("report: %s", self.folder / "report.md")

    def _statement(self, counts: Mapping[str, Any], differences: list[str]) -> str:
        seen = (
            f"{counts['phrases']} phrases for {counts['instances']} instances of {counts['images']} images of"
            f" {', '.join(counts['datasets'])}"
        )
        if self.protocol is None:
            return f"No protocol: {seen}, averaged over phrases."
        name = f"{self.protocol.name} ({self.protocol.sha256[:12]})"
        if differences:
            return f"DEVIATES from protocol {name}: {'; '.join(differences)}. It is {seen}."
        checked = "" if self.protocol.split_sha256 else " The split's file is not pinned by the protocol."
        return f"Follows protocol {name}: {seen}.{checked}"


def _markdown(report: Mapping[str, Any], pictures: bool) -> str:
    cards = report["scores"]
    name, final = next(iter(cards.items()))
    run = report["run"]
    parts = [
        report["statement"],
        "# Benchmark report",
        overview_table(cards),
        "Found: the matte overlaps (soft IoU) the referred instance more than any other of its image, or, alone in its"
        " image, by more than 0.1; grounding: the same over images of several instances; strict: soft IoU above 0.5;"
        " swap: both of two phrases for different instances of one image. SAD, Grad and Conn in thousands; band: where"
        " the true alpha is uncertain. Everything over all samples, found or not.",
        "## Found and missed",
        found_table(cards),
        f"## By phrase kind ({name})",
        kind_table(final, "kinds", "kind"),
        f"## By size of the instance ({name})",
        kind_table(final, "sizes", "share of the image"),
    ]
    if final["categories"]:
        parts += [f"## By category ({name})", kind_table(final, "categories", "category")]
    if len(final["datasets"]) > 1:
        parts += [f"## By data set ({name})", kind_table(final, "datasets", "data set")]
    if pictures:
        parts += ["## Pictures", "![the worst and the median samples](samples.png)"]
    megabytes = [
        ", ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in memory.items() if size)
        for memory in run["memory_bytes"]
    ]
    protocol = report["protocol"]
    details = {
        "protocol": f"{protocol['name']} {protocol['sha256']}" if protocol else "none",
        "split file": report["split_sha256"] or "not given",
        "checkpoint": f"{run['checkpoint'] or 'weights in memory'} {run['checkpoint_sha256'] or ''}".strip(),
        "input": f"{report['image_size']} pixels square" if report["image_size"] else "unknown",
        "time": f"{run['seconds']:.1f} s, {run['cpu_seconds']:.1f} s of CPU in one of {run['processes']} processes"
        f" ({run['device']}, precision {run['precision']})",
        "peak memory": "; ".join(megabytes),
        "versions": ", ".join(f"{package} {version}" for package, version in report["versions"].items()),
        "written": report["written"],
    }
    parts += ["## The run", "\n".join(f"- {key}: {value}" for key, value in details.items())]
    return "\n\n".join(parts) + "\n"


def _scores(module: pl.LightningModule) -> dict[str, ReferringScore]:
    scores = dict(getattr(module, "test_scores", {}).items())
    if not scores:
        raise InputError(
            f"BenchmarkReport needs scores to report, but {type(module).__name__} has no `test_scores`; remove the"
            " callback, or collect ReferringScores there."
        )
    return scores


def _gather_objects(item: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [item]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, item)
    return shares


def _peak_resident_bytes() -> int | None:
    """Return the most memory this process ever held; Linux counts in KiB, macOS in bytes, Windows not at all."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
