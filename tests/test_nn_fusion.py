"""Vector-level fusion against the formulas, written out sample by sample."""

import pytest
import torch

from mmfast.nn import AttentionFusion, ConcatFusion, WeightedFusion

DIMS = {"image": 12, "text": 8, "audio": 5}
B, OUT = 7, 16


def _features(dtype=torch.float64):
    torch.manual_seed(0)
    return {name: torch.randn(B, dim, dtype=dtype, requires_grad=True) for name, dim in DIMS.items()}


def _present():
    torch.manual_seed(1)
    present = {name: torch.rand(B) < 0.6 for name in DIMS}
    for name in DIMS:
        present[name][0], present[name][1] = True, False  # a sample with all, a sample with none
    return present


def _make(kind, dtype=torch.float64):
    torch.manual_seed(2)
    module = {
        "concat": lambda: ConcatFusion(DIMS, OUT),
        "weighted concat": lambda: WeightedFusion(DIMS, OUT),
        "weighted sum": lambda: WeightedFusion(DIMS, OUT, reduce="sum"),
        "attention": lambda: AttentionFusion(DIMS, OUT, heads=2),
    }[kind]()
    for name, p in module.named_parameters():
        if name == "logits" or name.endswith("bias"):
            torch.nn.init.normal_(p)
    return module.to(dtype)


KINDS = ("concat", "weighted concat", "weighted sum", "attention")


def formula(kind, module, x):
    """The result of one sample; x holds the modalities that it has."""
    state = dict(module.named_parameters())
    zeros = {name: torch.zeros(dim, dtype=torch.float64) for name, dim in DIMS.items()}
    if kind == "concat":
        return state["proj.weight"] @ torch.cat([x.get(n, zeros[n]) for n in DIMS]) + state["proj.bias"]
    if kind.startswith("weighted"):
        e = {n: torch.exp(state["logits"][i]) for i, n in enumerate(DIMS) if n in x}
        w = {n: e[n] / sum(e.values()) for n in e}
        if kind == "weighted concat":
            joined = torch.cat([w[n] * x[n] if n in x else zeros[n] for n in DIMS])
            return state["proj.weight"] @ joined + state["proj.bias"]
        terms = [w[n] * (state[f"proj.{n}.weight"] @ x[n] + state[f"proj.{n}.bias"]) for n in x]
        return sum(terms, torch.zeros(OUT, dtype=torch.float64))
    mixed = torch.zeros(OUT, dtype=torch.float64)
    if x:
        tokens = torch.stack([state[f"tokens.{n}.weight"] @ x[n] + state[f"tokens.{n}.bias"] for n in x])
        k, v = (tokens @ state["kv.weight"].T + state["kv.bias"]).split(OUT, 1)
        heads, width = module.heads, OUT // module.heads
        parts = []
        for h in range(heads):
            s = slice(h * width, (h + 1) * width)
            p = torch.softmax(k[:, s] @ state["query"][s] / width**0.5, 0)
            parts.append(p @ v[:, s])
        mixed = torch.cat(parts)
    return state["out.weight"] @ mixed + state["out.bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_formula(kind, missing):
    module, features = _make(kind), _features()
    present = _present() if missing else None
    wanted = [*features.values(), *module.parameters()]
    out = module(features, present)
    rows = [
        formula(kind, module, {n: f[b] for n, f in features.items() if present is None or present[n][b]})
        for b in range(B)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    g = torch.randn(B, OUT, dtype=torch.float64)
    ours = torch.autograd.grad(out, wanted, g)
    theirs = torch.autograd.grad(expected, wanted, g, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_absent_key_is_a_modality_present_nowhere(kind, dtype):
    module, features = _make(kind, dtype), _features(dtype)
    nowhere = {"text": torch.zeros(B, dtype=torch.bool)}
    expected = module(features, nowhere)
    for partial in ({n: f for n, f in features.items() if n != "text"}, {**features, "text": None}):
        module.zero_grad()
        out = module(partial)
        assert torch.equal(out, expected)
        out.sum().backward()
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            if ".text." in name:
                assert not p.grad.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_absent_features_are_never_read(kind):
    module, features, present = _make(kind), _features(), _present()
    dirty = {n: f.detach().masked_fill(~present[n][:, None], torch.nan).requires_grad_() for n, f in features.items()}
    out = module(dirty, present)
    assert torch.equal(out, module(features, present))
    out.sum().backward()
    for n, f in dirty.items():
        assert f.grad.isfinite().all() and not f.grad[~present[n]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    module = _make(kind, torch.float32)
    out = module({name: torch.zeros(0, dim) for name, dim in DIMS.items()})
    assert out.shape == (0, OUT)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_state_dicts_are_stable():
    keys = {kind: sorted(_make(kind).state_dict()) for kind in KINDS}
    assert keys["concat"] == ["proj.bias", "proj.weight"]
    assert keys["weighted concat"] == ["logits", "proj.bias", "proj.weight"]
    per = [f"{n}.{p}" for n in sorted(DIMS) for p in ("bias", "weight")]
    assert keys["weighted sum"] == ["logits", *(f"proj.{x}" for x in per)]
    rest = ["kv.bias", "kv.weight", "out.bias", "out.weight", "query"]
    assert keys["attention"] == [*rest, *(f"tokens.{x}" for x in per)]


def test_errors_name_what_is_wrong():
    module, features = _make("concat"), _features()
    with pytest.raises(ValueError, match="does not know video"):
        module({**features, "video": torch.zeros(B, 2)})
    with pytest.raises(ValueError, match="got no features"):
        module({"text": None})
    with pytest.raises(ValueError, match=r"text must be \[7, 8\], got \[7, 9\]"):
        module({**features, "text": torch.zeros(B, 9)})
    with pytest.raises(ValueError, match=r"present\['text'\] must be bool \[7\]"):
        module(features, {"text": torch.ones(B)})
    with pytest.raises(ValueError, match="expected 'concat' or 'sum'"):
        WeightedFusion(DIMS, OUT, reduce="mean")
    with pytest.raises(ValueError, match="heads 3 must divide out_dim 16"):
        AttentionFusion(DIMS, OUT, heads=3)
