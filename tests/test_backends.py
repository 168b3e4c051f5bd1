"""Other libraries' attention as backends: what they are told, against the oracle, and every refusal.

Stand-ins compute what the real functions document. Where the libraries are installed, the stand-ins are compared.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import random
import sys
import types

import pytest
import stand_ins
import torch

import mmfast
from mmfast import Layout, ModalityMask, info
from mmfast.backends import _masks, flash_attn, xformers
from mmfast.testing.numeric import assert_close_to_oracle

PACKAGES = ("flash-attn 2", "flash-attn 4", "xformers")
HOPPER = types.SimpleNamespace(major=9, minor=0, name="Some GPU")


@pytest.fixture
def gpu(monkeypatch):
    """Tensors on the CPU pass for tensors on a Hopper GPU; none of the packages is installed."""
    refusal = _masks.tensor_refusal

    def moved(q, dropout_p):
        return refusal(types.SimpleNamespace(device=torch.device("cuda", 0), dtype=q.dtype), dropout_p)

    monkeypatch.setattr(_masks, "tensor_refusal", moved)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: HOPPER)
    for name in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    yield monkeypatch
    forget()


def forget():
    for function in (flash_attn._import_refusal, flash_attn._function, xformers.installed):
        function.cache_clear()


def install(monkeypatch, package):
    """Puts the stand-in where the package would be; returns the backend's name."""
    name, make = {
        "flash-attn 2": ("flash_attn", stand_ins.flash_attn_2),
        "flash-attn 4": ("flash_attn.cute", stand_ins.flash_attn_4),
        "xformers": ("xformers.ops.fmha", stand_ins.fmha),
    }[package]
    monkeypatch.setitem(sys.modules, name, make())
    if name.count("."):
        for parent in ("xformers.ops", "xformers", "flash_attn"):
            if name.startswith(f"{parent}."):
                monkeypatch.setitem(sys.modules, parent, types.SimpleNamespace(__path__=[]))
    forget()
    return package.split()[0].replace("-", "_")


def results(backend, qkv, dout, layout_q, layout_k, mask, lse, **options):
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = mmfast.attention(*qkv, layout_q, layout_k, mask, backend=backend, return_lse=lse, **options)
    out, *rest = out if lse else (out,)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout), *rest]


def check(backend, qkv, dout, layout_q, layout_k, mask, lse, **options):
    actual = results(backend, qkv, dout, layout_q, layout_k, mask, lse, **options)
    wide = [x.double() for x in qkv]
    oracle = results("reference", wide, dout.double(), layout_q, layout_k, mask, lse, **options)
    peer = results("reference", qkv, dout, layout_q, layout_k, mask, lse, **options)
    for name, a, o, p in zip(("out", "dq", "dk", "dv", "lse"), actual, oracle, peer):
        assert_close_to_oracle(name, a, o.double(), p, gradient=name.startswith("d"))


def random_case(seed, package):
    """Lengths, positions, mask and options that the package can express; NaN in the rows outside the layouts."""
    rng = random.Random(seed)
    batch, cross = rng.randint(1, 5), rng.random() < 0.6
    lengths_k = [rng.randint(1, 40) for _ in range(batch)]
    lengths_q = [rng.randint(1, 40) for _ in range(batch)] if cross else lengths_k
    rule, window = rng.choice(
        [("full", (-1, -1)), ("causal", (-1, -1)), ("causal", (rng.randint(0, 20), rng.choice([-1, 0, 5])))]
        + [("full", (rng.randint(0, 20), 0))]
        + [("full", (rng.randint(-1, 30), rng.randint(-1, 30)))] * (package != "xformers")
    )
    if package == "xformers":  # it takes neither empty samples on one side nor causal ones with more queries than keys
        lengths_q = [min(n, m) for n, m in zip(lengths_q, lengths_k)]
        if rng.random() < 0.3:
            lengths_q, lengths_k = [*lengths_q, 0], [*lengths_k, 0]
    elif cross:
        lengths_q, lengths_k = ([0 if rng.random() < 0.2 else n for n in x] for x in (lengths_q, lengths_k))
    befores, after, shift = [rng.randint(0, 3) for _ in range(2)], rng.randint(0, 3), rng.randint(0, 5)
    befores = befores if cross else befores[:1] * 2

    def layout(lengths, start, before):
        ends = torch.tensor([before, *lengths]).cumsum(0).int()
        longest = rng.choice([None, max(lengths)])
        return Layout(ends, start=torch.tensor(start).int(), max_seqlen=longest)

    layout_q = layout_k = layout(lengths_k, [shift] * len(lengths_k), befores[1])
    if cross:
        layout_q = layout(lengths_q, [shift + m - n for n, m in zip(lengths_q, lengths_k)], befores[0])
    heads_k, dim = rng.choice([1, 2]), rng.choice([8, 32, 64])
    heads = heads_k * rng.choice([1, 3])
    generator = torch.Generator().manual_seed(seed)
    rows_q, rows_k = (before + sum(x) + after for before, x in zip(befores, (lengths_q, lengths_k)))
    shapes = [(rows_q, heads, dim), (rows_k, heads_k, dim), (rows_k, heads_k, dim), (rows_q, heads, dim)]
    dtype = rng.choice([torch.float16, torch.bfloat16])
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    for x, before in zip(tensors, (befores[0], befores[1], befores[1], befores[0])):
        x[:before] = x[x.shape[0] - after :] = torch.nan
    options = {} if rng.random() < 0.5 else {"softmax_scale": rng.uniform(0.05, 0.5)}
    lse = package != "xformers" and rng.random() < 0.5
    if package != "xformers" and rng.random() < 0.3:
        options["softcap"] = 2.0
    mask = getattr(ModalityMask, rule)(window)
    return tensors[:3], tensors[3], layout_q, layout_k, mask, lse, options


