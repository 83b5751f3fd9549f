"""Each optimisation that was kept, beside the plainer way it replaced: bench.py --only parts.

Forward and backward pass of the part alone, in the shape of the 1M model (8 rows of 256, width
128), interleaved; a value is the time of what the code does over that of what it does not, so 0.25
means four times faster. The tests show that both give the same numbers.

Dimensions: B rows, T context, W width, H heads, F ffn hidden, K text targets, V vocabulary.
"""
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import moe
from model import Model, attention_mask, generate, rope_table, rotate

B, T, W, H, HIDDEN, V, E = 8, 256, 128, 4, 352, 264, 8


def leaf(*shape, device):
    return torch.randn(*shape, device=device, requires_grad=True)


def backward(function, *inputs):
    """Work for Bench.interleave: function(*inputs), and the gradients of its sum."""
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def work(r):
        y = function(*inputs)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return work


def real_rope(x, rope):
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        return rotate(x, rope)


def one_matrix(x, weight, down):
    gate, up = F.linear(x, weight).chunk(2, dim=-1)                              # (B,T,F) each
    return F.linear(F.silu(gate) * up, down)


def two_matrices(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def head_everywhere(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1, reduction="sum")


def head_on_targets(x, weight, targets, at):
    x = F.embedding(at, x)                                                       # (K,W)
    return F.cross_entropy(F.linear(x, weight), targets[at], reduction="sum")


def attend(q, k, v, mask, layers=5):
    if mask.dtype == torch.bool and layers < 0:  # made into numbers once for all layers
        mask, layers = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf), -layers
    return sum(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for _ in range(layers))


def pairs(device):
    """{what: (kept, replaced)}, each a work for Bench.interleave."""
    new = partial(leaf, device=device)
    heads, rope = new(B, T, H, W // H), rope_table(T, W // H).to(device)
    x, flat, norm = new(B, T, W), new(B * T, W), nn.LayerNorm(W, bias=False).to(device)
    q, k, v = (new(B, H, T, W // H) for _ in range(3))
    at = torch.randperm(B * T, device=device)[:B * T * 7 // 10].sort()[0]  # targets: 7 in 10
    targets = torch.full((B * T,), -1, device=device)
    targets[at] = at % V
    doc = torch.arange(T, device=device).div(64, rounding_mode="floor").expand(B, -1)
    mask = attention_mask(doc, torch.where(torch.arange(T, device=device) % 64 < 16, doc, -1))
    patches, index = new(B * 100, W), torch.randint(B * 100, (B, T), device=device)
    gate, up, down, head = new(HIDDEN, W), new(HIDDEN, W), new(W, HIDDEN), new(V, W)
    experts = [new(E, HIDDEN, W), new(E, HIDDEN, W), new(E, W, HIDDEN)]
    load = torch.full((E,), B * T // E, device=device)
    order = torch.randperm(B * T, device=device)
    probs = new(B * T, E)
    return {
        "rope: one complex product / four real ones":
            (backward(rotate, heads, rope), backward(real_rope, heads, rope)),
        "norm: layer_norm / rms_norm":
            (backward(norm, x), backward(lambda x: F.rms_norm(x, (W,), norm.weight), x)),
        "gate and up: two matrices / one, then chunk":
            (backward(two_matrices, x, gate, up, down),
             backward(one_matrix, x, new(2 * HIDDEN, W), down)),
        "patches to positions: F.embedding / indexing":
            (backward(lambda p: F.embedding(index, p), patches),
             backward(lambda p: p[index], patches)),
        "head and loss: on targets / on all positions":
            (backward(head_on_targets, flat, head, targets, at),
             backward(head_everywhere, flat, head, targets)),
        "attention of five layers: mask as numbers once / as bool in each":
            (backward(attend, q, k, v, mask, -5), backward(attend, q, k, v, mask, 5)),
        "experts: loop / grouped_mm":
            (backward(moe.looped_experts, flat, *experts, load),
             backward(moe.grouped_experts, flat, *experts, load)),
        "slots by expert: permutation / indexing":
            (backward(moe.Reorder.apply, flat, order, order.argsort()),
             backward(lambda x: x[order], flat)),
        "router, top-1: max / topk":
            (backward(lambda p: p.max(-1)[0], probs), backward(lambda p: p.topk(1)[0], probs)),
    }


def decoding(cfg):
    network = Model(cfg).eval()
    slower = torch.no_grad()(generate.__wrapped__)
    return tuple(lambda r, run=run: run(network, [[0]], 64) for run in (generate, slower))
