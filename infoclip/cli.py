"""The command line, ``infoclip COMMAND``; ``infoclip --help`` lists the commands.

Everything heavy is imported inside the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from infoclip import __version__
from infoclip.errors import ConfigError, DataError, InfoclipError, InfoclipWarning

__all__ = ["app", "main"]

app = typer.Typer(
    name="infoclip",
    help="Fine-tune CLIP into open-vocabulary semantic segmentation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
pretrain_app = typer.Typer(no_args_is_help=True, help="Train a CLIP from scratch.")
app.add_typer(pretrain_app, name="pretrain")
data_app = typer.Typer(no_args_is_help=True, help="What is on the disk of the papers' data sets, or of your own.")
app.add_typer(data_app, name="data")

convert_app = typer.Typer(no_args_is_help=True, help="Published checkpoints to model folders, and back.")
app.add_typer(convert_app, name="convert")

_Memory = Annotated[
    str,
    typer.Option(
        help="Most memory, such as 4GiB or auto: it chooses views, classes and pictures at once. Default: any."
    ),
]
_Precision = Annotated[str, typer.Option(help="Of matrix products: fp32, bf16, or fp16 on a GPU.")]
_TrainedModel = Annotated[Path, typer.Argument(help="A run, or a model folder.")]
_ModelFolder = Annotated[Path, typer.Argument(help="Folder for the model.")]
_PublishedFile = Annotated[Path, typer.Argument(help="The file, such as model_final.pth.")]
_MaskClasses = Annotated[str, typer.Option(help="Training classes: a shipped list or a file. Default: COCO's.")]


def main() -> None:
    """Entry point of the ``infoclip`` command."""
    app()


def _guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake ends in one sentence on stderr and its exit code; an interrupt in 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        warnings.showwarning = show_warning
        try:
            return command(*args, **kwargs)
        except InfoclipError as error:
            if _rank():
                # The first process speaks for all. torchrun ends it as soon as this one is gone: let it finish.
                time.sleep(1)
                if error.shared:
                    raise typer.Exit(error.exit_code) from None
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted.", 130)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            where = f" ({error.filename})" if error.filename else ""
            _fail(f"{error.strerror or error}{where}.", 1)

    return run


def _rank() -> int:
    """This process's number among those of ``torchrun``."""
    return int(os.environ.get("RANK", "0"))


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings are for the user, one line each; those of libraries are for developers and stay out of sight."""
    if issubclass(category, InfoclipWarning):
        print(f"warning: {message}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"infoclip {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_guarded
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, hardware, and every op with its backends: available or why not."""
    from infoclip.info import show

    show(json=as_json)


@app.command()
@_guarded
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes, or one recipe's settings as the key=value that 'train' takes."""
    from infoclip.config import config_to_dict
    from infoclip.recipes import describe_recipe, get_recipe, list_recipes

    if name is not None:
        data = config_to_dict(get_recipe(name))
        print(json.dumps(data, indent=2) if as_json else "\n".join(_lines(data)))
    elif as_json:
        print(json.dumps({recipe: describe_recipe(recipe) for recipe in list_recipes()}, indent=2))
    else:
        width = max(map(len, list_recipes()))
        for recipe in list_recipes():
            print(f"{recipe:<{width}}  {describe_recipe(recipe)}")


