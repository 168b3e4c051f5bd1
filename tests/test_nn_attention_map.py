"""Recomputed attention weights against the dense formula over the brute-force mask."""

import pytest
import torch

from mmfast import Layout, ModalityMask
from mmfast.nn import CrossModalAttention, PackedTransformer, attention_map

NAMES = ("text", "image")


def _layout(lengths, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    layout = Layout.from_lengths(lengths)
    return Layout(
        layout.cu_seqlens,
        modality=torch.randint(0, 2, (total,), dtype=torch.uint8),
        time=torch.randint(0, 4, (total,), dtype=torch.int32),
        names=NAMES,
    )


MASKS = {
    "full": None,
    "causal": ModalityMask.causal(),
    "window": ModalityMask.full(window=(2, 1)),
    "mixed": ModalityMask({("text", "text"): "past", ("text", "image"): "same", ("image", "image"): "full"}),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_equals_the_dense_formula(mask, softcap):
    mask = MASKS[mask]
    layout_q, layout_k = _layout([3, 0, 5, 2], 0), _layout([4, 3, 0, 6], 1)
    q, k = torch.randn(10, 4, 8).double(), torch.randn(13, 2, 8).double()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    seen = (mask or ModalityMask.full()).visible(layout_q, layout_k)
    dense = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
    maps = attention_map((q, k), layout_q, layout_k, mask, samples=[3, 0, 2], heads=[1, 3], softcap=softcap)
    assert [m.sample for m in maps] == [3, 0, 2]
    for m in maps:
        rows = slice(*layout_q.cu_seqlens[m.sample : m.sample + 2].tolist())
        columns = slice(*layout_k.cu_seqlens[m.sample : m.sample + 2].tolist())
        torch.testing.assert_close(m.weights, dense[[1, 3], rows, columns])
        assert torch.equal(m.modality_q, layout_q.modality[rows])
        assert torch.equal(m.modality_k, layout_k.modality[columns])
        block = m.between("text", "image")
        assert torch.equal(block, m.weights[:, m.modality_q == 0][:, :, m.modality_k == 1])


def test_rows_outside_the_layout_are_not_read():
    q = torch.randn(8, 2, 8)
    layout = Layout.padded(2, 4, torch.tensor([3, 1], dtype=torch.int32))
    clean = attention_map((q, q), layout)
    dirty = q.clone()
    dirty[[3, 5, 6, 7]] = torch.nan
    for a, b in zip(clean, attention_map((dirty, dirty), layout)):
        assert torch.equal(a.weights, b.weights)
    assert [m.weights.shape[1] for m in clean] == [3, 1]


def test_weights_of_modules_give_their_outputs():
    torch.manual_seed(0)
    layout = Layout.from_lengths([4, 7])
    module = CrossModalAttention(32, 4)
    x = torch.randn(11, 32)
    values = (x @ module.in_proj_weight[64:].T).unflatten(1, (4, 8))
    out = module.forward_packed(x, x, x, layout)
    for m in attention_map(module.queries_and_keys(x, x), layout):
        rows = slice(*layout.cu_seqlens[m.sample : m.sample + 2].tolist())
        mixed = torch.einsum("hqk,khd->qhd", m.weights, values[rows]).flatten(1)
        torch.testing.assert_close(module.out_proj(mixed), out[rows], rtol=1e-4, atol=1e-5)


def test_layers_of_a_transformer():
    torch.manual_seed(0)
    model = PackedTransformer(3, 32, 4)
    x, layout = torch.randn(11, 32), Layout.from_lengths([4, 7])
    middle = model.blocks[1].queries_and_keys(model.blocks[0](x, layout), layout)
    for a, b in zip(model.queries_and_keys(x, layout, layer=-2), middle):
        assert torch.equal(a, b)
    assert attention_map(middle, layout, samples=[1], heads=[0])[0].weights.shape == (1, 7, 7)


def test_errors():
    q = torch.randn(3, 2, 8)
    with pytest.raises(IndexError, match="sample 2 is out of range"):
        attention_map((q, q), Layout.from_lengths([1, 2]), samples=[2])
    found = attention_map((q, q), Layout.from_lengths([1, 2], name="text"))[0]
    with pytest.raises(ValueError, match="'image' is no modality"):
        found.between("text", "image")
