"""Registration with torch.library, the same way for every op."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("mmfast", "FRAGMENT")


def define(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `mmfast::<schema>` and returns its default overload.

    Args:
        schema: name and signature in torch's schema language.
        cpu: implementation over CPU tensors.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        setup_context, backward: the autograd formula, as for torch.library.register_autograd.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"mmfast::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.mmfast, name).default


def no_double_backward(op: str) -> Callable:
    """The autograd formula of a backward op: raises instead of dropping second-order terms."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f'{op}: the kernels are once differentiable; for second derivatives pass backend="reference"'
        )

    return backward