@pretrain_app.command("scenes")
@_guarded
def pretrain_scenes(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("runs/scenes-clip"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1500,
    batch_size: Annotated[int, typer.Option(min=2, help="Image-caption pairs a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of weights, scenes and captions.")] = 0,
) -> None:
    """Train the tiny CLIP of the demo on generated scenes and captions."""
    from infoclip.pretrain import pretrain_scenes as run

    result = run(out, steps=steps, batch_size=batch_size, seed=seed)
    print(f"The CLIP is in {result.out}")


@pretrain_app.command("scenes-convnext")
@_guarded
def pretrain_scenes_convnext(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("runs/scenes-convnext"),
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures a step.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights, scenes and captions.")] = 0,
    teacher: Annotated[Path | None, typer.Option(help="A CLIP of 'pretrain scenes'; default: the shipped one.")] = None,
) -> None:
    """Train a tiny CLIP with a ConvNeXt on generated scenes, captions and the tiny CLIP's answers."""
    from infoclip.pretrain_convnext import pretrain_scenes_convnext as run

    result = run(out, steps=steps, batch_size=batch_size, seed=seed, teacher=teacher)
    print(f"The CLIP is in {result.out}")


@data_app.command("list")
@_guarded
def data_list() -> None:
    """The data sets by name, with the folders in which they are looked for."""
    from infoclip.data.benchmarks import BENCHMARKS

    for b in BENCHMARKS.values():
        print(f"{b.name:<11} {b.title:<20} {b.count:>7,} images  {b.folder}/{{{b.images}, {b.masks} or {b.converted}}}")
    from infoclip.data.panoptic import PANOPTIC_SETS

    print("\npanoptic:")
    for name, p in PANOPTIC_SETS.items():
        print(f"{name:<21} {p.pictures:>7,} images  {p.folder}/{{{p.images}, {p.json}, {p.pngs[0]}}}")


@data_app.command("check")
@_guarded
def data_check(
    name: Annotated[str, typer.Argument(help="A data set's name; leave it out for your own folders.")] = "",
    root: Annotated[Path, typer.Option(help="Folder below which the data are.")] = Path(),
    images: Annotated[str, typer.Option(help="Your own data: folder of images, below the root.")] = "images",
    masks: Annotated[str, typer.Option(help="Your own data: folder of masks, below the root.")] = "masks",
    classes: Annotated[str, typer.Option(help="Your own data: class list, a file or a shipped name.")] = "",
    label_map: Annotated[str, typer.Option(help="Annotation value -> class: a shipped name or a JSON file.")] = "",
    ignore_index: Annotated[int, typer.Option(help="Your own data: mask value without a label.")] = 255,
    out: Annotated[Path | None, typer.Option(help="Summary picture (default: data-check-NAME.png).")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Say what is there and what is missing, and read every pair: decodes, same size, labels in range."""
    from infoclip.data.check import check_dataset, draw_report
    from infoclip.data.classes import load_classes, load_label_map
    from infoclip.data.folders import FolderDataset, PairDataset
    from infoclip.data.panoptic import PANOPTIC_SETS, open_panoptic

    sets: list[tuple[str, PairDataset]] = []
    lacking: list[str] = []
    if name in PANOPTIC_SETS:
        sets.append((PANOPTIC_SETS[name].title, open_panoptic(root, name)))
    elif name:
        from infoclip.data.benchmarks import find_forms, get_benchmark, open_form

        benchmark = get_benchmark(name)
        for form in find_forms(name, root):
            whole = "whole" if len(form.pairs) == benchmark.count else f"of {benchmark.count:,}"
            print(f"{benchmark.title}, {form.kind}: {len(form.pairs):,} pairs ({whole}) in {form.masks}")
            for line in form.missing:
                print(f"  missing: {line}")
            if form.found:
                sets.append((f"{benchmark.title} ({form.kind})", open_form(benchmark, form, progress=not quiet)))
                lacking += form.missing
        if not sets:
            print("\n".join(("to be had from", *(f"  {line}" for line in benchmark.get))))
            raise DataError(f"{benchmark.title} is not below {root}.")
    else:
        names = load_classes(classes or root / "classes.json")
        mapping = load_label_map(label_map) if label_map else None
        ignored = ignore_index if mapping is None else max(ignore_index, len(names))
        sets.append((root.name or "data", FolderDataset(root / images, root / masks, names, ignored, mapping)))
    faults = 0
    for title, dataset in sets:
        report = check_dataset(dataset, title, workers=workers, progress=not quiet)
        picture = out or Path(f"data-check-{name or 'data'}.png")
        if len(sets) > 1:
            picture = picture.with_stem(f"{picture.stem}-{title.rpartition('(')[2].rstrip(')')}")
        draw_report(report, dataset, picture)
        speed = report.images / report.seconds if report.seconds else 0.0
        print(f"{title}: {report.images:,} pairs can be used, {len(report.faults):,} cannot ({speed:.0f} pairs/s)")
        for fault in report.faults[:20]:
            print(f"  {fault}")
        if len(report.faults) > 20:
            print(f"  and {len(report.faults) - 20:,} more")
        absent = f"; without a pixel: {', '.join(report.absent[:8])}" if report.absent else ""
        print(f"  {len(report.classes) - len(report.absent)} of {len(report.classes)} classes occur{absent}")
        print(f"  {picture}")
        faults += len(report.faults)
    if faults or lacking:
        raise DataError(f"{faults:,} pairs cannot be used and {len(lacking)} parts are missing; see above.")


@data_app.command("convert")
@_guarded
def data_convert(
    name: Annotated[str, typer.Argument(help="A data set's name.")],
    root: Annotated[Path, typer.Option(help="Folder below which the data are.")] = Path(),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write annotations_detectron2 beside the original download; goes on where it was stopped."""
    from infoclip.data.benchmarks import convert_benchmark

    folder, made, kept = convert_benchmark(name, root, progress=not quiet)
    print(f"{made:,} masks written, {kept:,} were there: {folder}")


@convert_app.command("catseg")
@_guarded
def convert_from_catseg(
    checkpoint: Annotated[Path, typer.Argument(help="model_final.pth of the published CAT-Seg.")],
    out: _ModelFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that weights cannot tell: model.num_heads=8."),
    ] = None,
    classes: Annotated[str, typer.Option(help="Training classes: a shipped list or a file.")] = "coco_stuff_171",
) -> None:
    """Turn a published CAT-Seg checkpoint into a model folder; every entry is accounted for."""
    from infoclip.convert import convert_catseg

    read = convert_catseg(checkpoint, out, overrides or [], classes)
    clip = read.config.clip
    print(f"{read.loaded} entries loaded, {len(read.derived)} window masks checked, none left over")
    print(f"{clip.model}, {clip.image_size} px")
    if read.left_out:
        print(f"beside the weights, not needed: {', '.join(read.left_out)}")
    print(f"The model is in {out}")


@convert_app.command("to-catseg")
@_guarded
def convert_to_catseg(
    model: _TrainedModel,
    out: _PublishedFile,
) -> None:
    """Write a model in the form that the published CAT-Seg code loads."""
    from infoclip.convert import write_catseg

    print(f"{write_catseg(model, out)} entries are in {out}")


@convert_app.command("maftplus")
@_guarded
def convert_from_maftplus(
    checkpoint: Annotated[Path, typer.Argument(help="model_final.pth of the published MAFT+.")],
    out: _ModelFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that weights cannot tell: mask.panoptic=true."),
    ] = None,
    classes: _MaskClasses = "",
) -> None:
    """Turn a published MAFT+ checkpoint into a model folder; every entry is accounted for."""
    _convert_masks("maftplus", checkpoint, out, overrides, classes)


@convert_app.command("fcclip")
@_guarded
def convert_from_fcclip(
    checkpoint: Annotated[Path, typer.Argument(help="model_final.pth of the published FC-CLIP.")],
    out: _ModelFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that weights cannot tell.")
    ] = None,
    classes: _MaskClasses = "",
) -> None:
    """Turn a published FC-CLIP checkpoint into a model folder; every entry is accounted for."""
    _convert_masks("fcclip", checkpoint, out, overrides, classes)


