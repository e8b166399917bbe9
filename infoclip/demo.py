"""The demos: a frozen CLIP, tuned with and without a paper's objective on generated scenes, and held against itself.

InfoCLIP's: four methods on the same pictures, all starting from the ViT CLIP that ships with the package:

- the frozen CLIP alone, zero-shot (:mod:`infoclip.evaluate.zero_shot`);
- the frozen CLIP behind a trained cost-aggregation head;
- CLIP fine-tuned together with the head, without alignment (recipe ``scenes-finetune``);
- the same with InfoCLIP's alignment objective (recipe ``scenes``).

MAFT+'s: three from the shipped CLIP with a ConvNeXt, and the other system beside them, on the same scenes:

- FC-CLIP: mask proposals on the frozen CLIP (recipe ``fcclip-scenes``);
- its CLIP fine-tuned with them, without more (recipe ``fcclip-scenes-finetune``);
- MAFT+ (recipe ``maftplus-scenes``), which also gives panoptic maps, as the two before it;
- InfoCLIP.

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

    from infoclip.api import Model

__all__ = ["EVAL_SEED", "SYSTEMS", "Method", "System", "demo"]

EVAL_SEED = 424_242
"""Seed of the evaluation scenes: one set for every method, seed and split."""

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


@dataclass(frozen=True)
class System:
    """What one demo compares."""

    methods: tuple[Method, ...]
    ours: str
    """Key of the method that is held against plain fine-tuning (``finetune``)."""
    panoptic: bool = False
    """Whether panoptic maps are compared too."""

    def method(self, key: str) -> Method:
        """One of the methods."""
        return next(method for method in self.methods if method.key == key)


_INFOCLIP = Method("infoclip", "InfoCLIP", "scenes", cost=1.15)

_METHODS = (
    Method("zero-shot", "Frozen CLIP, zero-shot", "scenes-finetune", trains=False, cost=0.05),
    Method(
        "frozen", "Frozen CLIP + head", "scenes-finetune", ("clip.tune=frozen", "clip.tune_positions=false"), cost=0.8
    ),
    Method("finetune", "Fine-tuned, no alignment", "scenes-finetune"),
    _INFOCLIP,
)

SYSTEMS = {
    "infoclip": System(_METHODS, "infoclip"),
    "maftplus": System(
        (
            Method("fcclip", "FC-CLIP, frozen", "fcclip-scenes", cost=1.4),
            Method("finetune", "Fine-tuned, naive", "fcclip-scenes-finetune", cost=1.8),
            Method("maftplus", "MAFT+", "maftplus-scenes", cost=2.0),
            _INFOCLIP,
        ),
        "maftplus",
        panoptic=True,
    ),
}
"""The demos by name."""


def demo(
    out: str | Path = "runs/demo",
    *,
    system: str = "infoclip",
    seeds: Sequence[int] = (0,),
    split: str = "attribute",
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Run the comparison and write ``report.html``, ``results.json`` and the trained models.

    The first seed's runs are ``out/frozen``, ``out/finetune`` and ``out/infoclip`` (each with ``model/``) or, of MAFT+,
    ``out/fcclip``, ``out/finetune``, ``out/maftplus`` and ``out/infoclip``, with ``pictures.png`` beside the report;
    those of further seeds are below ``out/seeds``. Everything is made in a hidden folder and put in its place at the
    end: an interrupted call leaves an earlier demo as it was.

    Args:
        out: folder of the demo; an earlier demo in it is replaced.
        system: of :data:`SYSTEMS`.
        seeds: of head, batches and training scenes; several give mean and standard deviation.
        split: ``attribute`` or ``composition``, see :func:`infoclip.data.scenes.split_classes`.
        steps: training steps in place of the recipes'.
        overrides: further ``key=value`` for every recipe.
        progress: print the course and show progress bars; the table is printed in any case.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: an unknown system, no or repeated seeds, an unknown split or setting.
        StorageError: the folder cannot be written.
    """
    from rich.console import Console

    from infoclip.data.scenes import split_classes
    from infoclip.evaluate.run import without_nan
    from infoclip.report.demo_page import demo_page, demo_picture

    if system not in SYSTEMS:
        raise ConfigError(f"The demo's system is '{system}'; expected {' or '.join(SYSTEMS)}.")
    chosen = SYSTEMS[system]
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"The seeds are {seeds}; expected one or more different whole numbers.")
    split_classes(split)
    out = Path(out)
    jobs = [
        (seed, method, _config(method, seed, split, steps, overrides, out))
        for seed in seeds
        for method in chosen.methods
    ]
    work = out / f".work-{os.getpid()}"
    console, started = Console(), time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        work.mkdir()
        truth = _evaluation_scenes(out, jobs[0][2], chosen.panoptic)
        runs = _run_jobs(jobs, truth, work, progress, console)
        results = _summary(system, runs, jobs, split, time.perf_counter() - started)
        (work / "results.json").write_text(json.dumps(without_nan(results), indent=1) + "\n", encoding="utf-8")
        (work / "report.html").write_text(
            demo_page(results, work / str(seeds[0]), truth, _try_it(system, out)), encoding="utf-8"
        )
        if chosen.panoptic:
            demo_picture(results, work / str(seeds[0]), truth).save(work / "pictures.png")
        _put_in_place(chosen, work, out, seeds)
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
    console.print(f"Try it:  {_try_it(system, out)}", soft_wrap=True)
    return results


