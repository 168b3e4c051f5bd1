"""MMFAST_AUTOTUNE=1: configurations are timed once for each kind of call, and the fastest one runs.

Where there is no GPU the kernels are interpreted, and the times are drawn; whatever wins must compute the same.
"""

import random
import types

import pytest
import test_triton_attention as attention
import test_triton_contrastive as contrastive
import test_triton_packing as packing
import test_triton_rotary as rotary
import torch
from test_perturbation import CASES, make, options
from test_triton_perturbation import check as check_perturbation
from triton_cases import DEVICE, needs_triton

import mmfast
from mmfast import Layout, ModalityMask

pytestmark = needs_triton


@pytest.fixture
def common(monkeypatch):
    from mmfast.kernels import _common

    monkeypatch.setattr(_common, "_AUTOTUNE", True)
    monkeypatch.setattr(_common, "_fastest", {})
    return _common


@pytest.fixture
def timed(common, monkeypatch):
    """Launches every third candidate once and draws its time; the others do not fit. Gives the times."""
    generator, times, seen = random.Random(0), [], []

    def milliseconds(launch):
        seen.append(launch)
        if len(seen) % 3:
            raise common.OutOfResources(300000, 232448, "shared memory")
        launch()
        times.append(generator.random())
        return times[-1]

    monkeypatch.setattr(common, "_milliseconds", milliseconds)
    return times


def attend():
    layout = Layout.from_lengths([9, 20])
    attention.check(attention.inputs(layout, None, 2, 1, dtype=torch.float16), layout, None, ModalityMask.causal())


def attend_with_dropout():
    layout, seed = Layout.from_lengths([3, 20]), torch.tensor([7])
    attention.check(
        attention.inputs(layout, None, 1, dtype=torch.float16), layout, None, None, dropout_p=0.3, dropout_seed=seed
    )


def attend_with_few_queries():
    layout, keys = Layout.from_lengths([2, 1]), Layout.from_lengths([70, 40])
    attention.check(attention.inputs(layout, keys, 4, 1, dtype=torch.float16), layout, keys)


def turn():
    layout = rotary.layout_of([5, 12], 0)
    rotary.check(rotary.tensors(17, 17, 16, torch.float32, norm=True), [layout])


def pack():
    packing.check(*packing.batch(torch.float32, 24, lengths=packing.LENGTHS)[:2])


def attack():
    for norm, case in (("linf", CASES[0]), ("l2", CASES[-1])):
        for shape in ((3, 40), (2, 9000)):  # in one pass, and in several
            check_perturbation(make(shape, torch.float32, case), options(case, norm=norm, eps=0.5, step_size=0.2))


def start():
    seed = torch.tensor(3, device=DEVICE)
    for norm in ("linf", "l2"):
        got, want = (torch.empty(3, 50, device=DEVICE) for _ in range(2))
        mmfast.random_start_(got, eps=0.3, norm=norm, seed=seed, backend="triton")
        mmfast.random_start_(want, eps=0.3, norm=norm, seed=seed, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def contrast():
    for kind in contrastive.KINDS:
        x, y, ids = contrastive.on_device(*contrastive.features(40, 24))
        contrastive.check(x, y, ids, kind)


CALLS = [attend, attend_with_dropout, attend_with_few_queries, turn, pack, attack, start, contrast]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_whatever_wins_computes_the_same(call, common, timed):
    call()
    kinds, count = len(common._fastest), len(timed)
    assert kinds and count
    call()
    assert (len(common._fastest), len(timed)) == (kinds, count)


def test_the_fastest_one_runs_and_each_size_has_its_own(common, monkeypatch):
    a, b, c = (common.Config({"BLOCK": n}) for n in (1, 2, 3))
    times, launched = {1: 2.0, 2: 1.0}, []
    monkeypatch.setattr(common, "_milliseconds", lambda launch: launch())

    def trial(config):
        launched.append(config)
        if config is c:
            raise common.OutOfResources(300000, 232448, "shared memory")
        return times[config.constants["BLOCK"]]

    def choose(*sizes):
        return common.fastest(("op", common.size_class(*sizes)), a, lambda: [a, b, c], trial)

    assert choose(100) is b and launched == [a, b, c]
    times[2] = 3.0
    assert choose(127) is b and len(launched) == 3
    assert choose(128) is a and len(launched) == 6
    monkeypatch.setattr(common, "_AUTOTUNE", False)
    assert choose(100) is a


def test_what_fits_nowhere_runs_as_it_is(common, monkeypatch):
    def milliseconds(launch):
        raise common.PTXASError("too many registers")

    monkeypatch.setattr(common, "_milliseconds", milliseconds)
    config = common.Config({"BLOCK": 1})
    assert common.fastest("op", config, lambda: [common.Config({"BLOCK": 2})], None) is config


def test_nothing_is_timed_while_a_graph_is_captured(common, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    config = common.Config({"BLOCK": 1})
    assert common.fastest("op", config, None, None) is config and not common._fastest


def test_times_come_from_tritons_benchmarker(common, monkeypatch):
    """Its calls of the driver are answered by a stand-in, whose clock counts launches."""
    clock, flushed = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            return end.time - self.time

    device = types.SimpleNamespace(Event=Event, synchronize=lambda: None)
    answers = types.SimpleNamespace(
        get_device_interface=lambda: device,
        get_empty_cache_for_benchmark=lambda: "cache",
        clear_cache=flushed.append,
    )
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", answers, raising=False)

    def launch():
        clock[0] += 2.5

    assert common._milliseconds(launch) == 2.5
    assert flushed and set(flushed) == {"cache"}