def _convert_masks(system: str, checkpoint: Path, out: Path, overrides: list[str] | None, classes: str) -> None:
    from infoclip.convert import convert_masks

    read = convert_masks(checkpoint, out, system, overrides or [], classes)
    print(f"{read.loaded} entries loaded, {len(read.derived)} of the frozen CLIP and the loss checked, none left over")
    print(f"{read.config.clip.model}, {len(read.classes)} classes")
    if read.left_out:
        print(f"beside the weights, not needed: {', '.join(read.left_out)}")
    print(f"The model is in {out}")


@convert_app.command("to-maftplus")
@_guarded
def convert_to_maftplus(
    model: _TrainedModel,
    out: _PublishedFile,
) -> None:
    """Write a model in the form that the published MAFT+ code loads."""
    from infoclip.convert import write_masks

    print(f"{write_masks(model, out, 'maftplus')} entries are in {out}")


@convert_app.command("to-fcclip")
@_guarded
def convert_to_fcclip(
    model: _TrainedModel,
    out: _PublishedFile,
) -> None:
    """Write a model in the form that the published FC-CLIP code loads."""
    from infoclip.convert import write_masks

    print(f"{write_masks(model, out, 'fcclip')} entries are in {out}")


@app.command()
@_guarded
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a config.json of an earlier run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = ...,  # type: ignore[assignment]
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share each batch, one a GPU; or start them with torchrun.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a segmentor."""
    from infoclip.config import apply_overrides, load_config
    from infoclip.recipes import get_recipe

    base = load_config(recipe) if recipe.endswith(".json") else get_recipe(recipe)
    config = apply_overrides(base, overrides or [])
    from infoclip.engine.train import train as run

    try:
        result = run(config, out, resume=resume, progress=not quiet, processes=processes)
    except KeyboardInterrupt:
        if _rank():
            raise typer.Exit(130) from None
        _fail(f"interrupted; the same command with --resume continues {out} from its newest checkpoint.", 130)
    if _rank():
        return
    speed = f", {result.images_per_second:.1f} images/s" if result.seconds else ""
    print(f"{result.steps} steps in {result.seconds:.0f} s{speed}; the model is in {result.model_dir}")


@app.command()
@_guarded
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run or a model folder; with --task panoptic also predictions.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Test settings to change: sliding_window=false."),
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder below which the data are.")] = Path(),
    data: Annotated[
        str,
        typer.Option(
            help="Data sets in their published folders below the root: a150, or a150,pc59, or all six of the papers: "
            "all ('infoclip data list')."
        ),
    ] = "",
    images: Annotated[str, typer.Option(help="Folder of images, below the root.")] = "images",
    masks: Annotated[str, typer.Option(help="Folder of masks, below the root.")] = "masks",
    classes: Annotated[
        str, typer.Option(help="Class list: a shipped name or a file. Default: classes.json of the root.")
    ] = "",
    label_map: Annotated[str, typer.Option(help="Annotation value -> class: a shipped name or a JSON file.")] = "",
    ignore_index: Annotated[int, typer.Option(help="Mask value without a label.")] = 255,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seen: Annotated[
        str, typer.Option(help="Class list of what counts as seen. Default: what the model was trained on.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for JSON, HTML report and counts by image; a stopped call goes on from them."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the images.")] = 1,
    memory: _Memory = "",
    precision: _Precision = "fp32",
    per_class: Annotated[bool, typer.Option("--per-class", help="Also a table of all classes.")] = False,
    task: Annotated[
        str,
        typer.Option(
            help="semantic; or panoptic: PATH is a model of mask proposals, or a folder of predictions in "
            "panopticapi's layout."
        ),
    ] = "semantic",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Mean IoU and its kin of a trained model on images with masks; PQ, SQ and RQ of panoptic results."""
    from rich.console import Console

    if task not in ("semantic", "panoptic"):
        raise ConfigError(f"--task is '{task}'; expected semantic or panoptic.")
    from infoclip.data.classes import load_classes

    if task == "panoptic":
        if memory or precision != "fp32":
            raise ConfigError("--memory and --precision are for cost aggregation; --task panoptic is mask proposals'.")
        from infoclip.data.panoptic import open_panoptic
        from infoclip.evaluate.panoptic_run import evaluate_panoptic_folder, evaluate_panoptic_model, is_model

        dataset = open_panoptic(root, data, images=images, classes=load_classes(classes) if classes else None)
        trained = load_classes(seen) if seen else None
        name = "evaluation"
        if is_model(path):
            name = data or name
            counted = evaluate_panoptic_model(path, dataset, trained, name=name, device=device, out=out,
                                              overrides=overrides or [], processes=processes,
                                              progress=not quiet)  # fmt: skip
        elif overrides:
            raise ConfigError(f"'{overrides[0]}' is a setting of a model, and {path} is none.")
        else:
            counted = evaluate_panoptic_folder(path, dataset, trained, out=out, progress=not quiet)
        if int(os.environ.get("RANK", "0")):
            return  # torchrun: the first process speaks for all
        for table in (counted.summary_table(), *([counted.class_table()] if per_class else [])):
            Console().print(table)
        if out is not None:
            print(out / f"{name}.html")
        return
    from infoclip.data.benchmarks import get_benchmark
    from infoclip.evaluate.run import SIX, evaluate_benchmarks, evaluate_folder, summary_table

    options: dict[str, Any] = {
        "seen": load_classes(seen) if seen else None,
        "overrides": overrides or [],
        "device": device,
        "out": out,
        "processes": processes,
        "memory": memory,
        "precision": precision,
        "progress": not quiet,
    }
    if data:
        names = list(SIX) if data == "all" else [name.strip() for name in data.split(",") if name.strip()]
        results = evaluate_benchmarks(path, names, root, **options)
        titles = {name: get_benchmark(name).title for name in names}
    else:
        chosen = classes or root / "classes.json"
        result = evaluate_folder(
            path, root / images, root / masks, chosen, label_map=label_map or None, ignore_index=ignore_index, **options
        )
        results, titles = {"evaluation": result}, {"evaluation": "evaluation"}
    if _rank():
        return  # torchrun: the first process speaks for all
    console = Console()
    for name, result in results.items():
        if len(results) == 1:
            console.print(result.summary_table())
        if per_class:
            console.print(titles[name], result.class_table(), sep="\n")
    if len(results) > 1:
        console.print(summary_table(results, titles))
    if out is not None:
        print(out / ("summary.html" if len(results) > 1 else f"{next(iter(results))}.html"))


