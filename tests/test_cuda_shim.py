"""The stand-in for a GPU that the CUDA kernels are tested on: its instructions give what PTX says, its faults show."""

import re
from pathlib import Path

import cuda_shim
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_shim.refusal is not None, reason=str(cuda_shim.refusal))
FAULTS = re.findall(r"^  (\w+),$", (cuda_shim.HERE / "probes.h").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def module():
    here = cuda_shim.HERE
    bindings = [here / "probes.cpp", cuda_shim.ROOT / "csrc/bindings/torch_tensor.cpp"]
    return cuda_shim.load(cuda_shim.compile_module("_probes", [here / "probes.cu"], bindings, cuda_shim.ROOT / "csrc"))


@pytest.fixture
def probe(module):
    def run(name, a=None, b=None, c=None, rows=16, transposed=False, fault="none", grid=(1, 1, 1), block=(32, 1),
            shared=4096):  # fmt: skip
        c = torch.full((16, 16), float("nan")) if c is None else c
        module.probe(name, a, b, c, rows, transposed, FAULTS.index(fault), grid, block, shared)
        return c

    module.set_order(2)
    yield run
    module.set_order(2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name, dtype", [("product bf16", torch.bfloat16), ("product f16", torch.float16)])
def test_product_of_matrices(probe, name, dtype, transposed):
    """Asynchronous copies, ldmatrix with and without transposition, and mma against numpy."""
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    c = probe(name, a, b.T.contiguous() if transposed else b, transposed=transposed)
    want = a.double().numpy() @ b.double().numpy()
    np.testing.assert_allclose(c.numpy(), want, rtol=1e-5, atol=1e-5)
    few = probe(name, a, b.T.contiguous() if transposed else b, transposed=transposed, rows=5)
    np.testing.assert_array_equal(few[:5], c[:5])
    assert not few[5:].any()  # copies that are not valid give zeros


def test_missing_wait_is_noticed(probe):
    a, b = torch.randn(2, 16, 16).bfloat16()
    assert probe("product bf16", a, b).isfinite().all()
    assert probe("product bf16", a, b, fault="waits_for_one_of_two").isnan().all()


def test_shuffles_and_votes(probe):
    x = torch.arange(32.0) + 100
    got = probe("warp", x, c=torch.full((9, 32), float("nan"))).numpy()
    lane, x = np.arange(32), x.numpy()
    np.testing.assert_array_equal(got[0], x[lane ^ 5])
    np.testing.assert_array_equal(got[1], x[7])
    np.testing.assert_array_equal(got[2], x[np.where(lane < 29, lane + 3, lane)])
    np.testing.assert_array_equal(got[3], x[np.where(lane >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(got[4], x[np.where(lane % 8 < 5, lane + 3, lane)])
    np.testing.assert_array_equal(got[5], x[lane // 4 * 4 + (lane + 1) % 4])
    assert (got[6] == sum(1 << i for i in range(0, 32, 3)) >> 8).all()
    assert (got[7] == 1 + 4).all()
    np.testing.assert_array_equal(got[8, :8], x[lane[:8] ^ 1])
    assert np.isnan(got[8, 8:]).all()


@pytest.mark.parametrize("order", [0, 1, 2, 77])
def test_blocks_barriers_and_shared_memory(probe, module, order):
    module.set_order(order)
    x, grid = torch.randn(96), (3, 2, 2)
    got = probe("block", x, c=torch.full((12, 97), float("nan")), grid=grid, block=(32, 3))
    assert torch.equal(got[:, :96], x.flip(0).expand(12, 96))
    assert (got[:, 96] == 20 + 1000).all()


def test_missing_barrier_is_noticed(probe, module):
    x = torch.randn(96)
    for order in (0, 1, 2):
        module.set_order(order)
        assert probe("block", x, c=torch.zeros(97), block=(32, 3), fault="no_barrier").isnan().any()


def test_conversions(probe):
    n = 1 << 16
    bits = torch.arange(n, dtype=torch.int32).to(torch.uint16)
    halves = bits.view(torch.float16).float()
    near = halves * (1 + torch.randint(-9, 10, (n,)) * 2.0**-13)  # around every number, and between neighbours
    for x in (halves, near, torch.randn(n) * 10 ** torch.linspace(-44, 38, n), bits.view(torch.bfloat16).float()):
        got = probe("convert", x, bits, c=torch.empty(5, n), rows=n, grid=(256, 1, 1), block=(256, 1))
        for row, want in enumerate((x.bfloat16().float(), x.half().float(), x.half().float(), halves)):
            torch.testing.assert_close(got[row], want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got[4], bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("barrier_in_a_branch", "divergent barrier"),
        ("barrier_beside_a_shuffle", "wait for each other"),
        ("shuffle_with_an_ended_lane", "has ended|wait for each other"),
        ("shuffle_from_outside_the_mask", "does not name"),
        ("lane_outside_its_mask", "does not name the lane itself"),
        ("shuffles_of_two_lines", "waits elsewhere"),
        ("copy_behind_shared_memory", "not in the block's shared memory"),
        ("copy_from_an_odd_address", "no multiple of 16"),
        ("copy_not_awaited", "before it waited"),
        ("matrix_outside_shared_memory", "not in the block's shared memory"),
        ("write_behind_shared_memory", "wrote behind"),
        ("store_to_an_odd_address", "no multiple of 16"),
    ],
)
def test_faults_are_noticed(probe, module, fault, message):
    a, c = torch.zeros(64), torch.zeros(64)
    for order in (0, 1, 2):
        module.set_order(order)
        with pytest.raises(RuntimeError, match=message):
            probe("faulty", a, c=c, fault=fault, block=(64, 1), shared=1024)
        probe("faulty", a, c=c, block=(64, 1), shared=1024)  # the next launch is not touched


def test_launches_that_a_gpu_refuses(probe):
    probe("faulty", shared=227 << 10)
    with pytest.raises(RuntimeError, match="probe: its shared memory is more"):
        probe("faulty", shared=(227 << 10) + 16)
    for wrong in ({"block": (1025, 1)}, {"block": (0, 1)}, {"grid": (1, 65536, 1)}):
        with pytest.raises(RuntimeError, match="probe: the kernel was not launched"):
            probe("faulty", **wrong)
    probe("faulty", fault="barrier_in_a_branch", grid=(0, 1, 1))  # nothing to do


def test_every_fault_is_tried():
    """A fault that no test names would show nothing."""
    text = Path(__file__).read_text()
    assert all(f'"{fault}"' in text for fault in FAULTS)
