"""Batches by a token budget or a fixed count, the same for the same seed, resumable in the middle of an epoch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from .hashing import shuffled

_WINDOW = 4096  # items that are sorted together: short enough to keep batches different from epoch to epoch


class BatchSampler(Sampler[list[int]]):
    """Lists of item indices, one per batch; give it to `DataLoader(batch_sampler=...)`.

    Each pass of `iter` runs to the end of the current epoch and then begins the next. A pass that was left early is
    continued by the next one. The batches depend on the arguments, `seed` and the epoch only.

    Args:
        lengths: tokens of each item, integer [items].
        tokens: the most tokens of a batch. Counted as the sum of lengths, or with `bucket` as count times longest,
            which is what a padded batch costs.
        batch_size: items of a batch. Exactly one of `tokens` and `batch_size` must be given.
        shuffle: another order each epoch; otherwise items come in their own order.
        seed: of the order.
        bucket: put items of similar length together (for padded baselines; packed batches need no such thing).
        drop_last: leave out the last batch where it is smaller than `batch_size` (it is never left out by `tokens`),
            and batches that not all ranks get. Otherwise the first batches are repeated, so that all ranks get equally
            many.
        rank, world_size: this process takes every `world_size`-th batch.

    Raises:
        ValueError: an argument outside its range, or an item that is longer than `tokens`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | torch.Tensor,
        *,
        tokens: int | None = None,
        batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        bucket: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.ndim != 1 or (self.lengths < 0).any():
            raise ValueError(f"BatchSampler: lengths has shape {self.lengths.shape}, expected [items], none negative")
        if (tokens is None) == (batch_size is None):
            raise ValueError(f"BatchSampler: tokens={tokens}, batch_size={batch_size}, expected exactly one of the two")
        if (tokens if batch_size is None else batch_size) < 1:
            raise ValueError(f"BatchSampler: tokens={tokens}, batch_size={batch_size}, expected 1 or more")
        if tokens is not None and len(self.lengths) and self.lengths.max() > tokens:
            raise ValueError(
                f"BatchSampler: item {int(self.lengths.argmax())} has {int(self.lengths.max())} tokens, more than "
                f"tokens={tokens}; raise tokens or cut the item"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchSampler: rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}")
        self.tokens, self.batch_size, self.shuffle, self.seed = tokens, batch_size, shuffle, seed
        self.bucket, self.drop_last, self.rank, self.world_size = bucket, drop_last, rank, world_size
        self.epoch = self.position = 0
        self._cached: tuple[int, list[np.ndarray]] | None = None

    def _ends(self, order: np.ndarray) -> list[int]:
        """Where the batches of a given order of items end."""
        count = len(order)
        if self.batch_size is not None:
            return [min(i + self.batch_size, count) for i in range(0, count, self.batch_size)]
        sizes, ends, begin = self.lengths[order], [], 0
        if self.bucket:
            longest = 0
            for i, size in enumerate(sizes.tolist()):
                if i > begin and max(longest, size) * (i - begin + 1) > self.tokens:
                    ends.append(i)
                    begin, longest = i, 0
                longest = max(longest, size)
            return [*ends, count] if count else []
        total = np.concatenate([[0], sizes.cumsum()])
        while begin < count:
            begin = int(np.searchsorted(total, total[begin] + self.tokens, side="right")) - 1
            ends.append(begin)
        return ends

    def _batches(self) -> list[np.ndarray]:
        """This rank's batches of the current epoch."""
        if self._cached is not None and self._cached[0] == self.epoch:
            return self._cached[1]
        count = len(self.lengths)
        order = shuffled(count, self.seed, self.epoch) if self.shuffle else np.arange(count)
        if self.bucket:
            windows = [order[i : i + _WINDOW] for i in range(0, count, _WINDOW)]
            order = np.concatenate([w[np.argsort(self.lengths[w], kind="stable")] for w in windows]) if count else order
        ends = self._ends(order)
        batches = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if self.drop_last and self.batch_size is not None and batches and len(batches[-1]) < self.batch_size:
            batches.pop()
        if self.bucket and self.shuffle:
            batches = [batches[i] for i in shuffled(len(batches), self.seed, self.epoch, 1)]
        extra = len(batches) % self.world_size
        if extra and self.drop_last:
            batches = batches[:-extra]
        elif extra:
            batches = [batches[i % len(batches)] for i in range(len(batches) + self.world_size - extra)]
        self._cached = (self.epoch, batches[self.rank :: self.world_size])
        return self._cached[1]

    def __len__(self) -> int:
        """Batches of this rank in the current epoch; by `tokens` it differs a little from epoch to epoch."""
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches()
        while self.position < len(batches):
            self.position += 1
            yield batches[self.position - 1].tolist()
        self.seek(self.epoch + 1)

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Go to a batch of an epoch; beyond the epoch's last batch this is the next epoch's first.

        A DataLoader with workers asks for batches before they are used: count the used ones and seek to that number.
        """
        if epoch < 0 or batch < 0:
            raise ValueError(f"BatchSampler.seek: epoch={epoch}, batch={batch}, expected 0 or more")
        self.epoch, self.position = epoch, batch
        if batch and batch >= len(self):
            self.epoch, self.position = epoch + 1, 0

    def _fingerprint(self) -> str:
        """Changes with everything that decides about the batches, but not with the rank."""
        settings = (self.tokens, self.batch_size, self.shuffle, self.seed, self.bucket, self.drop_last, self.world_size)
        return f"{settings} {zlib.crc32(self.lengths.astype('<i8').tobytes()):08x}"

    def state_dict(self) -> dict:
        """Epoch and number of batches given out in it, as plain Python values."""
        return {"epoch": self.epoch, "batch": self.position, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly after the batch at which `state_dict` was called.

        Raises:
            ValueError: the state belongs to other lengths or arguments, with which the batches would be others.
        """
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"BatchSampler.load_state_dict: the state is of a sampler with {state['fingerprint']}, expected "
                f"{self._fingerprint()} (tokens, batch_size, shuffle, seed, bucket, drop_last, world_size, lengths); "
                f"make the sampler with the same arguments"
            )
        self.seek(state["epoch"], state["batch"])
