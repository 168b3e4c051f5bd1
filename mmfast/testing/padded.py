"""The peer of `mmfast.models.MultimodalModel`: the same parameters in plain padded PyTorch.

Tokens are `[B, L, D]` with a key mask; padded regions, words and frames run through stem, projections and MLPs too,
which is what padding costs. Batches may be cut into parts of similar length (buckets) or single samples (loop over
samples). Attention is F.scaled_dot_product_attention, or written out as two batched products and a softmax, which is
faster on a CPU at these lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mmfast.models import AudioInput, ImageInput, MultimodalModel, TextInput
from mmfast.models.stem import FRAMES_PER_TOKEN, REGION_STRIDE


class Padded(NamedTuple):
    """Part of a batch of one modality."""

    samples: Tensor  # int64 [b], which samples of the batch
    values: Tensor  # regions [b, R, 3, S, S]; ids [n]; frames [b, F, bins]
    extra: Tensor | None  # positions of regions [b, R, 2]; first id of each word [b * W]
    mask: Tensor  # bool [b, L], True where a token is real
    full: bool  # nothing is padded

    def to(self, device: torch.device | str) -> Padded:
        """The same on another device."""
        return Padded(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def partition(lengths: Tensor, parts: int | None) -> list[Tensor]:
    """Samples in `parts` groups of similar length; 1: as they come; None: every sample alone, absent ones left out."""
    if parts == 1:
        return [torch.arange(lengths.shape[0])]
    order = lengths.argsort(stable=True)
    if parts is None:
        return [b[None] for b in order if lengths[b] > 0]
    return list(order.tensor_split(parts))


def pad_input(x: ImageInput | TextInput | AudioInput, parts: int | None = 1) -> list[Padded]:
    """What a collate function of padded batches makes of the same samples; not part of the timed step."""
    return [_pad(x, samples) for samples in partition(x.lengths, parts)]


def _pad(x: ImageInput | TextInput | AudioInput, samples: Tensor) -> Padded:
    lengths = x.lengths[samples].long()
    if isinstance(x, ImageInput):
        cells = (x.regions.shape[-1] // REGION_STRIDE) ** 2
        regions = [x.regions.split(x.lengths.tolist())[b] for b in samples]
        positions = [x.positions.split(x.lengths.tolist())[b] for b in samples]
        values, extra = pad_sequence(regions, batch_first=True), pad_sequence(positions, batch_first=True)
        tokens = lengths * cells
    elif isinstance(x, AudioInput):
        frames = [x.frames.split(x.lengths.tolist())[b] for b in samples]
        values, extra = pad_sequence(frames, batch_first=True), None
        values = pad(values, (0, 0, 0, -values.shape[1] % FRAMES_PER_TOKEN))
        tokens = (lengths + FRAMES_PER_TOKEN - 1) // FRAMES_PER_TOKEN
    else:
        first_word = x.lengths.cumsum(0) - x.lengths
        ends = torch.cat([x.offsets, torch.tensor([x.ids.shape[0]])])
        values, offsets, n = [], [], 0
        for b in samples.tolist():
            word, count = int(first_word[b]), int(x.lengths[b])
            ids = x.ids[ends[word] : ends[word + count]]
            values.append(ids)
            mine = x.offsets[word : word + count] - ends[word] + n
            n += ids.shape[0]
            # A padded word is an empty bag: the sum over nothing costs nothing.
            offsets.append(pad(mine, (0, int(lengths.max()) - count), value=n))
        values, extra, tokens = torch.cat(values), torch.cat(offsets), lengths
    longest = int(tokens.max()) if tokens.numel() else 0
    mask = torch.arange(longest) < tokens[:, None]
    return Padded(samples, values, extra, mask, bool(mask.all()))


class PaddedModel(nn.Module):
    """`MultimodalModel` without packing; shares the modules, and so the parameters, of the model it is given.

    Args:
        model: whose encoders it runs.
        attention: "sdpa" or "bmm".
    """

    def __init__(self, model: MultimodalModel, attention: str = "sdpa"):
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, inputs: dict[str, list[Padded]], batch: int) -> dict[str, Tensor]:
        """Modality name -> pooled `[B, dim]`, as `MultimodalModel.forward`."""
        pooled = {}
        for name, parts in inputs.items():
            means = torch.cat([self._mean(name, part) for part in parts])
            samples = torch.cat([part.samples for part in parts])
            pooled[name] = means.new_zeros(batch, means.shape[1]).index_copy(0, samples, means)
        return pooled

    def _mean(self, name: str, part: Padded) -> Tensor:
        encoder = self.model.encoders[name]
        x = getattr(self, f"_tokens_{name}")(encoder, part)
        for block in encoder.transformer.blocks:
            x = self._block(block, x, part)
        x = encoder.transformer.norm(x).masked_fill(~part.mask[..., None], 0)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.sum(1) / part.mask.sum(1).clamp(min=1)[:, None]

    @staticmethod
    def _tokens_image(encoder, part: Padded) -> Tensor:
        grid = part.values.shape[-1] // REGION_STRIDE
        tokens = encoder.stem(part.values.flatten(0, 1)).unflatten(0, (part.values.shape[0], -1))
        places = torch.cartesian_prod(*[torch.arange(grid, device=part.values.device)] * 2)
        positions = (part.extra[:, :, None] * grid + places).flatten(1, 2)
        row, column = positions.clamp(max=encoder.row.shape[0] - 1).unbind(-1)
        return tokens + (encoder.row[row] + encoder.column[column]).to(tokens.dtype)

    @staticmethod
    def _tokens_text(encoder, part: Padded) -> Tensor:
        tokens = embedding_bag(part.values, encoder.embedding, part.extra, mode="sum")
        place = torch.arange(part.mask.shape[1], device=part.mask.device).clamp(max=encoder.place.shape[0] - 1)
        return tokens.view(*part.mask.shape, -1) + encoder.place[place]

    @staticmethod
    def _tokens_audio(encoder, part: Padded) -> Tensor:
        groups = part.values.unflatten(1, (-1, FRAMES_PER_TOKEN)).flatten(2)
        return encoder.stem.layers(groups)

    def _block(self, block, x: Tensor, part: Padded) -> Tensor:
        heads = block.qkv(block.norm1(x)).unflatten(-1, (-1, block.head_dim)).transpose(1, 2)
        q, k, v = heads.split((block.heads, block.kv_heads, block.kv_heads), 1)
        if block.rotary_base is not None:
            q, k = _rotate(q, block.rotary_base), _rotate(k, block.rotary_base)
        # A sample without tokens attends to its padding, so that nothing becomes NaN; its mean is zero.
        mask = None if part.full else (part.mask | ~part.mask.any(1, keepdim=True))[:, None, None]
        if self.attention == "sdpa":
            mixed = scaled_dot_product_attention(q, k, v, mask)
        else:
            scores = q @ k.transpose(-1, -2) * block.head_dim**-0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            mixed = scores.softmax(-1).to(v.dtype) @ v
        x = x + block.out(mixed.transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding in the half-split form. Source: Su et al. 2021, equation 34."""
    half = x.shape[-1] // 2
    on = {"dtype": torch.float64, "device": x.device}
    angle = torch.arange(x.shape[-2], **on)[:, None] * base ** (-torch.arange(half, **on) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
