"""Each optimisation that was kept, beside the plainer way it replaced.

    python -m tools.bench_parts

Each value is the time of a forward and backward pass of the part alone, the way the code does it,
over the time of the way it does not, so 0.25 means four times faster. The shapes are those of the
1M model (8 rows of 256, width 128). The tests show that both ways give the same numbers.

Dimensions: B rows, T context, W width, H heads, F ffn hidden, K text targets, V vocabulary,
            E experts.
"""
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import moe
from model import Model, attention_mask, generate, rope_table, rotate
from tools import bench

B, T, W, H, HIDDEN, V, E = 8, 256, 128, 4, 352, 264, 8


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def both(kept, replaced, *inputs):
    return backward(kept, *inputs), backward(replaced, *inputs)


def backward(function, *inputs):
    """Work for Bench.interleave: function(*inputs), and the gradients of its sum."""
    leaves = [x for x in inputs if x.requires_grad]

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


def five_layers(q, k, v, mask):
    return sum(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for _ in range(5))


def five_layers_of_numbers(q, k, v, mask):
    return five_layers(q, k, v, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf))


def dense_parts():
    norm, index = nn.LayerNorm(W, bias=False), torch.randint(B * 100, (B, T))
    x, down = leaf(B, T, W), leaf(W, HIDDEN)
    at = torch.randperm(B * T)[:B * T * 7 // 10].sort()[0]  # 7 in 10 positions are targets
    targets = torch.full((B * T,), -1).index_copy(0, at, at % V)
    return {
        "norm: layer_norm / rms_norm": both(norm, lambda x: F.rms_norm(x, (W,), norm.weight), x),
        "gate and up: two matrices / one, then chunk":
            (backward(two_matrices, x, leaf(HIDDEN, W), leaf(HIDDEN, W), down),
             backward(one_matrix, x, leaf(2 * HIDDEN, W), down)),
        "patches to positions: F.embedding / indexing":
            both(lambda p: F.embedding(index, p), lambda p: p[index], leaf(B * 100, W)),
        "head and loss: on targets / on all positions":
            both(partial(head_on_targets, at=at), head_everywhere,
                 leaf(B * T, W), leaf(V, W), targets),
    }


def attention_parts():
    """A row holds four documents of 64 positions; the first 16 of each are an image."""
    at = torch.arange(T)
    doc = (at // 64).expand(B, -1)                                               # (B,T)
    mask = attention_mask(doc, torch.where(at % 64 < 16, doc, -1))               # (B,1,T,T)
    return {
        "rope: one complex product / four real ones":
            both(rotate, real_rope, leaf(B, T, H, W // H), rope_table(T, W // H)),
        "attention of five layers: mask as numbers once / as bool in each":
            both(five_layers_of_numbers, five_layers,
                 *(leaf(B, H, T, W // H) for _ in range(3)), mask),
    }


def expert_parts():
    order, load = torch.randperm(B * T), torch.full((E,), B * T // E)
    inverse, flat = order.argsort(), leaf(B * T, W)
    return {
        "experts: loop / grouped_mm":
            both(moe.looped_experts, moe.grouped_experts, flat, leaf(E, HIDDEN, W),
                 leaf(E, HIDDEN, W), leaf(E, W, HIDDEN), load),
        "slots by expert: permutation / indexing":
            both(lambda x: moe.Reorder.apply(x, order, inverse), lambda x: x[order], flat),
        "router, top-1: max / topk":
            both(lambda p: p.max(-1)[0], lambda p: p.topk(1)[0], leaf(B * T, E)),
    }


def decoding():
    network = Model(bench.config_of({})).eval()
    slower = torch.no_grad()(generate.__wrapped__)
    return {"decoding: inference_mode / no_grad": tuple(
        lambda r, run=run: run(network, [[0]], 64) for run in (generate, slower))}


def parts(where):
    """Rows whose values are only told: no mark is set for them."""
    groups = attention_parts(), dense_parts(), expert_parts(), decoding()
    for what, (kept, replaced) in [pair for group in groups for pair in group.items()]:
        took = where.interleave({"kept": kept, "replaced": replaced}, 15)
        each = [f"{1e3 * np.median(times):.2f}" for times in took.values()]
        yield bench.Row(what, took["kept"] / took["replaced"], note=f"{' and '.join(each)} ms")


def main(argv=None):
    bench.main(argv, {"parts": ("cpu", parts)}, "python -m tools.bench_parts", __doc__)


if __name__ == "__main__":
    main()
