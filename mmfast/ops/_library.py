"""Registration with torch.library, the same way for every op, and the short way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import profiler

_library = torch.library.Library("mmfast", "FRAGMENT")


def define(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `mmfast::<schema>` and returns a function that runs it; the default overload is its attribute `op`.

    The function calls `cpu` itself where nothing would look at the call on its way through the dispatcher, whose Python
    layers cost more than a small kernel.

    Args:
        schema: name and signature in torch's schema language.
        cpu: implementation over CPU tensors. It counts the versions of tensors that it changes.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        setup_context, backward: the autograd formula, as for torch.library.register_autograd.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"mmfast::{name}", backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.mmfast, name).default
    # Tensors in lists and formulas that only raise are left to the dispatcher.
    short = setup_context is not None and "Tensor[]" not in schema
    function = _function(name, cpu, setup_context, backward) if short else None

    def call(*args):
        if torch.compiler.is_compiling() or _observed():
            return op(*args)
        differentiable = False
        for tensor in _tensors(args):
            if type(tensor) not in _ORDINARY or not tensor.is_cpu or tensor.is_neg():
                return op(*args)
            differentiable |= tensor.requires_grad
        if not differentiable or not torch.is_grad_enabled():
            return cpu(*args)
        return op(*args) if function is None else function.apply(*args)

    call.op = op
    return call


_ORDINARY = (Tensor, torch.nn.Parameter)


def _observed() -> bool:
    """Whether a mode, a transform, a trace or a profiler wants to see every op."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or profiler._is_profiler_enabled
    )


def _tensors(args: Sequence) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list):
            yield from (x for x in arg if isinstance(x, Tensor))


def _function(name: str, cpu: Callable, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    def forward(ctx, *args):
        output = cpu(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), methods)


def no_double_backward(op: str) -> Callable:
    """The autograd formula of a backward op: raises instead of dropping second-order terms."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f'{op}: the kernels are once differentiable; for second derivatives pass backend="reference"'
        )

    return backward
