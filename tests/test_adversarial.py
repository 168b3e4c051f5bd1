"""Attacks on models whose optimum is known, and on small networks."""

import dataclasses

import pytest
import torch
from torch import nn

from mmfast import Layout
from mmfast.adversarial import (
    APGD,
    FGSM,
    MIFGSM,
    PGD,
    VILLA,
    FreeLB,
    adversarial_training_loss,
    evaluate,
)

ATTACKS = [FGSM, PGD, MIFGSM, APGD]


def linear(seed=0, b=5, d=12):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=generator)
    return w, torch.randn(b, d, generator=generator)


class Net(nn.Module):
    def __init__(self, d=10, c=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, c))

    def forward(self, x):
        return 10 * self.layers(x)


def problem(b=64):
    net = Net().eval()
    x = torch.rand(b, 10, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    return net, x, y, lambda z: nn.functional.cross_entropy(net(z), y, reduction="none")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_linear_model_reaches_the_dual_norm(attack, norm, targeted):
    w, x = linear()
    eps = torch.linspace(0.1, 2.0, len(x))
    result = attack(eps, norm=norm, targeted=targeted, random_start=False)(lambda z: z @ w, x, bounds=None)
    rise = (result - x) @ w * (-1 if targeted else 1)
    dual = w.abs().sum() if norm == "linf" else w.norm()
    torch.testing.assert_close(rise, eps * dual, rtol=1e-4, atol=1e-4)


def test_random_starts_converge():
    w, x = linear()
    result = PGD(1.0, norm="l2", steps=50, step_size=0.5)(lambda z: z @ w, x, bounds=None)
    torch.testing.assert_close((result - x) @ w, w.norm().expand(5), rtol=1e-4, atol=1e-4)


def test_linear_model_in_bounds():
    """With bounds the best point of the L-inf ball is known per element."""
    w, x = linear()
    x = x.sigmoid()
    result = PGD(0.3, steps=20)(lambda z: z @ w, x)
    want = (x + 0.3 * w.sign()).clamp(0, 1)
    torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-6)


