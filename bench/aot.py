"""``python -m bench aot``: every GPU kernel compiled on a machine without a GPU, and what the machine code says.

Triton: the calls that a room declares (``aot()`` in its ``triton_impl.py``) are made on the meta device with the launch
caught: each kernel is compiled with the signature, constants, warps and stages that Triton itself would have launched
it with. CUDA C++: every ``csrc/<op>/*.cu`` is compiled for the architectures that ``CMakeLists.txt`` builds.

Printed are registers, shared memory, local memory (spills) and the matrix instructions found in PTX and SASS. A spill,
shared memory above what a block of the generation can have, registers above it, or a kernel declared a matrix kernel
without a matrix instruction makes the command fail, and so does a room that has Triton kernels and declares no launch.
What could not be looked at, because a tool is missing, is said.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.arguments import output_file
from infoclip.kernels.aot import AotCall, NativeKernels, compiling_for

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot"
TRITON_TARGETS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a block may have, bytes (CUDA C++ programming guide, technical specifications)."""
RESERVED = 1024
"""Of the shared memory that cuobjdump tells, from sm_90 on: the system's own, which is not of the block's limit."""
_SELF = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # what is kept was found by this very file
REGISTERS = 65536
"""Registers of a multiprocessor: one block must fit."""

# Warp-wide products, Hopper's by warp groups, Blackwell's in tensor memory, as the assembler calls them.
PTX_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|wmma\.mma|mma\.sync)\b")
SASS_MATRIX = re.compile(r"\b(UTC[A-Z]*MMA|[HIDQO]GMMA|[HIDQO]MMA)\b")


