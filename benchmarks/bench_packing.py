"""mmfast.pack and unpack beside the chain of torch indexing, add and norm, and the copy bandwidth of the same run.

    pytest benchmarks/bench_packing.py --benchmark-columns=min,median --benchmark-group-by=group

extra_info["gbs"] counts the bytes that must move: each token read once and written once (backward: the gradient and
the tokens read, the tokens' gradient written). `copy` is Tensor.copy_ of as many bytes, `clone` also allocates.
"""

import pytest
import torch

from mmfast import LayerNorm, _native, pack, unpack
from mmfast.ops._pack_layout import Part, pack_layout

pytestmark = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))

SAMPLES = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Workload:
    """Images of up to 256 rows and texts of up to 128, ragged or all equal."""

    def __init__(self, dtype, ragged, dim=768):
        g = torch.Generator().manual_seed(0)
        lengths = [torch.randint(n // 4, n + 1, (SAMPLES,), generator=g) for n in (256, 128)]
        if not ragged:
            lengths = [torch.full((SAMPLES,), int(n.float().mean())) for n in lengths]
        self.dim, lengths = dim, [n.int() for n in lengths]
        leaf = lambda *shape: torch.randn(*shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
        self.image, self.text = (leaf(int(n.sum()), dim) for n in lengths)
        self.types, self.tables = leaf(2, dim), [leaf(257, dim), leaf(129, dim)]
        self.weight, self.bias = leaf(dim), leaf(dim)
        self.parts = {"image": Part(self.image, lengths[0]), "text": Part(self.text, lengths[1])}
        self.layout, place = pack_layout(self.parts, None)
        self.position = place[:, None].int()
        # What the chain indexes with is made beforehand: it pays for its own indexing, not for building the layout.
        self.modality = self.layout.modality.long()
        self.table_row = place + torch.tensor([0, 257])[self.modality]
        self.leaves = [self.image, self.text, self.types, *self.tables, self.weight, self.bias]
        self.bytes = 2 * self.layout.total * dim * self.image.element_size()

    def chain(self):
        x = torch.cat([self.image, self.text])[self.layout.source] + self.types[self.modality]
        x = x + torch.cat(self.tables)[self.table_row]
        return torch.nn.functional.layer_norm(x, (self.dim,), self.weight, self.bias)

    def fused(self):
        return pack(
            self.parts,
            type_embedding=self.types,
            position_embedding=dict(zip(self.parts, self.tables)),
            norm=LayerNorm(self.weight, self.bias),
        )[0]

    def kernel(self, out):
        """The kernel alone, into memory that is there already."""
        statistics = torch.empty(2, self.layout.total)
        arguments = (
            [self.image, self.text],
            self.layout.source,
            self.layout.modality,
            self.position,
            self.types,
            self.tables,
            [0, 1, 2],
            ["image", "text"],
            1,
            self.weight,
            self.bias,
            1e-5,
            out,
            *statistics,
        )
        return lambda: _native.cpu().pack_forward(*arguments)


@pytest.fixture(params=[(d, r) for d in DTYPES for r in ("ragged", "equal")], ids=lambda p: "-".join(p))
def workload(request, benchmark):
    benchmark.group = f"{request.node.originalname}-{'-'.join(request.param)}"
    work = Workload(DTYPES[request.param[0]], request.param[1] == "ragged")
    exact = work.chain().double()
    torch.testing.assert_close(work.fused().double(), exact, rtol=2e-2, atol=5e-2)
    return work


def measure(benchmark, function, moved):
    benchmark.pedantic(function, rounds=25, warmup_rounds=3)
    benchmark.extra_info["gbs"] = moved / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("who", ["copy", "clone", "kernel", "pack", "layout", "torch"])
def test_forward(benchmark, workload, who):
    source = torch.randn(workload.layout.total, workload.dim).to(workload.image.dtype)
    out = torch.empty_like(source)
    function = {
        "copy": lambda: out.copy_(source),
        "clone": source.clone,
        "kernel": workload.kernel(out),
        "pack": workload.fused,
        "layout": lambda: pack_layout(workload.parts, None),
        "torch": workload.chain,
    }[who]
    with torch.no_grad():
        measure(benchmark, function, workload.bytes)


@pytest.mark.parametrize("who", ["copy", "clone", "pack", "torch"])
def test_backward(benchmark, workload, who):
    x = workload.chain() if who == "torch" else workload.fused()
    grad, out = torch.randn(x.shape).to(x.dtype), torch.empty_like(x)
    function = {"copy": lambda: out.copy_(grad), "clone": grad.clone}.get(
        who, lambda: torch.autograd.grad(x, workload.leaves, grad, retain_graph=True)
    )
    measure(benchmark, function, workload.bytes * (1.5 if who in ("pack", "torch") else 1))


@pytest.mark.parametrize("who", ["clone", "unpack", "torch"])
def test_unpack(benchmark, workload, who):
    x, layout = torch.randn(workload.layout.total, workload.dim).to(workload.image.dtype), workload.layout
    rows = [(layout.modality == m).nonzero()[:, 0] for m in range(2)]
    back = unpack(x, layout)
    assert all(torch.equal(back[name], x[index]) for name, index in zip(layout.names, rows))
    function = {"clone": x.clone, "unpack": lambda: unpack(x, layout), "torch": lambda: [x[index] for index in rows]}
    measure(benchmark, function[who], workload.bytes)
