"""What other libraries can be told: one rule for all pairs of modalities, and a window on positions."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.layout import MAX_MODALITIES, Layout
from mmfast.mask import ModalityMask, Rule, unpack_table

DTYPES = (torch.float16, torch.bfloat16)


def tensor_refusal(q: Tensor, dropout_p: float) -> str | None:
    """Why neither library takes such a call, or None."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}, not on a GPU"
    if q.dtype not in DTYPES:
        return f"dtype is {str(q.dtype).removeprefix('torch.')}; it takes float16 and bfloat16"
    if dropout_p > 0:
        return "it drops other weights than mmfast's seed says"
    return None


def layout_refusal(mask: ModalityMask, layout_q: Layout, layout_k: Layout) -> str | None:
    """Why rule and layouts are no window on positions, or None."""
    if layout_q.seqused is not None or layout_k.seqused is not None:
        return "it takes packed samples only, and the layout has seqused"
    rules = _rules(mask, layout_q, layout_k)
    if len(rules) > 1:
        names = ", ".join(rule.name for rule in sorted(rules))
        return f"it has no modality masks, and the mask has the rules {names}"
    (rule,) = rules
    if rule not in (Rule.FULL, Rule.CAUSAL):
        return f"it has no words for the rule {rule.name}"
    if rule == Rule.CAUSAL and (layout_q.time is not None or layout_k.time is not None):
        return 'its causal mask compares positions, and the layout has a time of its own; with_time("index") drops it'
    return None


def window(mask: ModalityMask, layout_q: Layout, layout_k: Layout) -> tuple[int, int]:
    """(left, right): query i sees the keys j with `-right <= pos(i) - pos(j) <= left`, -1 meaning unlimited."""
    left, right = mask.window
    return left, 0 if Rule.CAUSAL in _rules(mask, layout_q, layout_k) else right


def _rules(mask: ModalityMask, layout_q: Layout, layout_k: Layout) -> set[Rule]:
    """The rules of the pairs of modalities that can occur."""
    table = unpack_table(mask.table(layout_q.names, layout_k.names))
    count_q, count_k = (
        1 if layout.modality is None else len(layout.names) or MAX_MODALITIES for layout in (layout_q, layout_k)
    )
    return {Rule(rule) for row in table[:count_q] for rule in row[:count_k]}


def same(layout_q: Layout, layout_k: Layout) -> bool:
    """Whether both sides have the same lengths and positions for certain, without a look at their numbers."""
    return layout_q.cu_seqlens is layout_k.cu_seqlens and layout_q.start is layout_k.start


def once(function: Callable) -> Callable:
    """A function of two layouts that reads their numbers, which waits for the device: once, until they change."""
    answers = weakref.WeakKeyDictionary()

    def call(layout_q: Layout, layout_k: Layout):
        numbers = [x for side in (layout_q, layout_k) for x in (side.cu_seqlens, side.start) if x is not None]
        if any(x.is_inference() for x in numbers):  # changes are not counted
            return function(layout_q, layout_k)
        versions = [x._version for x in numbers]
        kept = answers.setdefault(layout_q, weakref.WeakKeyDictionary())
        if layout_k not in kept or kept[layout_k][0] != versions:
            kept[layout_k] = versions, function(layout_q, layout_k)
        return kept[layout_k][1]

    return call


@once
def aligned(layout_q: Layout, layout_k: Layout) -> bool:
    """Whether the last query of each sample stands at the position of its last key."""
    lengths_q, lengths_k = layout_q.lengths(), layout_k.lengths()
    start_q, start_k = (0 if layout.start is None else layout.start for layout in (layout_q, layout_k))
    fits = start_q + lengths_q == start_k + lengths_k
    return bool((fits | (lengths_q == 0) | (lengths_k == 0)).all())


def alignment_refusal(mask: ModalityMask, layout_q: Layout, layout_k: Layout) -> str | None:
    """Why positions are not what the library takes them for, or None. Waits for the device once for two layouts."""
    if same(layout_q, layout_k) or window(mask, layout_q, layout_k) == (-1, -1):
        return None
    if torch.compiler.is_compiling():
        return "under torch.compile the positions of two layouts cannot be compared"
    if not aligned(layout_q, layout_k):
        return (
            "its masks align the last query of a sample with its last key, and the positions say otherwise; "
            "start = len_k - len_q of the queries would"
        )
    return None


def zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output where there are no queries or no keys at all, with gradients of zero."""
    return torch.zeros_like(q, memory_format=torch.contiguous_format) + sum(x[:0].sum() for x in (q, k, v))