@dataclass
class Row:
    """One compiled kernel. ``registers``, ``local`` and ``sass`` are None where no tool could tell them."""

    op: str
    form: str
    """``triton`` or ``cuda``."""
    kernel: str
    case: str
    arch: str
    threads: int | None
    shared: int
    registers: int | None
    local: int | None
    """Bytes of local memory a thread has: spills."""
    ptx: dict[str, int]
    """Matrix instructions in the PTX -> how many."""
    sass: dict[str, int] | None
    matrix: bool
    """Declared a matrix kernel."""
    launches: int = 1
    failures: list[str] = field(default_factory=list)

    def judge(self) -> Row:
        self.failures = []
        limit = SHARED_LIMIT[int(re.sub(r"\D", "", self.arch)) // 10 * 10]
        if self.local:
            self.failures.append(f"spills: {self.local} bytes of local memory a thread")
        if self.shared > limit:
            self.failures.append(f"shared memory: {self.shared} bytes, a block may have {limit}")
        if self.registers and self.threads and -(-self.registers // 8) * 8 * self.threads > REGISTERS:
            self.failures.append(f"registers: {self.registers} x {self.threads} threads, there are {REGISTERS}")
        if self.matrix and not (self.sass if self.sass is not None else self.ptx):
            self.failures.append("declared a matrix kernel, but it has no matrix instruction")
        return self


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from PATH, the toolkit's folder, or the copy that Triton ships."""
    folders = [os.environ.get("PATH", "")]
    folders += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return shutil.which(name, path=os.pathsep.join(folders))


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


def _count(pattern: re.Pattern[str], text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in pattern.findall(text):
        found[name] = found.get(name, 0) + 1
    return found


def look_at(cubin: Path, disassemble: bool, target: int) -> dict[str, dict[str, Any]]:
    """Mangled kernel name -> registers, static shared memory, local memory and matrix instructions of its SASS.

    Without ``disassemble`` (half a second a file; for PTX that has no matrix instruction) the last is empty.
    """
    program = tool("cuobjdump")
    if program is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    usage = _ask(program, "-res-usage", str(cubin))
    for name, registers, stack, shared, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        found[name] = {
            "registers": int(registers),
            "shared": max(int(shared) - (RESERVED if target >= 90 else 0), 0),
            "local": int(stack) + int(local),
            "sass": {},
        }  # fmt: skip
    if not disassemble:
        return found
    for part in re.split(r"^\s*Function : ", _ask(program, "-sass", str(cubin)), flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()]["sass"] = _count(SASS_MATRIX, body)
    return found


# Triton ---------------------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """One kernel as Triton's own launcher would compile it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def key(self, target: int) -> str:
        import triton

        constants = {str(k): getattr(v, "cache_key", v) for k, v in self.constants.items()}
        parts = (_SELF, triton.__version__, self.kernel.cache_key, self.signature, constants, self.attributes)
        options = {k: v for k, v in sorted(self.options.items()) if k != "extern_libs"}
        return hashlib.sha256(repr((*parts, options, target, tool("cuobjdump"))).encode()).hexdigest()


@contextmanager
def caught_launches(target: int) -> Iterator[list[Launch]]:
    """Inside, a Triton launch is written down instead of made; of an autotuned kernel every configuration."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    from triton.runtime.autotuner import Autotuner

    class NoDevice:
        """What Triton's launcher asks of a driver before it compiles."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> Any:
            return f"compile only, sm_{target}"

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            raise RuntimeError("there is no device")

    launches: list[Launch] = []

    def write_down(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, *more: Any
    ) -> None:
        launches.append(Launch(self, signature, constexprs, attrs, dict(options.__dict__)))

    def every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

    compile_one, tune, active = jit.JITFunction._do_compile, Autotuner.run, driver._active
    jit.JITFunction._do_compile, Autotuner.run = write_down, every_configuration
    driver.set_active(NoDevice())
    try:
        with compiling_for(divmod(target, 10)):
            yield launches
    finally:
        jit.JITFunction._do_compile, Autotuner.run = compile_one, tune
        driver._active = active  # none yet, perhaps: reset_active() would look for a GPU


@contextmanager
def parsing_in_turn() -> Iterator[None]:
    """One thread at a time turns a kernel's source into a syntax tree.

    Python 3.11 counts the depth of all threads' trees in one variable, so that two at once now and then end in
    ``SystemError: AST constructor recursion depth mismatch``.
    """
    from triton.runtime import jit

    lock, parse = threading.Lock(), jit.JITFunction.parse

    def parse_alone(self: Any) -> Any:
        with lock:
            return parse(self)

    jit.JITFunction.parse = parse_alone
    try:
        yield
    finally:
        jit.JITFunction.parse = parse


def compile_triton(launch: Launch, target: int) -> dict[str, Any]:
    """Facts of the machine code: ``shared``, ``threads``, ``ptx``, and of ``look_at``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch.options)
    facts: dict[str, Any] = {
        "shared": built.metadata.shared,
        "threads": 32 * built.metadata.num_warps,
        "ptx": _count(PTX_MATRIX, built.asm["ptx"]),
        "registers": None,
        "local": None,
        "sass": None,
    }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        for seen in look_at(Path(file.name), bool(facts["ptx"]), target).values():
            facts |= seen | {"shared": max(facts["shared"], seen["shared"])}
    return facts


def kept(key: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gave for this key the last time; keys are hashes of everything that it depends on."""
    file = CACHE / f"{key}.json"
    if file.is_file():
        return json.loads(file.read_text())
    value = make()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, suffix=".part", delete=False) as part:
        json.dump(value, part)
    Path(part.name).replace(file)
    return value


def triton_rows(op: str, calls: Sequence[AotCall], targets: Sequence[int] = TRITON_TARGETS) -> list[Row]:
    """Every different kernel that the calls launch, compiled for every target."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: Triton's interpreter has taken the compiler's place; unset it.")
    wanted: dict[tuple[str, int], tuple[Launch, AotCall, bool, int]] = {}
    for target in targets:
        for call in calls:
            with caught_launches(target) as launches:
                call.call()
            names = {launch.kernel.fn.__name__ for launch in launches}
            if not names:
                raise RuntimeError(f"{op}: the call '{call.name}' launches no Triton kernel")
            if unknown := set(call.matrix) - names:
                raise RuntimeError(f"{op}: '{call.name}' declares {sorted(unknown)}, but launches {sorted(names)}")
            for launch in launches:
                key = launch.key(target), target
                matrix = launch.kernel.fn.__name__ in call.matrix
                _, first, before, times = wanted.get(key, (None, call, False, 0))
                wanted[key] = launch, first, before or matrix, times + 1

    def one(item: tuple[tuple[str, int], tuple[Launch, AotCall, bool, int]]) -> Row:
        (key, target), (launch, call, matrix, times) = item
        facts = kept(key, lambda: compile_triton(launch, target))
        name = launch.kernel.fn.__name__
        return Row(op, "triton", name, call.name, f"sm_{target}", matrix=matrix, launches=times, **facts).judge()

    # Triton releases the lock of the interpreter in its passes, and ptxas is a program.
    with parsing_in_turn(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, wanted.items()))


# CUDA C++ -------------------------------------------------------------------------------------------------------------


def demangled(name: str) -> str:
    """``void infoclip::(anonymous)::sweep<float, true>(...)`` as ``sweep<float, true>``; else the name itself."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return name
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not pointer:
        return name
    text = ctypes.string_at(pointer).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(pointer))
    text = re.sub(r"\((int|long|bool|unsigned int)\)", "", text)  # casts of template arguments
    text = re.sub(r"infoclip::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", text).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return text[:i]
    return text


def cuda_targets() -> list[str]:
    """Architectures with machine code in the native build, as ``CMakeLists.txt`` names them: ``80``, ``90a``."""
    line = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    return re.findall(r"(\d+[af]?)-real", line.group(1)) if line else []


def cuda_rows(
    op: str, native: NativeKernels, sources: Sequence[Path], targets: Sequence[str], includes: Path = ROOT / "csrc"
) -> list[Row]:
    """Every kernel of the CUDA C++ sources, compiled by nvcc for every target.

    Raises ``RuntimeError`` where nvcc is missing or fails, and for a pattern of ``native`` that matches no kernel.
    """
    nvcc = tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    version = _ask(nvcc, "--version")
    headers = sorted(p for p in includes.rglob("*") if p.suffix in (".hpp", ".cuh", ".h", ".inl"))
    content = b"".join(p.read_bytes() for p in headers)

    def compiled(source: Path, target: str) -> dict[str, Any]:
        options = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{includes}", f"-arch=sm_{target}"]
        with tempfile.TemporaryDirectory() as folder:
            cubin, ptx = Path(folder) / "kernels.cubin", Path(folder) / "kernels.ptx"
            command = (nvcc, "-cubin", *options, "--keep", "--keep-dir", folder, "-o", str(cubin), str(source))
            _ask(*command)
            if not ptx.exists():  # --keep names it after the source
                ptx = next(Path(folder).glob("*.ptx"))
            # Each entry's PTX, so that an instruction is counted for the kernel that has it.
            entries = re.split(r"^\.(?:visible |weak )?\.?entry ", ptx.read_text(), flags=re.M)[1:]
            counts = {re.match(r"\w+", e).group(): e for e in entries}  # type: ignore[union-attr]
            seen = look_at(cubin, bool(PTX_MATRIX.search(ptx.read_text())), int(re.sub(r"\D", "", target)))
            return {
                name: {
                    "registers": None, "local": None, "sass": None, "shared": 0, **seen.get(name, {}),
                    "ptx": _count(PTX_MATRIX, body),
                    "threads": int(m.group(1)) if (m := re.search(r"\.maxntid\s+(\d+)", body)) else None,
                }
                for name, body in counts.items()
            }  # fmt: skip

    def one(item: tuple[Path, str]) -> list[Row]:
        source, target = item
        parts = (_SELF, version, content, source.read_bytes(), target, tool("cuobjdump"))
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        rows = []
        for mangled, facts in kept(key, lambda: compiled(source, target)).items():
            name = demangled(mangled)
            matrix = any(re.search(p, name) for p in native.matrix)
            dynamic = max((n for p, n in native.dynamic_shared.items() if re.search(p, name)), default=0)
            facts = {**facts, "shared": facts["shared"] + dynamic}
            rows.append(Row(op, "cuda", name, source.name, f"sm_{target}", matrix=matrix, **facts).judge())
        return rows

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for part in pool.map(one, [(s, t) for s in sources for t in targets]) for row in part]
    for pattern in (*native.matrix, *native.dynamic_shared):
        if not any(re.search(pattern, row.kernel) for row in rows):
            raise RuntimeError(
                f"{op}: no CUDA kernel is called {pattern!r}; there is {sorted({r.kernel for r in rows})}"
            )
    return rows


