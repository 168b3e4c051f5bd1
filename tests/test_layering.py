"""Holds the directions of the tree: who may import whom. Reads the sources, imports nothing of the project."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A layer may import the layers named here, and itself. Names are the first component below `mmfast`.
ALLOWED = {
    "layout": set(),
    "mask": {"layout"},
    "_native": set(),
    "reference": {"layout", "mask"},
    "kernels": set(),
    "backends": {"layout", "mask"},
    "ops": {"layout", "mask", "reference", "kernels", "_native", "backends"},
    "nn": {"layout", "mask", "ops"},
    "models": {"layout", "mask", "ops", "nn"},
    "adversarial": {"layout", "mask", "ops", "nn", "models"},
    "data": {"layout", "mask", "ops", "nn", "models"},
    "tasks": {"layout", "mask", "ops", "nn", "models", "data", "adversarial"},
    "train": {"layout", "mask", "ops", "nn", "models", "data", "adversarial", "tasks", "plot", "info"},
    "plot": {"layout", "mask", "ops", "nn"},
    "compat": {"layout", "mask", "ops", "nn"},
    "integrations": {"layout", "mask", "ops", "nn", "compat"},
    "info": {"_native", "backends", "ops", "data"},
    "testing": {"layout", "mask", "_native", "kernels", "ops", "nn", "reference", "models", "data"},
    "cli": {"train", "data", "info", "tasks", "testing"},
    "__main__": {"cli"},
    "__init__": {"layout", "mask", "ops", "nn", "adversarial"},
}


def imports(path: Path) -> set[str]:
    """Modules below `mmfast` that a file imports, anywhere in it; strings under TYPE_CHECKING count too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = inside[: len(inside) - node.level]
                base = ".".join([*package, base] if base else package)
            found |= {f"{base}.{alias.name}" if base == "mmfast" else base for alias in node.names}
    return {name for name in found if name == "mmfast" or name.startswith("mmfast.")}


PYTHON_FILES = sorted((ROOT / "mmfast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_downwards(path):
    parts = path.relative_to(ROOT / "mmfast").with_suffix("").parts
    layer = parts[0]
    assert layer in ALLOWED, f"{path} is in no layer: add it to ALLOWED, with what it may import"
    for name in imports(path):
        target = name.split(".")[1] if "." in name else None
        if target is None or target in ("__version__", layer) or (target in ("_cpu", "_cuda") and layer == "_native"):
            continue
        if target not in ALLOWED and layer not in ("_native", "ops", "reference", "layout", "mask"):
            continue  # a public name of the package, such as mmfast.attention
        assert target in ALLOWED[layer], f"{path.relative_to(ROOT)} imports {name}: not below {layer}"


def test_low_layers_never_import_the_package_itself():
    for path in PYTHON_FILES:
        layer = path.relative_to(ROOT / "mmfast").parts[0].removesuffix(".py")
        if layer in ("layout", "mask", "_native", "reference", "ops", "kernels", "backends"):
            assert "mmfast" not in imports(path), f"{path.relative_to(ROOT)} imports mmfast itself"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            found.add(node.module)
    foreign = {n for n in found if n.split(".")[0] not in {*sys.stdlib_module_names, "torch", "triton"}}
    assert all(n.startswith("mmfast.kernels") for n in foreign), f"{path.name} imports {foreign}"


def test_only_native_imports_compiled_modules():
    for path in PYTHON_FILES:
        compiled = {name for name in imports(path) if name.split(".")[1:2] in (["_cpu"], ["_cuda"])}
        assert not compiled or path.name == "_native.py", f"{path.relative_to(ROOT)} imports {compiled}"


def c_includes(path: Path) -> list[str]:
    return re.findall(r'#\s*include\s*["<]([^">]+)[">]', path.read_text(encoding="utf-8"))


C_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))


@pytest.mark.parametrize("path", C_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_csrc_includes_point_downwards(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for name in c_includes(path):
        assert not re.match(r"(torch|ATen|c10)/", name), f"{path}: framework header {name}"
        if name.startswith("pybind11") or name == "Python.h":
            assert folder == "bindings", f"{path}: only csrc/bindings uses {name}"
        if name.startswith("bindings/"):
            assert folder == "bindings", f"{path}: includes {name} from below"
        if name.startswith(("cpu/", "cuda/")):
            assert folder in ("bindings", name.split("/")[0]), f"{path}: includes {name}"


@pytest.mark.parametrize("path", [p for p in C_FILES if p.parent.name == "cuda"], ids=lambda p: p.name)
def test_ptx_and_launches_have_one_place_each(path):
    """Everything else runs on the CPU too, and waits for no GPU."""
    text = path.read_text(encoding="utf-8")
    assert path.name == "ptx.h" or not re.search(r"\basm\b", text), f"{path}: inline PTX belongs into ptx.h"
    assert path.name == "launch.h" or "cudaLaunch" not in text, f"{path}: launches go through launch.h"
    assert not re.search(r"<<<|cudaMalloc|cuda\w*Synchronize", text), path


def test_an_op_has_the_same_stem_everywhere():
    ops = {p.stem for p in (ROOT / "mmfast/ops").glob("[a-z]*.py")}
    bindings = {p.stem for p in (ROOT / "csrc/bindings").rglob("*.cpp")} - {"module", "torch_tensor"}
    assert bindings <= ops, f"bindings without an op: {bindings - ops}"
    kernels = {p.stem for p in KERNELS if not p.stem.startswith("_")}
    assert kernels <= ops, f"Triton kernels without an op: {kernels - ops}"
    for kernel in sorted(kernels):
        assert (ROOT / f"tests/test_triton_{kernel}.py").exists(), f"kernels/{kernel}.py has no tests"
    for op in sorted(ops):
        assert (ROOT / f"mmfast/reference/{op}.py").exists(), f"{op} has no reference"
        assert (ROOT / f"tests/test_{op}.py").exists(), f"{op} has no tests"
        assert (ROOT / f"benchmarks/bench_{op}.py").exists(), f"{op} has no benchmark"
        assert list((ROOT / "csrc/cpu").glob(f"{op}*.cpp")), f"{op} has no CPU kernel"


def test_top_level_import_is_light():
    """`import mmfast` must not pull in optional packages."""
    optional = {
        "PIL",
        "fontTools",
        "matplotlib",
        "soundfile",
        "tqdm",
        "tensorboard",
        "transformers",
        "triton",
        "resvg_py",
        "flash_attn",
        "xformers",
    }
    for path in PYTHON_FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            heavy = {n.split(".")[0] for n in names if n} & optional
            assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at module level; import it where it is used"