def _try_it(system: str, out: Path) -> str:
    objects = "red striped circle, blue plain square"
    more = f" --task panoptic --things '{objects}'" if SYSTEMS[system].panoptic else ""
    model = out / SYSTEMS[system].ours
    return f"infoclip predict {model} PICTURE --classes '{objects}, grass, water'{more} --out predictions"


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


def _evaluation_scenes(out: Path, config: Config, panoptic: bool) -> Path:
    from infoclip.data.scenes import write_scenes

    count, size = config.data.eval_images, config.clip.image_size
    folder = out.absolute() / "scenes" / f"eval-{count}x{size}px"
    return write_scenes(folder, count, size, EVAL_SEED, panoptic=panoptic)


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
            measured = done > 0
            left = (total - done) * (spent / done if measured else _SECONDS_A_STEP)
            machine = "this machine" if measured else "two CPU cores"
            console.print(f"[bold]{number}/{len(jobs)}[/bold] {method.name}, seed {seed} "
                          f"[dim](about {_minutes(left)} to go on {machine})[/dim]")  # fmt: skip
        begin = time.perf_counter()
        runs.append(_run_job(seed, method, config, truth, work, progress))
        if method.trains:
            spent += time.perf_counter() - begin
            done += _weight(method, config)
        else:  # it trains nothing and says little about the others
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
        if "panoptic" in model.tasks:
            figures = _evaluate_masks(model, config, job)
            return {**figures, "train_seconds": seconds, "peak_memory_mib": memory}
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


