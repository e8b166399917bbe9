"""Thousands of damaged, lying and odd inputs: each is used, or refused in one sentence.

Real files that the tests make (pictures, masks, manifests, class lists, configs, checkpoints, records) are mutated,
and JSON and names are drawn by hypothesis. For every input it is checked that nothing but an :class:`InfoclipError` of
one line comes out, within seconds, and that no file appears outside the output folder; the largest resident memory of
each kind is measured. ``python tests/fuzz.py --inputs 5000`` prints the counts; a few hundred run in the suite.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import small_config
from small_trees import write_tree

from infoclip.api import checked_classes
from infoclip.config import apply_overrides, load_config, save_config
from infoclip.convert import read_catseg
from infoclip.data.benchmarks import open_benchmark
from infoclip.data.classes import load_classes, load_label_map
from infoclip.data.files import is_rotated, read_ade_objects, read_image, read_label_map_mat, read_mask
from infoclip.errors import InfoclipError
from infoclip.evaluate.records import Records
from infoclip.model.checkpoint import load_model, save_model
from infoclip.model.segmentor import build_segmentor

__all__ = ["KINDS", "Outcome", "fuzz"]

SECONDS = 30
"""Longest processor time of one input; what waits without end instead shows when the whole run's time is over."""
MEMORY_MIB = 2048
"""Largest growth of the resident memory: a picture just under the limit of 100 million pixels takes 1.2 GB."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@dataclass
class Outcome:
    """What one kind of input came to."""

    kind: str
    used: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory_mib: float = 0.0
    faults: list[str] = field(default_factory=list)


# Inputs


def mutated(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The file with a few of its bytes changed, lost, doubled, or put in from another one."""
    data = bytearray(content)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 200) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        how = rng.randrange(7)
        if how == 0:
            data[at : at + length] = rng.randbytes(length)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + length]
        elif how == 3:
            data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
        elif how == 4:
            data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * min(length, 8)
        elif how == 5 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        else:
            other = rng.choice(others)
            data[at : at + length] = other[at : at + length]
    return bytes(data)


def pictures(rng: np.random.Generator, folder: Path) -> list[bytes]:
    """Small real pictures of every format and mode that is read, and one that claims a hundred million pixels."""
    files = []
    color = rng.integers(0, 256, (24, 31, 3), dtype=np.uint8)
    for number, (mode, suffix) in enumerate(
        [("RGB", "png"), ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("L", "png"), ("I;16", "png"),
         ("I;16", "tif"), ("RGB", "tif"), ("RGB", "bmp"), ("RGB", "webp"), ("RGBA", "png"), ("1", "png")]
    ):  # fmt: skip
        picture = Image.fromarray(color)
        if mode == "I;16":
            picture = Image.fromarray(rng.integers(0, 60_000, (24, 31)).astype(np.uint16))
        elif mode != "RGB":
            picture = picture.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        path = folder / f"{number}.{suffix}"
        picture.save(path, **({"exif": exif} if suffix in ("jpg", "webp") else {}))
        files.append(path.read_bytes())
    return files


