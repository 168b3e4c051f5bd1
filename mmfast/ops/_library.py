"""Registration with torch.library, the same way for every op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("mmfast", "FRAGMENT")


def define(
    schema: str,
    *,
    cpu: Callable,
    triton: Callable | None = None,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `mmfast::<schema>` and returns its default overload.

    An op with Triton kernels has one more argument, `str backend`, last in its schema: "cpu" or "triton", as
    `_dispatch.choose` said. The implementations and the fake do not get it; `setup_context` finds it in `inputs[-1]`,
    and the gradient formula passes it on to the backward op.

    Args:
        schema: name and signature in torch's schema language.
        cpu: implementation over CPU tensors.
        triton: implementation by Triton kernels, over tensors on a GPU, or on the CPU where kernels are interpreted.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        setup_context, backward: the autograd formula, as for torch.library.register_autograd.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    if triton is None:
        _library.impl(name, cpu, "CPU")
    else:
        if "str backend) ->" not in schema:
            raise ValueError(f"define: {name} has Triton kernels, so its last argument must be 'str backend'")

        def run(*args):
            if args[-1] == "cpu":
                return cpu(*args[:-1])
            with torch.cuda.device_of(_first_tensor(args)):  # Triton launches on the current device
                return triton(*args[:-1])

        _library.impl(name, run, "CPU")
        _library.impl(name, run, "CUDA")  # PyTorch's name for AMD's GPUs too
        fake = _without_backend(fake)
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"mmfast::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.mmfast, name).default


def _without_backend(function: Callable) -> Callable:
    return lambda *args: function(*args[:-1])


def _first_tensor(args) -> Tensor:
    for a in args:
        for x in a if isinstance(a, (list, tuple)) else (a,):
            if isinstance(x, Tensor):
                return x
    raise ValueError("no tensor among the arguments")


def no_double_backward(op: str) -> Callable:
    """The autograd formula of a backward op: raises instead of dropping second-order terms."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f'{op}: the kernels are once differentiable; for second derivatives pass backend="reference"'
        )

    return backward
