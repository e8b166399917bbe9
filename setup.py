"""Builds the native module ``infoclip._C`` with CMake and maps each room of ``kernels/`` to ``infoclip.kernels.<op>``.

``INFOCLIP_CUDA=0`` builds without the CUDA sources, ``1`` demands them; unset takes nvcc if it is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def rooms() -> dict[str, str]:
    """Every op's folder under ``kernels/``, by the name of the package that it becomes."""
    return {
        f"infoclip.kernels.{init.parent.name}": f"kernels/{init.parent.name}"
        for init in sorted((ROOT / "kernels").glob("*/__init__.py"))
    }


def script(name: str) -> str | None:
    """A build tool: the wheel beside this interpreter first (an isolated build puts it there), then the PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


class CMakeBuild(build_ext):
    """One CMake configure and build in a fresh folder: a cache left by another interpreter would break it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        wanted = os.environ.get("INFOCLIP_CUDA", "").strip()
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"error: INFOCLIP_CUDA={wanted}: expected 0, 1 or unset.")
        cmake = script("cmake")
        if cmake is None:
            raise SystemExit("error: cmake was not found: pip install cmake ninja, then build again.")
        import pybind11

        arguments = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DINFOCLIP_CUDA={ {'': 'AUTO', '0': 'OFF', '1': 'ON'}[wanted] }",
            f"-DINFOCLIP_VERSION={self.distribution.get_version()}",
        ]
        ninja = script("ninja")
        if ninja is not None:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        with tempfile.TemporaryDirectory(prefix="infoclip-build-") as folder:
            library = Path(folder) / "lib"
            arguments.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library}")
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
            subprocess.run([cmake, "-S", str(ROOT), "-B", folder, *arguments], check=True)
            subprocess.run([cmake, "--build", folder, "--parallel", jobs], check=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a process that has the old module loaded keeps it.
            temporary = target.with_name(target.name + ".new")
            shutil.copy2(library / target.name, temporary)
            temporary.replace(target)


setup(
    packages=find_packages(include=["infoclip", "infoclip.*"]) + list(rooms()),
    package_dir=rooms(),
    package_data={"infoclip": ["py.typed", "assets/**/*", "data/classes/*.json", "data/classes/*.txt"]},
    include_package_data=False,
    ext_modules=[Extension("infoclip._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
