import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maect_fast.config import HeadConfig
from maect_fast.models.head import NNCLRHead

N, D = 6, 12


def build(target_ema: float | None = None, topk: int = 3, seed: int = 0) -> NNCLRHead:
    config = HeadConfig(
        projector_hidden=10,
        predictor_hidden=14,
        output_dim=8,
        queue_size=20,
        topk=topk,
        temperature=0.2,
        target_ema=target_ema,
    )
    return NNCLRHead(config, D, seed=seed)


def pooled() -> Tensor:
    return torch.randn(2, N, D)


def fill_queue(head: NNCLRHead) -> None:
    """Labels and ids as after some updates."""
    head.loss.queue.queue_y.copy_(torch.arange(20) % 4)
    head.loss.queue.queue_id.copy_(torch.arange(20) + 100)


@pytest.mark.parametrize("target_ema", [None, 0.99])
def test_names_and_shapes(target_ema: float | None) -> None:
    head = build(target_ema)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    projector = {
        *(f"{i}.weight" for i in (0, 3, 6)),
        *(f"{i}.{n}" for i in (1, 4, 7) for n in norm),
    }
    predictor = {"0.weight", "3.weight", *(f"1.{n}" for n in norm)}
    expected = {f"projector.{n}" for n in projector} | {f"predictor.{n}" for n in predictor}
    expected |= {f"loss.queue.{n}" for n in ("queue", "queue_y", "queue_id", "queue_ptr")}
    if target_ema is not None:
        expected |= {f"target_projector.{n}" for n in projector}
    state = head.state_dict()
    assert set(state) == expected
    assert state["projector.0.weight"].shape == (10, D)
    assert state["projector.3.weight"].shape == (10, 10)
    assert state["projector.6.weight"].shape == (8, 10)
    assert state["predictor.0.weight"].shape == (14, 8)
    assert state["predictor.3.weight"].shape == (8, 14)
    assert state["loss.queue.queue"].shape == (20, 8)
    # kaiming-uniform with a = sqrt(5)
    bound = D**-0.5
    assert 0.8 * bound < state["projector.0.weight"].abs().max() <= bound


