"""What pack, unpack, to_padded and from_padded refuse, and what their kernels refuse below them."""

import dataclasses

import pytest
import torch
from test_packing import needs_cpu

from mmfast import Layout, Order, Part, RMSNorm, from_padded, pack, to_padded, unpack
from mmfast.ops._pack_op import _pack


def part(rows=4, dim=8, lengths=(4,), positions=None, dtype=torch.float32):
    return Part(torch.zeros(rows, dim, dtype=dtype), torch.tensor(lengths, dtype=torch.int32), positions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack({}), "got 0 parts"),
        (lambda: pack({f"m{i}": part() for i in range(17)}), "got 17 parts; expected 1 to 16"),
        (lambda: pack({"a": Part(torch.zeros(4), [4])}), r"tokens of 'a' must be a float tensor \[Tm, D\]"),
        (lambda: pack({"a": part(), "b": part(dim=9)}), "'b' has D = 9, 'a' has 8"),
        (lambda: pack({"a": part(), "b": part(dtype=torch.bfloat16)}), "dtype of 'b' is torch.bfloat16"),
        (lambda: pack({"a": part(lengths=(3,))}), "'a' add up to 3, but its tokens have 4 rows"),
        (lambda: pack({"a": part(lengths=(-1, 5))}), "item_lengths of 'a' holds -1"),
        (lambda: pack({"a": Part(torch.zeros(4, 8), torch.tensor([4.0]))}), "item_lengths of 'a' must be int32"),
        (lambda: pack({"a": part(), "b": part(lengths=(2, 2))}), "one item per sample.*a 1, b 2"),
        (lambda: pack({"a": part(positions=torch.zeros(3, 1, dtype=torch.int32))}), "positions of 'a' must be int32"),
        (lambda: pack({"a": part()}, type_embedding=torch.zeros(2, 8)), r"type_embedding must be a tensor \[1, 8\]"),
        (lambda: pack({"a": part()}, position_embedding={"b": torch.zeros(9, 8)}), "names 'b', which is no part"),
        (lambda: pack({"a": part()}, position_embedding={"a": torch.zeros(9, 7)}), r"must be a tensor \[N, 8\]"),
        (lambda: pack({"a": part()}, position_embedding={"a": [torch.zeros(9, 8)] * 2}), "2 tables.*1 axes"),
        (lambda: pack({"a": part()}, norm=torch.nn.LayerNorm(9)), r"norm is over \(9,\); expected \(8,\)"),
        (lambda: pack({"a": part()}, norm=torch.nn.BatchNorm1d(8)), "norm is a BatchNorm1d"),
        (lambda: pack({"a": part()}, norm=RMSNorm(torch.zeros(7))), r"norm's weight must be a tensor \[8\]"),
        (lambda: pack({"a": part()}, backend="cuda7"), "expected one of"),
        (lambda: Order.from_lists([[("b", 0)]], ["a"]), "no parts"),
        (lambda: unpack(torch.zeros(4, 8), Layout.from_lengths([4])), "no source"),
        (lambda: unpack(torch.zeros(5, 8), pack({"a": part()})[1]), r"x has shape \[5, 8\].*T = 4"),
        (
            lambda: unpack(torch.zeros(4, 8), dataclasses.replace(pack({"a": part()})[1], sizes=(3,))),
            "sizes add up to 3, but x has 4 rows",
        ),
        (lambda: to_padded(torch.zeros(4, 8), Layout.from_lengths([4]), length=3), "has 4 rows.*length is 3"),
        (lambda: from_padded(torch.zeros(2, 5, 8), Layout.from_lengths([4])), "B = 1"),
        (lambda: from_padded(torch.zeros(1, 3, 8), Layout.from_lengths([4])), "has 4 rows.*length is 3"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_cpu
def test_kernels_refuse_rows_outside():
    """What would read or write out of bounds is refused below the public functions too."""
    gather, scatter = torch.ops.mmfast.gather_rows.default, torch.ops.mmfast.scatter_rows.default
    x, index = torch.zeros(4, 8), torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"index\[1\] is 9, but x has 8 rows"):
        gather([x, x], index, 0.0, "cpu")
    with pytest.raises(ValueError, match=r"index\[1\] is 9, but the output has 5 rows"):
        scatter(x[:2], index, [2, 3], "cpu")
    with pytest.raises(ValueError, match="x and out have different rows"):
        gather([x, torch.zeros(4, 7)], torch.tensor([0, 5]), 0.0, "cpu")
    part = torch.zeros(2, dtype=torch.uint8)
    for source, modality, message in (
        ([0, 2], part, r"source\[1\] is 2, outside part a"),
        ([-1, 0], part, r"source\[0\] is -1"),
        ([0, 1], part + 1, r"modality\[0\] is 1; expected less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            _pack([x[:2]], torch.tensor(source), modality, None, None, [], [0, 0], ["a"], 0, None, None, 0.0, "cpu")


@needs_cpu
def test_position_outside_its_table():
    for value in (9, -1):
        positions = torch.tensor([[0], [8], [value], [1]], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"position_embedding\[a\]: position {value} of row 2 on axis 0.*9 rows"):
            pack({"a": part(positions=positions)}, position_embedding={"a": torch.zeros(9, 8)}, backend="cpu")


@needs_cpu
def test_last_position_outside_its_table():
    """Rows shared by threads, and a second axis: every row's positions are looked at."""
    positions = torch.zeros(5000, 2, dtype=torch.int32)
    positions[-1, 1] = 9
    tables = [torch.zeros(20, 64), torch.zeros(9, 64)]
    with pytest.raises(ValueError, match=r"position_embedding\[a\]: position 9 of row 4999 on axis 1.*9 rows"):
        pack({"a": (torch.zeros(5000, 64), [5000], positions)}, position_embedding={"a": tables}, backend="cpu")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[("a", 0), ("b", 0)]], "order names 2 parts.*3 items"),
        ([[("a", 0), ("b", 0), ("b", 0)]], "uses item 1 of 'b' 0 times|uses item 0 of 'b' 2 times"),
        ([[("a", 0), ("b", 0), ("b", 2)]], "names item 2 of 'b', which has 2 items"),
        ([[("a", 0), ("a", 1), ("b", 1)]], "names item 1 of 'a', which has 1 items"),
    ],
)
def test_order_errors(order, message):
    parts = {"a": part(), "b": part(lengths=(2, 2))}
    with pytest.raises(ValueError, match=message):
        pack(parts, order=Order.from_lists(order, ["a", "b"]))


def test_order_whose_samples_leave_items_out():
    order = Order.from_lists([[("a", 0), ("b", 0)], [("b", 1)]], ["a", "b"])
    parts = {"a": part(), "b": part(lengths=(2, 2))}
    for samples, total in (([2, 0], 2), ([2, 2], 4), ([-1, 4], 3)):
        wrong = order._replace(samples=torch.tensor(samples, dtype=torch.int32))
        with pytest.raises(ValueError, match=f"order.samples add up to {total}; expected 3"):
            pack(parts, order=wrong)
