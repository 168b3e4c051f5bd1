"""CrossModalAttention beside nn.MultiheadAttention: weights, outputs, gradients."""

import pytest
import torch
from torch import nn

from mmfast import Layout, ModalityMask
from mmfast.nn import CrossModalAttention

E, HEADS, B, L, S = 32, 4, 5, 6, 9
LENGTHS = [9, 1, 4, 7, 2]


def _right_padding():
    return torch.arange(S) >= torch.tensor(LENGTHS)[:, None]


def _any_padding():
    torch.manual_seed(3)
    padding = torch.rand(B, S) < 0.5
    padding[:, 4] = False
    return padding


def _pair(dtype=torch.float64, **options):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    ours = CrossModalAttention(E, HEADS, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _compare(ours, theirs, inputs, tolerance, **call):
    """Outputs, weights and all gradients of both modules agree."""
    results = []
    for module in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in dict.fromkeys(inputs)]
        by_id = dict(zip((id(x) for x in dict.fromkeys(inputs)), leaves))
        out, weights = module(*(by_id[id(x)] for x in inputs), **call)
        torch.manual_seed(7)
        loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
        module.zero_grad()
        loss.backward()
        results.append([out, weights, *(x.grad for x in leaves), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "self": {"source": "self"},
    "cross": {"source": "cross"},
    "other widths": {"source": "wide", "kdim": 24, "vdim": 16},
    "three inputs": {"source": "three"},
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_multihead_attention(case, bias, batch_first, dtype, tolerance):
    options = dict(CASES[case])
    source = options.pop("source")
    ours, theirs = _pair(dtype, bias=bias, batch_first=batch_first, **options)
    query = torch.randn(B, L, E, dtype=dtype)
    key = query if source == "self" else torch.randn(B, S, options.get("kdim", E), dtype=dtype)
    value = key if source in ("self", "cross") else torch.randn(B, S, options.get("vdim", E), dtype=dtype)
    if not batch_first:
        moved = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        query, key, value = moved[id(query)], moved[id(key)], moved[id(value)]
    _compare(ours, theirs, (query, key, value), tolerance, need_weights=False)


@pytest.mark.parametrize("padding", [_right_padding, _any_padding])
@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_key_padding_mask_and_weights(padding, as_float, average):
    ours, theirs = _pair(batch_first=True)
    query, key = torch.randn(B, L, E).double(), torch.randn(B, S, E).double()
    mask = padding()
    if as_float:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    call = {"key_padding_mask": mask, "average_attn_weights": average}
    _compare(ours, theirs, (query, key, key), 1e-10, **call)


@pytest.mark.parametrize("padding", [None, _right_padding, _any_padding])
def test_causal(padding):
    ours, theirs = _pair(batch_first=True)
    x = torch.randn(B, S, E).double()
    blocked = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask = None if padding is None else padding()
    if mask is not None:
        mask[:, 0] = False  # nn.MultiheadAttention gives NaN for rows that see nothing
    _compare(ours, theirs, (x, x, x), 1e-10, attn_mask=blocked, key_padding_mask=mask)
    alone, _ = ours(x, x, x, key_padding_mask=mask, is_causal=True)
    as_float = torch.zeros(S, S).masked_fill(blocked, -torch.inf)
    floats, _ = ours(x, x, x, key_padding_mask=mask, attn_mask=as_float)
    expected, _ = ours(x, x, x, key_padding_mask=mask, attn_mask=blocked)
    assert torch.equal(alone, expected) and torch.equal(floats, expected)


def test_without_a_batch():
    ours, theirs = _pair()
    query, key = torch.randn(L, E).double(), torch.randn(S, E).double()
    _compare(ours, theirs, (query, key, key), 1e-10, key_padding_mask=_right_padding()[2])


def test_state_dicts_load_both_ways_and_start_equal():
    for options in ({}, {"kdim": 24, "vdim": 16}, {"bias": False}):
        torch.manual_seed(5)
        ours = CrossModalAttention(E, HEADS, **options)
        torch.manual_seed(5)
        theirs = nn.MultiheadAttention(E, HEADS, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(a, b)
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())


def test_masked_keys_are_never_read():
    ours, _ = _pair(torch.float32, batch_first=True)
    query, key = torch.randn(B, L, E), torch.randn(B, S, E)
    for padding in (_right_padding(), _any_padding()):
        clean = ours(query, key, key, key_padding_mask=padding)
        dirty = key.masked_fill(padding[..., None], torch.nan)
        for a, b in zip(clean, ours(query, dirty, dirty, key_padding_mask=padding)):
            assert torch.equal(a, b)


def test_a_sample_without_keys_gives_the_output_bias():
    ours, _ = _pair(torch.float32, batch_first=True)
    padding = _right_padding()
    padding[1] = True
    key = torch.randn(B, S, E, requires_grad=True)
    out, weights = ours(torch.randn(B, L, E), key, key, key_padding_mask=padding)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
    assert not weights[1].any()
    out.sum().backward()
    assert key.grad.isfinite().all() and not key.grad[1].any()


def test_packed_equals_padded():
    ours, _ = _pair(batch_first=True)
    query, key = torch.randn(B, L, E).double(), torch.randn(B, S, E).double()
    padded, _ = ours(query, key, key, key_padding_mask=_right_padding(), need_weights=False)
    layout_k, rows = Layout.from_padding_mask(~_right_padding())
    packed_key = key.flatten(0, 1)[rows]
    packed = ours.forward_packed(query.flatten(0, 1), packed_key, packed_key, Layout.from_lengths([L] * B), layout_k)
    torch.testing.assert_close(packed.view(B, L, E), padded)


def test_packed_takes_a_modality_mask():
    ours, _ = _pair()
    x = torch.randn(6, E).double()
    modality = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.uint8)
    layout = Layout(torch.tensor([0, 6], dtype=torch.int32), modality=modality, names=("text", "image"))
    both = ours.forward_packed(x, x, x, layout, mask=ModalityMask.co_attention())
    text, image = x[None, :2], x[None, 2:]
    ours.batch_first = True
    expected = torch.cat([ours(text, image, image)[0], ours(image, text, text)[0]], 1)
    torch.testing.assert_close(both, expected[0])


def test_replaces_the_attention_of_torchs_own_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, dropout=0.0, batch_first=True)
    x, padding = torch.randn(B, S, E), _right_padding()
    expected = layer(x, src_key_padding_mask=padding)
    attention = CrossModalAttention(E, HEADS, batch_first=True)
    attention.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = attention
    real = ~padding
    torch.testing.assert_close(layer(x, src_key_padding_mask=padding)[real], expected[real], rtol=1e-4, atol=1e-5)


def test_errors_name_the_remedy():
    ours, _ = _pair(torch.float32, batch_first=True)
    x = torch.randn(B, S, E)
    with pytest.raises(ValueError, match="ModalityMask"):
        ours(x, x, x, attn_mask=torch.rand(S, S) < 0.5)
    with pytest.raises(ValueError, match="ModalityMask"):
        ours(x, x, x, attn_mask=torch.ones(S, S).triu(1) * -1e4)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[N, S\] = \[5, 9\]"):
        ours(x, x, x, key_padding_mask=torch.zeros(B, S + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 and -inf only"):
        ours(x, x, x, key_padding_mask=torch.rand(B, S))
    with pytest.raises(ValueError, match="samples must agree"):
        ours(x, x[:2], x[:2])
    with pytest.raises(ValueError, match="append the extra token"):
        CrossModalAttention(E, HEADS, add_bias_kv=True)
