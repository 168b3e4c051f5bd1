"""The packed transformer block against the same formula written per sample with plain PyTorch."""

import copy

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, rms_norm, scaled_dot_product_attention

from mmfast import Layout, ModalityMask
from mmfast.nn import PackedTransformer, PackedTransformerBlock
from mmfast.testing.numeric import assert_close_to_oracle

LENGTHS = [3, 0, 17, 1, 40]


def _norm(module, x):
    if isinstance(module, torch.nn.RMSNorm):
        return rms_norm(x, (x.shape[-1],), module.weight, module.eps)
    return layer_norm(x, (x.shape[-1],), module.weight, module.bias, module.eps)


def block_oracle(block, x, lengths, causal=False):
    """One sample after the other, dense attention."""
    out = []
    for sample in x.split(lengths):
        heads = linear(_norm(block.norm1, sample), block.qkv.weight, block.qkv.bias)
        heads = heads.unflatten(-1, (-1, block.head_dim)).transpose(0, 1)
        q, k, v = heads.split((block.heads, block.kv_heads, block.kv_heads))
        k, v = (t.repeat_interleave(block.heads // block.kv_heads, 0) for t in (k, v))
        if sample.shape[0]:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(0, 1).flatten(1)
        else:
            mixed = sample
        sample = sample + linear(mixed, block.out.weight, block.out.bias)
        hidden = linear(_norm(block.norm2, sample), block.mlp[0].weight, block.mlp[0].bias)
        out.append(sample + linear(gelu(hidden), block.mlp[2].weight, block.mlp[2].bias))
    return torch.cat(out)


def _run(function, module, x, g):
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = function(x)
    out.backward(g)
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kv_heads", [None, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_the_formula(norm, kv_heads, causal):
    torch.manual_seed(0)
    block = PackedTransformerBlock(32, 4, kv_heads=kv_heads, mlp_ratio=3, norm=norm)
    x, g = torch.randn(2, sum(LENGTHS), 32).unbind()
    mask = ModalityMask.causal() if causal else None
    ours = _run(lambda x: block(x, Layout.from_lengths(LENGTHS), mask), block, x, g)
    wide = copy.deepcopy(block).double()
    oracle = _run(lambda x: block_oracle(wide, x, LENGTHS, causal), wide, x.double(), g.double())
    same = _run(lambda x: block_oracle(block, x, LENGTHS, causal), block, x, g)
    names = ["out", "x", *(name for name, _ in block.named_parameters())]
    for i, (name, *values) in enumerate(zip(names, ours, oracle, same)):
        assert_close_to_oracle(name, *values, gradient=i > 0)


def test_rotary_depends_on_distances_only():
    torch.manual_seed(0)
    block = PackedTransformerBlock(32, 4, rotary_base=10000.0)
    x = torch.randn(8, 32)
    layout = Layout.from_lengths([8])
    shifted = Layout(layout.cu_seqlens, start=torch.tensor([100], dtype=torch.int32))
    torch.testing.assert_close(block(x, layout), block(x, shifted), rtol=1e-4, atol=1e-5)
    order = torch.randperm(8)
    assert not torch.allclose(block(x[order], layout), block(x, layout)[order], atol=1e-4)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = PackedTransformer(3, 32, 4, mlp_ratio=2)
    x, g = torch.randn(2, sum(LENGTHS), 32).unbind()
    layout = Layout.from_lengths(LENGTHS)
    plain = _run(lambda x: model(x, layout), model, x, g)
    model.checkpointing = True
    for a, b in zip(plain, _run(lambda x: model(x, layout), model, x, g)):
        assert torch.equal(a, b)


def test_no_rows_give_zero_gradients():
    model = PackedTransformer(2, 32, 4, rotary_base=100.0)
    model(torch.zeros(0, 32), Layout.from_lengths([0, 0])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_samples_do_not_mix():
    torch.manual_seed(0)
    model = PackedTransformer(2, 32, 4)
    x = torch.randn(sum(LENGTHS), 32)
    whole = model(x, Layout.from_lengths(LENGTHS))
    for part, out in zip(x.split(LENGTHS), whole.split(LENGTHS)):
        if part.shape[0]:
            torch.testing.assert_close(model(part, Layout.from_lengths([part.shape[0]])), out, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_runs_and_is_near():
    torch.manual_seed(0)
    model = PackedTransformer(2, 32, 4)
    x = torch.randn(sum(LENGTHS), 32)
    layout = Layout.from_lengths(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, layout)
    torch.testing.assert_close(out.float(), model(x, layout), rtol=0.05, atol=0.05)


def test_dropout_only_while_training():
    torch.manual_seed(0)
    block = PackedTransformerBlock(32, 4, dropout=0.5)
    x, layout = torch.randn(5, 32), Layout.from_lengths([5])
    assert not torch.equal(block(x, layout), block(x, layout))
    block.eval()
    assert torch.equal(block(x, layout), block(x, layout))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="heads 5 must divide dim 32"):
        PackedTransformerBlock(32, 5)
    with pytest.raises(ValueError, match="expected 'layer' or 'rms'"):
        PackedTransformerBlock(32, 4, norm="batch")