def reference_pass(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The head's layers on one view, batch statistics written out."""
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            mean, var = x.mean(dim=0), x.var(dim=0, unbiased=False)
            x = (x - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias
        elif isinstance(layer, nn.Linear):
            x = x @ layer.weight.T
        else:
            x = x.clamp_min(0)
    return x


@pytest.mark.parametrize("target_ema", [None, 0.9])
def test_loss_and_gradients_by_formula(target_ema: float | None) -> None:
    head = build(target_ema, topk=1).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    head.loss.queue.queue.copy_(F.normalize(torch.randn(20, 8, dtype=torch.float64), dim=-1))
    queue = head.loss.queue.queue.clone()
    features = pooled().double().requires_grad_()
    trained = [*head.projector.parameters(), *head.predictor.parameters(), features]

    predicted = [
        reference_pass(head.predictor, reference_pass(head.projector, x)) for x in features
    ]
    searched = head.projector if head.target_projector is None else head.target_projector
    z = [F.normalize(reference_pass(searched, x).detach(), dim=-1) for x in features]
    neighbour = [queue[(view @ queue.T).argmax(dim=1)] for view in z]
    logits = [neighbour[1 - v] @ F.normalize(predicted[v], dim=-1).T / 0.2 for v in (0, 1)]
    expected = sum((F.cross_entropy(rows, torch.arange(N)) for rows in logits), torch.zeros(())) / 2
    expected_grads = torch.autograd.grad(expected, trained)

    output = head(features, step=0)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    for grad, expected_grad in zip(
        torch.autograd.grad(output.loss, trained), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)
    # view 0 of what was searched with enters the queue
    torch.testing.assert_close(head.loss.queue.queue[:N], z[0])
    assert torch.equal(head.loss.queue.queue[N:], queue[N:])
    assert head.loss.queue.queue_ptr.tolist() == [N]


def test_statistics_are_per_view_and_advance_in_view_order() -> None:
    head = build()
    features = pooled() + torch.tensor([0.0, 50.0])[:, None, None]
    norm = head.projector[1]
    assert isinstance(norm, nn.BatchNorm1d)
    head(features, step=0)
    hidden = features @ head.state_dict()["projector.0.weight"].T
    expected = torch.zeros(10)
    for view in hidden:
        expected = 0.9 * expected + 0.1 * view.mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 2


def test_target_follows_by_formula_and_copies_the_statistics() -> None:
    head = build(0.9)
    assert head.target_projector is not None
    assert not any(p.requires_grad for p in head.target_projector.parameters())
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.5)
    expected = {name: p.detach().double() for name, p in head.projector.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(head(pooled(), step=step).loss)
        optimizer.step()
        head.update_target()
        for name, p in head.projector.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double()
    for name, p in head.target_projector.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(p, head.projector.get_parameter(name))
        assert p.grad is None
    for name, buffer in head.target_projector.named_buffers():
        assert torch.equal(buffer, head.projector.get_buffer(name))
        assert buffer.data_ptr() != head.projector.get_buffer(name).data_ptr()


def test_target_starts_as_a_true_copy() -> None:
    head = build(0.9)
    assert head.target_projector is not None
    nn.init.normal_(head.projector.get_parameter("0.weight"))
    head.start_target()
    target, source = head.target_projector.state_dict(), head.projector.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in target.items())
    assert all(value.data_ptr() != source[name].data_ptr() for name, value in target.items())


def test_resume_keeps_the_target_apart_from_the_projector() -> None:
    head = build(0.9)
    assert head.target_projector is not None
    with torch.no_grad():
        head.projector.get_parameter("0.weight").add_(1)
    other = build(0.9)
    other.load_state_dict(head.state_dict())
    weights = [h["target_projector.0.weight"] for h in (head.state_dict(), other.state_dict())]
    assert torch.equal(*weights)
    assert not torch.equal(weights[1], other.state_dict()["projector.0.weight"])


def test_update_target_without_a_target_does_nothing() -> None:
    head = build(None)
    before = copy.deepcopy(head.state_dict())
    head.update_target()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_evaluation_changes_no_state() -> None:
    head = build(0.9).eval()
    before = copy.deepcopy(head.state_dict())
    head(pooled(), step=0)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_ids_and_labels_reach_the_queue_and_the_metric() -> None:
    head = build(topk=1)
    fill_queue(head)
    ids, labels = torch.arange(N), torch.arange(N) % 4
    assert 0 <= head(pooled(), step=0, sample_id=ids, label=labels).nn_accuracy <= 1
    assert head.loss.queue.queue_id[:N].equal(ids)
    assert head.loss.queue.queue_y[:N].equal(labels)
    # the queue now holds these very images: without their ids they would find themselves
    x = pooled()
    head.eval()
    z = F.normalize(head.projector(x[0]), dim=-1).detach()
    head.loss.queue.queue[:N] = z
    assert head(x, step=1, label=labels).nn_accuracy == 1
    others = torch.full((N,), 9)
    assert head(x, step=1, sample_id=ids, label=others).nn_accuracy == 0


@pytest.mark.parametrize("as_tensor", [False, True])
def test_draws_depend_on_the_seed_and_the_step(as_tensor: bool) -> None:
    features = pooled()

    def loss(seed: int, step: int) -> float:
        torch.manual_seed(1)
        head = build(topk=20, seed=seed).eval()
        head.loss.queue.queue.copy_(torch.eye(20, 8) + 0.1)
        number: float = head(features, step=torch.tensor(step) if as_tensor else step).loss.item()
        return number

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_bf16_autocast_gives_an_fp32_loss() -> None:
    head = build(0.9)
    features = pooled()
    other = copy.deepcopy(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(features, step=0).loss
    assert loss.dtype == torch.float32
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(other(features, step=0).loss.item(), rel=0.1)
    assert head.loss.queue.queue.dtype == torch.float32
