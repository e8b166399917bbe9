"""Another commit's code beside the present one: ``python -m bench SUITE --base REF``.

The commit is checked out as a git worktree in a temporary folder and built there. The present suites then run on its
``infoclip`` in a process of its own, a round of it before each round of the present code, so that what the machine does
beside them meets both alike.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoclip.errors import ConfigError

if TYPE_CHECKING:
    from bench.harness import Case, Suite

__all__ = ["THRESHOLD", "Base", "compared", "opened", "regressions", "resolve"]

ROOT = Path(__file__).resolve().parent.parent
THRESHOLD = 0.05
"""How much slower a case may be than the other commit's, beyond the spread of the rounds."""


def resolve(ref: str, root: Path = ROOT) -> str:
    """The commit that a name stands for.

    Raises:
        ConfigError: no such commit, or no git checkout.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--base {ref}: git does not start ({error.strerror}).") from error
    if done.returncode == 128:
        raise ConfigError(f"--base {ref}: {root} is no git checkout; the other code is taken from its history.")
    if done.returncode:
        raise ConfigError(f"--base {ref}: there is no such commit; expected a branch, tag or hash of 'git log'.")
    return done.stdout.strip()


def build(folder: Path, commit: str, cuda: bool) -> None:
    """The native module of a checkout, in its place; a commit that was built before is taken from ``build/bench``."""
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    kept = ROOT / "build" / "bench" / f"{commit}{'.cuda' if cuda else ''}" / name
    if kept.is_file():
        print(f"base {commit[:9]}: built before, {kept.relative_to(ROOT)}", file=sys.stderr)
    else:
        sources = "C++ and CUDA sources" if cuda else "C++ sources"
        print(f"base {commit[:9]}: building its {sources} in {folder}, a few minutes ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        environment = {**os.environ, "INFOCLIP_CUDA": str(int(cuda))}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"--base: commit {commit[:9]} does not build: {(done.stderr or done.stdout)[-1500:]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "infoclip" / name, kept)
        print(f"base {commit[:9]}: built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if not (folder / "infoclip" / name).exists():
        shutil.copy2(kept, folder / "infoclip" / name)


@contextmanager
def checked_out(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """The commit's files in a temporary folder; nothing of it is left afterwards, however this ends."""
    holder = Path(tempfile.mkdtemp(prefix="infoclip-base-"))
    folder = holder / "tree"
    try:
        command = ["git", "worktree", "add", "--quiet", "--detach", str(folder), commit]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"--base: git cannot check {commit[:9]} out: {done.stderr.strip()}")
        yield folder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], cwd=root, capture_output=True, check=False)


@contextmanager
def opened(ref: str, timer: str, make: Callable[[Path, str, bool], None] = build) -> Iterator[Base]:
    """The other code, checked out, built and waiting.

    Raises:
        ConfigError: no such commit, or one that does not build.
    """
    from infoclip import native

    commit = resolve(ref)
    with checked_out(commit) as folder:
        make(folder, commit, native.available() and bool(native.build_info()["cuda"]))
        base = Base(folder, commit, timer)
        try:
            yield base
        finally:
            base.close()


# What the process of the other code runs: the bench of here, the package of there.
_WORKER = """
import sys
here, there, timer = sys.argv[1:]
sys.path[0] = here
import bench
sys.path[0] = there
# an editable install would lend the other code what its own tree lacks, such as a native module
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
from bench import base
base.serve(there, timer)
"""


class Base:
    """A process that runs the present suites on another commit's package, a round at a time."""

    def __init__(self, folder: Path, commit: str, timer: str) -> None:
        self.commit = commit
        self.missing: dict[str, str] = {}
        """What the other code cannot run, and why."""
        command = [sys.executable, "-c", _WORKER, str(ROOT), str(folder), timer]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of the other code (commit {self.commit[:9]}) ended; its words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def timer(
        self, suite: Suite, case: Case, part: str, device: str, dtype: str, backend: str
    ) -> Callable[[], float] | None:
        """What runs one round there and returns its seconds; None where the other code cannot."""
        import torch

        answer = self._ask(
            module=suite.make.__module__, suite=suite.title, sizes=case.sizes, part=part, device=device, dtype=dtype,
            backend=backend, threads=torch.get_num_threads(),
        )  # fmt: skip
        if "error" in answer:
            self.missing[f"{suite.title}, {backend}, {dtype}"] = answer["error"]
            return None
        return lambda: float(self._ask()["seconds"])

    def close(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(folder: str, timer: str) -> None:
    """Answer requests on stdin until it ends: one with a case prepares it, an empty one runs a round."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    import infoclip
    from bench import harness

    if not str(infoclip.__file__).startswith(folder):
        raise SystemExit(f"error: the other code is not used: infoclip came from {infoclip.__file__}")
    now: Callable[[], float] = getattr(time, timer)
    step: Callable[[], Any] = lambda: None  # noqa: E731
    shared: tuple[Any, Any] = (None, None)
    for line in sys.stdin:
        request = json.loads(line)
        if not request:
            step()
            start = now()
            step()
            answer: dict[str, Any] = {"seconds": now() - start}
        else:
            torch.set_num_threads(request["threads"])
            try:
                key = [request[name] for name in ("suite", "sizes", "device", "dtype")]
                if shared[0] != key:
                    shared = (None, None)
                    # its module alone: the other code may lack what the others are about
                    suite = harness.find_suite(request["suite"], request["module"])
                    shared = (key, harness.place(suite, *key[1:]))
                step, _ = harness.calibrated(shared[1].steps(request["backend"])[request["part"]], request["device"])
                answer = {}
            except Exception as error:  # another commit may lack anything: its words go into the report
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compared(present: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Time over the other code's, round by round: 20, 50 and 80 % quantiles (above 1: the present code is slower)."""
    from bench.harness import quantiles

    return quantiles([one / other for one, other in zip(present, base, strict=True)])


def regressions(rows: Sequence[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """Rows that are slower than the other code's by more than the threshold in four rounds of five."""
    return [row for row in rows if "base" in row and row["base"]["q20"] > 1 + threshold]


def comparison(rows: Sequence[dict[str, Any]], commit: str, threshold: float) -> str:
    """Markdown: time over the other commit's, a row a case."""
    lines = [
        f"time over that of {commit[:9]}, round by round (above 1: slower than it)\n",
        "| op | on | case | part | backend | 20 / 50 / 80 % | |",
        "|---|---|---|---|---|---|---|",
    ]
    slow = regressions(rows, threshold)
    for r in rows:
        if "base" not in r:
            continue
        spread = " / ".join(f"{r['base'][q]:.3f}" for q in ("q20", "q50", "q80"))
        verdict = "**slower**" if r in slow else "faster" if r["base"]["q80"] < 1 / (1 + threshold) else ""
        where = f"{r['op']} | {r['device']} {r['dtype']} | {r['case']} | {r['part']} | {r['backend']}"
        lines.append(f"| {where} | {spread} | {verdict} |")
    return "\n".join(lines)
