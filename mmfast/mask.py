"""The modality mask: for each (query modality, key modality) one rule, which compares the rows' times.

The mask is a small table and is never materialised; kernels evaluate it only in the tiles where it is mixed.
`csrc/include/mmfast/mask.h` holds the same definitions for the kernels.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmfast.layout import MAX_MODALITIES, Layout


class Rule(enum.IntEnum):
    """When key j is visible to query i of the same sample."""

    NONE = 0  # never
    FULL = 1  # always
    CAUSAL = 2  # time[j] <= time[i]
    PAST = 3  # time[j] < time[i]
    SAME = 4  # time[j] == time[i]


@dataclasses.dataclass(frozen=True)
class ModalityMask:
    """Rules per pair of modalities, and an optional window on positions.

    Args:
        pairs: `(query modality, key modality) -> rule`; modalities by name or id, rules as `Rule` or their lower-case
            names. Pairs that are not named follow `default`.
        default: rule of all other pairs.
        window: `(left, right)`: visible only where `-right <= pos(i) - pos(j) <= left`; -1 is unlimited.
        time: the `Layout.with_time` kind that the mask needs, for the reader and for error messages.
    """

    pairs: Mapping[tuple[str | int, str | int], Rule | str] | tuple = ()
    default: Rule | str = Rule.NONE
    window: tuple[int, int] = (-1, -1)
    time: str = "index"

    def __post_init__(self):
        pairs = self.pairs.items() if isinstance(self.pairs, Mapping) else self.pairs
        table = tuple((tuple(pair), _rule(rule)) for pair, rule in pairs)
        for pair, _ in table:
            if len(pair) != 2 or not all(isinstance(m, (str, int)) for m in pair):
                raise ValueError(f"ModalityMask: a pair must be (query modality, key modality), got {pair}")
        object.__setattr__(self, "pairs", table)
        object.__setattr__(self, "default", _rule(self.default))
        window = tuple(self.window)
        if len(window) != 2 or not all(isinstance(w, int) and -1 <= w < 2**31 for w in window):
            raise ValueError(f"ModalityMask: window must be (left, right) with numbers from -1 on, got {self.window}")
        object.__setattr__(self, "window", window)

    # The masks of the field. Each says which time it needs.

    @classmethod
    def full(cls, window: tuple[int, int] = (-1, -1)) -> ModalityMask:
        """Every row sees every row of its sample (encoders, cross-attention)."""
        return cls(default=Rule.FULL, window=window)

    @classmethod
    def causal(cls, window: tuple[int, int] = (-1, -1)) -> ModalityMask:
        """Text decoder, time "index". With a KV cache, `start = len_k - len_q` of the queries aligns bottom right."""
        return cls(default=Rule.CAUSAL, window=window)

    @classmethod
    def prefix_lm(cls) -> ModalityMask:
        """Prefix LM (PaliGemma): the prefix sees itself, the rest is causal. Time "prefix"."""
        return cls(default=Rule.CAUSAL, time="prefix")

    @classmethod
    def early_fusion(cls, window: tuple[int, int] = (-1, -1)) -> ModalityMask:
        """Images bidirectional inside a causal stream (Gemma 3, Transfusion). Time "segment_start".

        Gemma 3's local layers take `window=(W - 1, -1)`.
        """
        return cls(default=Rule.CAUSAL, window=window, time="segment_start")

    @classmethod
    def flamingo(cls, text: str | int = "text", image: str | int = "image", *, latest: bool = True) -> ModalityMask:
        """Cross-attention from text onto the latest image, or onto all earlier ones. Time "media_count".

        Images are numbered from 1, so text before any image sees nothing and gets zeros (Flamingo, Idefics).
        """
        return cls({(text, image): Rule.SAME if latest else Rule.CAUSAL}, time="media_count")

    @classmethod
    def q_former(cls, objective: str, query: str | int = "query", text: str | int = "text") -> ModalityMask:
        """BLIP-2's Q-Former: objective "contrastive", "matching" or "generation". Time "index".

        contrastive: queries and text see themselves only; matching: all see all; generation: text sees the queries
        and its own past. Text rows skip the cross-attention onto the image.
        """
        if objective == "contrastive":
            return cls({(query, query): Rule.FULL, (text, text): Rule.FULL})
        if objective == "matching":
            return cls({(a, b): Rule.FULL for a in (query, text) for b in (query, text)})
        if objective == "generation":
            return cls({(query, query): Rule.FULL, (text, query): Rule.FULL, (text, text): Rule.CAUSAL})
        raise ValueError(
            f"ModalityMask.q_former: objective is {objective!r}; expected 'contrastive', 'matching' or 'generation'"
        )

    @classmethod
    def bottleneck(cls, groups: Mapping[str | int, str | int]) -> ModalityMask:
        """Bottleneck fusion (MBT): each modality and its own copy of the bottleneck see one another, nothing else.

        Args:
            groups: modality -> its bottleneck's modality. The copies are averaged after each layer.
        """
        pairs = {(a, b): Rule.FULL for pair in groups.items() for a in pair for b in pair}
        return cls(pairs)

    @classmethod
    def co_attention(cls, first: str | int = "text", second: str | int = "image") -> ModalityMask:
        """Each of two modalities sees the other only (ViLBERT, LXMERT)."""
        return cls({(first, second): Rule.FULL, (second, first): Rule.FULL})

    @classmethod
    def dual_encoder(
        cls, image: str | int = "image", text: str | int = "text", *, causal_text: bool = True
    ) -> ModalityMask:
        """Two towers in one pass: image onto image, text onto text; causal text for CLIP, full for SigLIP."""
        return cls({(image, image): Rule.FULL, (text, text): Rule.CAUSAL if causal_text else Rule.FULL})

    @classmethod
    def block_diffusion(cls, noisy: str | int = "noisy", clean: str | int = "clean") -> ModalityMask:
        """Block diffusion: noisy blocks see themselves and the clean past. Time: the block's number, in both copies."""
        return cls(
            {(noisy, noisy): Rule.SAME, (noisy, clean): Rule.PAST, (clean, clean): Rule.CAUSAL}, time="block number"
        )

    # What kernels and tests take

    def table(self, names_q: Sequence[str] = (), names_k: Sequence[str] | None = None) -> tuple[int, ...]:
        """The rules as the kernels take them: 16 numbers, 3 bits per key modality.

        Args:
            names_q, names_k: the layouts' modality names; `names_k` defaults to `names_q`.

        Raises:
            ValueError: the mask names a modality that the layout does not have.
        """
        return _table(self, tuple(names_q), tuple(names_q if names_k is None else names_k))

    def visible(self, layout_q: Layout, layout_k: Layout | None = None) -> Tensor:
        """bool `[Tq, Tk]`: who sees whom. For tests and pictures: memory grows with the product."""
        layout_k = layout_q if layout_k is None else layout_k
        if layout_k.batch != layout_q.batch:
            raise ValueError(f"ModalityMask: layout_q has {layout_q.batch} samples, layout_k {layout_k.batch}")
        seen = rule_holds(
            self.table(layout_q.names, layout_k.names),
            self.window,
            *(x[:, None] for x in (layout_q.modalities(), layout_q.times(), layout_q.positions())),
            *(x[None, :] for x in (layout_k.modalities(), layout_k.times(), layout_k.positions())),
        )
        sample_q, sample_k = layout_q.samples()[:, None], layout_k.samples()[None, :]
        return seen & (sample_q == sample_k) & (sample_q < layout_q.batch)

    def __repr__(self) -> str:
        rules = [f"{a} -> {b} {rule.name}" for (a, b), rule in self.pairs]
        if self.default != Rule.NONE or not rules:
            rules.append(f"{'otherwise' if rules else 'all'} {self.default.name}")
        text = ", ".join(rules)
        if self.window != (-1, -1):
            text += f"; window {self.window}"
        return f"ModalityMask({text}; time {self.time})"


