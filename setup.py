"""Builds mmfast's compiled modules. Imports no torch, so that pip's build isolation works.

`mmfast._cpu` is built from `csrc/bindings` (pybind11, compiled once) and `csrc/cpu/<op>.cpp`, compiled once per
instruction set and chosen at run time. Without a C++ compiler the package still installs, with the reference backend.

`mmfast._cuda` is built from `csrc/bindings/cuda` and `csrc/cuda/<op>.cu` where nvcc is found. It holds the CUDA
runtime, so that it needs nothing but the driver, and can be imported without one.

Environment: MMFAST_BUILD_CPU=0 skips the CPU kernels; MMFAST_PORTABLE=1 compiles the portable instruction set only,
which is quicker; MMFAST_CXXFLAGS adds compiler flags (sanitizers); CXX names the compiler. MMFAST_BUILD_CUDA=0 skips
the CUDA kernels, 1 fails where they cannot be built; MMFAST_CUDA_ARCHS lists the architectures, "80;90a" by default
(Ampere to Ada, and Hopper; on others the driver compiles the first one's PTX); NVCC names CUDA's compiler. MAX_JOBS
bounds the parallel jobs.
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


def find_nvcc() -> str | None:
    """$NVCC, else nvcc in CUDA_HOME, CUDA_PATH, the path, or where NVIDIA's packages install it."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for folder in folders:
        if folder and (found := shutil.which("nvcc", path=str(Path(folder, "bin")))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_archs() -> list[str]:
    return os.environ.get("MMFAST_CUDA_ARCHS", "80;90a").replace(",", ";").strip(";").split(";")


class BuildNative(build_ext):
    """Compiles with ninja: all files in parallel, again only what changed."""

    def run(self):
        refusals = {"mmfast._cpu": self.cpu_refusal(), "mmfast._cuda": self.cuda_refusal()}
        if os.environ.get("MMFAST_BUILD_CUDA") == "1" and refusals["mmfast._cuda"]:
            raise RuntimeError(f"mmfast: MMFAST_BUILD_CUDA=1, but {refusals['mmfast._cuda']}")
        for name, reason in refusals.items():
            if reason:
                instead = "The package works with the reference backend." if name == "mmfast._cpu" else ""
                kind = "CPU" if name == "mmfast._cpu" else "CUDA"
                print(f"mmfast: the {kind} kernels are not built: {reason}. {instead}".rstrip(), file=sys.stderr)
        self.extensions = [e for e in self.extensions if not refusals[e.name]]
        if self.extensions:
            super().run()

    def toolchain_refusal(self) -> str | None:
        """What every compiled module lacks here, or None."""
        if sys.platform != "linux":
            return f"{sys.platform} is not supported yet; Linux is"
        if find_compiler() is None:
            return "no C++ compiler was found (tried $CXX, g++, clang++, c++); on Debian: apt-get install g++"
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        return None if header.exists() else f"{header} is missing; on Debian: apt-get install python3-dev"

    def cpu_refusal(self) -> str | None:
        return "MMFAST_BUILD_CPU=0" if os.environ.get("MMFAST_BUILD_CPU", "1") == "0" else self.toolchain_refusal()

    def cuda_refusal(self) -> str | None:
        if os.environ.get("MMFAST_BUILD_CUDA") == "0":
            return "MMFAST_BUILD_CUDA=0"
        if find_nvcc() is None:
            return "nvcc was not found (tried $NVCC, CUDA_HOME, CUDA_PATH, the path); install the CUDA toolkit"
        return self.toolchain_refusal()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        temp = Path(self.build_temp).resolve() / ext.name
        temp.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        ninja_file = cuda_ninja_file if ext.name == "mmfast._cuda" else cpu_ninja_file
        (temp / "build.ninja").write_text(ninja_file(target, [*self.compiler.include_dirs]))
        jobs = os.environ.get("MAX_JOBS")
        command = [*ninja_command(), "-C", str(temp), *(["-j", jobs] if jobs else [])]
        if self.verbose > 1:
            command.append("-v")
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"mmfast: compiling {ext.name} failed; the compiler's message is above") from error


def ninja_command() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        pass
    if shutil.which("ninja"):
        return [shutil.which("ninja")]
    raise RuntimeError("mmfast: ninja is needed to build the kernels; pip install ninja")


INCLUDES = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}"]


def python_flags(include_dirs: list[str]) -> str:
    import pybind11

    folders = (*include_dirs, sysconfig.get_paths()["include"], pybind11.get_include())
    return " ".join(f"-isystem {path}" for path in folders)


def compile_rule(flags: list[str]) -> list[str]:
    cache = "ccache " if shutil.which("ccache") else ""
    return [
        f"cxx = {cache}{find_compiler()}",
        f"flags = {' '.join(flags + INCLUDES)}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]


def cpu_ninja_file(target: Path, include_dirs: list[str]) -> str:
    """The text of build.ninja: bindings once, every kernel once per instruction set, one link."""
    names = isas()
    flags = [
        *CXXFLAGS,
        *(f"-DMMFAST_HAS_{name.upper()}" for name in names),
        *os.environ.get("MMFAST_CXXFLAGS", "").split(),
    ]
    lines = [
        *compile_rule(flags),
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
        compile(source, f"{source.stem}.binding.o", f"-O1 {python_flags(include_dirs)}")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def cuda_bindings() -> list[Path]:
    return [ROOT / "csrc/bindings/torch_tensor.cpp", *sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp"))]


def cuda_ninja_file(target: Path, include_dirs: list[str]) -> str:
    """The text of build.ninja. `<op>.o.log` keeps ptxas's figures: registers, spills, shared memory of each kernel."""
    first, *_ = archs = cuda_archs()
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{first},code=compute_{first}")
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    device = [
        "-std=c++17",
        "-O3",
        "-DMMFAST_CUDA_MODULE",
        *codes,
        "-Xptxas=-v",
        "-Wno-deprecated-gpu-targets",
        *(f"-Xcompiler={f}" for f in host),
    ]
    binding = ["-std=c++17", "-O1", *host, "-DMMFAST_CUDA_MODULE", python_flags(include_dirs)]
    lines = [
        *compile_rule(binding),
        f"nvcc = {find_nvcc()} -ccbin {find_compiler()}",
        "rule nvcc",
        f"  command = $nvcc {' '.join(device + INCLUDES)} -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log >&2; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $out",
        "rule link",
        "  command = $nvcc -shared --cudart=static -Wno-deprecated-gpu-targets $in -o $out",
        "  description = link $out",
    ]
    kernels = [(source, f"{source.stem}.o") for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    bindings = [(source, f"{source.stem}.binding.o") for source in cuda_bindings()]
    lines.extend(f"build {obj}: nvcc {source}" for source, obj in kernels)
    lines.extend(f"build {obj}: compile {source}" for source, obj in bindings)
    lines.append(f"build {target}: link {' '.join(obj for _, obj in kernels + bindings)}")
    return "\n".join(lines) + "\n"


setup(
    packages=[*find_packages(include=["mmfast", "mmfast.*"]), "mmfast.kernels"],
    package_dir={"mmfast": "mmfast", "mmfast.kernels": "kernels"},
    ext_modules=[Extension("mmfast._cpu", sources=[]), Extension("mmfast._cuda", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
