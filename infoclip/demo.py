"""The demo: one frozen CLIP, tuned with and without InfoCLIP's objective on generated scenes, and held against itself.

Four methods on the same pictures, all starting from the CLIP that ships with the package:

- the frozen CLIP alone, zero-shot (:mod:`infoclip.evaluate.zero_shot`);
- the frozen CLIP behind a trained cost-aggregation head;
- CLIP fine-tuned together with the head, without alignment (recipe ``scenes-finetune``);
- the same with InfoCLIP's alignment objective (recipe ``scenes``).

They learn on the seen classes and are tested on other scenes with all 52 classes. Each method runs in a process of its
own, so that its peak memory is its own too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoclip import errors
from infoclip.config import Config, apply_overrides, config_from_dict, config_to_dict
from infoclip.errors import ConfigError, InfoclipError, StorageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

__all__ = ["EVAL_SEED", "METHODS", "Method", "demo"]

EVAL_SEED = 424_242
"""Seed of the evaluation scenes: one set for every method, seed and split."""

_PANELS = 6
_TRY = "--classes 'red striped circle, blue plain square, grass, water' --out predictions"
_SECONDS_A_STEP = 0.3  # on two CPU cores, for the estimate before anything was measured


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    key: str
    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    trains: bool = True
    cost: float = 1.0
    """Time a step relative to plain fine-tuning, for the estimate."""


METHODS = (
    Method("zero-shot", "Frozen CLIP, zero-shot", "scenes-finetune", trains=False, cost=0.05),
    Method(
        "frozen", "Frozen CLIP + head", "scenes-finetune", ("clip.tune=frozen", "clip.tune_positions=false"), cost=0.8
    ),
    Method("finetune", "Fine-tuned, no alignment", "scenes-finetune"),
    Method("infoclip", "InfoCLIP", "scenes", cost=1.15),
)


def demo(
    out: str | Path = "runs/demo",
    *,
    seeds: Sequence[int] = (0,),
    split: str = "attribute",
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Run the comparison and write ``report.html``, ``results.json`` and the trained models.

    The first seed's runs are ``out/frozen``, ``out/finetune`` and ``out/infoclip`` (each with ``model/``), those of
    further seeds are below ``out/seeds``. Everything is made in a hidden folder and put in its place at the end: an
    interrupted call leaves an earlier demo as it was.

    Args:
        out: folder of the demo; an earlier demo in it is replaced.
        seeds: of head, batches and training scenes; several give mean and standard deviation.
        split: ``attribute`` or ``composition``, see :func:`infoclip.data.scenes.split_classes`.
        steps: training steps in place of the recipes'.
        overrides: further ``key=value`` for every recipe.
        progress: print the course and show progress bars; the table is printed in any case.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: no or repeated seeds, an unknown split or setting.
        StorageError: the folder cannot be written.
    """
    from rich.console import Console

    from infoclip.data.scenes import split_classes
    from infoclip.evaluate.run import without_nan

    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"The seeds are {seeds}; expected one or more different whole numbers.")
    split_classes(split)
    out = Path(out)
    jobs = [(seed, method, _config(method, seed, split, steps, overrides, out)) for seed in seeds for method in METHODS]
    work = out / f".work-{os.getpid()}"
    console, started = Console(), time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        work.mkdir()
        truth = _evaluation_scenes(out, jobs[0][2])
        runs = _run_jobs(jobs, truth, work, progress, console)
        results = _summary(runs, jobs, split, time.perf_counter() - started)
        (work / "results.json").write_text(json.dumps(without_nan(results), indent=1) + "\n", encoding="utf-8")
        (work / "report.html").write_text(_report(results, runs, work, truth), encoding="utf-8")
        _put_in_place(work, out, seeds)
    except OSError as error:
        if isinstance(error, InfoclipError):
            raise
        raise StorageError(
            f"Cannot write the demo to {out}: {error.strerror or error}; free some space or choose another --out."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    console.print(_terminal_table(results))
    console.print(f"Report:  {out / 'report.html'}", soft_wrap=True)
    console.print(f"Figures: {out / 'results.json'}", soft_wrap=True)
    console.print(f"Try it:  infoclip predict {out / 'infoclip'} PICTURE {_TRY}", soft_wrap=True)
    return results


# Settings and data


def _config(method: Method, seed: int, split: str, steps: int | None, overrides: Sequence[str], out: Path) -> Config:
    from infoclip.recipes import get_recipe

    config = apply_overrides(get_recipe(method.recipe), [*overrides, *method.overrides])
    config.name = method.key
    if steps is not None:
        config.train.steps = steps
    config.train.seed = seed
    config.data.split = "composition" if split == "composition" else "attribute"
    config.data.scenes_seed += seed
    size, count = config.clip.image_size, config.data.train_images
    config.data.root = str((out / "scenes" / f"seed{config.data.scenes_seed}-{count}x{size}px").absolute())
    return config.validate()


def _evaluation_scenes(out: Path, config: Config) -> Path:
    from infoclip.data.scenes import write_scenes

    count, size = config.data.eval_images, config.clip.image_size
    return write_scenes(out.absolute() / "scenes" / f"eval-{count}x{size}px", count, size, EVAL_SEED)


# One process for each method


def _run_jobs(
    jobs: Sequence[tuple[int, Method, Config]], truth: Path, work: Path, progress: bool, console: Console
) -> list[dict[str, Any]]:
    """Run every method of every seed; returns what each process measured."""
    runs, spent = [], 0.0
    total = sum(_weight(method, config) for _, method, config in jobs)
    done = 0.0
    for number, (seed, method, config) in enumerate(jobs, start=1):
        if progress:
            measured = number > 2  # the first job trains nothing and says little about the others
            left = (total - done) * (spent / done if measured else _SECONDS_A_STEP)
            machine = "this machine" if measured else "two CPU cores"
            console.print(f"[bold]{number}/{len(jobs)}[/bold] {method.name}, seed {seed} "
                          f"[dim](about {_minutes(left)} to go on {machine})[/dim]")  # fmt: skip
        begin = time.perf_counter()
        runs.append(_run_job(seed, method, config, truth, work, progress))
        if number > 1:
            spent += time.perf_counter() - begin
            done += _weight(method, config)
        else:
            total -= _weight(method, config)
    return runs


def _weight(method: Method, config: Config) -> float:
    evaluation = config.data.eval_images / 8  # a test image costs about an eighth of a step
    return method.cost * config.train.steps + evaluation if method.trains else evaluation


def _run_job(seed: int, method: Method, config: Config, truth: Path, work: Path, progress: bool) -> dict[str, Any]:
    folder = work / str(seed)
    folder.mkdir(exist_ok=True)
    job = folder / f"{method.key}.job.json"
    result = folder / f"{method.key}.result.json"
    job.write_text(
        json.dumps(
            {
                "key": method.key,
                "trains": method.trains,
                "config": config_to_dict(config),
                "out": str(folder / method.key),
                "truth": str(truth),
                "result": str(result),
                "predictions": str(folder / f"{method.key}.npz"),
                "progress": progress,
            }
        ),
        encoding="utf-8",
    )
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    package_root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH", "")]))
    status = subprocess.run([sys.executable, "-m", "infoclip.demo", str(job)], env=environment).returncode
    try:
        data: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InfoclipError(
            f"The process of '{method.name}' (seed {seed}) ended with code {status} and no result; "
            "if it was killed, free some memory and run the demo again."
        ) from error
    if "error" in data:
        kind = getattr(errors, data["error"]["type"], InfoclipError)
        raise kind(data["error"]["message"])
    return {"seed": seed, "method": method.key, **data}


def _worker(job_path: Path) -> None:
    """What the process of one method does: train, measure, evaluate, write the result."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    try:
        result = _train_and_evaluate(job)
    except InfoclipError as error:
        result = {"error": {"type": type(error).__name__, "message": str(error)}}
    path = Path(job["result"])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    temporary.replace(path)


def _train_and_evaluate(job: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch
    from torch import Tensor

    from infoclip.data.folders import FolderDataset
    from infoclip.data.scenes import SCENE_CLASSES, split_classes
    from infoclip.evaluate.run import evaluate_model, segmentor_predictor, zero_shot_predictor

    config = config_from_dict(job["config"])
    out, truth = Path(job["out"]), Path(job["truth"])
    seconds, memory = 0.0, math.nan
    if job["trains"]:
        from infoclip.api import load
        from infoclip.engine.train import train

        trained = train(config, out, progress=job["progress"])
        seconds, memory = trained.seconds, _peak_memory_mib(trained.peak_memory_mib)
        model = load(out, device=config.train.device)
        predictor = segmentor_predictor(model.segmentor, SCENE_CLASSES, config.eval)
    else:
        from infoclip.clip import load_clip

        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        on_gpu = config.train.device != "cpu" and torch.cuda.is_available()
        clip = load_clip(config.clip).to("cuda" if on_gpu else "cpu")
        predictor = zero_shot_predictor(clip, SCENE_CLASSES)
    found: list[NDArray[np.uint8]] = []

    def keep(_: int, __: dict[str, Any], labels: Tensor) -> None:
        found.append(labels.cpu().numpy().astype(np.uint8))

    seen, _ = split_classes(config.data.split)
    result = evaluate_model(
        predictor,
        FolderDataset(truth / "images", truth / "masks", SCENE_CLASSES),
        SCENE_CLASSES,
        seen,
        progress=job["progress"],
        on_prediction=keep,
        settings={"eval_seed": EVAL_SEED},
    )
    np.savez_compressed(job["predictions"], labels=np.stack(found))
    if not job["trains"]:
        used = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else math.nan
        memory = _peak_memory_mib(used)
    return {
        "seen": 100 * result.seen.miou,
        "unseen": 100 * result.unseen.miou,
        "harmonic": 100 * result.harmonic,
        "train_seconds": seconds,
        "peak_memory_mib": memory,
        "evaluation": result.to_dict(),
    }


def _peak_memory_mib(otherwise: float) -> float:
    """Largest resident memory of this process alone; on CUDA what torch's allocator held (``otherwise``).

    Linux's ``ru_maxrss`` of a new process begins with what its parent held, so ``VmHWM`` is read instead.
    """
    import torch

    if not torch.cuda.is_available():
        try:
            for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        except (OSError, ValueError):
            pass
    if math.isnan(otherwise):
        from infoclip.engine.environment import peak_memory_mib

        return peak_memory_mib("cuda" if torch.cuda.is_available() else "cpu")
    return otherwise


# Results


def _summary(
    runs: Sequence[dict[str, Any]], jobs: Sequence[tuple[int, Method, Config]], split: str, seconds: float
) -> dict[str, Any]:
    from infoclip.data.scenes import split_classes
    from infoclip.engine.environment import collect_environment

    seen, unseen = split_classes(split)
    methods: dict[str, Any] = {}
    for method in METHODS:
        own = [run for run in runs if run["method"] == method.key]
        figures = ("seen", "unseen", "harmonic", "train_seconds", "peak_memory_mib")
        config = next(config for _, m, config in jobs if m is method)
        methods[method.key] = {
            "name": method.name,
            "recipe": method.recipe if method.trains else None,
            "mean": {name: _mean([run[name] for run in own]) for name in figures},
            "std": {name: _std([run[name] for run in own]) for name in figures},
            "runs": [{k: v for k, v in run.items() if k != "method"} for run in own],
            "config": config_to_dict(config),
        }
    gains = [
        {"seed": ours["seed"]} | {name: ours[name] - plain[name] for name in ("seen", "unseen", "harmonic")}
        for ours, plain in zip(methods["infoclip"]["runs"], methods["finetune"]["runs"], strict=True)
    ]
    return {
        "format": "infoclip-demo-1",
        "unit": "mIoU in percent: mean IoU over the classes present in the ground truth",
        "split": split,
        "seeds": [run["seed"] for run in methods["infoclip"]["runs"]],
        "seen_classes": seen,
        "unseen_classes": unseen,
        "methods": methods,
        "gain_of_infoclip_over_finetune": gains,
        "seconds": seconds,
        "environment": collect_environment(),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


_COLUMNS = (("seen", "seen mIoU"), ("unseen", "unseen mIoU"), ("harmonic", "harmonic mean"))


def _rows(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Method names and their cells, with the best mIoU figures marked."""
    methods = results["methods"].values()
    several = len(results["seeds"]) > 1
    rows = []
    for method in methods:
        cells = []
        for key, _ in _COLUMNS:
            best = max((m["mean"][key] for m in methods if not math.isnan(m["mean"][key])), default=math.inf)
            cells.append((_figure(method, key, 1, several), method["mean"][key] >= best))
        trained = method["recipe"] is not None
        cells.append((_figure(method, "train_seconds", 0, several) if trained else "-", False))
        cells.append((_figure(method, "peak_memory_mib", 0, False), False))
        rows.append((method["name"], cells))
    return rows


def _figure(method: Mapping[str, Any], key: str, digits: int, several: bool) -> str:
    value = f"{method['mean'][key]:.{digits}f}"
    return f"{value} ± {method['std'][key]:.{digits}f}" if several else value


def _header() -> list[str]:
    return ["method", *(name for _, name in _COLUMNS), "training s", "peak memory MiB"]


def _terminal_table(results: Mapping[str, Any]) -> Any:
    from rich.table import Table

    seeds = results["seeds"]
    unseen = len(results["unseen_classes"])
    table = Table(
        title=f"{len(results['seen_classes'])} seen and {unseen} unseen classes ({results['split']} split), "
        + (f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"),
        title_justify="left",
    )
    for i, name in enumerate(_header()):
        table.add_column(name, justify="left" if i == 0 else "right")
    for name, cells in _rows(results):
        table.add_row(name, *(f"[bold]{value}[/bold]" if best else value for value, best in cells))
    return table


def _verdict(results: Mapping[str, Any]) -> str:
    """One sentence on what was seen, whichever way it went."""
    gains = results["gain_of_infoclip_over_finetune"]
    unseen, seen = _mean([g["unseen"] for g in gains]), _mean([g["seen"] for g in gains])
    better = sum(g["unseen"] > 0 for g in gains)
    count = f" (better in {better} of {len(gains)} seeds)" if len(gains) > 1 else ""
    return (
        f"Against plain fine-tuning, InfoCLIP's objective changes the mIoU on unseen classes by {unseen:+.1f} points"
        f"{count} and on seen classes by {seen:+.1f}."
    )


# The report


def _report(results: dict[str, Any], runs: Sequence[dict[str, Any]], work: Path, truth: Path) -> str:
    from infoclip.report.html import Cell, Page

    page = Page("InfoCLIP on generated scenes")
    page.paragraph(_verdict(results), "lead")
    seeds = results["seeds"]
    page.paragraph(
        f"Four methods, one tiny CLIP. Each learns on {len(results['seen_classes'])} seen classes and is tested on "
        f"{results['methods']['infoclip']['runs'][0]['evaluation']['images']} other scenes with all "
        f"{len(results['seen_classes']) + len(results['unseen_classes'])} classes as candidates "
        f"({results['split']} split, "
        + (f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}")
        + ")."
    )
    page.table(_header(), [[name, *(Cell(*cell) for cell in cells)] for name, cells in _rows(results)])
    page.paragraph(
        "mIoU in percent, over the classes present in the ground truth. Harmonic mean of seen and unseen. Peak memory "
        "is that of the method's own process.",
        "soft",
    )
    _charts(page, results, work, seeds[0])
    _panels(page, results, work / str(seeds[0]), truth)
    _maps(page, results, work / str(seeds[0]), truth)
    _classes(page, results)
    page.heading("How to repeat it")
    page.code(
        f"infoclip demo --split {results['split']} --seeds {','.join(map(str, seeds))}\n"
        f"infoclip predict runs/demo/infoclip PICTURE {_TRY}"
    )
    page.details_code("Settings of InfoCLIP", json.dumps(results["methods"]["infoclip"]["config"], indent=1))
    page.details_code("Environment", json.dumps(results["environment"], indent=1))
    return page.render()


def _charts(page: Any, results: Mapping[str, Any], work: Path, seed: int) -> None:
    from infoclip.engine.log import read_log
    from infoclip.report.curves import SERIES_COLORS, Series, bar_chart, line_chart
    from infoclip.report.html import Markup

    methods = results["methods"]
    keys = [key for key, _ in _COLUMNS]
    bars = [(m["name"], [m["mean"][k] for k in keys], [m["std"][k] for k in keys]) for m in methods.values()]
    cards = [("Quality", Markup(bar_chart(["seen", "unseen", "harmonic mean"], bars, y_label="mIoU, %")),
              "Bars: standard deviation over seeds." if len(results["seeds"]) > 1 else "One seed.")]  # fmt: skip
    color = {method.key: SERIES_COLORS[i] for i, method in enumerate(METHODS)}
    logs = {m.key: read_log(work / str(seed) / m.key / "log.jsonl") for m in METHODS if m.trains}
    task = [
        Series(methods[key]["name"], [line["step"] for line in log],
               [line["losses"].get("segmentation") or math.nan for line in log], color[key])
        for key, log in logs.items()
    ]  # fmt: skip
    cards.append(("Segmentation loss", Markup(line_chart(task, x_label="step", y_label="loss", log_y=True)),
                  f"Seed {seed}, means between logging steps."))  # fmt: skip
    lines = logs["infoclip"]
    names = list(dict.fromkeys(name for line in lines for name in line["losses"] if name != "segmentation"))
    for name in names:
        points = [(line["step"], line["losses"].get(name)) for line in lines]
        kept = [(step, value) for step, value in points if value is not None]
        series = Series(name, [s for s, _ in kept], [v for _, v in kept], color["infoclip"])
        cards.append((f"Alignment term: {name}",
                      Markup(line_chart([series], x_label="step", y_label=name)),
                      "InfoCLIP only; weighted, as it enters the loss."))  # fmt: skip
    page.heading("Curves")
    page.cards(cards)


def _panels(page: Any, results: Mapping[str, Any], folder: Path, truth: Path) -> None:
    import numpy as np

    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.report.html import chip, figure
    from infoclip.report.overlay import overlay

    predictions = {m.key: np.load(folder / f"{m.key}.npz")["labels"] for m in METHODS}
    unseen = set(results["unseen_classes"])
    page.heading("Pictures")
    page.paragraph(
        "The first test scenes that hold both seen and unseen objects. The same class has the same colour everywhere; "
        "below each prediction stands the share of its pixels that are right."
    )
    for index in _examples(truth, unseen, _PANELS):
        image, mask = _sample(truth, index)
        figures = [
            figure(image, "image"),
            figure(overlay(image, mask, SCENE_CLASSES, legend=False, alpha=0.8), "truth"),
        ]
        found = set(np.unique(mask).tolist())
        mistaken: dict[int, float] = {}
        for method in METHODS:
            labels = predictions[method.key][index]
            right = float((labels == mask).mean())
            figures.append(figure(overlay(image, labels, SCENE_CLASSES, legend=False, alpha=0.8), method.name,
                                  f"{100 * right:.0f} % right"))  # fmt: skip
            for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
                if int(label) not in found and count / labels.size > 0.005:
                    mistaken[int(label)] = max(mistaken.get(int(label), 0.0), count / labels.size)
        chips = [chip(SCENE_CLASSES[i], i, "unseen" if SCENE_CLASSES[i] in unseen else "") for i in sorted(found)]
        worst = sorted(mistaken, key=lambda i: -mistaken[i])[:10]
        chips += [chip(SCENE_CLASSES[i], i, "not in the scene") for i in worst]
        page.panel("", figures, chips)


def _maps(page: Any, results: Mapping[str, Any], folder: Path, truth: Path) -> None:
    """Alignment maps of teacher and students for a few classes."""
    import numpy as np

    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.report.html import figure

    maps = _alignment_maps(folder, truth, _examples(truth, set(results["unseen_classes"]), 3))
    page.heading("Alignment maps")
    page.paragraph(
        "How strongly each patch and a class's text are aligned (R of the paper): in the frozen teacher, whose map the "
        "objective hands on, and in the two fine-tuned students, seen through the same alignment module. Each map runs "
        "from its own smallest to its own largest value; three classes of each scene."
    )
    for index, rows in maps:
        image, mask = _sample(truth, index)
        order = np.argsort(-np.bincount(mask.flatten(), minlength=len(SCENE_CLASSES)))
        present = [int(i) for i in order if (mask == i).any()]
        figures = []
        for label in sorted(present, key=lambda i: SCENE_CLASSES[i] not in results["unseen_classes"])[:3]:
            unseen = SCENE_CLASSES[label] in results["unseen_classes"]
            tinted = np.where((mask == label)[..., None], image, (image * 0.35).astype(np.uint8))
            figures.append(figure(tinted, SCENE_CLASSES[label], "unseen class" if unseen else "seen class"))
            for name, values in rows.items():
                figures.append(figure(_heat(values[label]), name))
        page.panel("", figures, columns=1 + len(rows))


def _alignment_maps(
    folder: Path, truth: Path, indices: Sequence[int]
) -> list[tuple[int, dict[str, NDArray[np.float32]]]]:
    """For each scene: name -> R as [T, h, w], of the teacher and of both students."""
    import torch

    from infoclip.api import as_pixels, load
    from infoclip.clip import load_clip
    from infoclip.data.scenes import SCENE_CLASSES
    from infoclip.engine.checkpoint import latest_checkpoint, load_checkpoint
    from infoclip.errors import CheckpointError
    from infoclip.model.inference import preprocess
    from infoclip.objective import AlignmentObjective, Embeddings

    student, plain = load(folder / "infoclip", "cpu"), load(folder / "finetune", "cpu")
    teacher = load_clip(student.config.clip).frozen_copy()
    objective = AlignmentObjective(student.config.align, teacher.embed_dim)
    newest = latest_checkpoint(folder / "infoclip" / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{folder / 'infoclip'} has no checkpoint, which holds the alignment module.")
    objective.load_state_dict(load_checkpoint(newest[1])["objective"])
    objective.eval()
    result = []
    with torch.no_grad():
        texts = [clip.text_features(SCENE_CLASSES).mean(dim=1) for clip in
                 (teacher, student.segmentor.clip, plain.segmentor.clip)]  # fmt: skip
        for index in indices:
            pixels = as_pixels(truth / "images" / f"{index:06d}.png")
            views = []
            for clip, text in zip((teacher, student.segmentor.clip, plain.segmentor.clip), texts, strict=True):
                dense = clip.encode_image(preprocess(pixels, clip)[None]).dense
                grid = (dense.shape[2], dense.shape[3])
                views.append(Embeddings(dense.flatten(2).transpose(1, 2), text))
            of_teacher, of_student = objective.alignment_maps(views[1], views[0])
            of_plain = objective.alignment_maps(views[2], views[0])[1]
            named = {"teacher": of_teacher, "fine-tuned": of_plain, "InfoCLIP": of_student}
            result.append((index, {k: v[0].T.unflatten(1, grid).float().numpy() for k, v in named.items()}))
    return result


def _heat(values: NDArray[np.float32]) -> NDArray[np.uint8]:  # [h, w] -> [h, w, 3]
    import matplotlib as mpl
    import numpy as np

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (mpl.colormaps["magma"](scaled)[..., :3] * 255).round().astype(np.uint8)


def _classes(page: Any, results: Mapping[str, Any]) -> None:
    from infoclip.report.html import Cell

    methods = results["methods"].values()
    tables = [m["runs"][0]["evaluation"]["per_class"] for m in methods]
    rows = []
    for column in zip(*tables, strict=True):
        values = [row["iou"] for row in column]
        known = [v for v in values if v is not None]
        cells = [Cell("-" if v is None else f"{100 * v:.1f}", v is not None and v == max(known)) for v in values]
        rows.append([column[0]["name"], "seen" if column[0]["seen"] else "unseen", *cells])
    header = ["class", "", *(m["name"] for m in methods)]
    page.heading("Class by class")
    page.details(f"IoU in percent of all {len(rows)} classes, seed {results['seeds'][0]}", header, rows)


def _examples(truth: Path, unseen: set[str], count: int) -> list[int]:
    """The first scenes that hold a seen object and an unseen one, each over at least 2 % of the picture."""
    import numpy as np

    from infoclip.data.scenes import OBJECT_CLASSES

    total = len(list((truth / "masks").glob("*.png")))
    found = []
    for index in range(total):
        _, mask = _sample(truth, index)
        shares = np.bincount(mask.flatten(), minlength=len(OBJECT_CLASSES))[: len(OBJECT_CLASSES)] / mask.size
        kinds = {name in unseen for name, share in zip(OBJECT_CLASSES, shares, strict=True) if share >= 0.02}
        if kinds == {True, False}:
            found.append(index)
        if len(found) == count:
            break
    return found or list(range(min(count, total)))


def _sample(truth: Path, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image [H, W, 3] and mask [H, W] of one test scene."""
    import numpy as np
    from PIL import Image

    with (
        Image.open(truth / "images" / f"{index:06d}.png") as image,
        Image.open(truth / "masks" / f"{index:06d}.png") as mask,
    ):
        return np.array(image.convert("RGB")), np.array(mask)


# Files


def _put_in_place(work: Path, out: Path, seeds: Sequence[int]) -> None:
    """Exchange the finished parts for those of an earlier demo; the pages come last."""
    trained = [method.key for method in METHODS if method.trains]
    others = work / "seeds"
    for seed in seeds[1:]:
        (others / str(seed)).mkdir(parents=True)
        for key in trained:
            (work / str(seed) / key).rename(others / str(seed) / key)
    for key in trained:
        _swap(work / str(seeds[0]) / key, out / key, work)
    _swap(others, out / "seeds", work)
    for name in ("report.html", "results.json"):
        (work / name).replace(out / name)


def _swap(new: Path, target: Path, work: Path) -> None:
    """``new`` in the place of ``target``; what was there goes to the work folder, which is removed at the end."""
    old = work / f"old-{target.name}"
    if target.exists():
        target.rename(old)
    try:
        if new.exists():
            new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _remove_leftovers(out: Path) -> None:
    """Work folders of demos that were killed."""
    import psutil

    for folder in out.glob(".work-*"):
        pid = folder.name.rpartition("-")[2]
        if not pid.isdigit() or not psutil.pid_exists(int(pid)) or int(pid) == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(5, round(seconds / 5) * 5)} s"


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
