"""mmfast's Triton kernels, one file per op; they import torch and triton only. Importing this package imports neither.

The folder lies at the top of the source tree and is installed as `mmfast.kernels` (setup.py maps it).
"""

if __name__ != "mmfast.kernels":
    # Beside a source tree, transformers finds this folder where it looks for another project's package, and asks for
    # its version: 0 is too old for it.
    __version__ = "0"

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"mmfast: the folder of Triton kernels was imported as {__name__!r}; its name is mmfast.kernels, and the "
            "name 'kernels' belongs to another project: install mmfast, or leave its source folder"
        )
