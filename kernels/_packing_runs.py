"""Gradients of embedding rows: sums over runs of rows that share one, and of the pieces of runs that cross chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmfast.kernels._common import Config


@triton.jit
def add_to_run(total, value, key, i, begin, end, rows, out, carry, chunk, column, D: tl.constexpr):
    """Adds row i's gradient to the run of rows with its key; where the run or the chunk ends, writes the sum."""
    total += value
    mine = tl.load(key + i)
    after = tl.load(key + i + 1, mask=i + 1 < rows, other=-1)
    if (after != mine) | (i + 1 == end):
        from_before = tl.load(key + begin - 1, mask=begin > 0, other=-1) == mine
        slot = chunk * 2 + (from_before == 0).to(tl.int64)
        whole = (from_before == 0) & (after != mine)
        line = tl.where(whole, out + mine.to(tl.int64) * D, carry + slot * D)
        tl.store(line + column, total, mask=column < D)
        total = tl.zeros_like(total)
    return total


@triton.jit(do_not_specialize=["rows", "chunk_rows"])
def _join(key, carry, out, rows, chunk_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr):
    """Adds up the pieces of the run that goes on after this program's chunk, if it began there."""
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    begin = chunk * chunk_rows
    end = begin + chunk_rows
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if end < rows:
        mine = tl.load(key + end)
        began_here = tl.load(key + end - 1) == mine
        if begin > 0:
            began_here = began_here & (tl.load(key + begin - 1) != mine)
        if began_here:
            total = tl.load(carry + (2 * chunk + 1) * D + column, mask=column < D, other=0.0)
            at = chunk + 1
            going = True
            while going:
                piece = at + tl.arange(0, CHUNKS)
                same = piece < chunks
                same = same & (tl.load(key + piece * chunk_rows, mask=same, other=-1) == mine)
                mask = same[:, None] & (column < D)[None, :]
                total += tl.sum(tl.load(carry + (2 * piece * D)[:, None] + column[None, :], mask=mask, other=0.0), 0)
                at += CHUNKS
                going = tl.sum(same.to(tl.int32), 0) == CHUNKS
            tl.store(out + mine.to(tl.int64) * D + column, total, mask=column < D)


class Runs:
    """Rows in the order of the embedding row whose gradient they add to, and room for the sums."""

    order = type_key = type_total = type_carry = table_key = table_total = table_carry = None

    def __init__(self, modality, position, described, axis, dtables, dtype_embedding, chunks, dim):
        def room(*shape):
            return torch.zeros(*shape, dim, dtype=torch.float32, device=modality.device)

        self.results = []
        if axis is None and dtype_embedding is None:
            return
        key = modality.to(torch.int32)
        if axis is not None:
            # The tables of all parts behind each other; a part without one counts as one row.
            parts, axes, sizes = (described[k] for k in ("table_part", "table_axis", "table_size"))
            which = {m: i for i, (m, a) in enumerate(zip(parts, axes)) if a == axis}
            place, begin = position[:, axis], 0
            key = torch.zeros_like(place)
            for m in range(len(described["size"])):
                size = sizes[which[m]] if m in which else 1
                key = torch.where(modality == m, place.clamp(0, size - 1) + begin, key)
                if m in which and dtables[which[m]] is not None:
                    self.results.append((dtables[which[m]], begin, size))
                begin += size
            self.table_total, self.table_carry = room(begin), room(chunks, 2)
        key, self.order = torch.sort(key, stable=True)
        if axis is not None:
            self.table_key = key
        self.dtype_embedding = dtype_embedding
        if dtype_embedding is not None:
            self.type_key = modality[self.order].to(torch.int32)
            self.type_total, self.type_carry = room(len(described["size"])), room(chunks, 2)

    def finish(self, chunk_rows: int) -> None:
        """Adds up the runs that cross chunks, and writes the gradients."""
        for key, carry, total in (
            (self.type_key, self.type_carry, self.type_total),
            (self.table_key, self.table_carry, self.table_total),
        ):
            if key is not None:
                chunks, _, dim = carry.shape
                config = Config({"BLOCK_D": min(128, triton.next_power_of_2(dim)), "CHUNKS": 16})
                grid = (chunks, triton.cdiv(dim, config.constants["BLOCK_D"]))
                _join[grid](key, carry, total, key.shape[0], chunk_rows, D=dim, **config.options())
        if self.type_key is not None:
            self.dtype_embedding.copy_(self.type_total)
        for g, begin, size in self.results:
            g.copy_(self.table_total[begin : begin + size])
