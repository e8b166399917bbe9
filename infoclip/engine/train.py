"""Training: the segmentor's loss and the alignment terms, logs, checkpoints, and an exact resume.

Everything random in a step (samples, augmentation, class choice) is drawn from the seed and the step's number, and a
checkpoint holds the rest (weights, optimiser moments, loader position, generators, the unfinished logging window).
On the CPU a run that is killed and resumed therefore ends with the same bits as one that was not.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from infoclip.budget import format_bytes, hand_back
from infoclip.config import Config, config_to_dict, load_config
from infoclip.data.classes import load_classes, load_label_map
from infoclip.data.folders import FolderDataset, PairDataset
from infoclip.data.loader import ResumableLoader
from infoclip.data.panoptic import open_panoptic
from infoclip.data.transforms import derive_seed, training_transform
from infoclip.engine import checkpoint as ckpt
from infoclip.engine.distributed import Ranks, SharedShortageError, WholeBatch
from infoclip.engine.environment import collect_environment, peak_memory_mib
from infoclip.engine.log import ProgressLine, RunLog
from infoclip.engine.optim import allocate_moments, build_optimizer, clip_gradients, lr_factor, set_learning_rate
from infoclip.engine.planner import PROMPTS, Plan, Settings, budget_of, couples, lower, make_plan
from infoclip.errors import (
    CheckpointError,
    ConfigError,
    InfoclipError,
    InfoclipWarning,
    NonFiniteLossError,
    OutOfMemoryError,
)
from infoclip.workers import joined, run_in_processes

if TYPE_CHECKING:
    from infoclip.clip import DenseCLIP

__all__ = ["FREE_KEYS", "Run", "TrainResult", "build_run", "choose_classes", "fingerprint", "panel", "train",
           "training_data"]  # fmt: skip

FREE_KEYS = frozenset(
    {
        "name",
        "data.root",
        "data.workers",
        "model.class_chunk",
        "model.memory",
        "train.device",
        "train.threads",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.log_every",
        "train.image_every",
    }
)
"""Settings that may differ when a run is resumed: where and how it runs, not what it computes."""


@dataclass
class TrainResult:
    """What :func:`train` leaves."""

    out: Path
    model_dir: Path
    steps: int
    seconds: float
    """Spent in training steps by this call, without set-up; 0 when the run was already finished."""
    images_per_second: float
    losses: dict[str, float]
    """The last logged losses: ``loss`` and its terms by name."""
    peak_memory_mib: float


def train(
    config: Config, out: str | Path, resume: bool = False, progress: bool = True, processes: int = 1
) -> TrainResult:
    """Train a segmentor and leave the run in ``out``.

    ``out`` then holds ``config.json``, ``environment.json``, ``log.jsonl``, ``tensorboard/``,
    ``checkpoints/step_000100/`` and, at the end, ``model/``. The caller's generators, threads and determinism settings
    are put back afterwards.

    A non-finite loss or gradient stops the run. On the CPU every step is checked before its update. On CUDA a flag is
    kept on the device and read on logging steps and before every checkpoint, so that no step waits for it and no
    checkpoint is ever made after the fault.

    Several processes share each batch (:mod:`infoclip.engine.distributed`); ``out`` and the data have the same paths in
    all of them. What they reach differs from what one does by rounding alone, and a run can go on with another number.

    Args:
        config: everything that decides the result (``infoclip.recipes``).
        out: the run's folder.
        resume: continue from the newest complete checkpoint; without one, or in a new folder, start.
        progress: show a progress bar on stderr.
        processes: so many are started here, each on a GPU of its own where there are GPUs; within ``torchrun`` its
            processes train together.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is off, the run had other settings, or there are more processes
            than images in a batch.
        DataError: the data are missing or faulty.
        CheckpointError: CLIP's weights or the checkpoint do not fit.
        NonFiniteLossError: with the step, the files of its batch and the last good checkpoint.
        StorageError: the disk is full or not writable; earlier checkpoints stay whole.
        LostProcessError: another process of the run was killed.
    """
    out = Path(out)
    if processes > 1:
        return run_in_processes(processes, train, config.validate(), out, resume, progress, heard=True)
    with joined() as workers:
        ranks = Ranks(workers, config.data.batch_size)
        with ranks.together():
            config.validate()
            ranks.by_first(lambda: _check_folder(config, out, resume))
            device = _device(workers.device(config.train.device))
            with _process_settings(config, device):
                ranks.compute_on(device)
                run = build_run(config, out, device, ranks)
                try:
                    return run.go(progress)
                finally:
                    run.close()


def build_run(config: Config, out: Path, device: torch.device, ranks: Ranks | None = None) -> Run:
    """The run of a config's system, with its data read and its model built; errors as :func:`train`'s."""
    if config.system == "catseg":
        return Run(config, out, device, ranks)
    from infoclip.engine.mask_run import MaskRun

    return MaskRun(config, out, device, ranks)


def training_data(config: Config, out: Path) -> PairDataset:
    """The training images and masks that ``config.data`` describes; scenes are written first when they are missing.

    Raises:
        DataError: folders, class list or label map are missing or faulty.
        ConfigError: ``data.root`` is empty for folders.
    """
    data = config.data
    chosen = load_classes(data.train_classes) if data.train_classes else None
    if data.kind == "scenes":
        from infoclip.data.scenes import SCENE_CLASSES, split_classes

        root = scenes_folder(config, out)
        if chosen is None:
            chosen = list(split_classes(data.split)[0])
        if config.system != "catseg":
            return open_panoptic(root, classes=SCENE_CLASSES, train_classes=chosen)
        return FolderDataset(root / "images", root / "masks", SCENE_CLASSES, data.ignore_index, train_classes=chosen)
    if not data.root:
        raise ConfigError("data.root is empty; pass data.root=FOLDER, the folder that holds the images and the masks.")
    root = Path(data.root)
    if data.kind == "benchmark":
        from infoclip.data.benchmarks import open_benchmark

        return open_benchmark(data.benchmark, root, chosen)
    if data.kind == "panoptic":
        names = load_classes(data.classes) if data.classes else None
        return open_panoptic(
            root, data.benchmark, images=data.images, pngs=data.masks, annotations=data.annotations,
            classes=names, train_classes=chosen,
        )  # fmt: skip
    label_map = load_label_map(data.label_map) if data.label_map else None
    classes = load_classes(data.classes)
    return FolderDataset(root / data.images, root / data.masks, classes, data.ignore_index, label_map, chosen)


def scenes_folder(config: Config, out: Path) -> Path:
    """Folder of the generated training scenes, written when missing: below ``data.root``, or below ``out``."""
    from infoclip.data.scenes import split_classes, write_scenes

    data = config.data
    root = Path(data.root) if data.root else out / "scenes"
    folder = root / f"train-{data.split}"
    seen, _ = split_classes(data.split)
    with ckpt.storage_errors(f"the scenes {folder}"):
        write_scenes(folder, data.train_images, config.clip.image_size, data.scenes_seed, classes=seen,
                     panoptic=config.system != "catseg")  # fmt: skip
    return folder


def choose_classes(present: Tensor, total: int, limit: int, seed: int, step: int) -> Tensor:  # [K] -> [T']
    """Sorted indices of the classes of one step: all that are present, and random others up to ``limit``."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "classes", step))
    order = torch.randperm(total, generator=generator)
    others = order[~torch.isin(order, present)]
    return torch.cat([present, others[: max(0, limit - len(present))]]).sort().values