@app.command()
@_guarded
def predict(
    path: Annotated[Path, typer.Argument(help="A run, or a model folder.")],
    pictures: Annotated[list[Path], typer.Argument(help="Image files, folders, patterns such as 'photos/**/*.jpg'.")],
    out: Annotated[Path, typer.Option(help="Folder for overlays, labels and JSON.")],
    classes: Annotated[str, typer.Option(help='Class names separated by commas, "red circle, blue sky".')] = "",
    classes_file: Annotated[
        str | None,
        typer.Option(
            help="A class list: one class a line, JSON, or a shipped list's name; names may hold commas here."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="semantic; panoptic or instance for models of mask proposals (maftplus, fcclip).")
    ] = "semantic",
    things: Annotated[
        str | None,
        typer.Option(help="Classes whose objects are told apart, separated by commas. Default: all of them."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engine: Annotated[str, typer.Option(help="local: this process; ray: the workers of a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(min=0, help="Ray: workers; 0 for one a GPU, or one for four CPUs.")] = 0,
    address: Annotated[
        str | None, typer.Option(help="Ray: a running cluster; default RAY_ADDRESS, else one on this machine.")
    ] = None,
    memory: _Memory = "",
    precision: _Precision = "fp32",
) -> None:
    """Segment pictures with any classes; writes an overlay, a PNG of labels or segments, and JSON each."""
    names = _class_names(classes, classes_file)
    apart = None if things is None else [part.strip() for part in things.split(",") if part.strip()]
    from infoclip.predict import predict as run

    many = len(pictures) > 1 or not pictures[0].is_file()
    done = run(path, pictures, names, out, task=task, things=apart, device=device, progress=many, engine=engine,
               workers=workers, address=address, memory=memory, precision=precision)  # fmt: skip
    for result in done.results[:20]:
        shares = {name: f"{name} {100 * share:.0f} %" for name, share in list(result.shares.items())[:5]}
        numbers = {name: f"{count} x " for name, count in result.counts.items() if count > 1}
        found = ", ".join(numbers.get(name, "") + text for name, text in shares.items()) or "nothing found"
        print(f"{result.image}: {found}\n  {result.overlay}\n  {result.labels}\n  {result.json}")
    if len(done.results) > 20:
        print(f"and {len(done.results) - 20:,} more in {out}")
    if done.plan is not None:
        print(done.plan, file=sys.stderr)
    if done.kept:
        print(f"{done.kept:,} were there already: {out}")
    for fault in done.faults:
        print(f"skipped: {fault}", file=sys.stderr)
    if done.faults:
        count, others = len(done.faults), done.results or done.kept
        raise DataError(
            f"{count:,} could not be used and {'was' if count == 1 else 'were'} skipped; "
            + (f"the others are in {out}." if others else "there was no other, and nothing is written.")
        )


@app.command()
@_guarded
def export(
    path: Annotated[Path, typer.Argument(help="A run, or a model folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the export.")],
    classes: Annotated[str, typer.Option(help='Class names separated by commas, "red circle, blue sky".')] = "",
    classes_file: Annotated[
        str | None, typer.Option(help="Class list: a file, or a shipped name such as ade20k_150.")
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="torch, onnx, or both as 'torch,onnx'.")] = "torch,onnx",
) -> None:
    """Write a model with a fixed class list as a torch.export program and as ONNX, checked against it."""
    from infoclip.export import export as run

    names = _class_names(classes, classes_file)
    result = run(path, names, out, formats=[part.strip() for part in formats.split(",") if part.strip()])
    for kind, file in result.files.items():
        checked = f", scores within {result.differences[kind]:.0e}" if kind in result.differences else ""
        print(f"{kind}: {file}, {file.stat().st_size / 1e6:.1f} MB{checked}")
    for line in result.unchecked:
        print(f"not checked: {line}", file=sys.stderr)


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the models.")] = Path("runs/demo"),
    system: Annotated[
        str, typer.Option(help="infoclip; or maftplus, beside FC-CLIP and InfoCLIP, with panoptic figures.")
    ] = "infoclip",
    seeds: Annotated[str, typer.Option(help="Seeds separated by commas; several give mean and spread.")] = "0",
    split: Annotated[str, typer.Option(help="Unseen classes by attribute or by composition.")] = "attribute",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps in place of the recipes'.")] = None,
) -> None:
    """Train with and without a paper's objective on generated scenes; table, pictures and report."""
    numbers = _seeds(seeds)
    from infoclip.demo import demo as run

    run(out, system=system, seeds=numbers, split=split, steps=steps)


def _class_names(text: str, file: str | None) -> list[str]:
    from infoclip.data.classes import check_classes, load_classes

    if bool(text.strip()) == (file is not None):
        raise ConfigError('Name the classes with either --classes "red circle, blue sky" or --classes-file FILE.')
    return load_classes(file) if file is not None else check_classes(text.split(","), "--classes")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise ConfigError(f"--seeds is '{text}'; expected whole numbers such as 0,1,2.") from error
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds is '{text}'; expected one or more different whole numbers.")
    return seeds


def _lines(data: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            lines.append(f"{prefix}{key}={str(shown).lower() if isinstance(shown, bool) else shown}")
    return lines


if __name__ == "__main__":
    main()
