"""Builds mmfast's compiled modules. Imports no torch, so that pip's build isolation works.

`mmfast._cpu` is built from `csrc/bindings` (pybind11, compiled once) and `csrc/cpu/<op>.cpp`, compiled once per
instruction set and chosen at run time. Without a C++ compiler the package still installs, with the reference backend.

Environment: MMFAST_BUILD_CPU=0 skips the module; MMFAST_PORTABLE=1 compiles the portable instruction set only, which is
quicker; MMFAST_CXXFLAGS adds compiler flags (sanitizers); CXX names the compiler; MAX_JOBS bounds the parallel jobs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

X86_ISAS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16"]

CXXFLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]


def isas() -> dict[str, list[str]]:
    """Instruction sets to compile for, with their flags; other machines than x86-64 get the portable build only."""
    portable = os.environ.get("MMFAST_PORTABLE", "0") == "1"
    return X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") and not portable else {"scalar": []}


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


class BuildNative(build_ext):
    """Compiles with ninja: all files in parallel, again only what changed."""

    def run(self):
        if os.environ.get("MMFAST_BUILD_CPU", "1") == "0":
            return self.skip("MMFAST_BUILD_CPU=0")
        if sys.platform != "linux":
            return self.skip(f"{sys.platform} is not supported yet; Linux is")
        if find_compiler() is None:
            return self.skip(
                "no C++ compiler was found (tried $CXX, g++, clang++, c++); on Debian: apt-get install g++"
            )
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.exists():
            return self.skip(f"{header} is missing; on Debian: apt-get install python3-dev")
        super().run()

    def skip(self, reason: str):
        print(
            f"mmfast: the CPU kernels are not built: {reason}. The package works with the reference backend.",
            file=sys.stderr,
        )
        self.extensions = []

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve() / ext.name
        temp.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(target, [*self.compiler.include_dirs]))
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja_command(), "-C", str(temp), *(["-j", jobs] if jobs else [])]
        if self.verbose > 1:
            command.append("-v")
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError("mmfast: compiling the CPU kernels failed; the compiler's message is above") from error


def ninja_command() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        pass
    if shutil.which("ninja"):
        return [shutil.which("ninja")]
    raise RuntimeError("mmfast: ninja is needed to build the CPU kernels; pip install ninja")


def ninja_file(target: Path, python_include: list[str]) -> str:
    """The text of build.ninja: bindings once, every kernel once per instruction set, one link."""
    import pybind11

    includes = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}"]
    python = [
        f"-isystem {path}" for path in (*python_include, sysconfig.get_paths()["include"], pybind11.get_include())
    ]
    names = isas()
    flags = [
        *CXXFLAGS,
        *(f"-DMMFAST_HAS_{name.upper()}" for name in names),
        *os.environ.get("MMFAST_CXXFLAGS", "").split(),
    ]
    cache = "ccache " if shutil.which("ccache") else ""
    lines = [
        f"cxx = {cache}{find_compiler()}",
        f"flags = {' '.join(flags + includes)}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx $flags -shared -Wl,--gc-sections $in -o $out",
        "  description = link $out",
    ]
    objects = []

    def compile(source: Path, obj: str, extra: str):
        objects.append(obj)
        lines.extend([f"build {obj}: compile {source}", f"  extra = {extra}"])

    # The widest instruction sets first: they compile longest.
    for name in reversed(names):
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            compile(
                source,
                f"{source.stem}.{name}.o",
                f"-DMMFAST_ISA={name} -DMMFAST_ISA_{name.upper()} {' '.join(names[name])}",
            )
    for source in sorted((ROOT / "csrc/bindings").glob("*.cpp")):
        compile(source, f"{source.stem}.binding.o", " ".join(["-O1", *python]))
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


setup(
    packages=[*find_packages(include=["mmfast", "mmfast.*"]), "mmfast.kernels"],
    package_dir={"mmfast": "mmfast", "mmfast.kernels": "kernels"},
    ext_modules=[Extension("mmfast._cpu", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