class Run:
    """One run: its parts, the loop, and what a checkpoint holds."""

    def __init__(self, config: Config, out: Path, device: torch.device, ranks: Ranks | None = None) -> None:
        from infoclip.clip.templates import resolve_templates

        self.config, self.out, self.device = config, out, device
        self.ranks = ranks or Ranks(batch=config.data.batch_size)
        self.before = int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0
        self.peak_before = self._peak() if device.type == "cpu" else 0
        self.checkpoints = out / "checkpoints"
        self.step = 0
        self.log: RunLog | None = None
        self.loader: ResumableLoader | None = None

        torch.manual_seed(config.train.seed)
        self.dataset = self.ranks.in_turn(lambda: training_data(config, out))
        self.classes = self.dataset.classes
        self.ignore_index = self.dataset.ignore_index
        self.templates = resolve_templates(config.clip.templates)
        self.objective: torch.nn.Module | None = None
        self.teacher_hash = ""
        try:
            self._build()
        except InfoclipError:
            raise
        except ValueError as error:
            raise ConfigError(f"These model settings do not go together: {error}.") from error
        try:
            self.optimizer = build_optimizer(self.segmentor, self.objective, config.optim)
        except ValueError as error:
            raise ConfigError(f"There is nothing to train ({error}); set clip.tune=attention or full.") from error
        augment = training_transform(dataclasses.replace(config.data, ignore_index=self.ignore_index))
        self.loader = ResumableLoader(
            self.dataset, config.data.batch_size, config.train.seed, config.data.workers,
            augment, self.ignore_index, pin_memory=device.type == "cuda", objects=config.system != "catseg",
            part=self.ranks.part,
        )  # fmt: skip

        self.coupled = couples(config)
        self.settings = Settings("fast", config.model.class_chunk, self.ranks.most)
        self.plan: Plan | None = None
        self.budget = budget_of(config.model.memory, device)
        if self.budget is not None:
            shared = config.model.memory == "auto" and device.type == "cpu"  # the free memory of one machine
            self.budget = min(self.ranks.gather(self.budget // self.ranks.here if shared else self.budget))
            hand_back(device)

        # since the last logging step: sums on the device, and how many steps gave each
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.losses: dict[str, float] = {}
        self.norms: dict[str, Tensor] = {}
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.recent: list[tuple[int, list[str]]] = []  # batches since the last check

    def _build(self) -> None:
        """The model, and what its loss is made of beside it."""
        from infoclip.clip import TextBank, text_cache_dir
        from infoclip.model import build_segmentor

        config, device = self.config, self.device
        self.segmentor: Any = build_segmentor(config).to(device).train()
        clip: DenseCLIP = self.segmentor.clip
        self.ranks.same_weights(self.segmentor)
        clip.prompt_tokens(self.classes, self.templates)  # a name that does not fit fails here, not at its first draw
        self.bank = TextBank(clip, self.templates, text_cache_dir())
        self.teacher: Any = None
        if config.align.method != "none":
            from infoclip.objective import AlignmentObjective

            self.teacher = clip.frozen_copy()
            self.teacher_hash = fingerprint(self.teacher)
            self.objective = AlignmentObjective(config.align, clip.embed_dim).to(device).train()
            self.ranks.same_weights(self.objective)
            self.teacher_text = TextBank(self.teacher, self.templates, text_cache_dir())(self.classes)  # [T, P, d]

    # The loop

    def go(self, progress: bool) -> TrainResult:
        config, total = self.config, self.config.train.steps
        model_dir = self.out / "model"
        progress = progress and self.ranks.first
        self._restore_or_plan()
        if self.step < total:
            self._allocate()
        self.ranks.by_first(self._write_heads)
        assert self.loader is not None
        if self.plan is not None and progress and self.step < total:
            from rich.console import Console

            Console(stderr=True).print(self.plan.table())
        if self.step < total:
            self.loader.start()  # workers fork before TensorBoard and the progress bar start their threads
        if self.ranks.first:
            self.log = RunLog(self.out, self.step)
        if self.plan is not None and self.log is not None:
            self.log.event(self.step, "memory plan", self.plan.to_dict())
        images = config.data.batch_size * config.train.grad_accumulation
        start_step, begin = self.step, time.perf_counter()
        self.window_begin, self.window_step, self.data_wait = begin, self.step, 0.0
        with ProgressLine(config.name, self.step, total, progress) as bar:
            while self.step < total:
                picture = self._train_step()
                if self.step == start_step and self.plan is not None:
                    self._measured()
                self.step += 1
                last = self.step == total
                bar.advance()
                save = last or self.step % config.train.checkpoint_every == 0
                if last or self.step % config.train.log_every == 0:
                    rate, waited = self._log(images, begin)
                    bar.note(self.losses["loss"], rate, waited)
                if picture is not None and self.log is not None:
                    self.log.image("train/image-truth-prediction", picture(), self.step)
                if save:
                    self._save()
        seconds = time.perf_counter() - begin if self.step > start_step else 0.0

        def leave_model() -> None:
            from infoclip.model.checkpoint import save_model

            if start_step < total or not (model_dir / "config.json").exists():
                with ckpt.storage_errors(f"the model {model_dir}"):
                    save_model(self.segmentor, config, self.classes, model_dir, {"steps": self.step})

        self.ranks.by_first(leave_model)
        rate = (self.step - start_step) * images / seconds if seconds else 0.0
        peak = max(self.ranks.gather(peak_memory_mib(self.device.type)))
        return TrainResult(self.out, model_dir, self.step, seconds, rate, self.losses, peak)

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        if self.log is not None:
            self.log.close()

    def _train_step(self) -> Any:
        """One optimiser step; returns a function that draws the batch when a picture is due, else None."""
        config, parts = self.config, self.config.train.grad_accumulation
        assert self.loader is not None
        waiting = time.perf_counter()
        batches = [next(self.loader) for _ in range(parts)]
        self.data_wait += time.perf_counter() - waiting
        self.recent.append((self.step, [name for batch in batches for name in batch["files"]]))

        set_learning_rate(
            self.optimizer, lr_factor(self.step, config.train.steps, config.optim.schedule, config.optim.warmup_steps)
        )
        wanted = {
            "sizes": not config.data.crop,
            "labelled": config.train.ignored == "masked",
            "present": 0 < config.data.sample_classes < len(self.classes),
            "objects": config.system != "catseg",
        }
        wholes, present = self.ranks.complete(batches, self.ignore_index, wanted)
        chosen = self._choose(present)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            shortage = None
            try:
                totals, picture = self._gradients(batches, wholes, chosen)
                totals = self.ranks.add_up(parameters, totals)
                break
            except SharedShortageError as error:
                shortage = str(error)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_shortage(error):
                    raise
                shortage = str(error).splitlines()[0]
                try:
                    self.ranks.agree(shortage)
                except SharedShortageError as told:
                    shortage = str(told)
            # Outside the handler, whose traceback holds what the step had computed.
            self._step_down(shortage, len(self.classes) if chosen is None else len(chosen))

        kinds = (self.step + 1) % config.train.log_every == 0 or self.step + 1 == config.train.steps
        by_kind = clip_gradients(self.optimizer.param_groups, 0.0, "group") if kinds else {}
        norms = clip_gradients(self.optimizer.param_groups, config.optim.clip_grad_norm, config.optim.clip_grad)
        self.norms = {**by_kind, **norms}
        self._watch(totals["loss"], norms)
        self._update()
        for name, value in totals.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        due = config.train.image_every > 0 and (self.step + 1) % config.train.image_every == 0
        return picture if due else None

    def _gradients(
        self, batches: list[dict[str, Any]], wholes: list[WholeBatch], chosen: Tensor | None
    ) -> tuple[dict[str, Tensor], Any]:
        """Forward and backward passes of a step: the losses by name, and a function that draws the first pictures.

        Losses and gradients are this process's share of the step's.

        Nothing but the parameters' gradients changes, and nothing random is drawn: it can be repeated.
        """
        names = self.classes if chosen is None else [self.classes[i] for i in chosen.tolist()]
        clip = self.segmentor.clip
        recompute = self.settings.mode in ("balanced", "lean") and not clip.text_frozen
        own = slice(None) if clip.text_frozen else self.ranks.workers.part(len(names))
        with self._autocast(), torch.set_grad_enabled(not recompute):
            text = self._text(names[own], chosen) if names[own] else None  # [T, P, d]
        # A step's micro-batches share one pass through the text tower: gradients meet at this leaf.
        if self.ranks.count == 1 or clip.text_frozen:
            assert text is not None
            leaf = text.detach()
        else:
            shape = (len(names), len(self.templates), clip.embed_dim)
            leaf = self.ranks.joined_rows(None if text is None else text.detach(), own, shape, self.device)
        leaf.requires_grad_(not clip.text_frozen)
        totals: dict[str, Tensor] = {}
        picture = None
        for batch, whole in zip(batches, wholes, strict=True):
            for part, images, pixels in self._divided(batch, whole.labelled):
                terms, draw = self._forward(part, leaf, chosen)
                weighted = {name: value * (images / len(batches)) for name, value in terms.items()}
                weighted["segmentation"] = terms["segmentation"] * (pixels / len(batches))
                weighted["loss"] = weighted["segmentation"] + weighted.pop("alignment", 0.0)
                weighted["loss"].backward()
                for name, value in weighted.items():
                    totals[name] = totals.get(name, 0.0) + value.detach()
                picture = picture or draw
                del terms, weighted
        if leaf.grad is not None:
            gradient = self.ranks.total(leaf.grad)[own]
            if text is not None and recompute:
                with self._autocast():
                    clip.text_backward(names[own], gradient, self.templates, PROMPTS)
            elif text is not None:
                text.backward(gradient)
        return totals, picture

    def _divided(self, batch: dict[str, Any], labelled: int) -> list[tuple[dict[str, Any], float, float]]:
        """This process's micro-batches of a batch with so many labelled pixels.

        Returns:
            Each with its share of the whole batch's images, and of what the segmentation loss averages.
        """
        size = self.settings.micro_batch
        divided = []
        for start in range(0, len(batch["image"]), size):
            part = {key: value[start : start + size] for key, value in batch.items()}
            images = pixels = len(part["image"]) / self.ranks.batch
            if self.config.train.ignored == "masked":
                pixels = int((part["mask"] != self.ignore_index).sum()) / max(1, labelled)
            divided.append((part, images, pixels))
        return divided

    def _allocate(self) -> None:
        """The optimiser's moments, before the first step rather than in its middle."""
        learnt = sum(p.numel() * p.element_size() for group in self.optimizer.param_groups for p in group["params"])
        try:
            allocate_moments(self.optimizer)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_shortage(error):
                raise
            raise OutOfMemoryError(
                f"Out of memory for the optimiser's moments ({format_bytes(2 * learnt)}), which no leaner setting "
                f"makes smaller; free memory on {self.device}, or train less of the model (clip.tune)."
            ) from error

    def _update(self) -> None:
        """The optimiser's step. It allocates nothing that lasts; where even so memory runs out, some groups of
        parameters may be new and others not, so that the step cannot be repeated."""
        try:
            self.optimizer.step()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_shortage(error):
                raise
            found = ckpt.latest_checkpoint(self.checkpoints)
            kept = f"continue from {found[1]} with --resume" if found else "start again: there is no checkpoint yet"
            raise OutOfMemoryError(
                f"Out of memory while the optimiser changed the weights at step {self.step + 1}, which is not kept; "
                f"free memory on {self.device} or choose a lower model.memory, and {kept}."
            ) from error

    def _step_down(self, shortage: str, classes: int) -> None:
        """After running out of memory: the next lower settings, with a warning and a line in the log."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        below = lower(self.settings, classes, self.coupled, self.device)
        if below is None:
            raise OutOfMemoryError(
                f"Out of memory at step {self.step + 1} with the leanest settings ({self.settings}); free memory on "
                f"{self.device}, or lower {self._smaller} ({shortage.rstrip('.')})."
            )
        text = f"out of memory at step {self.step + 1} with {self.settings}: repeated with {below}"
        if self.ranks.first:
            warnings.warn(text, InfoclipWarning, stacklevel=2)
        self._use(below)
        if self.log is not None:
            self.log.event(self.step + 1, text, {"settings": dataclasses.asdict(below), "shortage": shortage})

    @property
    def _smaller(self) -> str:
        """Settings that take less memory where lowered."""
        coupled = self.coupled and self.config.data.batch_size > 1
        return "data.sample_classes, data.batch_size" + ("" if coupled else " or clip.image_size")

    def _use(self, settings: Settings) -> None:
        self.settings = settings
        self.segmentor.use_memory(settings.mode, settings.chunk)

    def _restore_or_plan(self) -> None:
        """Settings of the checkpoint where the same memory was asked for, so that a resumed run has the same bits."""
        config = self.config
        earlier = self._restore()
        asked = [config.model.memory, config.model.class_chunk]
        if earlier.get("asked") == asked and earlier.get("processes", 1) == self.ranks.count:
            self._use(Settings(**earlier["settings"]))
        elif self.budget is None:
            self._use(Settings(config.model.memory, config.model.class_chunk, self.ranks.most))
        else:
            self.plan = self._make_plan(self.budget)
            self._use(self.plan.settings)

    @property
    def _share(self) -> Config:
        """The settings with the images of the process that takes the most, which decides for all. (Of the prompts it
        takes a part as well: what a plan counts for them is more than it needs.)"""
        return dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, batch_size=self.ranks.most))

    def _make_plan(self, budget: int) -> Plan:
        config, clip = self.config, self.segmentor.clip
        limit = config.data.sample_classes
        classes = min(limit, len(self.classes)) if limit > 0 else len(self.classes)
        length = clip.prompt_length(self.classes, self.templates)
        return make_plan(
            budget, self._share, self.segmentor, self.teacher, self.objective, classes, length, self.device
        )

    def _measured(self) -> None:
        """The first real step against the plan: what it took is logged, and settings that took too much are lowered."""
        assert self.plan is not None
        # -1: the process had held as much before, and nothing can be told
        peak = max(self.ranks.gather(max(0, self._peak() - self.before) if self._peak() > self.peak_before else -1))
        if peak < 0:
            return
        values = {"measured": peak, "counted": self.plan.footprint.total, "budget": self.plan.budget}
        if self.log is not None:
            self.log.event(self.step + 1, f"the first step took {format_bytes(peak)}", values)
        if peak > self.plan.budget:
            below = lower(self.settings, self.plan.classes, self.coupled, self.device)
            more = f"goes on with {below}" if below else "there are no leaner settings"
            text = f"the first step took {format_bytes(peak)} of {format_bytes(self.plan.budget)}; {more}"
            if self.log is not None:
                warnings.warn(text, InfoclipWarning, stacklevel=2)
                self.log.event(self.step + 1, text, {})
            if below:
                self._use(below)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return int(peak_memory_mib("cpu") * 2**20)

    def _teacher_features(self, image: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, d, h, w]
        """The frozen teacher's dense features in the compute dtype, made under inference mode."""
        with torch.inference_mode(), self._autocast():
            dense = self.teacher.encode_image(image).dense
        return dense.clone()  # a tensor made under inference mode cannot be kept for a backward pass

    def _forward(self, batch: dict[str, Any], text: Tensor, chosen: Tensor | None) -> tuple[dict[str, Tensor], Any]:
        """The losses of a batch by name (``loss`` is their sum), and a function that draws it."""
        from infoclip.kernels.upsample_bce import upsample_bce
        from infoclip.model.inference import best_class, preprocess

        config, ignore = self.config, self.ignore_index
        mask = batch["mask"]
        if chosen is not None:
            table = torch.full((max(ignore, len(self.classes)) + 1,), ignore)
            table[chosen] = torch.arange(len(chosen))
            mask = table[mask]
        mask = mask.to(self.device, non_blocking=True)
        image = preprocess(batch["image"].to(self.device, non_blocking=True), self.segmentor.clip)
        with self._autocast():
            output = self.segmentor(image, text)
        task = upsample_bce(output.logits, mask, ignore_index=ignore, ignored=config.train.ignored)
        terms = {"loss": task, "segmentation": task}
        if self.teacher is not None and self.objective is not None and self.step >= config.align.start_step:
            from infoclip.objective import Embeddings

            dense = self._teacher_features(image)
            teacher_text = self.teacher_text if chosen is None else self.teacher_text[chosen.to(self.device)]
            pixels = [_pixels(output.dense), _pixels(dense)]
            if self.coupled:
                pixels = [self.ranks.whole_batch(x) for x in pixels]
            result = self.objective(
                student=Embeddings(pixels[0], text.mean(dim=1).float()),
                teacher=Embeddings(pixels[1], teacher_text.mean(dim=1)),
                step=self.step,
            )
            terms = {"loss": task + result.loss, "segmentation": task, **result.terms}
            terms["alignment"] = result.loss
        first = output.logits[:4].detach()

        def draw() -> Any:
            guess = torch.stack([best_class(x.float(), batch["mask"].shape[-2:]) for x in first]).cpu()
            # indices of the whole list, so that a class keeps its colour from step to step
            return panel(batch["image"], batch["mask"], guess if chosen is None else chosen[guess], self.classes)

        return terms, draw

    def _choose(self, present: Tensor | None) -> Tensor | None:
        if present is None:
            return None
        limit, total = self.config.data.sample_classes, len(self.classes)
        return choose_classes(present[present < total], total, limit, self.config.train.seed, self.step)

    def _text(self, names: list[str], chosen: Tensor | None) -> Tensor:  # -> [T, P, d]
        if self.segmentor.clip.text_frozen:
            everything = self.bank(self.classes)
            return everything if chosen is None else everything[chosen.to(everything.device)]
        return self.bank(names)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.train.precision == "bf16")

    # Faults

    def _watch(self, loss: Tensor, norms: dict[str, Tensor]) -> None:
        """Note a non-finite loss or gradient; on the CPU, stop before it reaches the parameters."""
        bad = ~torch.isfinite(loss + sum(norms.values()))
        if self.device.type == "cpu":
            if bool(bad):
                self._stop(self.step, float(loss))
            self.recent.clear()
        else:
            self.first_bad = torch.where((self.first_bad < 0) & bad, self.step, self.first_bad)

    def _check(self) -> None:
        """Read the device's flag."""
        if self.device.type != "cpu":
            step = int(self.first_bad)
            if step >= 0:
                self._stop(step, None)
            self.recent.clear()

    def _stop(self, step: int, loss: float | None) -> None:
        mine = next((files for number, files in self.recent if number == step), [])
        files = [name for names in self.ranks.gather(mine) for name in names]
        found = ckpt.latest_checkpoint(self.checkpoints)
        good = f"the last good checkpoint is {found[1]}" if found else "there is no checkpoint yet"
        what = "The loss or its gradient is not finite"
        if loss is not None:
            what = f"The loss is {loss}" if not math.isfinite(loss) else "The gradient is not finite"
        raise NonFiniteLossError(
            f"{what} at step {step + 1}, batch {', '.join(files)}; {good}. "
            "Check these files, or start again with a lower optim.lr or train.precision=fp32."
        )

    # Logs and checkpoints

    def _log(self, images: int, begin: float) -> tuple[float, float]:
        """Write the means since the last line; returns images a second, and the share of the time waited for data."""
        self._check()
        peak = max(self.ranks.gather(peak_memory_mib(self.device.type)))
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        norms = {name: float(value) for name, value in self.norms.items()}
        now = time.perf_counter()
        steps = max(1, self.step - self.window_step)
        passed = max(now - self.window_begin, 1e-9)
        rate, waited = steps * images / passed, min(1.0, self.data_wait / passed)
        self.losses = means
        rest = dict(means)
        values = {
            "step": self.step,
            "loss": rest.pop("loss"),
            "losses": rest,
            "lr": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            "grad_norm": norms,
            "images_per_second": rate,
            "data_wait_seconds": self.data_wait / steps,
            "peak_memory_mib": peak,
            "seconds": now - begin,
        }
        if self.log is not None:
            self.log.write(values)
        self.sums, self.counts = {}, {}
        self.window_begin, self.window_step, self.data_wait = now, self.step, 0.0
        return rate, waited

    def _save(self) -> None:
        self._check()
        self.ranks.by_first(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        assert self.loader is not None
        state: dict[str, Any] = {
            "step": self.step,
            "teacher": self.teacher_hash,
            "segmentor": self.segmentor.state_dict(),
            "objective": self.objective.state_dict() if self.objective is not None else {},
            "optimizer": {str(k): v for k, v in self.optimizer.state_dict()["state"].items()},
            "loader": self.loader.state_dict(),
            "window": {"sums": self.sums, "counts": self.counts, "losses": self.losses},
            "rng": ckpt.get_rng_state(),
            "memory": {
                "asked": [self.config.model.memory, self.config.model.class_chunk],
                "settings": dataclasses.asdict(self.settings),
                "processes": self.ranks.count,
            },
        }
        ckpt.save_checkpoint(self.checkpoints, self.step, state)
        ckpt.prune_checkpoints(self.checkpoints, self.config.train.keep_checkpoints)

    def _restore(self) -> dict[str, Any]:
        """Continue from the newest checkpoint, if there is one; returns what it says of memory."""
        self.ranks.by_first(lambda: ckpt.remove_unfinished(self.out))
        found = self.ranks.broadcast(ckpt.latest_checkpoint(self.checkpoints))
        if found is None:
            return {}
        _, path = found
        state = ckpt.load_checkpoint(path)
        if state["teacher"] != self.teacher_hash:
            raise CheckpointError(
                f"The CLIP weights '{self.config.clip.pretrained}' are not those that {self.out} started from; "
                "put the earlier weights back, or start a new run."
            )
        try:
            self.segmentor.load_state_dict(state["segmentor"])
            if self.objective is not None:
                self.objective.load_state_dict(state["objective"])
            groups = self.optimizer.state_dict()["param_groups"]
            moments = {int(k): v for k, v in state["optimizer"].items()}
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"The checkpoint {path} is of another architecture: {reason}") from error
        assert self.loader is not None
        self.loader.load_state_dict(state["loader"])
        window = state["window"]
        self.sums = {name: value.to(self.device) for name, value in window["sums"].items()}
        self.counts, self.losses = window["counts"], window["losses"]
        ckpt.set_rng_state(state["rng"])
        self.step = state["step"]
        return state.get("memory", {})

    def _write_heads(self) -> None:
        """``config.json`` and ``environment.json``, once everything that a user can get wrong has been read."""
        with ckpt.storage_errors(str(self.out)):
            self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "environment.json"
        environment = collect_environment()
        if path.exists():
            try:
                earlier = json.loads(path.read_text(encoding="utf-8"))
                environment["earlier"] = [*earlier.pop("earlier", []), earlier]
            except (OSError, ValueError, AttributeError):
                pass  # only a record; the run does not depend on it
        ckpt.atomic_write_text(path, json.dumps(environment, indent=2) + "\n")
        text = json.dumps(config_to_dict(self.config), indent=2) + "\n"
        ckpt.atomic_write_text(self.out / "config.json", text)


def _check_folder(config: Config, out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the run.")
    traces = [name for name in ("config.json", "log.jsonl", "checkpoints", "model") if (out / name).exists()]
    if not traces:
        return
    if not resume:
        raise ConfigError(f"{out} already holds a run; pass --resume to continue it, or choose another --out.")
    before, now = dict(_flat(config_to_dict(load_config(out / "config.json")))), dict(_flat(config_to_dict(config)))
    changed = [key for key in now if now[key] != before.get(key) and key not in FREE_KEYS]
    if changed:
        listed = ", ".join(f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in changed)
        raise ConfigError(
            f"{out} was started with other settings: {listed}; resume with the same settings, or choose another --out."
        )


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device is '{name}'; expected auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device is '{name}'; expected auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device is '{name}', but torch finds no CUDA device; pass train.device=cpu.")
    return device


@contextmanager
def _process_settings(config: Config, device: torch.device) -> Iterator[None]:
    """Threads, determinism and generators as the run wants them, and afterwards as they were.

    Deterministic algorithms are enforced on the CPU; on CUDA the backward of bilinear resizing has none.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    devices = [torch.cuda._utils._get_device_index(device, optional=True)] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            if config.train.threads:
                torch.set_num_threads(config.train.threads)
            if device.type == "cpu":
                torch.use_deterministic_algorithms(True)
                torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            if device.type == "cuda":
                torch.cuda.set_device(device)
                torch.cuda.reset_peak_memory_stats()
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocators raise a plain RuntimeError."""
    told = ("DefaultCPUAllocator", "infoclip._C: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


def _pixels(dense: Tensor) -> Tensor:  # [B, d, h, w] -> [B, n, d]
    return dense.flatten(2).transpose(1, 2).float()


def fingerprint(module: torch.nn.Module) -> str:
    """Hash of the module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def panel(
    image: Tensor,  # [B, 3, H, W] uint8
    truth: Tensor,  # [B, H, W]
    guess: Tensor,  # [b, H, W], the first b
    classes: list[str],
) -> Any:
    """Rows of image, truth and prediction, [b * H, 3 * W, 3] uint8."""
    import numpy as np

    from infoclip.report.overlay import overlay

    rows = []
    for i, labels in enumerate(guess):
        pixels = image[i].permute(1, 2, 0).numpy()
        drawn = [np.asarray(overlay(pixels, y.numpy(), classes, legend=False)) for y in (truth[i], labels)]
        rows.append(np.concatenate([pixels, *drawn], axis=1))
    return np.concatenate(rows, axis=0)
