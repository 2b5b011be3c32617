"""Score a folder of mattes, made by any method, against a folder of true alphas.

    python tools/evaluate_folder.py --pred RESULTS --alpha TRUTH [--trimap TRIMAPS] [--out REPORT]

Files belong together by name: `--alpha-pattern "*_alpha.png"` says which files of TRUTH count and what of their names
(the star) is the sample's. The errors are those of lit_matting.metrics.functional, over the whole image and, with
trimaps, over their unknown region (128) as well. Mattes may be 8- or 16-bit, grey or with an alpha channel.

REPORT gets report.json, per_sample.csv (for tools/compare_reports.py) and report.md; the table is printed. The exit
status is not 0 when a truth has no matte or no trimap, a file cannot be read, or sizes differ and `--resize` is not
given.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_matting.checks import InputError
from lit_matting.files import write_whole
from lit_matting.metrics import functional
from lit_matting.metrics.report import environment, figure, markdown_table, to_csv, to_json

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
ERRORS = ("sad", "mse", "mad", "grad", "conn")
UNKNOWN = 128


@dataclass(frozen=True)
class Job:
    """One sample to score."""

    key: str
    pred: Path
    alpha: Path
    trimap: Path | None
    dialect: str
    normalize: str
    resize: bool


def find(folder: Path, pattern: str | None, option: str) -> dict[str, Path]:
    """Return the image files of a folder by what the pattern's star stands for; by default their stems.

    Raises:
        InputError: If the folder does not exist, the pattern has not one star, or two files have one name.
    """
    if not folder.is_dir():
        raise InputError(f"`{option}`: there is no folder {str(folder)!r}.")
    if pattern is not None and pattern.count("*") != 1:
        raise InputError(f"`{option}-pattern` must have exactly one *, which stands for the sample, got {pattern!r}.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in EXTENSIONS or not path.is_file():
            continue
        key = path.stem
        if pattern is not None:
            match = re.fullmatch("(.+)".join(re.escape(part) for part in pattern.split("*")), path.name)
            if match is None:
                continue
            key = match[1]
        if key in found:
            raise InputError(
                f"`{option}`: {found[key].name} and {path.name} are both called {key!r}; give `{option}-pattern`."
            )
        found[key] = path
    return found


def read(path: Path) -> NDArray[np.generic]:
    """Return a matte (H, W): uint8, or float64 in [0, 1] when the file has 16 bits.

    Of a file with an alpha channel that channel is the matte, unless it is opaque everywhere; of three channels the
    first, if they are equal.

    Raises:
        InputError: If the file cannot be read or is a colour picture.
    """
    array = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise InputError(f"{path} cannot be read as an image.")
    if array.ndim == 3:
        last = array[..., -1]
        if array.shape[2] in (2, 4) and last.min() < np.iinfo(array.dtype).max:
            array = last
        elif (array[..., : min(3, array.shape[2])] == array[..., :1]).all():
            array = array[..., 0]
        else:
            raise InputError(f"{path} is a colour picture, not a matte: its channels differ and it has no alpha.")
    if array.dtype == np.uint16:
        return array / 65535
    if array.dtype != np.uint8:
        raise InputError(f"{path} has values of type {array.dtype}; a matte has 8 or 16 bits.")
    return np.ascontiguousarray(array)


def score(job: Job) -> dict[str, Any] | str:
    """Return the row of one sample, or in words why there is none."""
    try:
        alpha, pred = read(job.alpha), read(job.pred)
        if pred.shape != alpha.shape:
            if not job.resize:
                raise InputError(
                    f"{job.pred} is {pred.shape[1]} x {pred.shape[0]} but {job.alpha} is {alpha.shape[1]} x"
                    f" {alpha.shape[0]}; give --resize to resize the prediction, or write it at the image's own size."
                )
            smaller = pred.shape[0] > alpha.shape[0] and pred.shape[1] > alpha.shape[1]
            mode = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
            pred = cv2.resize(pred, alpha.shape[::-1], interpolation=mode)
        row: dict[str, Any] = {"key": job.key, "height": alpha.shape[0], "width": alpha.shape[1]}
        row.update(_errors(pred, alpha, None, job))
        if job.trimap is not None:
            trimap = read(job.trimap)
            if trimap.shape != alpha.shape or trimap.dtype != np.uint8:
                raise InputError(f"{job.trimap} must be 8-bit and as large as {job.alpha}.")
            unknown = trimap == UNKNOWN
            if not unknown.any() and not np.isin(trimap, (0, 255)).all():
                raise InputError(f"{job.trimap} holds grey values but no {UNKNOWN}, which is what unknown is here.")
            row["unknown"] = float(unknown.mean())
            row.update({f"unknown.{name}": value for name, value in _errors(pred, alpha, unknown, job).items()})
        return row
    except InputError as error:
        return str(error)


def _errors(
    pred: NDArray[np.generic], alpha: NDArray[np.generic], region: NDArray[np.bool_] | None, job: Job
) -> dict[str, float]:
    return {
        "sad": functional.sad(pred, alpha, region),
        "mse": functional.mse(pred, alpha, region),
        "mad": functional.mad(pred, alpha, region),
        "grad": functional.grad(pred, alpha, region, job.normalize, job.dialect),  # type: ignore[arg-type]
        "conn": functional.conn(pred, alpha, region, job.dialect),  # type: ignore[arg-type]
    }


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return what there is to score.

    Raises:
        InputError: If no truth is found, or truths have no matte or no trimap.
    """
    alphas = find(options.alpha, options.alpha_pattern, "--alpha")
    preds = find(options.pred, options.pred_pattern, "--pred")
    trimaps = find(options.trimap, options.trimap_pattern, "--trimap") if options.trimap else {}
    if not alphas:
        raise InputError(f"`--alpha`: {options.alpha} holds no image that counts; see `--alpha-pattern`.")
    _check_missing(set(alphas), set(preds), options, "pred", "matte")
    if options.trimap:
        _check_missing(set(alphas) & set(preds), set(trimaps), options, "trimap", "trimap")
    return [
        Job(key, preds[key], path, trimaps.get(key), options.dialect, options.normalize, options.resize)
        for key, path in alphas.items()
        if key in preds
    ]