def unpack_table(table: Sequence[int]) -> list[list[int]]:
    """16 x 16 rules from the packed form."""
    return [[(row >> (3 * k)) & 7 for k in range(MAX_MODALITIES)] for row in table]


def rule_holds(
    table: Sequence[int],
    window: tuple[int, int],
    modality_q: Tensor,
    time_q: Tensor,
    position_q: Tensor,
    modality_k: Tensor,
    time_k: Tensor,
    position_k: Tensor,
) -> Tensor:
    """bool: where rule and window let the query see the key, both of one sample; the arguments broadcast."""
    # Numbers of the host in kernels: a tensor of them would wait for the device.
    word = torch.full_like(modality_q, table[0], dtype=torch.int64)
    for modality, row in enumerate(table):
        if row != table[0]:
            word = torch.where(modality_q == modality, row, word)
    rule = (word >> 3 * modality_k.long()) & 7
    time_q, time_k = time_q.long(), time_k.long()
    seen = (
        (rule == Rule.FULL)
        | ((rule == Rule.CAUSAL) & (time_k <= time_q))
        | ((rule == Rule.PAST) & (time_k < time_q))
        | ((rule == Rule.SAME) & (time_k == time_q))
    )
    distance = position_q.long() - position_k.long()
    left, right = window
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return seen


def _rule(value: Rule | str | int) -> Rule:
    try:
        return Rule[value.upper()] if isinstance(value, str) else Rule(value)
    except (KeyError, ValueError):
        known = ", ".join(rule.name.lower() for rule in Rule)
        raise ValueError(f"ModalityMask: a rule is {value!r}; expected one of {known}") from None


@functools.lru_cache(maxsize=256)
def _table(mask: ModalityMask, names_q: tuple[str, ...], names_k: tuple[str, ...]) -> tuple[int, ...]:
    rules = [[int(mask.default)] * MAX_MODALITIES for _ in range(MAX_MODALITIES)]
    for (query, key), rule in mask.pairs:
        rules[_id(query, names_q, "query")][_id(key, names_k, "key")] = int(rule)
    return tuple(sum(rule << (3 * k) for k, rule in enumerate(row)) for row in rules)


def _id(modality: str | int, names: tuple[str, ...], side: str) -> int:
    if isinstance(modality, int):
        if not 0 <= modality < MAX_MODALITIES:
            raise ValueError(f"ModalityMask: modality {modality} is out of range; expected 0 to {MAX_MODALITIES - 1}")
        return modality
    if modality not in names:
        known = ", ".join(names) or "no names"
        raise ValueError(f"ModalityMask: {modality!r} is no modality of the {side} layout (it has {known})")
    return names.index(modality)
