"""What an sdist, a wheel and an installation must hold, and what happens where no compiler is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

USE_IT = (
    # An editable installation's finder would serve this checkout's compiled module to the installed package.
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
    "import torch, mmfast; layout = mmfast.Layout.from_lengths([3, 0, 5]);"
    "x = torch.randn(8, 2, 8); out = mmfast.attention(x, x, x, layout); assert out.shape == x.shape;"
    "import mmfast.kernels; print(mmfast.__file__, mmfast.kernels.__file__, 'ran')"
)


def run(*command, cwd, **env):
    environment = {**os.environ, **env}
    environment.pop("PYTHONPATH", None)
    environment.update(env)
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def sources(pattern: str) -> set[str]:
    """Files below the root that git tracks or would track; without git, all of them."""
    return {str(p.relative_to(ROOT)) for p in ROOT.glob(pattern) if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (archive,) = out.glob("mmfast-*.tar.gz")
    return archive


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {"/".join(n.split("/")[1:]) for n in archive.getnames()}
    wanted = sources("mmfast/**/*.py") | sources("kernels/*.py") | sources("tests/*.py") | sources("tests/*.txt")
    for suffix in ("cpp", "h", "cu", "cuh"):
        wanted |= sources(f"csrc/**/*.{suffix}") | sources(f"tests/cuda_shim/**/*.{suffix}")
    assert "csrc/cuda/attention_forward.cuh" in wanted and "tests/cuda_shim/cuda/ptx.h" in wanted
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
    assert not wanted - names, f"missing from the sdist: {sorted(wanted - names)}"
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_wheel_from_the_sdist_is_complete_and_runs_elsewhere(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "src", filter="data")
    (tree,) = (tmp_path / "src").iterdir()
    wheel = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    printed = run(*wheel, cwd=tmp_path, MMFAST_BUILD_CUDA="0", MMFAST_PORTABLE="1")
    assert "the CUDA kernels are not built: MMFAST_BUILD_CUDA=0" in printed
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert not sources("mmfast/**/*.py") - names
    assert not {f"mmfast/{name}" for name in sources("kernels/*.py")} - names
    assert [n.split(".")[0] for n in names if n.endswith(".so")] == ["mmfast/_cpu"]
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "benchmarks/", "kernels/"))]
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    printed = run(sys.executable, "-c", USE_IT, cwd=tmp_path, PYTHONPATH=str(site))
    assert str(site) in printed and "reference" not in printed
    for wish in (
        "print(mmfast.info.collect()['backends']['cuda'])",
        "mmfast.attention(x, x, x, layout, backend='cuda')",
    ):
        code = f"{USE_IT}; import mmfast.info\ntry: {wish}\nexcept RuntimeError as error: print(error)"
        printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
        assert "mmfast._cuda cannot be imported" in printed and "install the CUDA toolkit (nvcc)" in printed


def test_without_a_compiler_the_package_installs_says_so_and_works(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "src", filter="data")
    (tree,) = (tmp_path / "src").iterdir()
    empty = tmp_path / "bin"
    empty.mkdir()
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--target", site]
    printed = run(*install, tree, cwd=tmp_path, PATH=str(empty), CXX="")
    assert "no C++ compiler was found" in printed and "reference backend" in printed
    assert "the CUDA kernels are not built" in printed
    printed = run(sys.executable, "-c", USE_IT, cwd=tmp_path, PYTHONPATH=str(site), PATH=str(empty))
    assert str(site) in printed
    assert "reference backend" in printed, "falling back must be logged"


def test_the_kernels_folder_is_importable_under_its_own_name_only():
    command = [sys.executable, "-c", "from kernels import attention"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode and "its name is mmfast.kernels" in result.stderr


@pytest.mark.slow
def test_an_editable_installation_finds_the_kernels(tmp_path):
    tree = tmp_path / "tree"
    for name in ("mmfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site]
    run(*install, "-e", tree, cwd=tmp_path, MMFAST_BUILD_CPU="0", MMFAST_BUILD_CUDA="0")
    # This checkout's own editable finder bears the same name.
    code = (
        "import sys, site; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "[sys.modules.pop(name) for name in list(sys.modules) if '__editable__' in name];"
        f"sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r});"
        "import mmfast.kernels; print(mmfast.kernels.__file__)"
    )
    assert str(tree / "kernels") in run(sys.executable, "-c", code, cwd=tmp_path)


def test_setup_py_imports_no_torch():
    assert "import torch" not in (ROOT / "setup.py").read_text()


@pytest.mark.skipif(not shutil.which("nm"), reason="binutils are not installed")
def test_kernels_of_one_instruction_set_share_nothing_with_another():
    """A weak symbol outside its own namespace would be merged by the linker and could hold the wrong instructions."""
    objects = [p for p in (ROOT / "build").rglob("*.o") if p.name.count(".") == 2 and "asan" not in p.parts]
    objects = [p for p in objects if p.name.split(".")[1] in ("avx2", "avx512", "avx512_bf16")]
    if not objects:
        pytest.skip("no object files here: installed without building in place")
    for path in objects:
        isa = path.name.split(".")[1]
        listing = run("nm", "-C", "--defined-only", path, cwd=ROOT).splitlines()
        for line in listing:
            kind, name = line.split(maxsplit=2)[1:]
            if name.startswith("DW.ref."):  # a pointer for exception tables: data, the same everywhere
                continue
            own = name.startswith(f"mmfast::{isa}::")
            assert kind not in "WVu" or own, f"{path.name} defines the shared symbol {name}"
            assert kind != "T" or own, f"{path.name} exports {name}"
