"""Registration with torch.library, the same way for every op, and the short way past the dispatcher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import profiler

_library = torch.library.Library("mmfast", "FRAGMENT")


def define(
    schema: str,
    *,
    cpu: Callable,
    triton: Callable | None = None,
    cuda: Callable | None = None,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `mmfast::<schema>` and returns a function that runs it; the default overload is its attribute `op`.

    The function calls the implementation itself where nothing would look at the call on its way through the
    dispatcher, whose Python layers cost more than a small kernel.

    An op with kernels for GPUs has one more argument, `str backend`, last in its schema: "cpu", "triton" or "cuda", as
    `_dispatch.choose` said. The implementations and the fake do not get it; `setup_context` finds it in `inputs[-1]`,
    and the gradient formula passes it on to the backward op.

    Args:
        schema: name and signature in torch's schema language.
        cpu: implementation over CPU tensors. It counts the versions of tensors that it changes.
        triton: implementation by Triton kernels, over tensors on a GPU, or on the CPU where kernels are interpreted.
        cuda: implementation by the compiled CUDA kernels; where there are Triton kernels.
        fake: shapes and dtypes of the outputs, for torch.compile and export.
        setup_context, backward: the autograd formula, as for torch.library.register_autograd.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    run = cpu
    if triton is None:
        _library.impl(name, cpu, "CPU")
    else:
        if "str backend) ->" not in schema:
            raise ValueError(f"define: {name} has Triton kernels, so its last argument must be 'str backend'")

        def run(*args):
            if args[-1] == "cpu":
                return cpu(*args[:-1])
            with torch.cuda.device_of(_first_tensor(args)):  # kernels are launched on the current device
                return (cuda if args[-1] == "cuda" else triton)(*args[:-1])

        _library.impl(name, run, "CPU")
        _library.impl(name, run, "CUDA")  # PyTorch's name for AMD's GPUs too
        fake = _without_backend(fake)
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"mmfast::{name}", backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.mmfast, name).default
    function = None if setup_context is None else _function(name, op._schema, run, setup_context, backward)
    places = [i for i, argument in enumerate(op._schema.arguments) if "Tensor" in str(argument.type)]

    def call(*args):
        tensors = []
        for i in places:
            arg = args[i]
            if type(arg) is list:
                tensors += arg
            elif arg is not None:
                tensors.append(arg)
        if not plain(tensors):
            return op(*args)
        leaves = [t for t in tensors if t is not None and t.requires_grad] if torch.is_grad_enabled() else None
        if not leaves:
            return run(*args)
        if function is None:  # a formula that raises is left to the dispatcher
            return op(*args)
        asked = [False] * len(args)
        for i in places:
            arg = args[i]
            if arg is not None:
                asked[i] = [x is not None and x.requires_grad for x in arg] if type(arg) is list else arg.requires_grad
        return function.apply(args, asked, *leaves)

    call.op = op
    return call


_ORDINARY = {Tensor, torch.nn.Parameter}


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call may go past the dispatcher: nobody looks at it, and the tensors are what lies in CPU memory."""
    if torch.compiler.is_compiling() or _observed():
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _ORDINARY or not t.is_cpu or t.is_neg():
            return False
    return True


def _observed() -> bool:
    """Whether a mode, a transform, a trace or a profiler wants to see every op."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or profiler._is_profiler_enabled
    )


def _function(
    name: str, schema: torch.FunctionSchema, run: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The formula as a torch.autograd.Function of what needs a gradient; all arguments come along as one tuple."""
    gives_list = str(schema.returns[0].type) == "List[Tensor]"

    def forward(ctx, args, asked, *leaves):
        output = run(*args)
        ctx.needs_input_grad = asked
        setup_context(ctx, args, output)
        return output if isinstance(output, Tensor) else tuple(output)

    def apply_formula(ctx, *grads):
        grads = backward(ctx, list(grads)) if gives_list else backward(ctx, *grads)
        result = [None, None]
        for want, grad in zip(ctx.needs_input_grad, grads):
            if want is True:
                result.append(grad)
            elif want:
                result += itertools.compress(itertools.repeat(None) if grad is None else grad, want)
        return tuple(result)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(apply_formula)}
    return type(name, (torch.autograd.Function,), methods)


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
