"""Builds `mmfast._cuda` for the CPU: the same kernels and bindings, by g++ and the headers of this folder.

A thread of a block becomes a fibre, so that every line of csrc/cuda runs without a GPU, without nvcc and without
CUDA's headers. fibres.h says what it notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache/cuda_shim"

compiler = os.environ.get("CXX") or "g++"
refusal = None if shutil.which(compiler.split()[0]) else f"no C++ compiler: {compiler} was not found"

_FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-psabi -Wno-unknown-pragmas"
    " -U_FORTIFY_SOURCE -DMMFAST_CUDA_MODULE -DMMFAST_CUDA_SHIM"  # a fortified longjmp refuses to change stacks
)


def build(sources: Path = ROOT / "csrc", flags: str | None = None, name: str = "_cuda") -> Path:
    """The module's file; compiles what changed. `sources` is csrc, or a copy of it; flags None: MMFAST_CXXFLAGS."""
    flags = os.environ.get("MMFAST_CXXFLAGS", "") if flags is None else flags
    bindings = [sources / "bindings/torch_tensor.cpp", *sorted((sources / "bindings/cuda").glob("*.cpp"))]
    return compile_module(name, sorted((sources / "cuda").glob("*.cu")), bindings, sources, flags)


def compile_module(name: str, kernels: list[Path], bindings: list[Path], sources: Path, flags: str = "") -> Path:
    import ninja
    import pybind11

    python = [f"-isystem {p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    includes = f"-I{HERE} -I{sources / 'include'} -I{sources}"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    rules = [
        f"cxx = {'ccache ' if shutil.which('ccache') else ''}{compiler}",
        "rule compile",
        f"  command = $cxx {_FLAGS} {includes} {flags} $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out",
    ]
    objects = []
    for source in [*kernels, HERE / "fibres.cpp", *bindings]:
        kind = "binding" if source in bindings else "kernel"
        objects.append(f"{source.stem}.{kind}.o")
        extra = " ".join(["-O1", *python]) if kind == "binding" else "-x c++ -include cuda_runtime.h"
        rules += [f"build {objects[-1]}: compile {source}", f"  extra = {extra}"]
    rules.append(f"build {name}{suffix}: link {' '.join(objects)}")
    text = "\n".join(rules) + "\n"
    folder = CACHE / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test runs share the folder
        (folder / "build.ninja").write_text(text)
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, *(["-j", jobs] if jobs else [])]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile for the CPU\n{result.stdout[-8000:]}")
    return folder / f"{name}{suffix}"


def load(path: Path) -> ModuleType:
    # A name of its own: pybind11 gives what it has made under a name before.
    name = f"cuda_shim.{path.parent.name}.{path.name.split('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def use():
    """Within the context backend "cuda" runs on the CPU."""
    from mmfast import _native

    with _native.use_cuda(load(build())):
        yield _native.cuda()
