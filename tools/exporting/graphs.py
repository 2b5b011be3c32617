"""Graphs to files, and from files back into the pipeline."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from lit_matting.backbones import TextFeatures
from lit_matting.checks import InputError
from lit_matting.files import whole_file
from lit_matting.networks.matting_network import MattingNetwork, enlarge
from lit_matting.records import MattingOutput
from tools.exporting.branches import MATTE_FIELDS, TEXT_FIELDS, Graph

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "export.json"
LARGEST_BATCH = 63
"""diffusers' upsampling takes another way from 64 on."""
_INLINE_BYTES = 2**28
"""Weights beyond this go into a file beside the graph: protobuf ends at 2 GiB."""


def check_packages(formats: Sequence[Format]) -> None:
    """Raise :class:`InputError` where a format's packages are missing."""
    if "onnx" not in formats:
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"`--format onnx` needs the extra `export` ({error}): pip install -e '.[export]'.") from error


def write_graph(graph: Graph, folder: Path, formats: Sequence[Format], fold: bool = True) -> None:
    """Export one graph into a folder, in every format, with any batch from 1 to :data:`LARGEST_BATCH`.

    Args:
        graph: The graph.
        folder: Where the files go.
        formats: Which files.
        fold: Let the exporter compute constants. False where weights are kept in fewer bits: it would expand them.
    """
    with _quiet():
        program = _trace(graph)
        if "torch" in formats:
            torch.export.save(program, folder / f"{graph.name}.pt2")
        if "onnx" in formats:
            _write_onnx(program, graph, folder / f"{graph.name}.onnx", fold)


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with torch.no_grad():
        return torch.export.export(graph.module, graph.examples, dynamic_shapes=_shapes(graph, batch), strict=False)


def _shapes(graph: Graph, batch: Any) -> tuple[Any, ...]:
    each = tuple({0: batch} for _ in graph.examples)
    # the text branch takes as many inputs as its encoder spells with, as one starred argument
    return (each,) if graph.name == "text" else each


def _write_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path, fold: bool) -> None:
    import onnx

    exported = torch.onnx.export(
        program,
        input_names=graph.inputs,
        output_names=graph.outputs,
        dynamic_shapes=_shapes(graph, "batch"),
        dynamo=True,
        optimize=fold,
        verbose=False,
    )
    # stack traces of this machine's files, half of a small graph
    exported.model.metadata_props.clear()
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()
    for value in exported.model.graph.initializers.values():
        value.metadata_props.clear()
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    exported.save(path, external_data=size > _INLINE_BYTES)
    onnx.checker.check_model(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice, and without the fused kernel that they do not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    torch.backends.mha.set_fastpath_enabled(False)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# --- running them ---------------------------------------------------------------------------------


class ExportedGraphs:
    """The three graphs of a folder; each is opened when it is first run.

    Args:
        folder: What `tools/export.py` wrote.
        kind: Which of its files to run.

    Raises:
        InputError: If the folder does not hold them.
    """

    def __init__(self, folder: Path, kind: Format = "onnx") -> None:
        for name in ("image", "text", "matte"):
            if not (folder / f"{name}{SUFFIXES[kind]}").is_file():
                raise InputError(f"{str(folder)!r} holds no {name}{SUFFIXES[kind]}: make it with tools/export.py.")
        self.folder, self.kind = folder, kind
        self._open: dict[str, Any] = {}

    def run(self, name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of one graph."""
        if name not in self._open:
            self._open[name] = self._load(self.folder / f"{name}{SUFFIXES[self.kind]}")
        if self.kind == "torch":
            with torch.no_grad():
                outputs = self._open[name](*inputs)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        session = self._open[name]
        named = {item.name: value.contiguous().numpy() for item, value in zip(session.get_inputs(), inputs)}
        return tuple(torch.from_numpy(value) for value in session.run(None, named))

    def _load(self, path: Path) -> Any:
        if self.kind == "torch":
            return torch.export.load(path).module()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def close(self) -> None:
        """Let go of what was opened."""
        self._open.clear()


class ExportedNetwork(nn.Module):
    """Exported graphs in the place of a network: give it to :class:`~lit_matting.pipeline.MattingPipeline`.

    The phrases are spelled and the matte is refined by the network that was exported; everything else is the graphs.

    Args:
        exported: The graphs.
        network: The network they were made from.
    """

    def __init__(self, exported: ExportedGraphs, network: MattingNetwork) -> None:
        super().__init__()
        self.refiner = network.refiner
        # the last graph's features are projected already
        self.project = None if network.refiner is None else nn.Identity()
        self.backbone = _ExportedBackbone(exported, network)
        self._run = exported.run

    def matte(self, image: Tensor, latent: Tensor, text: TextFeatures, refine: bool = False) -> MattingOutput:
        """Return the low-resolution maps of latents and phrases; nothing is refined here."""
        maps = self._run("matte", latent, *(getattr(text, name) for name in TEXT_FIELDS))
        alpha, trimap, grounding, features = (maps[MATTE_FIELDS.index(name)] for name in MATTE_FIELDS)
        enlarged = enlarge(alpha, image.shape[-2:])
        return MattingOutput(enlarged, alpha, trimap, None, grounding, features=features)


class _ExportedBackbone(nn.Module):
    def __init__(self, exported: ExportedGraphs, network: MattingNetwork) -> None:
        super().__init__()
        self._run = exported.run
        self._spell = network.backbone.text_encoder.spell
        self.check_size = network.backbone.check_size
        self.name = f"{network.backbone.name} as {exported.kind} graphs"

    def encode_image(self, image: Tensor) -> Tensor:
        return self._run("image", image)[0]

    def encode_text(self, phrases: Sequence[str]) -> TextFeatures:
        return TextFeatures(*self._run("text", *self._spell(phrases).values()))


def describe(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Return names, shapes and types of every graph's inputs and the names of its outputs, for JSON."""
    return {
        graph.name: {
            "inputs": {
                name: {"shape": ["batch", *example.shape[1:]], "type": str(example.dtype).removeprefix("torch.")}
                for name, example in zip(graph.inputs, graph.examples)
            },
            "outputs": list(graph.outputs),
        }
        for graph in graphs
    }


def write_description(content: dict[str, Any], folder: Path) -> None:
    """Write what the folder holds."""
    with whole_file(folder / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
