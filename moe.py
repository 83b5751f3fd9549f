"""Mixture of experts in place of the feed-forward layer: dropless, by router or by modality.

Dimensions: B rows, T positions, N = B*T tokens, W width, F ffn hidden, E experts,
            K experts a token (top_k), S = N*K slots (a slot is one token at one expert).

The paper's MoE (section 4) is MegaBlocks' dropless MoE in every layer: an expert has no capacity
limit, so no token is dropped. train.py weights the load-balancing loss by the paper's 0.01.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Stats(NamedTuple):
    """What one layer reports of one forward pass, padding left out."""
    balance: torch.Tensor   # () float32, SUM of load_balancing_loss over tokens, 0 without a router
    counts: torch.Tensor    # (2,E) float32, number of (text, image) tokens sent to each expert


class MoE(nn.Module):
    """Takes the place of SwiGLU: forward(x (B,T,W), modality (B,T)) -> y (B,T,W), Stats.

    routing="learned": a router without bias, in fp32, gives each token a softmax over the experts.
    The K most probable ones run, and each output is scaled by its probability, which is not
    renormalised over the K. The router never sees `modality`.
    routing="modality": expert 0 takes the text tokens and expert 1 the image tokens, unscaled.

    modality: 0 text, 1 image, -1 padding. Padding runs like text, because then no shape depends on
    the data. The balance loss and the counts leave it out, or they would measure packing.

    One 3-D tensor holds a matrix of all experts, because an expert without tokens then has a
    gradient of zero; if it had none, DDP would wait for it."""

    def __init__(self, width, hidden, layer, experts, top_k=1, routing="learned"):
        super().__init__()
        self.learned, self.loop = routing == "learned", False  # loop = True: never grouped_mm
        self.looped = looped_experts  # train.py keeps torch.compile out of it
        self.experts, self.top_k = (experts, top_k) if self.learned else (2, 1)

        def weight(fan_in, *shape):  # as init_weight in model.py, for each expert
            std, drawn = fan_in ** -0.5, torch.empty(shape)
            return nn.Parameter(nn.init.trunc_normal_(drawn, std=std, a=-3 * std, b=3 * std))
        self.w_gate = weight(width, self.experts, hidden, width)                 # (E,F,W)
        self.w_up = weight(width, self.experts, hidden, width)                   # (E,F,W)
        # it writes to the residual stream, so its std is divided by sqrt(2 (layer + 1)), too
        self.w_down = weight(hidden * 2 * (layer + 1), self.experts, width, hidden)  # (E,W,F)
        if self.learned:
            self.router = weight(width, self.experts, width)                     # (E,W)
            # how many slots each expert got in the step before; train.py writes it. It is saved,
            # because otherwise the first step of a resumed run would differ
            self.register_buffer("load", torch.ones(experts))                    # (E,)

    def forward(self, x, modality):
        flat, modality = x.flatten(0, 1), modality.flatten()                     # (N,W), (N,)
        if self.learned:
            gates, chosen, probs = route(flat, self.router, self.top_k)          # (N,K) (N,K) (N,E)
        else:
            gates, chosen = None, (modality == 1).long()[:, None]                # (N,1)
        # 1 where a token goes to an expert; not by bincount, which would synchronise with the GPU
        hot = F.one_hot(chosen, self.experts).sum(1)                             # (N,E)
        y = self.dispatch(flat, chosen, hot.sum(0), gates)                       # (N,W)
        is_kind = torch.stack([modality == 0, modality == 1]).float()            # (2,N)
        counts = is_kind @ hot.float()                                           # (2,E)
        balance = (load_balancing_loss(self.load, is_kind.sum(0) @ probs) if self.learned
                   else counts.new_zeros(()))
        return y.unflatten(0, x.shape[:2]), Stats(balance, counts)               # (B,T,W)

    def dispatch(self, x, chosen, load, gates):
        """Sorts the slots by expert, so that each expert runs on one contiguous slice. x (N,W),
        chosen (N,K) int64 expert ids, load (E,) int64 slots of each expert, gates (N,K) or None
        -> (N,W)."""
        order = chosen.flatten().argsort(stable=True)                            # (S,) slot ids
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=x.device)                 # the inverse
        weights = [w.to(x.dtype) for w in (self.w_gate, self.w_up, self.w_down)]
        slots = x[:, None].expand(-1, self.top_k, -1).flatten(0, 1)              # (S,W)
        slots = Reorder.apply(slots, order, place)                               # by expert
        fast = not self.loop and grouped_mm_is_fast(slots, weights[-1])
        run_experts = grouped_experts if fast else self.looped
        slots = run_experts(slots, *weights, load)                               # (S,W)
        slots = Reorder.apply(slots, place, order).unflatten(0, chosen.shape)    # (N,K,W)
        if gates is not None:
            slots = slots * gates[:, :, None].to(x.dtype)
        return slots.sum(1)                                                      # (N,W)


class Reorder(torch.autograd.Function):
    """x (S,W), index (S,) a permutation of its rows, inverse (S,) which undoes it -> x[index].
    Autograd would add gradients into zeros row by row; gathering by the inverse is enough here."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)                                          # (S,W)

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None                         # (S,W)


