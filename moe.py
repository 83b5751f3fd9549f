"""Mixture of experts in place of the feed-forward layer: dropless, learned or by modality.

Dimensions: B rows, T positions, N = B*T tokens, W width, F ffn hidden, E experts, K experts a token
(top_k), S = N*K slots (one token at one expert).

The paper's MoE (section 4) is MegaBlocks' dropless one: token-choice top-k, no capacity, no token
dropped, every feed-forward layer replaced, the load-balancing loss weighted 0.01 (by train.py).
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Stats(NamedTuple):
    """What one layer reports of one forward pass. Padding is in neither field."""
    balance: torch.Tensor   # () float32, load_balancing_loss, 1.0 at perfect balance
    counts: torch.Tensor    # (2,E) float32, number of (text, image) tokens sent to each expert


class MoE(nn.Module):
    """A drop-in for the SwiGLU layer: forward(x (B,T,W), kind (B,T)) -> y (B,T,W), Stats.

    routing="learned": a bias-free fp32 router, softmax over E, the K most probable experts, each
    output scaled by its raw probability (not renormalised over the K). It never sees `kind`.
    routing="modality": no router; expert 0 takes text and expert 1 image tokens, unscaled.

    kind: 0 text, 1 image, -1 padding. Padding is computed like text (shapes stay static) but is
    left out of the balance loss and of the counts, which would otherwise describe the packer.

    Expert weights are stacked in one 3-D tensor: an expert without tokens gets a zero gradient, not
    None, so that DDP never waits for it. They are initialised as the dense layer's are.
    """

    def __init__(self, width: int, hidden: int, layer: int, experts: int = 8, top_k: int = 1,
                 routing: str = "learned"):
        super().__init__()
        self.learned = routing == "learned"
        self.experts, self.top_k = (experts, top_k) if self.learned else (2, 1)
        self.gate = nn.Parameter(torch.empty(self.experts, hidden, width))
        self.up = nn.Parameter(torch.empty(self.experts, hidden, width))
        self.down = nn.Parameter(torch.empty(self.experts, width, hidden))
        weights = [(self.gate, width ** -0.5), (self.up, width ** -0.5),
                   (self.down, (hidden * 2 * (layer + 1)) ** -0.5)]  # as init_weight in model.py
        if self.learned:
            self.router = nn.Parameter(torch.empty(self.experts, width))
            weights.append((self.router, width ** -0.5))
        for weight, std in weights:
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        # torch.compile asks and does not trace the probe; here, as the mark imports the compiler,
        # a second that a dense model need not wait
        torch.compiler.assume_constant_result(use_grouped_mm)

    def forward(self, x, kind):
        flat, kind = x.flatten(0, 1), kind.flatten()                             # (N,W), (N,)
        if self.learned:
            gates, chosen, probs = route(flat, self.router, self.top_k)          # (N,K) (N,K) (N,E)
        else:
            chosen, gates, probs = (kind == 1).long()[:, None], None, None       # (N,1)
        # a one-hot map and not bincount: that one waits for the GPU
        hot = (chosen[:, :, None] == torch.arange(self.experts, device=x.device)).sum(1)  # (N,E)
        y = self.run(flat, chosen, hot.sum(0), gates).unflatten(0, x.shape[:2])  # (B,T,W)
        return y, summary(hot, probs, kind)

    def run(self, x, chosen, load, gates):
        """x (N,W), chosen (N,K) expert ids, load (E,) slots of each expert, gates (N,K) or None
        -> (N,W). Sorts the slots by expert, so that each expert works on one contiguous slice."""
        order = chosen.flatten().argsort(stable=True)                            # (S,) slot ids
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)                 # the inverse
        weights = self.gate, self.up, self.down
        if torch.is_autocast_enabled(x.device.type):  # autocast knows linear but not grouped_mm
            dtype = torch.get_autocast_dtype(x.device.type)
            x, *weights = (tensor.to(dtype) for tensor in (x, *weights))
        slots = x[:, None].expand(-1, self.top_k, -1).flatten(0, 1)              # (S,W)
        slots = Reorder.apply(slots, order, place)                               # by expert
        slots = run_experts(slots, *weights, load)                               # (S,W)
        slots = Reorder.apply(slots, place, order).unflatten(0, chosen.shape)    # (N,K,W)
        if gates is not None:
            slots = slots * gates[:, :, None]
        return slots.sum(1)                                                      # (N,W)


class Reorder(torch.autograd.Function):
    """x (S,W), index a permutation of its rows and its inverse -> x[index]. Autograd would add the
    gradients row by row into zeros; of a permutation they need only be gathered."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)                                          # (S,W)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None                         # (S,W)


def route(x, router, top_k: int):
    """x (N,W), router (E,W) -> gates (N,K), chosen (N,K) int64, probs (N,E), all fp32.
    In fp32 under autocast too: in bf16 near-equal experts tie and the choice becomes noise."""
    with torch.autocast(x.device.type, enabled=False):
        probs = F.linear(x.float(), router.float()).softmax(-1)                  # (N,E)
    if top_k == 1:  # max is several times faster than topk on a CPU
        gates, chosen = probs.max(-1, keepdim=True)                              # (N,1)
    else:
        gates, chosen = probs.topk(top_k, dim=-1)                                # (N,K)
    return gates, chosen, probs