@pytest.mark.parametrize("package", PACKAGES)
def test_what_the_library_is_told_is_what_the_mask_says(gpu, package):
    backend = install(gpu, package)
    for seed in range(40):
        *case, options = random_case(seed, package)
        try:
            check(backend, *case, **options)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case[2:]}, {options}") from error


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_to_attend_to(gpu, package):
    backend = install(gpu, package)
    for rows_q, rows_k, ends in ((0, 0, [0]), (2, 3, [0]), (2, 2, [0, 0]), (0, 0, [0, 0, 0])):
        layout = Layout(torch.tensor(ends).int())
        q, k = torch.randn(rows_q, 2, 8).half(), torch.randn(rows_k, 1, 8).half()
        check(backend, [q, k, k.clone()], q.clone(), layout, layout, None, package != "xformers")


@pytest.mark.parametrize("package", PACKAGES)
def test_grouped_heads_and_strided_rows_without_gradients(gpu, package):
    backend = install(gpu, package)
    layout = Layout.from_lengths([5, 9])
    q, k, v = torch.randn(14, 8, 8).half().split([4, 2, 2], dim=1)
    k, v = (x.mT.contiguous().mT for x in (k, v))
    assert k.stride(-1) == v.stride(-1) == 2
    out = mmfast.attention(q, k, v, layout, mask=ModalityMask.causal(), backend=backend)
    oracle, peer = (
        mmfast.attention(*(x.to(dtype) for x in (q, k, v)), layout, mask=ModalityMask.causal(), backend="reference")
        for dtype in (torch.float64, torch.float16)
    )
    assert_close_to_oracle("out", out, oracle, peer)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_table_of_one_rule(gpu, package):
    backend = install(gpu, package)
    layout = Layout(torch.tensor([0, 3, 5]).int(), modality=torch.tensor([0, 1, 1, 0, 1]).byte(), names=("a", "b"))
    q, k, v, dout = torch.randn(4, 5, 2, 8).half()
    check(backend, [q, k, v], dout, layout, layout, ModalityMask.q_former("matching", "a", "b"), False)


def test_what_flash_attention_2_takes_by_the_longest_sample(gpu):
    """It drops a window to the right as wide as the longest keys, lets an unlimited one reach no farther,
    and with one query takes row b for sample b."""
    install(gpu, "flash-attn 2")
    text, image = (Layout.from_lengths(lengths) for lengths in ([9, 4], [3, 2]))
    text = dataclasses.replace(text, start=torch.tensor([-6, -2]).int())
    q, k, v = (torch.randn(rows, 1, 8).half() for rows in (13, 5, 5))
    for window in ((-1, 4), (2, -1)):
        check("flash_attn", [q, k, v], q.clone(), text, image, ModalityMask.full(window), True)
    few, image = Layout.from_lengths([1, 0, 1]), Layout.from_lengths([2, 1, 2])
    check("flash_attn", [q[:2], k, v], q[:2].clone(), few, image, None, True)


# Refusals


def refused(backend, match, layout_q=None, layout_k=None, mask=None, dtype=torch.float16, dim=8, **options):
    layout_q = Layout.from_lengths([4, 3]) if layout_q is None else layout_q
    q = torch.zeros(layout_q.total, 2, dim, dtype=dtype)
    k = q if layout_k is None else torch.zeros(layout_k.total, 2, dim, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"attention: backend '{backend}' cannot run: .*{match}"):
        mmfast.attention(q, k, k, layout_q, layout_k, mask, backend=backend, **options)


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_a_package_that_is_not_installed(gpu, backend):
    refused(backend, f"{backend.replace('_', '-')} is not installed: pip install")
    assert "pip install" in info.collect()["backends"][backend]


