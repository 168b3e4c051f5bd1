"""Tasks: retrieval figures by hand, losses against their formulas, missing modalities, shared parameters."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_toys import ToyModel, toy_batches

from mmfast.adversarial import FGSM
from mmfast.models import ImageInput
from mmfast.nn import AttentionFusion, ConcatFusion, WeightedFusion
from mmfast.tasks import (
    Adversarial,
    Batch,
    Classification,
    Contrastive,
    MultiTask,
    chance,
    embed,
    ranks,
    recall,
    retrieval,
)
from mmfast.tasks.adversarial import with_regions


def brute_ranks(x, y, x_ids, y_ids):
    out = []
    for i in range(len(x)):
        scores = [float(x[i] @ y[j]) for j in range(len(y))]
        best = max(s for s, j in zip(scores, y_ids.tolist()) if j == int(x_ids[i]))
        out.append(1 + sum(s >= best and j != int(x_ids[i]) for s, j in zip(scores, y_ids.tolist())))
    return out


def test_ranks_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(17, 4, generator=g), torch.randn(23, 4, generator=g)
    x_ids, y_ids = torch.arange(17) % 9, torch.arange(23) % 9
    for chunk in (1, 5, 100):
        assert ranks(x, y, x_ids, y_ids, chunk=chunk).tolist() == brute_ranks(x, y, x_ids, y_ids)


def test_a_model_that_says_the_same_of_all_gets_no_credit():
    x = torch.ones(10, 3)
    assert ranks(x, x, torch.arange(10), torch.arange(10)).tolist() == [10] * 10


def test_recall_and_median():
    figures = recall(torch.tensor([1, 2, 6, 11]))
    assert figures == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "median rank": 2.0}


def test_chance_is_the_mean_over_random_orders():
    q_ids, c_ids = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2, 2, 2, 3])
    g = torch.Generator().manual_seed(0)
    for at in (1, 3):
        hits = []
        for _ in range(4000):
            order = torch.randperm(7, generator=g)[:at]
            hits.append((c_ids[order][None] == q_ids[:, None]).any(1).float().mean().item())
        assert chance(q_ids, c_ids, at) == pytest.approx(100 * sum(hits) / len(hits), abs=2)
    assert chance(torch.arange(50), torch.arange(50)) == pytest.approx(2.0)


def test_retrieval_in_both_directions_leaves_out_queries_without_a_partner():
    x, y = torch.eye(4), torch.eye(4)
    figures = retrieval(x, y, torch.arange(4), torch.tensor([0, 1, 2, 9]))
    assert figures["image->text R@1"] == 100 and figures["text->image R@1"] == 100
    assert figures["image->text candidates"] == 4
    with pytest.raises(ValueError, match=r"ranks: query 3 \(id 3\) has no right candidate"):
        ranks(x, y, torch.arange(4), torch.tensor([0, 1, 2, 9]))


# Contrastive


def batch(count=8, seed=0, ids=None):
    batches = toy_batches(seed, batch_size=count)
    out = next(batches)
    return Batch(out.inputs, out.size, ids if ids is not None else out.ids, out.labels)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 2, 0, 1, 5, 6, 0])])
def test_contrastive_is_infonce_without_negatives_of_the_same_id(ids):
    model, b = ToyModel(dropout=0), batch(ids=ids)
    loss, figures = Contrastive().loss(model, b)
    x, y = (model.project(n, f) for n, f in model(b.inputs).items())
    logits = model.logit_scale.exp() * x @ y.T
    same = (b.ids[:, None] == b.ids[None]) & ~torch.eye(8, dtype=torch.bool)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(8)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert figures["scale"].item() == pytest.approx(math.exp(2.0))
    loss.backward()
    assert model.logit_scale.grad is not None


def test_contrastive_needs_ids():
    b = batch()
    with pytest.raises(ValueError, match=r"Contrastive: the batch has no ids, expected int64 \[8\]"):
        Contrastive().loss(ToyModel(), Batch(b.inputs, 8))
    with pytest.raises(ValueError, match="kind is 'clip', expected"):
        Contrastive(kind="clip")


def test_embeddings_are_unit_vectors_in_order():
    model, b = ToyModel(dropout=0), batch()
    x, ids = embed(model, [b, b], "text")
    assert torch.allclose(x.norm(dim=1), torch.ones(16)) and torch.equal(ids, torch.cat([b.ids, b.ids]))
    with pytest.raises(ValueError, match="no batch"):
        embed(model, [], "text")


# Classification


@pytest.mark.parametrize("fusion", [ConcatFusion, WeightedFusion, AttentionFusion])
def test_classification_on_a_fusion(fusion):
    model, b = ToyModel(dropout=0), batch()
    task = Classification(
        4,
        16,
        ("image", "text"),
        fusion=fusion({"image": 8, "text": 8}, 16, **({"heads": 2} if fusion is AttentionFusion else {})),
    )
    loss, figures = task.loss(model, b)
    assert loss.item() == pytest.approx(F.cross_entropy(task.logits(model, b.inputs), b.labels).item())
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    assert 0 <= figures["accuracy"] <= 100


def test_accuracy_majority_and_chance():
    class Fixed(nn.Module):
        def forward(self, inputs):
            return inputs

    task = Classification(4, 4, ("image",))
    nn.init.eye_(task.head.weight), nn.init.zeros_(task.head.bias)
    labels = torch.tensor([0, 0, 0, 1, 2])
    inputs = {"image": F.one_hot(torch.tensor([0, 0, 1, 1, 3]), 4).float()}
    figures = task.evaluate(Fixed(), [Batch(inputs, 5, labels=labels)])
    assert figures == {"accuracy": 60.0, "majority": 60.0, "chance": 25.0, "samples": 5}


def test_classification_checks_its_arguments():
    with pytest.raises(ValueError, match="classes is 1, expected at least 2"):
        Classification(1, 8)
    with pytest.raises(ValueError, match="2 modalities and no fusion"):
        Classification(3, 8, ("image", "text"))
    with pytest.raises(ValueError, match="no labels"):
        Classification(3, 8).loss(ToyModel(), Batch(batch().inputs, 8))
    with pytest.raises(ValueError, match="there is no sample"):
        Classification(3, 8).evaluate(ToyModel(), [])


# Multi-task


def tasks():
    return {"classes": Classification(4, 8), "retrieval": Contrastive()}


def test_equal_and_fixed_weights_sum_the_losses():
    model, b = ToyModel(dropout=0), batch()
    parts = tasks()
    alone = {name: task.loss(model, b)[0].item() for name, task in parts.items()}
    total, figures = MultiTask(parts).loss(model, b)
    assert total.item() == pytest.approx(sum(alone.values()), rel=1e-5)
    total, figures = MultiTask(parts, weights={"retrieval": 0.25}).loss(model, b)
    assert total.item() == pytest.approx(alone["classes"] + 0.25 * alone["retrieval"], rel=1e-5)
    assert figures["retrieval/weight"] == 0.25 and "classes/accuracy" in figures


def test_uncertainty_weighting_is_its_formula_and_learns():
    model, b = ToyModel(dropout=0), batch()
    parts = tasks()
    task = MultiTask(parts, weighting="uncertainty")
    with torch.no_grad():
        task.log_variance.copy_(torch.tensor([0.5, -1.0]))
    total, _ = task.loss(model, b)
    alone = [t.loss(model, b)[0].item() for t in parts.values()]
    expected = math.exp(-0.5) * alone[0] + 0.25 + math.exp(1.0) * alone[1] - 0.5
    assert total.item() == pytest.approx(expected, rel=1e-5)
    total.backward()
    # d/ds (exp(-s) L + s / 2)
    expected = [-math.exp(-0.5) * alone[0] + 0.5, -math.exp(1.0) * alone[1] + 0.5]
    assert task.log_variance.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_backbone_runs_once_and_gets_gradients_of_all_tasks():
    model, b = ToyModel(dropout=0), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    parts = tasks()
    task = MultiTask(parts)
    total, _ = task.loss(model, b)
    assert len(calls) == 1
    total.backward()
    shared = model.encoders["image"].weight.grad.clone()
    each = []
    for part in parts.values():
        model.zero_grad()
        part.loss(model, b)[0].backward()
        each.append(model.encoders["image"].weight.grad.clone())
    assert torch.allclose(shared, sum(each), atol=1e-5)
    assert {n for n, _ in task.named_parameters()} == {
        "modules_of_tasks.classes.head.weight",
        "modules_of_tasks.classes.head.bias",
    }


def test_multitask_evaluates_each_task():
    model, b = ToyModel(dropout=0), batch()
    figures = MultiTask(tasks()).evaluate(model, {"classes": [b], "retrieval": ([b],)})
    assert figures["classes/samples"] == 8 and "retrieval/image->text R@1" in figures


def test_multitask_checks_its_arguments():
    with pytest.raises(ValueError, match="weighting is 'gradnorm'"):
        MultiTask(tasks(), weighting="gradnorm")
    with pytest.raises(ValueError, match="weights name depth"):
        MultiTask(tasks(), weights={"depth": 1.0})
    with pytest.raises(ValueError, match="tasks is empty"):
        MultiTask({})
    with pytest.raises(ValueError, match="give one of the two"):
        MultiTask(tasks(), weighting="uncertainty", weights={"classes": 1.0})


def test_candidates_are_ranked_by_id_whatever_their_order():
    model, b = ToyModel(dropout=0), batch()
    g = torch.Generator().manual_seed(3)
    names, known = torch.randn(12, 5, generator=g), torch.cat([b.ids[:6].flip(0), torch.arange(100, 106)])
    b = Batch(b.inputs, b.size, b.ids, candidates=names, candidate_ids=known)
    plain, _ = Contrastive().loss(model, b)
    total, figures = Contrastive(candidates=0.5).loss(model, b)
    x = model.project("image", model({"image": b.inputs["image"]})["image"])
    y = model.project("text", model({"text": names})["text"])
    logits = model.logit_scale.exp() * x @ y.T
    target = torch.tensor([known.tolist().index(i) for i in b.ids[:6].tolist()])  # the last two are not among them
    assert figures["candidates"].item() == pytest.approx(F.cross_entropy(logits[:6], target).item(), rel=1e-4)
    assert total.item() == pytest.approx(plain.item() + 0.5 * figures["candidates"].item(), rel=1e-5)


# Adversarial


class OneToken(nn.Module):
    """Mean colour of a sample's regions through a linear layer, with a batch norm that counts its batches."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)

    def forward(self, inputs):
        x = inputs["image"]
        sample = torch.repeat_interleave(x.lengths.long())
        mean = torch.zeros(len(x.lengths), 3).index_add(0, sample, x.regions.mean((2, 3))) / x.lengths[:, None]
        return {"image": self.norm(self.linear(mean))}