# The command ----------------------------------------------------------------------------------------------------------


def room_of(op: str) -> Any:
    """The op's package."""
    return importlib.import_module(f"infoclip.kernels.{op}")


def declared(op: str) -> tuple[list[AotCall], str | None]:
    """The Triton launches that the op's room declares; where it declares none, a sentence that says so.

    Raises ``RuntimeError`` for a room that has Triton kernels and declares no launch of them.
    """
    form = getattr(room_of(op), "triton_impl", None)
    if form is None:
        return [], f"{op}: no Triton form."
    if hasattr(form, "aot"):
        return form.aot(), None
    from triton.runtime.jit import KernelInterface

    kernels = sorted(name for name, value in vars(form).items() if isinstance(value, KernelInterface))
    if kernels:
        raise RuntimeError(
            f"{op}: kernels/{op}/triton_impl.py has Triton kernels ({', '.join(kernels)}) and no aot() that declares "
            "their launches; CONTRIBUTING.md, 'Adding an op', says how"
        )
    return [], f"{op}: its Triton form launches no kernel of its own."


def collect(
    ops: Sequence[str], forms: Sequence[str] = ("triton", "cuda"), quick: bool = False
) -> tuple[list[Row], list[str], list[str]]:
    """Rows of the ops, sentences about what was not looked at, and errors: what should have been and could not be."""
    rows: list[Row] = []
    unseen: list[str] = []
    errors: list[str] = []
    if tool("cuobjdump") is None:
        unseen.append("SASS, registers and spills: cuobjdump was not found (CUDA toolkit, Triton).")
    for op in ops:
        try:
            if "triton" in forms:
                from infoclip.kernels.triton_support import MISSING

                if MISSING:
                    unseen.append(f"{op}, Triton kernels: {MISSING}")
                else:
                    calls, nothing = declared(op)
                    unseen += [nothing] if nothing else []
                    rows += triton_rows(op, [call for call in calls if call.quick or not quick])
            sources = sorted((ROOT / "csrc" / op).glob("*.cu"))
            if "cuda" in forms and sources:
                if tool("nvcc") is None:
                    names = ", ".join(str(s.relative_to(ROOT)) for s in sources)
                    unseen.append(f"{op}, CUDA C++ ({names}): nvcc was not found.")
                else:
                    native = getattr(room_of(op).native_impl, "AOT", NativeKernels())
                    rows += cuda_rows(op, native, sources, cuda_targets())
        except RuntimeError as error:  # the other ops are looked at all the same
            errors.append(str(error))
    return rows, unseen, errors