def _check_missing(truths: set[str], given: set[str], options: argparse.Namespace, option: str, what: str) -> None:
    missing, folder = sorted(truths - given), getattr(options, option)
    if set(missing) == truths:
        raise InputError(f"no {what} in {folder} has the name of a truth in {options.alpha}; see the patterns.")
    if missing and not options.allow_missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{len(missing)} of {len(truths)} truths have no {what} in {folder} ({shown}); see `--{option}-pattern`,"
            " or give --allow-missing to leave them out."
        )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the means over samples; those with a trimap only for the unknown region."""
    names = [*ERRORS, *(f"unknown.{name}" for name in ERRORS)]
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: float(np.mean(items)) for name, items in values.items() if items}


def table(means: dict[str, float]) -> str:
    """Return the means as a Markdown table."""
    rows = [["whole image", *(figure(means[name]) for name in ERRORS)]]
    if "unknown.sad" in means:
        rows.append(["unknown region", *(figure(means[f"unknown.{name}"]) for name in ERRORS)])
    return markdown_table(["", "SAD", "MSE", "MAD", "Grad", "Conn"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the folder; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pred", type=Path, required=True, help="folder of predicted mattes")
    parser.add_argument("--alpha", type=Path, required=True, help="folder of true alphas")
    parser.add_argument("--trimap", type=Path, help="folder of trimaps (128 is unknown)")
    for name in ("pred", "alpha", "trimap"):
        parser.add_argument(f"--{name}-pattern", help="which files count; the * is the sample's name (default: all)")
    parser.add_argument(
        "--dialect", choices=("matlab", "python_port", "p3m"), default="matlab", help="see docs/METRICS.md"
    )
    parser.add_argument("--normalize", choices=("minmax", "none"), default="minmax", help="of the gradient error")
    parser.add_argument("--resize", action="store_true", help="resize mattes of another size to their truth")
    parser.add_argument("--allow-missing", action="store_true", help="leave truths without a matte or a trimap out")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="folder for report.json, per_sample.csv and report.md")
    options = parser.parse_args(arguments)
    try:
        todo = jobs(options)
    except InputError as error:
        print(f"evaluate_folder: error: {error}", file=sys.stderr)
        return 2
    bar = {"total": len(todo), "unit": "matte", "disable": not sys.stderr.isatty()}
    if options.workers > 1:
        with multiprocessing.Pool(options.workers) as pool:
            results = list(tqdm(pool.imap(score, todo), **bar))
    else:
        results = [score(job) for job in tqdm(todo, **bar)]
    rows = [result for result in results if isinstance(result, dict)]
    failed = [result for result in results if isinstance(result, str)]
    for reason in failed:
        print(f"evaluate_folder: error: {reason}", file=sys.stderr)
    if not rows:
        return 1
    means = summary(rows)
    settings = {name: getattr(options, name) for name in ("dialect", "normalize", "resize", "allow_missing")}
    about = f"{len(rows)} mattes of {options.pred} against {options.alpha}, {options.dialect} definitions"
    truths = len(find(options.alpha, options.alpha_pattern, "--alpha"))
    unmarked = sum("unknown.sad" not in row for row in rows) if options.trimap else 0
    if unmarked:
        about = f"INCOMPLETE: {unmarked} of {len(rows)} mattes are not in the means of the unknown region. {about}"
    if len(rows) < truths:
        about = f"INCOMPLETE: {truths - len(rows)} of {truths} truths are not in these means. {about}"
    print(f"{about}\n\n{table(means)}")
    if options.out:
        report = {"statement": about, "settings": settings, "means": means, "failed": failed, "versions": environment()}
        write_whole(to_csv(rows), options.out / "per_sample.csv")
        write_whole(f"{about}\n\n# Mattes against truth\n\n{table(means)}\n".encode(), options.out / "report.md")
        write_whole(to_json(report), options.out / "report.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