def pictures():
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 2, 1, 3, 1, 2], dtype=torch.int32)
    regions = torch.rand(int(lengths.sum()), 3, 16, 16, generator=g)
    image = ImageInput(regions, lengths, torch.zeros(len(regions), 2, dtype=torch.int32))
    return Batch({"image": image}, 6, labels=torch.tensor([0, 1, 2, 0, 1, 2]))


def test_adversarial_training_sees_pictures_at_the_edge_of_the_ball():
    torch.manual_seed(0)
    model, task, b = OneToken(), Classification(3, 8), pictures()
    task = Adversarial(task, FGSM(0.1))
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0]["image"].regions.detach())))
    loss, figures = task.loss(model, b)
    loss.backward()
    assert model.training and [training for training, _ in seen] == [False, True]
    attack = seen[-1][1]
    moved = (attack - b.inputs["image"].regions).abs()
    assert moved.max() <= 0.1 + 1e-6 and (moved > 0.099).float().mean() > 0.5
    assert attack.min() >= 0 and attack.max() <= 1
    assert int(model.norm.num_batches_tracked) == 1
    assert all(p.grad is not None for p in model.parameters()) and torch.isfinite(figures["attacked"])
    # The attack raises the loss: the point of it.
    with torch.no_grad():
        model.eval()
        clean = task.task.loss(model, b)[0]
        attacked = task.task.loss(model, with_regions(b, attack))[0]
    assert attacked > clean


def test_random_starts_follow_from_torchs_random_state():
    model, task, b = OneToken(), Classification(3, 8), pictures()
    task = Adversarial(task, FGSM(0.1, step_size=0.05, random_start=True))
    state = torch.get_rng_state()
    first = task.loss(model, b)[0].item()
    other = task.loss(model, b)[0].item()
    torch.set_rng_state(state)
    model.norm.reset_running_stats()
    assert task.loss(model, b)[0].item() == pytest.approx(first) and first != other
