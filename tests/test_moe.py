"""python -m pytest tests/test_moe.py   (about 5 seconds)"""
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import moe as moe_module
from helpers import build, make_batch
from moe import MoE, grouped_experts, load_balancing_loss, looped_experts, route

W, H = 16, 32


def layer(experts=4, top_k=1, routing="learned", seed=0):
    torch.manual_seed(seed)
    return MoE(W, H, 0, experts, top_k, routing)


def tokens(n=24, seed=0):
    """x (2,n,W) and kind (2,n) with text, images and padding."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(-1, 2, (2, n), generator=generator)
    return torch.randn(2, n, W, generator=generator), kind


def masked_reference(m, x, kind):
    """Every expert on every token, masked: slow and plain -> y, None."""
    flat = x.flatten(0, 1)
    if m.learned:
        probs = (flat @ m.router.T).softmax(-1)
        rank = probs.argsort(-1, descending=True).argsort(-1)  # of each expert for the token
        gate = probs * (rank < m.top_k)
    else:
        gate = F.one_hot((kind.flatten() == 1).long(), 2).float()
    y = 0
    for e in range(m.experts):
        y = y + gate[:, e:e + 1] * (F.silu(flat @ m.w_gate[e].T) * (flat @ m.w_up[e].T)
                                @ m.w_down[e].T)
    return y.view_as(x), None


def value_and_gradients(function, m, x, kind):
    """The function's output and its gradients for x and for the parameters of m."""
    x = x.clone().requires_grad_()
    m.zero_grad()
    y = function(x, kind)[0]
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad] + [p.grad.clone() for p in m.parameters()]


def all_close(a, b, atol=2e-6):
    return all(torch.allclose(i, j, atol=atol, rtol=1e-4) for i, j in zip(a, b, strict=True))


@pytest.mark.parametrize("run", [grouped_experts, looped_experts])
@pytest.mark.parametrize("routing, top_k, skew", [
    ("learned", 1, 0), ("learned", 2, 0), ("learned", 4, 0), ("learned", 1, 9), ("learned", 2, 9),
    ("modality", 1, 0)])
def test_both_ways_equal_the_masked_reference(monkeypatch, run, routing, top_k, skew):
    """Also in their gradients, which an expert without tokens has, too: zero, not None."""
    monkeypatch.setattr(moe_module, "grouped_mm_is_fast", lambda *args: run is grouped_experts)
    m, (x, kind) = layer(top_k=top_k, routing=routing), tokens()
    if skew:  # expert 2 gets every token, experts stay empty
        x[..., 0] = skew
        m.router.data[:, 0] = torch.tensor([0.0, 0.0, 9.0, 1.0])
        assert (m(x, kind)[1].counts.sum(0) == 0).any()
    fast = value_and_gradients(m, m, x, kind)
    assert all_close(fast, value_and_gradients(partial(masked_reference, m), m, x, kind))


def test_a_compiled_layer_is_one_graph(monkeypatch):
    """With the grouped kernel, as on a GPU; and the rule that chooses it can be traced."""
    assert not moe_module.grouped_mm_is_fast(torch.ones(8, 8), torch.ones(2, 8, 8)), "on a CPU"
    (x, kind), rule = tokens(), moe_module.grouped_mm_is_fast
    monkeypatch.setattr(moe_module, "grouped_mm_is_fast", lambda *args: not rule(*args))
    m = layer(top_k=2)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    plain, fast = (value_and_gradients(run, m, x.bfloat16(), kind) for run in (m, compiled))
    assert all_close(plain, fast, atol=2e-2)


@pytest.mark.parametrize("major, dtype, width, fast", [
    (9, torch.bfloat16, 16, True), (10, torch.bfloat16, 16, False), (8, torch.bfloat16, 16, False),
    (9, torch.float32, 16, False), (9, torch.bfloat16, 20, False)])
def test_the_grouped_kernel_is_for_hopper_in_bf16(monkeypatch, major, dtype, width, fast):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Mock(major=major))
    x = Mock(is_cuda=True, dtype=dtype)
    assert moe_module.grouped_mm_is_fast(x, torch.empty(2, width, 32)) == fast


def test_router_is_fp32_among_bf16():
    m, (x, _) = layer(), tokens()
    probs = route(x.bfloat16().flatten(0, 1), m.router, 1)[2]
    y, stats = m(x.bfloat16(), torch.zeros(2, 24))
    assert torch.equal(probs, route(x.bfloat16().float().flatten(0, 1), m.router, 1)[2])
    assert probs.dtype == stats.balance.dtype == torch.float32
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and stats.counts.sum() == 48


def test_balance_is_one_at_perfect_balance_and_e_at_collapse():
    for slots in (16.0, 32.0):  # top-1 and top-2 of the same tokens
        assert load_balancing_loss(torch.full((8,), slots), torch.full((8,), 1 / 8)).item() == 1
    one = torch.eye(8)[0]
    assert load_balancing_loss(one * 128, one).item() == 8
    assert load_balancing_loss(0 * one, one).item() == 0  # a step of padding came before


def test_balance_of_a_hand_computed_example():
    """3 tokens, 2 experts, top-1: probabilities (.9 .1) (.6 .4) (.2 .8) -> f = (2/3, 1/3), sum of
    P = (1.7, 1.3), E sum f P = 2 (2/3 * 1.7 + 1/3 * 1.3) = 9.4/3. The last is padding."""
    torch.manual_seed(0)
    m = MoE(4, 4, 0, 2)
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.01, 0.99]])
    m.router.data = torch.eye(2, 4)
    x = torch.cat([probs.log(), torch.zeros(4, 2)], 1)[None]
    m.load.copy_(m(x, torch.tensor([[0, 1, 0, -1]]))[1].counts.sum(0))
    stats = m(x, torch.tensor([[0, 1, 0, -1]]))[1]
    assert stats.balance.item() == pytest.approx(9.4 / 3, rel=1e-5)
    assert stats.counts.tolist() == [[1, 1], [1, 0]]


def test_model_reports_the_mean_over_layers_and_counts():
    model = build(moe="learned", experts=4, top_k=2, depth=3).eval()
    batch = make_batch(model.cfg, [["tIttt", "tttt"], ["tItIttt"]])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(batch)
    counts = out.expert_counts
    assert counts.shape == (3, 2, 4) and not counts.requires_grad
    assert (counts.sum(2) == torch.tensor([13.0, 12.0]) * 2).all(), "text, image slots; no padding"
    each = [stats.balance.item() for stats in model.decode(batch)[1]]
    assert min(each) > 0.5 * 25  # 25 tokens
    assert out.balance.item() == pytest.approx(sum(each) / 3)
    again = model(batch)
    assert torch.equal(out.loss, again.loss) and torch.equal(counts, again.expert_counts)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert build()(batch).balance == 0 and build()(batch).expert_counts is None