def test_a_package_that_breaks_or_is_too_old(gpu):
    def breaks(name):
        raise OSError("undefined symbol")

    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None):
        return q

    gpu.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=old))
    forget()
    refused("flash_attn", "too old: it lacks causal, deterministic.*2.6 or newer")
    gpu.setattr(importlib, "import_module", breaks)
    forget()
    refused("flash_attn", "cannot be imported: OSError: undefined symbol")
    refused("xformers", "cannot be imported: OSError: undefined symbol")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_call_that_the_library_cannot_take(gpu, package):
    backend = install(gpu, package)
    text, image = Layout.from_lengths([4, 3]), Layout.from_lengths([6, 5])
    mixed = Layout(torch.tensor([0, 2]).int(), modality=torch.tensor([0, 1]).byte(), names=("text", "image"))
    seed = torch.zeros(1, dtype=torch.int64)
    refused(backend, "dtype is float32; it takes float16 and bfloat16", dtype=torch.float32)
    refused(backend, "drops other weights", dropout_p=0.1, dropout_seed=seed)
    used = Layout(torch.tensor([0, 3]).int(), seqused=torch.tensor([2]).int(), time=torch.zeros(3).int())
    refused(backend, "has seqused", used, Layout.from_lengths([3]))
    refused(backend, "has seqused", Layout.from_lengths([3]), used)
    refused(backend, "the rules NONE, FULL, CAUSAL", mixed, mask=ModalityMask.dual_encoder())
    refused(backend, "the rules NONE, FULL", mixed, mask=ModalityMask.co_attention())
    refused(backend, "no words for the rule SAME", mask=ModalityMask(default="same"))
    refused(backend, "no words for the rule PAST", mask=ModalityMask(default="past"))
    timed = Layout(torch.tensor([0, 2]).int(), time=torch.tensor([0, 1]).int())
    refused(backend, "the layout has a time of its own", timed, mask=ModalityMask.causal())
    later = Layout(text.cu_seqlens, start=torch.tensor([1, 1]).int())
    for sides in ((text, image), (later, text), (text, later)):
        refused(backend, "align the last query of a sample with its last key", *sides, ModalityMask.causal())
    gpu.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(major=7, minor=5, name="Old GPU"))
    refused(backend, "Old GPU is sm_75; sm_80 or newer is needed")


def test_what_xformers_cannot_take(gpu):
    install(gpu, "xformers")
    text, image = Layout.from_lengths([4, 3]), Layout.from_lengths([6, 0])
    refused("xformers", "no softcap", softcap=1.0)
    refused("xformers", "no lse of packed samples", return_lse=True)
    refused("xformers", r"windows look back.*\(3, -1\)", mask=ModalityMask.full((3, -1)))
    refused("xformers", r"windows look back.*\(-1, 2\)", mask=ModalityMask.full((-1, 2)))
    refused("xformers", "sample 1 has 3 queries and 0 keys", text, image)
    refused("xformers", "sample 1 has 0 queries and 3 keys", image, text)
    text = Layout(text.cu_seqlens, start=torch.tensor([-1, -1]).int())
    image = Layout.from_lengths([3, 2])
    refused("xformers", "sample 0 has 4 queries and 3 keys.*no more queries", text, image, ModalityMask.causal())


def test_tensors_on_the_cpu(monkeypatch):
    for package in PACKAGES:
        backend = install(monkeypatch, package)
        refused(backend, "the tensors are on cpu, not on a GPU")
    forget()


def test_which_flash_attention_runs(gpu):
    install(gpu, "flash-attn 2")
    layout = Layout.from_lengths([3])
    calls = []

    def recording(name):
        module = sys.modules[name]
        function = module.flash_attn_varlen_func

        def record(q, k, v, **options):
            calls.append(name)
            return function(q, k, v, **options)

        record.__signature__ = inspect.signature(function)
        gpu.setattr(module, "flash_attn_varlen_func", record)
        forget()

    recording("flash_attn")
    gpu.setitem(sys.modules, "flash_attn.cute", stand_ins.flash_attn_4())
    recording("flash_attn.cute")
    for dim, major, hip in ((128, 9, None), (256, 9, None), (64, 8, None), (64, 10, None), (64, 9, "7.0")):
        properties = types.SimpleNamespace(major=major, minor=0, name="Some GPU")
        gpu.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        gpu.setattr(torch.version, "hip", hip)
        mmfast.attention(*[torch.zeros(3, 1, dim).half()] * 3, layout, backend="flash_attn")
    assert calls == ["flash_attn.cute", "flash_attn", "flash_attn", "flash_attn.cute", "flash_attn"]
    gpu.setattr(torch.version, "hip", None)
    gpu.setitem(sys.modules, "flash_attn", None)
    forget()
    refused("flash_attn", "D is 256; flash-attn-4 is used on NVIDIA GPUs from sm_90 to sm_110, up to D = 128", dim=256)