def _instructions(row: Row) -> str:
    found = row.ptx if row.sass is None else row.sass
    text = ", ".join(f"{name} x{n}" for name, n in sorted(found.items())) or ("none" if row.matrix else "")
    return text + (" (PTX only)" if row.sass is None and text else "")


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row a compiled kernel."""
    lines = [
        "| op | form | kernel | first launched by | for | launches | threads | registers | shared B | local B "
        "| matrix instructions | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def known(value: int | None) -> str:
        return "?" if value is None else str(value)

    for r in rows:
        verdict = "**" + "; ".join(r.failures) + "**" if r.failures else "ok"
        threads = "any" if r.threads is None else str(r.threads)
        lines.append(
            f"| {r.op} | {r.form} | `{r.kernel}` | {r.case} | {r.arch} | {r.launches} | {threads} "
            f"| {known(r.registers)} | {r.shared} | {known(r.local)} | {_instructions(r)} | {verdict} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row an op, form and architecture: kernels, the most of each resource, instructions, failures."""
    out = []
    for op, form, arch in dict.fromkeys((r.op, r.form, r.arch) for r in rows):
        mine = [r for r in rows if (r.op, r.form, r.arch) == (op, form, arch)]
        instructions = sorted({name for r in mine for name in (r.ptx if r.sass is None else r.sass)})
        out.append(
            {
                "op": op, "form": form, "arch": arch, "kernels": len(mine),
                "registers": max((r.registers for r in mine if r.registers is not None), default=None),
                "shared": max(r.shared for r in mine),
                "spilling": sum(bool(r.local) for r in mine),
                "matrix_kernels": sum(r.matrix for r in mine),
                "instructions": instructions,
                "failures": sum(bool(r.failures) for r in mine),
            }
        )  # fmt: skip
    return out


def show_summary(rows: Sequence[Row]) -> str:
    lines = [
        "| op | form | for | kernels | registers, most | shared B, most | spilling | matrix | instructions | failing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in summary(rows):
        most = "?" if r["registers"] is None else r["registers"]
        names = ", ".join(r["instructions"])
        lines.append(
            f"| {r['op']} | {r['form']} | {r['arch']} | {r['kernels']} | {most} | {r['shared']} | {r['spilling']} "
            f"| {r['matrix_kernels']} | {names} | {r['failures']} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    from infoclip import kernels

    parser = argparse.ArgumentParser(prog="python -m bench aot", description="Compile every GPU kernel without a GPU.")
    parser.add_argument("op", nargs="*", metavar="OP", help=f"any of {', '.join(kernels.ROOMS)} (default: all)")
    parser.add_argument("--form", choices=["triton", "cuda"], help="only this form")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write every row as JSON")
    parser.add_argument("--all", action="store_true", help="print a row for each kernel, not only the summary")
    parser.add_argument("--quick", action="store_true", help="only the Triton launches that the test-suite compiles")
    options = parser.parse_args(argv)
    for op in options.op:
        if op not in kernels.ROOMS:
            parser.error(f"unknown op {op!r}: expected some of {', '.join(kernels.ROOMS)}")
    forms = (options.form,) if options.form else ("triton", "cuda")
    rows, unseen, errors = collect(options.op or kernels.ROOMS, forms, options.quick)
    if options.all:
        print(table(rows) + "\n")
    print(show_summary(rows))
    for sentence in unseen:
        print(f"not looked at: {sentence}")
    for sentence in errors:
        print(f"error: {sentence}", file=sys.stderr)
    failing = [r for r in rows if r.failures]
    for r in failing:
        print(f"FAILED {r.op} {r.form} {r.kernel} ({r.case}) {r.arch}: {'; '.join(r.failures)}")
    if options.json:
        from bench.harness import machine

        facts = {"machine": machine(), "not_looked_at": unseen, "errors": errors, "summary": summary(rows)}
        options.json.write_text(json.dumps({**facts, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return 1 if failing or errors else 0