def route(x, router, top_k):
    """x (N,W), router (E,W) -> gates (N,K) fp32, chosen (N,K) int64, probs (N,E) fp32. It computes
    in fp32, because in bf16 nearly equal experts would tie and the choice would be noise. (With
    --shard on CUDA the router's weights arrive rounded to bf16; the products are still fp32.)"""
    probs = F.linear(x.float(), router.float()).softmax(-1)                      # (N,E)
    gates, chosen = probs.topk(top_k, dim=-1)                                    # (N,K)
    return gates, chosen, probs


def load_balancing_loss(load, probs) -> torch.Tensor:
    """E * sum_e f_e P_e, with f_e = load_e / sum(load) the share of slots that expert e got and P_e
    its probability, summed over tokens (load, probs (E,)). sum f = 1 whatever K is (the MegaBlocks
    convention; others do not divide by K and get K), so the value per token is exactly 1.0 at
    perfect balance and E when one expert takes all with certainty. Only P carries a gradient.

    f comes from the step before, over all ranks and micro-batches, because it hardly moves between
    steps. With f fixed, the loss is linear in the tokens, so its sum over micro-batches and ranks
    is the loss of the step, however the step is divided. If each micro-batch had its own f, each
    would have to be balanced by itself, and a run on two GPUs would differ from a run on one."""
    return len(load) / load.sum().clamp(min=1) * (load * probs).sum()  # 0 after a step of padding


def grouped_mm_is_fast(x, w_down):
    """Whether torch has a fast grouped_mm here. It needs bf16, a Hopper GPU, torch 2.10 or later,
    and rows of a multiple of 16 bytes. Elsewhere our loop is as fast, and on Blackwell an expert
    without tokens makes gradients wrong (pytorch issue 172439). tools.check compares the two."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    aligned = all(size % 8 == 0 for size in w_down.shape[1:])  # 8 numbers of 2 bytes
    return aligned and torch.cuda.get_device_properties(x.device).major == 9


def grouped_experts(x, w_gate, w_up, w_down, load):
    """x (S,W) sorted by expert, w_gate and w_up (E,F,W), w_down (E,W,F), load (E,) int64 lengths of
    the slices, whose sum is S -> (S,W), each expert's SwiGLU on its slice. One kernel runs all
    experts; the ends of the slices stay on the device."""
    ends = load.cumsum(0).to(torch.int32)                                        # (E,)
    w_gate, w_up, w_down = (w.transpose(1, 2) for w in (w_gate, w_up, w_down))
    gate = F.silu(F.grouped_mm(x, w_gate, offs=ends))                            # (S,F)
    hidden = gate * F.grouped_mm(x, w_up, offs=ends)                             # (S,F)
    return F.grouped_mm(hidden, w_down, offs=ends)                               # (S,W)


def looped_experts(x, w_gate, w_up, w_down, load):
    """What grouped_experts does, one expert after another. On CUDA tolist() waits for the GPU."""
    outputs, slices = [], x.split(load.tolist())
    for part, gate, up, down in zip(slices, w_gate, w_up, w_down):
        hidden = F.silu(F.linear(part, gate)) * F.linear(part, up)               # (load_e,F)
        outputs.append(F.linear(hidden, down))                                   # (load_e,W)
    return torch.cat(outputs)                                                    # (S,W)