def test_neither_is_chosen_by_itself(gpu):
    for package in PACKAGES:
        install(gpu, package)
    gpu.setattr(flash_attn, "attention", None)
    gpu.setattr(xformers, "attention", None)
    q = torch.zeros(3, 1, 8).half()
    assert mmfast.attention(q, q, q, Layout.from_lengths([3])).shape == q.shape
    with pytest.raises(ValueError, match=r"'flash'; expected one of cpu, triton, .*flash_attn, xformers"):
        mmfast.attention(q, q, q, Layout.from_lengths([3]), backend="flash")


def test_samples_that_are_empty_on_one_side_have_no_alignment():
    layout_q = Layout(torch.tensor([0, 0, 2, 4]).int(), start=torch.tensor([9, 1, 5]).int())
    layout_k = Layout(torch.tensor([0, 3, 6, 6]).int())
    assert _masks.aligned(layout_q, layout_k) and _masks.aligned(layout_k, layout_q)
    assert not _masks.aligned(dataclasses.replace(layout_q, start=layout_q.start + 1), layout_k)


def test_numbers_are_read_once_until_they_change():
    layout_q = Layout.from_lengths([2, 3])
    layout_k = Layout(layout_q.cu_seqlens + 0, start=torch.tensor([0, 0]).int())
    reads = []
    read = _masks.once(lambda a, b: reads.append(1) or a.cu_seqlens.tolist())
    assert read(layout_q, layout_k) == read(layout_q, layout_k) == [0, 2, 5]
    assert len(reads) == 1
    layout_q.cu_seqlens[1] = 1
    assert read(layout_q, layout_k) == [0, 1, 5] and len(reads) == 2
    assert read(layout_k, layout_q) == [0, 2, 5] and len(reads) == 3
    assert _masks.same(layout_q, layout_q) and not _masks.same(layout_q, layout_k)


@pytest.mark.parametrize("package", ["flash-attn 2", "flash-attn 4"])
def test_self_attention_reads_no_numbers(gpu, package):
    """Tensors without memory, which whoever reads them notices."""
    install(gpu, package)
    layout = Layout.from_lengths([4, 3], device="meta")
    other = Layout.from_lengths([4, 3], device="meta")
    q = torch.empty(7, 2, 8, dtype=torch.float16, device="meta")
    for mask in (ModalityMask.causal((2, -1)), ModalityMask.full()):
        assert flash_attn.refusal(q, layout, layout, mask, 0.0, 0.0, False) is None
    assert flash_attn.refusal(q, layout, other, ModalityMask.full(), 0.0, 0.0, False) is None
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        flash_attn.refusal(q, layout, other, ModalityMask.causal(), 0.0, 0.0, False)


# Where the libraries are installed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("peer", [flash_attn, xformers], ids=["flash_attn", "xformers"])
def test_the_library_itself(peer):
    if reason := peer.installed():
        pytest.skip(reason)
    package = "xformers" if peer is xformers else "flash-attn 2"
    for seed in range(40):
        qkv, dout, layout_q, layout_k, mask, lse, options = random_case(seed, package)
        moved = {id(layout): layout.to("cuda") for layout in (layout_q, layout_k)}
        sides = (moved[id(layout)] for layout in (layout_q, layout_k))
        check(peer.__name__.split(".")[-1], [x.cuda() for x in qkv], dout.cuda(), *sides, mask, lse, **options)


@pytest.mark.parametrize("module, stand_in", [("flash_attn", "flash_attn_2"), ("flash_attn.cute", "flash_attn_4")])
def test_stand_ins_have_the_signature_of_flash_attention(module, stand_in):
    real = pytest.importorskip(module).flash_attn_varlen_func
    known = inspect.signature(real).parameters
    for name, parameter in inspect.signature(getattr(stand_ins, stand_in)().flash_attn_varlen_func).parameters.items():
        assert known[name].default == parameter.default or parameter.default is inspect.Parameter.empty, name


def test_stand_ins_make_the_masks_of_xformers():
    real = pytest.importorskip("xformers.ops.fmha")
    masks = [library.BlockDiagonalMask for library in (real, stand_ins.fmha())]
    lengths = ([2, 5, 1], [2, 9, 3])
    for change in (
        lambda mask: mask,
        lambda mask: mask.make_causal_from_bottomright(),
        lambda mask: mask.make_local_attention_from_bottomright(3),
    ):
        dense = [change(mask.from_seqlens(*lengths, device=torch.device("cpu"))).materialize((8, 14)) for mask in masks]
        assert torch.equal(*dense)
    known = inspect.signature(real.memory_efficient_attention).parameters
    assert set(inspect.signature(stand_ins.fmha().memory_efficient_attention).parameters) <= set(known)
