"""A segmentor with a fixed class list as one program: ``torch.export`` and ONNX, for serving without infoclip.

The program takes a batch of pictures at the encoder's size and gives the scores of every class; the text embeddings of
the class list are constants in it. Cutting a large picture into windows and resizing the scores stays with the caller,
as does reading files (:mod:`infoclip.model.inference` says what ``infoclip predict`` does there).

Sizes: ``B`` pictures, ``T`` classes, ``S`` the encoder's input side, ``h = w = S / patch size``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from infoclip.errors import ConfigError, DataError
from infoclip.kernels import use_backend
from infoclip.model.inference import preprocess
from infoclip.storage import new_directory

if TYPE_CHECKING:
    from infoclip.model.segmentor import Segmentor

__all__ = ["FORMATS", "TOLERANCE", "Exported", "FixedSegmentor", "export"]

Format = Literal["torch", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a score (0..1) between the file and the model: float32 sums in another order give some 1e-6."""
_FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
_DESCRIPTION = "export.json"
_PROTOBUF_LIMIT = 1_500_000_000
"""Bytes of weights above which ONNX puts them beside the graph: a protobuf file ends at 2 GiB."""


class FixedSegmentor(nn.Module):
    """The segmentor with its class list built in.

    Args:
        segmentor: in evaluation mode afterwards.
        text: [T, P, d], the class list's embeddings.
    """

    text: Tensor

    def __init__(self, segmentor: Segmentor, text: Tensor) -> None:
        super().__init__()
        self.segmentor = segmentor.eval()
        self.register_buffer("text", text.detach().clone())

    def forward(
        self,
        image: Tensor,  # [B, 3, S, S] float32, RGB in 0..255
    ) -> Tensor:  # [B, T, 4h, 4w] float32 in 0..1
        """Scores of every class at four times the patch grid."""
        return self.segmentor(preprocess(image, self.segmentor.clip), self.text).logits.float().sigmoid()


@dataclass(frozen=True)
class Exported:
    """What was written, and how far each file's scores are from the model's."""

    folder: Path
    files: dict[str, Path]
    """By format."""
    differences: dict[str, float]
    """By format: the largest difference of a score, over batches of one and two random pictures."""
    unchecked: list[str] = field(default_factory=list)
    """Formats that nothing here can run, with the reason."""


def export(
    model_path: str | Path,
    classes: Sequence[str],
    out_dir: str | Path,
    *,
    formats: Sequence[str] = FORMATS,
) -> Exported:
    """Write a model with a fixed class list as a ``torch.export`` program and as ONNX, and check both against it.

    ``model.pt2`` is for ``torch.export.load``; ``model.onnx`` (opset 20) for onnxruntime and others; ``export.json``
    states input, output, class list and differences. Both take any batch size. The plain forms of the kernels are
    traced, so that neither file needs infoclip. Run on the CPU.

    Args:
        model_path: a run or model directory, or a published checkpoint.
        classes: names; see :meth:`infoclip.api.Model.segment`.
        out_dir: made when missing; an earlier export there is replaced in one step.
        formats: of ``torch`` and ``onnx``.

    Raises:
        CheckpointError: no usable model.
        ConfigError: an unknown format, ONNX without the package onnxscript, or a file whose scores differ.
        DataError: a class list that cannot be used, or an output folder that holds something else.
        StorageError: the output cannot be written.
    """
    from infoclip.api import checked_classes, load

    wanted = list(dict.fromkeys(formats))
    if not wanted or not set(wanted) <= set(FORMATS):
        raise ConfigError(f"The formats are '{', '.join(wanted)}'; expected some of {', '.join(FORMATS)}.")
    if "onnx" in wanted:
        _need("onnxscript")
    out = Path(out_dir)
    if out.exists() and not (out / _DESCRIPTION).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no earlier export; choose a new folder.")
    names = checked_classes(classes)
    model = load(model_path, "cpu")
    segmentor = model.segmentor
    names, text = model.embed(names)
    if not isinstance(text, Tensor):
        raise ConfigError(f"{model_path} is a model of mask proposals; export takes models of the system catseg.")
    segmentor.aggregator.use_memory("fast", len(names))  # one region: chunks would only repeat the graph
    program = FixedSegmentor(segmentor, text)
    side = segmentor.clip.image_size
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255
    with use_backend("reference"), torch.no_grad(), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        expected = program(pictures)
        traced = torch.export.export(
            program, (pictures,), dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}}, strict=False
        )
    files: dict[str, Path] = {}
    differences: dict[str, float] = {}
    unchecked: list[str] = []
    with new_directory(out, "the export") as temporary:
        for kind in wanted:
            path = temporary / _FILES[kind]
            if kind == "torch":
                torch.export.save(traced, path)
                found = _run_torch(path, pictures)
            else:
                _write_onnx(traced, path, names)
                try:
                    found = _run_onnx(path, pictures)
                except ImportError:
                    unchecked.append("onnx: the package onnxruntime is not installed")
                    found = []
            for scores in found:
                difference = (scores - expected[: len(scores)]).abs().max().item()
                differences[kind] = max(differences.get(kind, 0.0), difference)
            if differences.get(kind, 0.0) > TOLERANCE:
                raise ConfigError(
                    f"The {kind} file's scores differ from the model's by {differences[kind]:.1e}, more than"
                    f" {TOLERANCE:.0e}; nothing was written: try another version of its packages."
                )
            files[kind] = out / _FILES[kind]
        description = {
            "model": str(model_path),
            "input": {"name": "image", "shape": ["batch", 3, side, side], "dtype": "float32", "values": "RGB, 0..255"},
            "output": {"name": "scores", "shape": ["batch", len(names), *expected.shape[2:]], "dtype": "float32",
                       "values": "0..1; the largest gives the label"},
            "classes": names,
            "files": {kind: path.name for kind, path in files.items()},
            "largest_difference_of_a_score": differences,
            "unchecked": unchecked,
            "torch": torch.__version__,
        }  # fmt: skip
        text_ = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (temporary / _DESCRIPTION).write_text(text_, encoding="utf-8")
    return Exported(out, files, differences, unchecked)


def _write_onnx(traced: torch.export.ExportedProgram, path: Path, names: list[str]) -> None:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(
            traced, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=["scores"], verbose=False
        )
    made.model.metadata_props["classes"] = json.dumps(names, ensure_ascii=False)
    weights = sum(t.numel() * t.element_size() for t in traced.state_dict.values())
    made.save(path, external_data=weights > _PROTOBUF_LIMIT)


def _run_torch(path: Path, pictures: Tensor) -> list[Tensor]:
    program = torch.export.load(path).module()
    with torch.no_grad():
        return [program(pictures), program(pictures[:1])]


def _run_onnx(path: Path, pictures: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(["scores"], {"image": x.numpy()})[0]) for x in (pictures, pictures[:1])]


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"ONNX export needs the package {package}: pip install 'infoclip[export]', or ask for --format torch."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report to stdout and to their loggers what is of use to their developers."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