def _drawn(strategy: st.SearchStrategy[Any]) -> Callable[[random.Random], Any]:
    """Examples of a strategy, fifty at a time: making one takes nearly as long."""
    stock: list[Any] = []

    def draw(rng: random.Random) -> Any:
        if not stock:

            @seed(rng.getrandbits(64))
            @settings(max_examples=50, database=None, deadline=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(strategy)
            def collect(value: Any) -> None:
                stock.append(value)

            collect()
        return stock.pop()

    return draw


_json = _drawn(JSON)
_text = _drawn(st.text(max_size=200))


def lying_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with some of its values replaced by others."""
    data = json.loads(content)

    def visit(node: Any) -> Any:
        if rng.random() < 0.02:
            return rng.choice((None, -1, 0, 10**30, 1e308, "", "../../x", "/etc/passwd", [], {}, True, [[]], 2**31))
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items() if rng.random() > 0.01}
        return [visit(value) for value in node[:50]] if isinstance(node, list) else node

    return json.dumps(visit(data)).encode()


class Kind:
    """One kind: ``seeds`` makes real files in a folder; ``use`` reads an input written at a path below ``work``."""

    def __init__(
        self, name: str, share: float, suffix: str, seeds: Callable[[Path], list[bytes]],
        use: Callable[[Path, Path], None],
    ) -> None:  # fmt: skip
        self.name, self.share, self.suffix, self.seeds, self.use = name, share, suffix, seeds, use

    def content(self, seeds: list[bytes], rng: random.Random) -> bytes:
        if self.suffix == ".json" and rng.random() < 0.5:
            if rng.random() < 0.3:
                return json.dumps(_json(rng)).encode()
            return lying_json(rng.choice(seeds), rng)
        if self.suffix == ".txt" and rng.random() < 0.5:
            return _text(rng).encode("utf-8", "surrogatepass")
        return mutated(rng.choice(seeds), seeds, rng)


def _pictures(folder: Path) -> list[bytes]:
    return pictures(np.random.default_rng(0), folder)


def _mats(folder: Path) -> list[bytes]:
    files = []
    for compressed in (False, True):
        scipy.io.savemat(folder / "a.mat", {"LabelMap": np.arange(600, dtype=np.uint16).reshape(20, 30)},
                         do_compression=compressed)  # fmt: skip
        files.append((folder / "a.mat").read_bytes())
    return files


def _tree_file(name: str, path: str) -> Callable[[Path], list[bytes]]:
    def make(folder: Path) -> list[bytes]:
        write_tree(name, folder / "tree", (8, 12))
        return [(folder / "tree" / path).read_bytes()]

    return make


def _open_tree(name: str, path: str) -> Callable[[Path, Path], None]:
    def use(file: Path, work: Path) -> None:
        root = work.parent / "seeds/tree"
        file.replace(root / path)
        for sample in open_benchmark(name, root):
            assert int(sample["mask"].min()) >= 0

    return use


def _model(folder: Path) -> Path:
    if not (folder / "model").exists():
        config = small_config(folder)
        torch.manual_seed(0)
        save_model(build_segmentor(config), config, ["a", "b"], folder / "model")
    return folder / "model"


def _weights(folder: Path) -> list[bytes]:
    return [(_model(folder) / "model.safetensors").read_bytes()]


def _model_config(folder: Path) -> list[bytes]:
    return [(_model(folder) / "config.json").read_bytes()]


def _load(name: str) -> Callable[[Path, Path], None]:
    def use(file: Path, work: Path) -> None:
        folder = work.parent / "seeds/model"
        whole = (folder / name).read_bytes()
        try:
            (folder / name).write_bytes(file.read_bytes())
            load_model(folder)
        finally:
            (folder / name).write_bytes(whole)

    return use


def _pth(folder: Path) -> list[bytes]:
    config = small_config(folder)
    torch.manual_seed(0)
    state = build_segmentor(config).published_state_dict()
    torch.save({"model": state, "iteration": 3}, folder / "a.pth")
    return [(folder / "a.pth").read_bytes()]


def _configs(folder: Path) -> list[bytes]:
    save_config(small_config(folder), folder / "a.json")
    return [(folder / "a.json").read_bytes()]


def _use_config(file: Path, work: Path) -> None:
    apply_overrides(load_config(file), ["optim.lr=1e-4"])
    text = file.read_bytes().decode("utf-8", "replace")
    apply_overrides(small_config(work / "out"), [f"eval.size={text[:9]}", text[:30]])


def _names(folder: Path) -> list[bytes]:
    return ["cat\ndog, hound\n# remark\nzwölf 🌲\n".encode(), b"a\n" * 3, b"\xef\xbb\xbfcat\r\ndog\r\n",
            "\n".join(f"class {i}" for i in range(10_000)).encode()]  # fmt: skip


def _only(read: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def use(file: Path, work: Path) -> None:
        read(file)

    return use


def _masks(folder: Path) -> list[bytes]:
    files = _pictures(folder)
    return [files[i] for i in (4, 5, 6, 7, 12)] * 2 + files


def _use_names(file: Path, work: Path) -> None:
    checked_classes(load_classes(file))


def _use_image(file: Path, work: Path) -> None:
    assert read_image(file).ndim == 3
    is_rotated(file)


def _records(folder: Path) -> list[bytes]:
    counts = {"file": "x", "pixels": 3, "right": 1, "cells": [0, 5], "counts": [1, 2], "seconds": [0, 0, 0]}
    lines = [{"key": {"a": 1}}, *({"image": i, **counts} for i in range(9))]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def _use_records(file: Path, work: Path) -> None:
    records = Records(work / "out", "x", {"a": 1}, 9, 3)
    (work / "out").mkdir(exist_ok=True)
    file.replace(records.path)
    found, _ = records.collect(lambda record: None)
    assert len({r.index for r in found}) == len(found) <= 9


_JSON_OF_PC59 = "VOCdevkit/VOC2010/trainval_merged.json"
_LIST_OF_VOC = "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
KINDS = [
    Kind("image", 0.24, ".png", _pictures, _use_image),
    Kind("mask", 0.16, ".png", _masks, _only(read_mask)),
    Kind("ade mask", 0.05, ".png", _pictures, _only(read_ade_objects)),
    Kind("mat mask", 0.09, ".mat", _mats, _only(read_label_map_mat)),
    Kind("manifest json", 0.08, ".json", _tree_file("pc59", _JSON_OF_PC59), _open_tree("pc59", _JSON_OF_PC59)),
    Kind("manifest list", 0.05, ".txt", _tree_file("pas20", _LIST_OF_VOC), _open_tree("pas20", _LIST_OF_VOC)),
    Kind("names", 0.07, ".txt", _names, _use_names),
    Kind("label map", 0.05, ".json", lambda _: [b'{"7": 0, "11": 1}'], _only(load_label_map)),
    Kind("config", 0.08, ".json", _configs, _use_config),
    Kind("model config", 0.03, ".json", _model_config, _load("config.json")),
    Kind("safetensors", 0.04, ".bin", _weights, _load("model.safetensors")),
    Kind("pth", 0.04, ".pth", _pth, _only(read_catseg)),
    Kind("records", 0.02, ".jsonl", _records, _use_records),
]
"""Every kind with its share of the inputs."""


# Running


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def _files(folder: Path) -> set[str]:
    return {str(Path(parent) / name) for parent, _, names in os.walk(folder) for name in names}


def run_kind(name: str, count: int, number_seed: int, until: float) -> Outcome:
    """``count`` inputs of one kind, in this process; stops at the time ``until``."""
    kind = next(k for k in KINDS if k.name == name)
    outcome = Outcome(name)
    rng = random.Random(f"{number_seed} {name}")
    signal.signal(signal.SIGPROF, _too_long)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="infoclip-fuzz-") as top:
        outer = Path(top)
        os.environ["INFOCLIP_CACHE"] = str(outer / "cell/work/out/cache")
        seeds_at, work = outer / "cell/seeds", outer / "cell/work"
        seeds_at.mkdir(parents=True)
        (work / "out").mkdir(parents=True)
        os.chdir(work)
        seeds = kind.seeds(seeds_at)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        known = _files(outer)
        for number in range(count):
            if time.monotonic() > until:
                break
            content = kind.content(seeds, rng)
            path = work / f"input{kind.suffix}"
            path.write_bytes(content)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kind.use(path, work)
                outcome.used += 1
            except InfoclipError as error:
                outcome.refused += 1
                if len(str(error).splitlines()) != 1:
                    outcome.faults.append(f"{name} {number_seed}/{number}: not one line: {str(error)[:200]!r}")
            except Exception:
                last = traceback.format_exc().splitlines()
                outcome.faults.append(
                    f"{name} {number_seed}/{number}: {' | '.join(line.strip() for line in last[-5:])}"
                )
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            path.unlink(missing_ok=True)
        strange = {f for f in _files(outer) - known if not f.startswith(str(work / "out"))}
        outcome.faults += [f"{name}: wrote {file}" for file in sorted(strange)[:5]]
        outcome.memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        if outcome.memory_mib > MEMORY_MIB:
            outcome.faults.append(f"{name}: {outcome.memory_mib:.0f} MiB more resident memory, over {MEMORY_MIB}")
        os.chdir("/")
    outcome.seconds = time.monotonic() - start
    return outcome


def fuzz(inputs: int, number_seed: int = 0, seconds: float = 480.0, processes: int = 2) -> list[Outcome]:
    """Run every kind in a process of its own; the outcomes in the order of :data:`KINDS`.

    An input that hangs outside Python is not interrupted by its timer: its kind ends with a fault a minute later.
    """
    until = time.monotonic() + seconds

    def run(kind: Kind) -> Outcome:
        count = max(1, round(inputs * kind.share))
        left = max(1.0, until - time.monotonic())
        command = [sys.executable, __file__, "--kind", kind.name, "--inputs", str(count), "--seed", str(number_seed),
                   "--seconds", str(left)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left + 60, check=False)
        except subprocess.TimeoutExpired:
            return Outcome(kind.name, faults=[f"{kind.name}: no answer a minute after its time"])
        if done.returncode:
            return Outcome(
                kind.name, faults=[f"{kind.name}: its process ended with {done.returncode}: {done.stderr[-400:]}"]
            )
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, KINDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this one, here; prints JSON")
    options = parser.parse_args()
    if options.kind:
        outcome = run_kind(options.kind, options.inputs, options.seed, time.monotonic() + options.seconds)
        print(json.dumps(asdict(outcome)))
        return
    outcomes = fuzz(options.inputs, options.seed, options.seconds)
    print(f"{'kind':<15}{'inputs':>8}{'used':>8}{'refused':>9}{'seconds':>9}{'+MiB':>7}{'faults':>8}")
    for o in outcomes:
        total = o.used + o.refused + len(o.faults)
        print(f"{o.kind:<15}{total:>8}{o.used:>8}{o.refused:>9}{o.seconds:>9.1f}{o.memory_mib:>7.0f}{len(o.faults):>8}")
    print(f"{'all':<15}{sum(o.used + o.refused + len(o.faults) for o in outcomes):>8}")
    faults = [fault for o in outcomes for fault in o.faults]
    for fault in faults[:40]:
        print(fault, file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