def summary(hot, probs, kind) -> Stats:
    """hot (N,E) slots of a token at an expert, probs (N,E) or None (fixed routing), kind (N,)."""
    with torch.autocast(hot.device.type, enabled=False):  # counts above 256 are not bf16 numbers
        modality = torch.stack([kind == 0, kind == 1]).float()                   # (2,N)
        counts = modality @ hot.float()                                          # (2,E)
        balance = counts.new_zeros(())
        if probs is not None:
            mean_prob = modality.sum(0) @ probs / modality.sum().clamp(min=1)    # (E,)
            balance = load_balancing_loss(counts.sum(0), mean_prob)
    return Stats(balance, counts)


def load_balancing_loss(load, mean_prob) -> torch.Tensor:
    """E * sum_e f_e P_e, with f_e = load_e / (tokens * K) the share of slots that expert e got and
    P_e its mean probability (load, mean_prob (E,)). sum f = sum P = 1 whatever K is (the
    MegaBlocks convention; others do not divide by K and get K), so the value is exactly 1.0 at
    perfect balance and E when one expert takes all with certainty. Only P carries a gradient. It is
    of this micro-batch and rank: the mean of several such values is not that of the global batch.
    """
    share = load / load.sum().clamp(min=1)                                       # f (E,)
    return len(load) * (share * mean_prob).sum()


# --------------------------------------------------------------------------- running experts


def run_experts(x, gate, up, down, load):
    """Each expert's SwiGLU on its slice. x (S,W) sorted by expert, gate and up (E,F,W), down
    (E,W,F), load (E,) slice lengths, sum S -> (S,W)."""
    aligned = all(n * x.element_size() % 16 == 0 for n in down.shape[1:])  # its stride rule
    way = grouped_experts if aligned and use_grouped_mm(x.device, x.dtype) else looped_experts
    return way(x, gate, up, down, load)


def grouped_experts(x, gate, up, down, load):
    """One kernel for all experts; the slice ends stay on the device."""
    ends = load.cumsum(0).to(torch.int32)                                        # (E,)
    gate, up, down = (weight.transpose(1, 2) for weight in (gate, up, down))
    hidden = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)  # (S,F)
    return F.grouped_mm(hidden, down, offs=ends)                                 # (S,W)


def looped_experts(x, gate, up, down, load):
    """The same, one expert after another. On a GPU tolist() waits for the device."""
    slices = zip(x.split(load.tolist()), gate.unbind(), up.unbind(), down.unbind())
    return torch.cat([F.linear(F.silu(F.linear(part, g)) * F.linear(part, u), d)
                      for part, g, u, d in slices])


def use_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    return probe_grouped_mm(device, dtype)


@functools.cache
def probe_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped_mm exists, is fast and is right here. Decided once per device and dtype, by
    running it, and printed: the same file runs on laptops, A100s and H100s."""
    why = None
    if not hasattr(F, "grouped_mm"):
        why = "needs torch 2.10"
    elif device.type != "cuda":  # CPU: a whole step takes 0.98 to 1.06 times the loop's time
        why = f"not faster on {device.type}"
    elif torch.cuda.get_device_capability(device)[0] not in (9, 10) or dtype != torch.bfloat16:
        why = "fast only in bf16 on Hopper and data-centre Blackwell"  # else torch loops too
    else:
        why = grouped_mm_error(device, dtype)
    print(f"moe: experts run by {f'a loop (grouped_mm: {why})' if why else 'grouped_mm'}"
          f" on {device.type} {str(dtype).removeprefix('torch.')}", flush=True)
    return why is None


def grouped_mm_error(device, dtype) -> str | None:
    """Compares both ways, values and gradients, on a tiny problem with an idle expert."""
    results = []
    for run in (looped_experts, grouped_experts):
        load = torch.tensor([5, 0, 11], device=device)
        shapes = [(16, 16)] + 3 * [(3, 16, 16)]  # x, gate, up, down
        leaves = [torch.linspace(-1, 1, math.prod(shape), device=device).view(shape).to(dtype)
                  .requires_grad_() for shape in shapes]
        try:
            with torch.enable_grad():
                y = run(*leaves, load)
                results.append([y, *torch.autograd.grad((y * y).sum(), leaves)])
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0][:80]
    same = all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2)
               for a, b in zip(*results))
    return None if same else "differs from the loop"


# ---------------------------------------------------------------------------- specialisation


def specialization(counts) -> dict:
    """How far the experts have divided the modalities among them (paper 4.4, E.2).

    counts (L,2,E): text and image tokens per expert and layer, summed over the batches to be
    judged (Output.expert_counts). Returns lists of L floats in 0..1: "score" = mean over experts of
    1 - H2(p_e), p_e the image share of expert e's tokens and H2 the binary entropy in bits; "floor"
    = 1 - H2(p) of all tokens, which experts without any preference would score, as p_e is not
    corrected for the mixture. Experts without tokens have no p_e and are left out of the mean
    (ours; the paper does not say)."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    used = counts.sum(1) > 0                                                     # (L,E)
    score = (one_minus_entropy(counts) * used).sum(-1) / used.sum(-1).clamp(min=1)  # (L,)
    floor = one_minus_entropy(counts.sum(2, keepdim=True)).squeeze(-1)           # (L,)
    return {"score": score.tolist(), "floor": floor.tolist()}


def one_minus_entropy(counts) -> torch.Tensor:
    """(L,2,E) -> (L,E): 1 - binary entropy (bits) of each expert's text/image split."""
    p = counts / counts.sum(1, keepdim=True).clamp(min=1)                        # (L,2,E)
    return 1 + (torch.xlogy(p, p) / math.log(2)).sum(1)                          # (L,E)
