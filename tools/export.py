"""Export a network to ONNX, and to torch.export's own format: three graphs, with the refiner outside.

    python tools/export.py outputs/demo/last.ckpt -o build/demo_onnx
    python tools/export.py outputs/demo/last.ckpt -o build/demo_int8 --weights int8 \\
        --check outputs/demo/shards/val.index.json
    python tools/export.py --config configs/backbone/sd21.yaml -o build/sd21_onnx   # random weights: does it fit?

Written are image.onnx (pixels -> latent), text.onnx (token ids -> text features), matte.onnx (both -> low-resolution
alpha, trimap, grounding, features) and export.json, which describes them. The graphs take the square the network was
trained on and any batch. Before the folder gets its name, the mattes of the graphs, refined by this project's refiner,
are compared with those of the network itself.

The exit status is 2, and nothing is written, if the graphs differ, or if smaller weights cost more than allowed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository's root holds the packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from lit_matting.checks import InputError
from lit_matting.networks.matting_network import MattingNetwork
from lit_matting.pipeline import MattingPipeline
from lit_matting.version import VERSION
from tools.exporting.branches import WEIGHTS, graphs, shrink_weights
from tools.exporting.graphs import (
    ExportedGraphs,
    ExportedNetwork,
    check_packages,
    describe,
    write_description,
    write_graph,
)
from tools.exporting.parity import cost_of_smaller_weights, examples, largest_difference, mattes
from tools.networks import open_pipeline, random_network

ALPHA_TOLERANCE = 1e-3
SAD_TOLERANCE = 0.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        export(options)
    except InputError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{options.output}: {_megabytes(options.output):.0f} MB; took {time.process_time():.0f} s of processor time, at"
        f" most {used.ru_maxrss / 2**20:.1f} GiB of memory"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    result = argparse.ArgumentParser(
        prog="python tools/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("checkpoint", nargs="?", help="what `fit` wrote, or a folder of save_pretrained")
    result.add_argument("--config", help="instead: an experiment or a backbone of configs/, with random weights")
    result.add_argument("-o", "--output", type=Path, required=True, help="folder to write; it must not exist")
    result.add_argument("--overwrite", action="store_true", help="replace the folder if it does")
    result.add_argument("--format", nargs="+", choices=("onnx", "torch"), default=["onnx"], help="default: onnx")
    result.add_argument("--weights", choices=WEIGHTS, default="fp32", help="how weights are kept (default: fp32)")
    result.add_argument(
        "--check", metavar="SHARDS|CSV", help="where smaller weights are judged: a benchmark in shards, or image,phrase"
    )
    result.add_argument("--examples", type=int, default=64, help="phrases of it at most (default: %(default)s)")
    result.add_argument(
        "--allow", type=float, default=SAD_TOLERANCE, help="share by which they may change SAD (default: %(default)s)"
    )
    result.add_argument("--no-parity", action="store_true", help="do not run the graphs: saves memory at full size")
    result.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="as for `matte`")
    return result


def export(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        InputError: If it cannot be done, or the result is not the network.
    """
    if (options.checkpoint is None) == (options.config is None):
        raise InputError("give a checkpoint, or `--config` for random weights.")
    if options.weights != "fp32" and not options.check:
        raise InputError(
            f"`--weights {options.weights}` changes mattes: name by `--check` the shards, or a table image,phrase, by"
            " which to see how much."
        )
    if options.output.exists() and not options.overwrite:
        raise InputError(f"`-o {options.output}` exists already: choose another name, or add --overwrite.")
    check_packages(options.format)
    given = examples(options.check, options.examples) if options.check else []
    pipeline = _open(options)
    network, size = pipeline.network, pipeline.image_size
    cost: dict[str, float] = {}
    if options.weights != "fp32":
        cost = _shrink(pipeline, options, given)
    partial = options.output.with_name(f".{options.output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        parts = graphs(network, size)
        for graph in parts:
            print(f"exporting {graph.name} ...", flush=True)
            write_graph(graph, partial, options.format, fold=options.weights == "fp32")
        parity = {} if options.no_parity else _parity(pipeline, partial, options)
        write_description(
            {
                "format": "lit_matting.export/1",
                "version": VERSION,
                "image_size": size,
                "weights": options.weights,
                "threshold": pipeline.threshold,
                "backbone": network.backbone.name,
                "text": _spelling(network),
                "graphs": describe(parts),
                "largest_difference_of_alpha": parity,
                "cost_of_smaller_weights": cost,
            },
            partial,
        )
        if options.output.is_dir():
            shutil.rmtree(options.output)
        os.replace(partial, options.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(options: argparse.Namespace) -> MattingPipeline:
    if options.checkpoint is not None:
        return open_pipeline(options.checkpoint, "fp32", options.trust)
    network, size = random_network(options.config)
    return MattingPipeline(network, size, device="cpu", precision="fp32")


def _shrink(pipeline: MattingPipeline, options: argparse.Namespace, given: Sequence[Any]) -> dict[str, float]:
    whole = mattes(pipeline, given)
    shrink_weights(pipeline.network, options.weights)
    cost = cost_of_smaller_weights(whole, mattes(pipeline, given), given)
    print(f"{options.weights} changes SAD by {cost['sad_change']:+.2%} on {len(given)} phrases")
    if cost["sad_change"] > options.allow:
        raise InputError(
            f"`--weights {options.weights}` changes SAD by {cost['sad_change']:.2%}, more than `--allow`"
            f" {options.allow:.2%}: take bf16 or fp32, or allow more."
        )
    return cost


def _parity(pipeline: MattingPipeline, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Compare the graphs with the network they were made from."""
    found = {}
    for kind in options.format:
        exported = ExportedGraphs(folder, kind)
        network = ExportedNetwork(exported, pipeline.network)
        second = MattingPipeline(network, pipeline.image_size, device="cpu", precision="fp32")
        found[kind] = largest_difference(pipeline, second)
        exported.close()
        print(f"{kind}: alpha differs by at most {found[kind]:.1e}")
        # untrained attention is flat, and standardising a flat map enlarges what is only rounding
        if found[kind] > ALPHA_TOLERANCE and options.checkpoint is not None:
            raise InputError(
                f"the {kind} graphs differ from the network: alpha by {found[kind]:.2g}, more than {ALPHA_TOLERANCE:g}."
            )
    return found


def _spelling(network: MattingNetwork) -> dict[str, Any]:
    encoder = network.backbone.text_encoder
    return {"encoder": type(encoder).__name__, "max_tokens": encoder.max_tokens}


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


if __name__ == "__main__":
    sys.exit(main())
