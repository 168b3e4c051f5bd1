"""A source tree that is used through PYTHONPATH: makes its `kernels` folder importable, as installing it does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mmfast

FOLDER = Path(mmfast.__file__).resolve().parent.parent / "kernels"


def use_kernels() -> None:
    """Binds `mmfast.kernels` to the folder beside the imported package, before an installed one could be found."""
    file = FOLDER / "__init__.py"
    if not file.exists() or "mmfast.kernels" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("mmfast.kernels", file, submodule_search_locations=[str(FOLDER)])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["mmfast.kernels"] = mmfast.kernels = module