def test_tokens_have_balls_of_their_own():
    w, _ = linear(d=6)
    x = torch.randn(3, 4, 6)
    result = PGD(0.5, norm="l2", granularity="token", random_start=False)(lambda z: (z @ w).sum(1), x, bounds=None)
    torch.testing.assert_close((result - x) @ w, torch.full((3, 4), 0.5) * w.norm(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attack", ATTACKS)
def test_packed_equals_dense(attack):
    """The same samples attacked packed and padded give the same points, also from random starts."""
    w, _ = linear(d=6)
    layout = Layout.from_lengths([4, 4, 4])
    x = torch.randn(3, 4, 6)
    eps = torch.tensor([0.1, 1.0, 2.0])
    run = attack(eps, norm="l2", steps=4, random_start=True, restarts=2)
    dense = run(lambda z: (z @ w).square().sum(1), x, bounds=None, seed=5)

    def packed_loss(z):
        return torch.zeros(3).index_add(0, layout.samples(), (z @ w).square())

    packed = run(packed_loss, x.flatten(0, 1), bounds=None, seed=5, layout=layout)
    torch.testing.assert_close(packed.view_as(x), dense, rtol=1e-4, atol=1e-5)
    size = (dense - x).flatten(1).norm(dim=1)
    assert (size <= eps * 1.00001).all() and (size > 0.9 * eps).all()


def test_ragged_with_rows_outside():
    layout = Layout.from_lengths([3, 0, 5])
    x = torch.randn(10, 4)
    x[8:] = torch.nan
    result = PGD(0.1)(
        lambda z: torch.zeros(3).index_add(0, layout.samples(8), z[:8].sum(1)), x, bounds=None, layout=layout
    )
    torch.testing.assert_close(result[:8], x[:8] + 0.1)
    assert result[8:].isnan().all()


def test_modalities():
    wa, a = linear(0)
    wb, b = linear(1)
    inputs = {"image": a.sigmoid(), "text": b, "label": torch.arange(5)}

    def loss(z):
        assert z["label"] is not None
        return z["image"] @ wa + z["text"] @ wb

    bounds = {"image": (0.0, 1.0)}
    result = PGD({"image": 0.1, "text": torch.full((5,), 0.5)}, step_size={"image": 0.1, "text": 0.2})(
        loss, inputs, bounds=bounds
    )
    torch.testing.assert_close(result["image"], (inputs["image"] + 0.1 * wa.sign()).clamp(0, 1))
    torch.testing.assert_close(result["text"], b + 0.5 * wb.sign())
    only = PGD({"text": 0.5})(loss, inputs, bounds=None)
    assert torch.equal(only["image"], inputs["image"]) and not torch.equal(only["text"], b)
    with pytest.raises(ValueError, match="eps names 'audio'"):
        PGD({"audio": 0.5})(loss, inputs)
    with pytest.raises(ValueError, match="perturb its embedding"):
        PGD({"label": 0.5})(loss, inputs)
    with pytest.raises(ValueError, match="step_size is missing for text"):
        PGD({"text": 0.5}, step_size={"image": 1.0})(loss, inputs)


@pytest.mark.parametrize("attack", ATTACKS)
def test_networks(attack):
    net, x, _, loss = problem()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = attack(0.1)(loss, x)
    assert not result.requires_grad and (result - x).abs().max() <= 0.1 + 1e-6
    assert result.min() >= 0 and result.max() <= 1
    assert loss(result).mean() > loss(x).mean() + 0.1
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        assert torch.equal(attack(0.1)(loss, x), result)  # repeatable, and gradients are on inside


def test_strength_grows():
    _, x, _, loss = problem()

    def strength(attack):
        return loss(attack(loss, x)).mean().item()

    assert strength(PGD(0.1, steps=20)) > strength(FGSM(0.1)) * 0.999
    one, many = PGD(0.3, steps=3), PGD(0.3, steps=3, restarts=4)
    assert (loss(many(loss, x)) >= loss(one(loss, x)) - 1e-6).all()  # the first restart is the single run
    assert strength(APGD(0.1, steps=30)) > strength(PGD(0.1, steps=30)) * 0.99


def test_model_mode():
    net, x, y, _ = problem()
    net.train()
    net.layers[1].eval()  # a frozen normalisation
    modes = [m.training for m in net.modules()]
    seen = []

    def loss(z):
        seen.append([m.training for m in net.modules()])
        return nn.functional.cross_entropy(net(z), y)

    PGD(0.1, steps=1)(loss, x)
    assert seen[-1] == modes
    PGD(0.1, steps=1)(loss, x, model=net)
    assert not any(seen[-1]) and [m.training for m in net.modules()] == modes


def test_losses_that_do_not_fit():
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"loss_fn returned \[4, 3\]"):
        PGD(0.1)(lambda z: z, x)
    with pytest.raises(ValueError, match=r"must return losses \[B\]"):
        APGD(0.1)(lambda z: z.sum(), x)
    with pytest.raises(ValueError, match="at least 1"):
        PGD(0.1, steps=0)
    unused = PGD(0.1, random_start=False)(lambda z: torch.zeros(4, requires_grad=True), x)
    assert torch.equal(unused, x)  # no gradient, no step
    with pytest.raises(dataclasses.FrozenInstanceError):
        PGD(0.1).eps = 2


def test_adversarial_training_loss():
    net, x, _, loss = problem()
    attack = FGSM(0.1)
    mixed = adversarial_training_loss(loss, x, attack, weight=0.3)
    want = 0.7 * loss(x).mean() + 0.3 * loss(attack(loss, x)).mean()
    torch.testing.assert_close(mixed, want)
    mixed.backward()
    assert all(p.grad is not None for p in net.parameters())
    torch.testing.assert_close(adversarial_training_loss(loss, x, None, weight=0.0), loss(x).mean())


def test_freelb_is_the_mean_over_its_steps():
    net, x, _, loss = problem()
    free = FreeLB(0.5, 0.2, steps=3, random_start=False)
    value = free.backward(loss, x)
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    delta, total = torch.zeros_like(x), 0.0
    for _ in range(3):
        delta.requires_grad_()
        step = loss(x + delta).mean() / 3
        step.backward()
        total += step.item()
        g = delta.grad / delta.grad.norm(dim=1, keepdim=True)
        delta = delta.detach() + 0.2 * g
        delta = delta * (0.5 / delta.norm(dim=1, keepdim=True)).clamp(max=1)
    assert abs(value.item() - total) < 1e-5
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_freelb_scaled_backward_and_plain():
    net, x, _, loss = problem()
    free = FreeLB({"input": 0.5}, 0.2, steps=2, granularity="sample")
    free.backward(loss, x, seed=3)
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    free.backward(loss, x, seed=3, backward=lambda value: (1024 * value).backward())
    for a, p in zip(plain, net.parameters()):
        torch.testing.assert_close(p.grad / 1024, a, rtol=1e-4, atol=1e-6)
    net.zero_grad()
    FreeLB(0.0, 0.2, steps=2).backward(loss, x)
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss(x).mean().backward()
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_villa():
    net, x, y, _ = problem()
    inputs = {"image": x, "text": torch.randn(64, 10)}

    def forward(z):
        return net(z["image"] + 0.1 * z["text"])

    def task(logits):
        return nn.functional.cross_entropy(logits, y, reduction="none")

    parts = VILLA({"image": 0.5, "text": 1.0}, {"image": 0.2, "text": 0.4}).backward(forward, task, inputs)
    assert set(parts) == {"clean", "image", "text"} and parts["image"] > parts["clean"]
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.zero_grad()
    VILLA({"image": 0.0}, 0.1, kl_weight=1.0).backward(forward, task, inputs)  # no perturbation: the clean loss twice
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (2 * task(forward(inputs)).mean()).backward()
    for a, p in zip(got, net.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


def test_evaluate_honest_model():
    net, x, y, loss = problem()
    found = evaluate(loss, lambda z: net(z).argmax(1) == y, x, {"pgd": PGD(0.1), "apgd": APGD(0.1, steps=20)})
    assert found.clean == 1 and found.worst <= min(found.accuracy.values()) < 1
    assert found.loss["pgd"] > found.loss["noise"] > found.loss["clean"]
    assert not found.flags


def test_evaluate_sees_hidden_gradients():
    """Rounded inputs have a gradient of zero: the attack finds nothing, and the flags say so."""
    net, x, y, _ = problem()

    def hidden(z):
        return net((z * 8).round() / 8)

    def loss(z):
        return nn.functional.cross_entropy(hidden(z), y, reduction="none")

    y = hidden(x).argmax(1)
    found = evaluate(loss, lambda z: hidden(z).argmax(1) == y, x, {"pgd": PGD(0.2, random_start=False)})
    assert found.accuracy["pgd"] == 1
    text = "; ".join(found.flags)
    assert "random noise" in text and "exactly zero" in text and "without limit" in text
    with pytest.raises(ValueError, match="none of them targeted"):
        evaluate(loss, hidden, x, {"a": PGD(0.1, targeted=True)})


def test_apgd_checkpoints():
    from mmfast.adversarial.attacks import _checkpoints

    # Croce and Hein 2020, section 3.2: windows of 22, 19, 16, 13, 10, 7 and then 6 steps
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