def _evaluate_masks(model: Model, config: Config, job: Mapping[str, Any]) -> dict[str, Any]:
    """mIoU and PQ of a model of mask proposals; its maps go beside the labels."""
    import numpy as np

    from infoclip.data.panoptic import open_panoptic
    from infoclip.data.scenes import SCENE_CLASSES, split_classes
    from infoclip.evaluate.panoptic_run import PanopticMap, evaluate_panoptic, model_predictor

    dataset = open_panoptic(job["truth"], classes=SCENE_CLASSES)
    found: list[PanopticMap] = []

    def keep(_: int, __: dict[str, Any], result: PanopticMap) -> None:
        found.append(result)

    seen, _ = split_classes(config.data.split)
    result = evaluate_panoptic(
        model_predictor(model, dataset), dataset, seen, progress=job["progress"], on_prediction=keep,
        settings={"eval_seed": EVAL_SEED},
    )  # fmt: skip
    labels = [one.semantic.cpu().numpy().astype(np.uint8) for one in found if one.semantic is not None]
    ids = [one.ids.cpu().numpy().astype(np.uint8) for one in found]
    segments = [[(s.id, s.category) for s in one.segments] for one in found]
    np.savez_compressed(
        job["predictions"], labels=np.stack(labels), ids=np.stack(ids), segments=np.array(json.dumps(segments))
    )
    return {
        "seen": 100 * result.semantic_seen.miou,
        "unseen": 100 * result.semantic_unseen.miou,
        "harmonic": 100 * result.semantic_harmonic,
        "pq_seen": 100 * result.seen.pq,
        "pq_unseen": 100 * result.unseen.pq,
        "pq_harmonic": 100 * result.harmonic,
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
    system: str,
    runs: Sequence[dict[str, Any]],
    jobs: Sequence[tuple[int, Method, Config]],
    split: str,
    seconds: float,
) -> dict[str, Any]:
    from infoclip.data.scenes import split_classes
    from infoclip.engine.environment import collect_environment

    seen, unseen = split_classes(split)
    chosen = SYSTEMS[system]
    methods: dict[str, Any] = {}
    for method in chosen.methods:
        own = [run for run in runs if run["method"] == method.key]
        figures = [*QUALITY["semantic"], *QUALITY["panoptic" if chosen.panoptic else "none"], "train_seconds",
                   "peak_memory_mib"]  # fmt: skip
        config = next(config for _, m, config in jobs if m is method)
        methods[method.key] = {
            "name": method.name,
            "recipe": method.recipe if method.trains else None,
            "mean": {name: _mean([run.get(name, math.nan) for run in own]) for name in figures},
            "std": {name: _std([run.get(name, math.nan) for run in own]) for name in figures},
            "runs": [{k: v for k, v in run.items() if k != "method"} for run in own],
            "config": config_to_dict(config),
        }
    gains = [
        {"seed": ours["seed"]} | {name: ours[name] - plain[name] for name in figures if name in ours and name in plain}
        for ours, plain in zip(methods[chosen.ours]["runs"], methods["finetune"]["runs"], strict=True)
    ]
    return {
        "format": "infoclip-demo-2",
        "system": system,
        "unit": "percent; mIoU: mean IoU over the classes present in the ground truth; pq: panoptic quality",
        "split": split,
        "seeds": [run["seed"] for run in methods[chosen.ours]["runs"]],
        "seen_classes": seen,
        "unseen_classes": unseen,
        "methods": methods,
        "gain_over_finetune": gains,
        "seconds": seconds,
        "environment": collect_environment(),
    }


QUALITY = {
    "semantic": ("seen", "unseen", "harmonic"),
    "panoptic": ("pq_seen", "pq_unseen", "pq_harmonic"),
    "none": (),
}
"""Names of the figures of quality, by task."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def _terminal_table(results: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    from infoclip.report.demo_page import measures, table_header, table_rows

    seeds = results["seeds"]
    unseen = len(results["unseen_classes"])
    table = Table(
        title=f"{measures(results)} on {len(results['seen_classes'])} seen and {unseen} unseen classes "
        f"({results['split']} split), "
        + (f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    # With PQ, 80 columns have no room for time and memory, which are in the report.
    shown = 7 if "PQ" in measures(results) else None
    for i, name in enumerate(table_header(results)[:shown]):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for name, cells in table_rows(results):
        marked = [f"[bold]{value}[/bold]" if best else value for value, best in cells]
        table.add_row(name, *marked[: None if shown is None else shown - 1])
    return table


# Files


def _put_in_place(system: System, work: Path, out: Path, seeds: Sequence[int]) -> None:
    """Exchange the finished parts for those of an earlier demo; the pages come last."""
    trained = [method.key for method in system.methods if method.trains]
    others = work / "seeds"
    for seed in seeds[1:]:
        (others / str(seed)).mkdir(parents=True)
        for key in trained:
            (work / str(seed) / key).rename(others / str(seed) / key)
    for key in trained:
        _swap(work / str(seeds[0]) / key, out / key, work)
    _swap(others, out / "seeds", work)
    for name in (*(["pictures.png"] if system.panoptic else []), "report.html", "results.json"):
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
