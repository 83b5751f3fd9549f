"""One readable transformer over text and image patches, early or late fusion.

    python model.py RUN_DIR --image cat.png --prompt "a photo of"
    python model.py --sizes

Dimensions: B rows, T positions of a row, W width, H heads, Hd head dim, F ffn hidden, L layers,
            I images in the batch, P patches of an image, V vocabulary, K text targets, E experts.

Follows "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951) section 2. Where the paper is
silent (norms, positions, init, heads) we follow DCLM / open_lm, the decoder it cites, and say so.
"""
import math
import pickle
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe import MoE


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the parameters. 0 = auto; the auto rules are ours, not the paper's:
    head dim = the divisor of the width that is a multiple of 8 (else even), leaves 2 heads or more
    and is nearest to 64 (the smaller of two); ffn hidden = int(8w/3) rounded up to a multiple of
    256 (16 below width 512: small models would be mostly rounding); vision width = half the width,
    rounded up to a multiple of 8. ValueError, one line, when the fields do not fit together."""
    fusion: str = "early"  # early: raw patches, no encoder; late: a ViT before the decoder
    moe: str = "none"  # none; learned: a router; modality: one text and one image expert
    experts: int = 8  # experts of a learned MoE layer
    top_k: int = 1  # experts a token goes to
    granularity: int = 1  # learned MoE: each expert's hidden size is the dense one divided by this
    width: int = 64  # of the decoder
    depth: int = 4  # blocks of the decoder
    heads: int = 0  # attention heads; 0: a head dim near 64
    context: int = 256  # positions of a row, text tokens and patches
    image_size: int = 32  # pixels of a side
    patch_size: int = 8  # pixels of a side
    vocab_size: int = 264  # ids the model can read and write
    mlp_multiple: int = 0  # ffn hidden is 8/3 width rounded up to this; 0: 256, small widths 16
    vision_width: int = 0  # late fusion, of the encoder; 0: half of --width
    vision_depth: int = 0  # late fusion, of the encoder; 0: as --depth
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower

    def __post_init__(self):
        for field in fields(self):
            least = 0 if field.default in (0, False) else 1
            value = getattr(self, field.name)
            if not isinstance(value, str):
                require(value >= least, f"{field.name} {value} is below {least}")
        choices = {"fusion": ("early", "late"), "moe": ("none", "learned", "modality")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} {value!r} is unknown: use {' or '.join(allowed)}")
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        require(self.moe != "learned" or self.top_k <= self.experts,
                f"top_k {self.top_k} exceeds experts {self.experts}")
        require(self.moe == "learned" or self.granularity == 1,
                f"granularity {self.granularity} needs moe learned, not {self.moe}")
        require(self.hidden % self.granularity == 0,
                f"ffn hidden size {self.hidden} is not divisible by granularity {self.granularity}")
        require(self.context >= self.n_patches + 2,
                f"context {self.context} is too short for one image of {self.n_patches} patches, "
                f"BOS and one text token: use at least {self.n_patches + 2}")
        split_heads(self.width, self.heads)
        if self.fusion == "late":
            split_heads(self.encoder_width, 0)

    @property
    def head_dim(self) -> int:
        return split_heads(self.width, self.heads)

    @property
    def hidden(self) -> int:
        return ffn_hidden(self.width, self.mlp_multiple)

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size ** 2

    @property
    def encoder_width(self) -> int:
        return self.vision_width or -(-self.width // 16) * 8

    @property
    def encoder_depth(self) -> int:
        return self.vision_depth or self.depth


def require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


def split_heads(width: int, heads: int = 0) -> int:
    """Head dim of a layer of this width; heads 0 = choose (rule in ModelConfig)."""
    if heads:
        require(width % heads == 0, f"width {width} is not divisible by heads {heads}")
        require(width // heads % 2 == 0, f"width {width} / heads {heads} is odd: RoPE turns pairs")
        return width // heads
    for multiple in (8, 2):
        fits = [d for d in range(multiple, width // 2 + 1, multiple) if width % d == 0]
        if fits:
            return min(fits, key=lambda d: (abs(d - 64), d))
    raise ValueError(f"width {width} has no even head dim that leaves 2 heads: use a multiple of 8")


def ffn_hidden(width: int, multiple: int = 0) -> int:
    """SwiGLU hidden size: 8w/3, so that 3 matrices cost what 2 of 4w would, rounded up."""
    multiple = multiple or (256 if width >= 512 else 16)
    return -(-int(8 * width / 3) // multiple) * multiple


# The paper's Table 6 (8.13b: arXiv 2507.09404): a line is an early size and the late one of about
# the same FLOPs. `lr` is for train.py. MoE uses the early sizes and learning rates.
PRESETS = {
    name: dict(fusion="late" if vision_width else "early", width=width, vision_width=vision_width,
               lr=lr, depth=24, context=1024, image_size=224, patch_size=14, vocab_size=50432)
    for name, width, vision_width, lr in (
        ("275m", 800, 0, 1.5e-3), ("289m", 768, 384, 1.5e-3),
        ("464m", 1088, 0, 1.5e-3), ("494m", 1024, 512, 1.5e-3),
        ("932m", 1632, 0, 5e-4), ("1b", 1536, 768, 5e-4),
        ("1.63b", 2208, 0, 4.2e-4), ("1.75b", 2048, 1024, 4.2e-4),
        ("2.28b", 2624, 0, 4e-4), ("2.43b", 2464, 1184, 3.8e-4),
        ("3.35b", 3232, 0, 3.5e-4), ("3.7b", 3072, 1536, 3.3e-4), ("8.13b", 5120, 0, 2.4e-4))}


def attention_mask(doc: torch.Tensor, image_id: torch.Tensor) -> torch.Tensor:
    """doc (B,T), image_id (B,T; -1 = not an image) int64 -> (B,1,T,T) bool, True = may look.

    A position looks back over its own document, and over the whole of its own image:

        key ->     b t A A A t | b t           b = BOS, t = text, A = patch, | = next document
        query b    x . . . . . | . .
              t    x x . . . . | . .
              A    x x x x x . | . .           patches see each other both ways ...
              A    x x x x x . | . .
              A    x x x x x . | . .
              t    x x x x x x | . .           ... text sees the past only (paper 2.3) ...
              b    . . . . . . | x .           ... and nothing crosses a document
              t    . . . . . . | x x

    Padding (doc 0) sees padding, so that no softmax row is empty (an empty row gives NaN).
    """
    at = torch.arange(doc.shape[1], device=doc.device)
    causal = at[:, None] >= at[None, :]                                          # (T,T)
    same_doc = doc[:, :, None] == doc[:, None, :]                                # (B,T,T)
    same_image = (image_id[:, :, None] == image_id[:, None, :]) & (image_id >= 0)[:, :, None]
    return (same_doc & (causal | same_image))[:, None]                           # (B,1,T,T)


def block_mask(doc: torch.Tensor, image_id: torch.Tensor):
    """attention_mask for FlexAttention: blocks of 128 x 128 pairs that are all False are never
    computed, so documents that share a row do not pay for each other. Needs torch.compile."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_look(b, h, query, key):
        same_image = (image_id[b, query] == image_id[b, key]) & (image_id[b, query] >= 0)
        return (doc[b, query] == doc[b, key]) & ((query >= key) | same_image)

    rows, length = doc.shape
    return create_block_mask(may_look, rows, None, length, length, device=doc.device)


def attend(q, k, v, mask) -> torch.Tensor:
    """q, k, v (B,H,T,Hd); mask (B,1,T,T) bool or float32 to be added, None, or a BlockMask ->
    (B,H,T,Hd)."""
    if mask is None or isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    from torch.nn.attention.flex_attention import flex_attention
    return flex_attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask)  # rope is in fp32


def rope_table(length: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """(T,Hd/2,2) float32: cos and sin of position * theta^(-2j/Hd)."""
    rates = theta ** (-torch.arange(0, head_dim, 2) / head_dim)                  # (Hd/2,)
    angles = torch.arange(length)[:, None] * rates                               # (T,Hd/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()             # (T,Hd/2,2)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """x (B,T,H,Hd): pair j at position t turned by the angle in rope (T,Hd/2,2); float32 out."""
    pairs = x.float().unflatten(-1, (-1, 2))                                     # (B,T,H,Hd/2,2)
    # eager on a CPU, one complex product is 3-4 times faster than four real ones; elsewhere the
    # real form, as torch.compile cannot generate complex kernels
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None]
        return torch.view_as_real(turned).flatten(-2)                            # (B,T,H,Hd)
    a, b = pairs.unbind(-1)                                                      # (B,T,H,Hd/2)
    cos, sin = rope[:, None].unbind(-1)                                          # (T,1,Hd/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def norm(width: int) -> nn.LayerNorm:
    """Gain-only LayerNorm (DCLM's); F.rms_norm has no fused CPU kernel and is 3-4 times slower."""
    return nn.LayerNorm(width, eps=1e-5, bias=False)


def init_weight(weight: torch.Tensor, fan_in: int, layer: int | None = None):
    """Normal of std 1/sqrt(fan_in) cut at 3 std; a matrix that writes to the residual stream
    (layer given, counted from 0) is divided by sqrt(2(layer+1)), as in open_lm."""
    std = fan_in ** -0.5 / (1 if layer is None else math.sqrt(2 * (layer + 1)))
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def linear(fan_in: int, fan_out: int, layer: int | None = None) -> nn.Linear:
    module = nn.Linear(fan_in, fan_out, bias=False)
    init_weight(module.weight, fan_in, layer)
    return module


class Attention(nn.Module):
    # q, k, v apart, as gate and up below: with one fused matrix the backward pass copies the
    # gradients of the parts together, which costs 7-9 % of a small model's step on a CPU
    def __init__(self, width: int, head_dim: int, layer: int):
        super().__init__()
        self.heads = (-1, head_dim)
        self.q, self.k, self.v = (linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = norm(width), norm(width)
        self.out = linear(width, width, layer)

    def forward(self, x, mask, rope, cache=None):
        """x (B,T,W). cache: a list that keeps this layer's keys and values, empty at first."""
        # QK-norm over the full width, before the head split (DCLM): bounds the attention logits
        q = self.q_norm(self.q(x)).unflatten(-1, self.heads)                     # (B,T,H,Hd)
        k = self.k_norm(self.k(x)).unflatten(-1, self.heads)
        v = self.v(x).unflatten(-1, self.heads)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)        # (B,H,T,Hd)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = k, v
        y = attend(q, k, v, mask)                                                # (B,H,T,Hd)
        return self.out(y.transpose(1, 2).flatten(-2))                           # (B,T,W)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, layer: int):
        super().__init__()
        self.gate, self.up = linear(width, hidden), linear(width, hidden)
        self.down = linear(hidden, width, layer)

    def forward(self, x, kind=None):
        return self.down(F.silu(self.gate(x)) * self.up(x)), None                # (B,T,F) inside


class Block(nn.Module):
    """Pre-norm transformer block of the decoder or of the encoder."""

    def __init__(self, cfg: ModelConfig, width: int, head_dim: int, layer: int, moe: str = "none"):
        super().__init__()
        hidden = ffn_hidden(width, cfg.mlp_multiple)
        self.attention_norm, self.ffn_norm = norm(width), norm(width)
        self.attention = Attention(width, head_dim, layer)
        self.ffn = (SwiGLU(width, hidden, layer) if moe == "none" else
                    MoE(width, hidden // cfg.granularity, layer, cfg.experts, cfg.top_k, moe))

    def forward(self, x, mask=None, rope=None, kind=None, cache=None):
        """x (B,T,W), kind (B,T) 0 text, 1 image, -1 padding -> x (B,T,W), MoE stats or None.
        The stats are returned, never stored: recomputation under activation checkpointing would
        count a stored one twice."""
        x = x + self.attention(self.attention_norm(x), mask, rope, cache)
        y, stats = self.ffn(self.ffn_norm(x), kind)
        return x + y, stats


class VisionEncoder(nn.Module):
    """Late fusion (paper 2.3): a ViT of the decoder's own blocks (its sizes fit no other), both
    ways and with learned positions instead of RoPE, no CLS, final norm, and one linear connector,
    which the paper does not describe. (I,P,patch_dim) in [-1,1] -> (I,P,W)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = cfg.encoder_width
        self.checkpointing = cfg.checkpointing
        self.patch = linear(cfg.patch_dim, width)
        self.positions = nn.Parameter(torch.empty(cfg.n_patches, width))
        init_weight(self.positions, width)
        self.blocks = nn.ModuleList(Block(cfg, width, split_heads(width), layer)
                                    for layer in range(cfg.encoder_depth))
        self.norm = norm(width)
        self.connector = linear(width, cfg.width)

    def forward(self, patches):
        x = self.patch(patches) + self.positions                                 # (I,P,Wv)
        for block in self.blocks:
            x, _ = run_block(block, self.checkpointing and self.training, x)
        return self.connector(self.norm(x))                                      # (I,P,W)


def run_block(block, checkpointing: bool, *args):
    if checkpointing:  # keep only the block's input, recompute the rest in the backward pass
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def flex_error(block, rope, rows: int) -> str | None:
    """Why a compiled block cannot run on FlexAttention here, None if it can: tried, and compared
    with the dense mask in values and gradients, as what works differs by GPU and version."""
    width, length = block.attention_norm.weight.numel(), len(rope)
    at = torch.arange(length, device=rope.device).expand(rows, -1)               # (B,T)
    doc = at // (length // 2)  # two documents, each with an image
    image = torch.where(at % (length // 2) < length // 4, doc, -1)
    results = []
    try:
        for call, build in ((block.forward, attention_mask), (block, block_mask)):
            generator = torch.Generator(rope.device).manual_seed(0)
            x = torch.randn(rows, length, width, device=rope.device, generator=generator,
                            requires_grad=True)                                  # (B,T,W)
            y, _ = call(x, build(doc, image), rope, (image >= 0).long())
            results.append([y, *torch.autograd.grad((y.float() ** 2).sum(), x)])
    except Exception as error:  # a compiler's are of nearly every type
        return " ".join(str(error).split())[:80] or type(error).__name__
    far = max((a - b).float().norm() / b.float().norm() for a, b in zip(*results))
    return None if far < 0.05 else f"differs from the dense mask by {far:.2f}"


class Output(NamedTuple):
    loss: torch.Tensor                  # () float32, SUM of the text targets' losses, nats
    count: int                          # number of text targets
    aux: dict                           # name -> () float32, unweighted; "load_balancing_loss"
    token_loss: torch.Tensor            # (K,) float32, detached, in the order of target_index
    expert_counts: torch.Tensor | None  # (L,2,E) float32, MoE: (text, image) tokens per expert


class Model(nn.Module):
    """forward(batch) -> Output. The batch format is data.py's (see its docstring)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        init_weight(self.embedding.weight, cfg.width)  # std 1/sqrt(W), as open_lm
        late = cfg.fusion == "late"
        self.vision = VisionEncoder(cfg) if late else linear(cfg.patch_dim, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, cfg.width, cfg.head_dim, layer, cfg.moe)
                                    for layer in range(cfg.depth))
        self.norm = norm(cfg.width)
        self.flex = False  # FlexAttention instead of a dense mask; train.py sets it on CUDA
        self.head = linear(cfg.width, cfg.vocab_size)  # untied: the paper's counts fit no other
        self.register_buffer("rope", rope_table(cfg.context, cfg.head_dim), persistent=False)

    def embed(self, batch: dict) -> torch.Tensor:
        """(B,T,W): the patch's embedding at patch positions, the token's elsewhere. Both tables
        are always read, so that a text-only batch still gives every parameter a (zero) gradient:
        DDP would otherwise wait for ever, or go wrong silently."""
        if "images" not in batch:  # generate() past its prompt
            return self.embedding(batch["tokens"])
        pixels = batch["images"].float() / 127.5 - 1                 # (I,P,patch_dim)
        patches = self.vision(pixels).flatten(0, 1)                              # (I*P,W)
        at = batch["patch_index"]
        # F.embedding, not patches[at]: its backward is far faster than index_put's
        patches = F.embedding(at.clamp(min=0), patches)                          # (B,T,W)
        return torch.where((at >= 0)[..., None], patches, self.embedding(batch["tokens"]))

    def decode(self, batch: dict, caches: list | None = None, start: int = 0):
        """-> (B,T,W) normalised hidden states and the list of the layers' MoE stats. With caches
        (one list a layer), the batch continues at position `start` what they hold."""
        x = self.embed(batch)
        image = batch["patch_index"] >= 0
        kind = torch.where(batch["doc"] > 0, image.long(), -1)                   # (B,T)
        mask = None  # a single new text token may look at all of the cache
        if start == 0:  # once a step, for all layers
            build = block_mask if self.flex and caches is None else attention_mask
            mask = build(batch["doc"], batch["patch_index"] // self.cfg.n_patches)
            if isinstance(mask, torch.Tensor) and x.device.type == "cpu":
                # numbers to add: SDPA would make them again in every layer, at 4-10 % of its time
                mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)     # (B,1,T,T)
        rope = self.rope[start:start + x.shape[1]]
        stats = []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x, stat = run_block(block, self.cfg.checkpointing and self.training,
                                x, mask, rope, kind, cache)
            stats.append(stat)
        return self.norm(x), stats

    def forward(self, batch: dict) -> Output:
        """Next-token loss on text targets only (paper 2.1): logits exist only where needed."""
        x, stats = self.decode(batch)
        at = batch["target_index"]
        x = F.embedding(at, x.flatten(0, 1))                                     # (K,W)
        token_loss = head_loss(x, self.head.weight, batch["targets"].flatten()[at])
        aux, counts = {}, None
        if self.cfg.moe == "learned":
            aux["load_balancing_loss"] = torch.stack([s.balance for s in stats]).mean()
        if self.cfg.moe != "none":
            counts = torch.stack([s.counts for s in stats])                      # (L,2,E)
        return Output(token_loss.sum(), at.numel(), aux, token_loss.detach(), counts)

    def num_params(self) -> dict:
        """N: what reproduces the paper's sizes: matrices of the decoder blocks (of the experts
        only the active ones), token embedding and head; gains, patch projection, connector and
        router left out. N_vision: matrices of the encoder blocks (late). N_nonembedding: N
        without embedding and head. N_total: every parameter there is."""
        n = Counter()
        for name, p in self.named_parameters():
            n[param_group(name)] += p.numel()
        active = n["experts"]
        if self.cfg.moe != "none":
            share = (self.cfg.top_k, self.cfg.experts) if self.cfg.moe == "learned" else (1, 2)
            active = active * share[0] // share[1]
        inner = n["attention"] + active
        return {"N": inner + n["embedding"] + n["head"], "N_total": n.total(),
                "N_vision": n["encoder"], "N_nonembedding": inner}

    def flops(self, D: float, D_vision: float = 0) -> float:
        """Training FLOPs as the paper counts them (Table 1): 6 N D, late 6 (N_v D_v + N D). D: all
        tokens, D_vision: the image tokens among them."""
        n = self.num_params()
        return 6 * (n["N_vision"] * D_vision + n["N"] * D)


def param_group(name: str) -> str:
    """Which part of num_params() a parameter belongs to; every parameter is in exactly one."""
    if "norm" in name:
        return "gains"
    if name.startswith("vision."):
        return "encoder" if ".blocks." in name else "patch"
    parts = {"embedding": "embedding", "head": "head", ".attention.": "attention",
             ".router": "router", ".ffn.": "experts"}
    return next(group for key, group in parts.items() if key in name)


def head_loss(x, weight, targets, max_logits: int = 2 ** 26) -> torch.Tensor:
    """x (K,W), weight (V,W), targets (K,) -> (K,) float32 losses. Above max_logits = K * V it runs
    in chunks whose logits are recomputed in the backward pass: at V = 50432 the logits of a
    micro-batch, their softmax and its gradient would otherwise be the largest tensors of all."""
    def loss(x, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")

    rows = max(1, max_logits // weight.shape[0])
    if len(x) <= rows:
        return loss(x, targets)
    return torch.cat([checkpoint(loss, a, b, use_reentrant=False)
                      for a, b in zip(x.split(rows), targets.split(rows))])


@torch.inference_mode()  # a sixth faster than no_grad for a small model
def generate(model: Model, parts: list, max_new_tokens: int, temperature: float = 0.0,
             top_k: int = 0, seed: int = 0, stop: int | None = None,
             n_vocab: int | None = None) -> list:
    """The ids of the text that follows a prompt, with a KV cache; ends early at `stop` (left out).

    parts: any mixture of lists of token ids and images, an image as uint8 (P,patch_dim) like
    batch["images"]. temperature 0 takes the likeliest token, above 0 samples, among the top_k
    likeliest if top_k > 0; the same seed gives the same text. n_vocab: ids from here on are
    padding of the vocabulary and never chosen. The text ends where the context does; ValueError
    when the prompt already fills it."""
    batch = prompt_batch(parts, model.cfg, model.rope.device)
    start, length = 0, batch["tokens"].shape[1]
    require(length < model.cfg.context, f"a prompt of {length} positions leaves no room in the "
            f"context of {model.cfg.context}: give fewer images or less text")
    generator = torch.Generator().manual_seed(seed)
    caches, ids = [[] for _ in model.blocks], []
    while len(ids) < min(max_new_tokens, model.cfg.context - length):
        x, _ = model.decode(batch, caches, start)                                # (1,T,W)
        logits = model.head(x[0, -1]).float().cpu()[:n_vocab]                    # (V,)
        token = sample(logits, temperature, top_k, generator)
        if token == stop:
            break
        ids.append(token)
        start += batch["tokens"].shape[1]
        one = torch.ones(1, 1, dtype=torch.long, device=model.rope.device)
        batch = {"tokens": one * token, "doc": one, "patch_index": -one}         # (1,1) each
    return ids


def prompt_batch(parts: list, cfg: ModelConfig, device) -> dict:
    """One row, one document: the fields of a Batch that decode() reads."""
    tokens, patch_index, images = [], [], []
    for part in parts:
        if isinstance(part, torch.Tensor):
            first = len(images) * cfg.n_patches
            patch_index += range(first, first + cfg.n_patches)
            tokens += [0] * cfg.n_patches
            images.append(part)
        else:
            patch_index += [-1] * len(part)
            tokens += part
    require(tokens, "the prompt is empty: give at least one token, such as the end-of-text id")
    batch = {"tokens": torch.tensor([tokens]), "doc": torch.ones(1, len(tokens), dtype=torch.long),
             "patch_index": torch.tensor([patch_index])}                         # (1,T) each
    if images:
        batch["images"] = torch.stack(images)                                    # (I,P,patch_dim)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator) -> int:
    """logits (V,) float32 on the CPU, where a seed means the same on every machine."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits)))[0][-1], -math.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def load_model(run_dir: str) -> tuple:
    """RUN_DIR/ckpt.pt -> Model on the CPU and the checkpoint's data settings (dict). SystemExit,
    one line, when there is none or it is not one of train.py's."""
    path, ckpt = read_checkpoint(run_dir)
    with reading(path):
        model = Model(ModelConfig(**ckpt["config"]["model"]))
        model.load_state_dict(ckpt["model"])
        return model.eval(), ckpt["config"]["data"]


def read_checkpoint(source: str) -> tuple:
    """A run's directory, or a file written by torch.save -> its Path and content, on the CPU."""
    path = Path(source, "ckpt.pt") if Path(source).is_dir() else Path(source)
    if not path.is_file():
        runs = ", ".join(str(p.parent) for p in sorted(path.parent.glob("*/ckpt.pt"))[:9])
        raise SystemExit(f"{path} does not exist: name the directory of one run of train.py"
                         + (f", as {runs}" if runs else ""))
    with reading(path):  # weights_only: a file from elsewhere must not be able to run code
        return path, torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def reading(path: Path):
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError,
            ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise SystemExit(f"{path} is not a checkpoint of this model.py ({reason}): train it "
                         "again, or use the code it was trained with") from None


def read_weights(source: str, heads: int = 0) -> tuple:
    """Weights to start from (paper 3.3): a run of train.py, or a .pt file of open_lm / DCLM ->
    config, the fields of ModelConfig that they decide (of a run, all), and weights, our parameter
    name -> tensor on the CPU. heads: see from_open_lm. SystemExit, one line, for anything else."""
    path, ckpt = read_checkpoint(source)
    with reading(path):
        own = "config" in ckpt
        return (ckpt["config"]["model"], ckpt["model"]) if own else from_open_lm(ckpt, heads, path)


# open_lm's modules -> ours; where there are several, its matrix holds them one after another
OPEN_LM = {"tok_embeddings": "embedding", "in_proj": "q k v", "out_proj": "out", "w12": "gate up",
           "w3": "down", "output": "head", "q_norm": "q_norm", "k_norm": "k_norm", "norm": "norm",
           "attention_norm": "attention_norm", "ffn_norm": "ffn_norm"}


def from_open_lm(state: dict, heads: int = 0, source: str = "the state dict") -> tuple:
    """A state dict of mlfoundations/open_lm with DCLM's choices (gain-only norms, QK-norm, SwiGLU,
    "rotary"), or one under "state_dict", names after "module." or "model." -> as read_weights.
    heads: used where no inv_freq tells them. SystemExit for what our decoder has no place for."""
    def need(condition, reason):
        if not condition:
            raise SystemExit(f"{source} cannot be read as weights of open_lm: {reason}")

    state = {re.sub(r"^((module|model)\.)+", "", name): tensor
             for name, tensor in state.get("state_dict", state).items()}
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w3.weight"):
        need(name in state, f"it has no {name}")
    vocab_size, width = state["tok_embeddings.weight"].shape
    hidden = state["layers.0.feed_forward.w3.weight"].shape[1]
    multiple = next((m for m in (256, 16) if ffn_hidden(width, m) == hidden), 0)
    need(multiple, f"ffn hidden size {hidden} is not 8/3 of width {width}, rounded up to 256 or 16")
    rates = state.get("layers.0.attention.pos_embed.inv_freq", ())               # (Hd/2,)
    heads = width // (2 * len(rates)) if len(rates) else heads
    need(heads and width % (2 * heads) == 0, f"{heads} heads for width {width}: give --heads")
    weights = {}
    for name, tensor in state.items():
        path, module, kind = f"..{name}".rsplit(".", 2)
        if kind == "inv_freq" or kind == "bias" and not tensor.any():
            continue
        need(kind == "weight" and module in OPEN_LM, f"this decoder has no place for its {name}")
        path, parts = path.replace("layers", "blocks"), OPEN_LM[module].split()
        for part, piece in zip(parts, tensor.chunk(len(parts))):
            if part in ("q", "k", "q_norm", "k_norm"):  # rows in the order of our RoPE: its one
                # turns element j of a head with j + Hd/2, ours 2j with 2j + 1
                piece = piece.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            weights[f"{path}.{part}.weight".lstrip(".").replace("feed_forward", "ffn")] = piece
    depth = sum("in_proj" in name for name in state)
    return dict(width=width, depth=depth, heads=heads, vocab_size=vocab_size,
                mlp_multiple=multiple), weights


@torch.no_grad()
def adopt(model: Model, weights: dict, part: str, source: str):
    """Copies weights (name -> tensor) into the model: part "vision", the names that start with
    "vision.", or "decoder", all others. Before anything is copied, a name or shape that differs is
    a SystemExit, one line. A number of heads shows in no shape: take it from read_weights."""
    require(part in ("decoder", "vision"), f"part {part!r} is unknown: use decoder or vision")
    ours, theirs = ({name: tensor for name, tensor in named
                     if name.startswith("vision.") == (part == "vision")}
                    for named in (model.named_parameters(), weights.items()))
    for name in ours | theirs:
        need, have = (tuple(d[name].shape) if name in d else "missing" for d in (ours, theirs))
        remedy = "give the " + ("--vision-width, --vision-depth" if part == "vision" else
                                "--width, --depth and --moe") + " of the run it is from"
        if name in ("embedding.weight", "head.weight") and need[0] != have[0]:
            remedy = "pack the data with the tokenizer the weights were trained with"
        if need != have:
            raise SystemExit(f"{source}: {name} is {have} there, {need} in this model: {remedy}")
    for name, parameter in ours.items():
        parameter.copy_(theirs[name])


IMAGE_SHARE = 0.544  # of the tokens of the paper's 45-45-10 mixture (D_v / D, App. C.2)


def training_memory(model: Model) -> tuple:
    """Bytes on a GPU with DDP, with FSDP over 8, and of each row of the micro-batch beside them.

    An estimate, of which only the first term is sharp. DDP: 16 bytes a parameter (fp32 weight and
    gradient, two moments of Adam) and 14 for each of the 2^26 logits that head_loss allows. FSDP:
    an eighth of the 16, one whole block in bf16, the logits. A row, with --checkpointing: for each
    token and unit of width, 4 bytes in every block (its fp32 input) and 54 in the one recomputed
    (counted in bf16 without torch.compile, which needs less). Left out: DDP's buckets (up to 4
    bytes a parameter), copies of routed tokens, the gaps of the allocator, CUDA itself."""
    cfg, total, logits = model.cfg, model.num_params()["N_total"], 14 * 2 ** 26
    block = sum(p.numel() for p in model.blocks[0].parameters())
    row = 54 * cfg.width + 4 * cfg.depth * (cfg.width + IMAGE_SHARE * cfg.vision_width)
    return 16 * total + logits, 2 * total + 2 * block + logits, cfg.context * row


def print_sizes():
    """A line for each of PRESETS, and for the early ones with 8 experts: parameters in billions,
    FLOPs to train on a token, 6 (N + 0.544 N_v), GB of training_memory, and the tokens in billions
    that 1e20 to 1e22 FLOPs buy."""
    print("name  fusion    width   img      N    N_v N_total  GFLOP    DDP FSDP/8   row"
          "    1e20    1e21    1e22")
    for name, moe in [(name, moe) for moe in ("none", "learned") for name in PRESETS
                      if moe == "none" or PRESETS[name]["fusion"] == "early"]:
        cfg = ModelConfig(**{k: v for k, v in PRESETS[name].items() if k != "lr"}, moe=moe)
        with torch.device("meta"):  # shapes without memory
            model = Model(cfg)
        n, flops = model.num_params(), model.flops(1, IMAGE_SHARE)
        in_billions = (n["N"], n["N_vision"], n["N_total"], flops, *training_memory(model),
                       *(budget / flops for budget in (1e20, 1e21, 1e22)))
        print(("{:6}{:10}{:5}{:6}{:7.3f}{:7.3f}{:8.3f}{:7.3f}{:7.1f}{:7.1f}{:6.2f}" + 3 * "{:8.1f}")
              .format(name, cfg.fusion + " moe" * (moe != "none"), cfg.width, cfg.vision_width,
                      *(x / 1e9 for x in in_billions)))
    print("N, N_v, N_total: billions of parameters (N without encoder, of experts the active);\n"
          "GFLOP to train on a token; DDP, FSDP/8: GB a GPU without activations; row: GB for each\n"
          "row of 1024 tokens; 1e20: billions of tokens for 1e20 FLOPs")


def read_image(path: str, size: int):
    """Any image file -> uint8 (S,S,3) array: its centre square, resized, as in validation."""
    from data import Skip, load_image, square
    try:
        image = load_image(Path(path).read_bytes(), size)
    except OSError as error:
        raise SystemExit(f"cannot read the image {path}: {error.strerror}") from None
    if isinstance(image, Skip):
        raise SystemExit(f"cannot read the image {path}: {image}")
    return square(image, size)


def main(argv=None):
    from data import Parser, get_tokenizer, patchify  # here: as a module, this needs only torch
    parser = Parser(prog="model.py", description="Continue images and text with a trained model.")
    parser.add_argument("run_dir", nargs="?", help="directory of one run, with ckpt.pt")
    parser.add_argument("--sizes", action="store_true", help="print the paper's sizes, and stop")
    parser.add_argument("--image", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt", default="", help="text after the images")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among this many, 0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.sizes:
        return print_sizes()
    if not args.run_dir:
        parser.error("name the directory of one run of train.py, or give --sizes")
    model, data = load_model(args.run_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, cfg = get_tokenizer(data["tokenizer"]), model.cfg
    images = [patchify(read_image(path, cfg.image_size), cfg.patch_size) for path in args.image]
    # the order of a caption document: end-of-text as BOS, images, text
    parts = [[tokenizer.eot_token], *map(torch.from_numpy, images),
             tokenizer.encode_ordinary(args.prompt)]
    try:
        ids = generate(model, parts, args.max_new_tokens, args.temperature, args.top_k, args.seed,
                       stop=tokenizer.eot_token, n_vocab=tokenizer.n_vocab)
    except ValueError as error:
        raise SystemExit(f"model.py: {error}") from None
    print(args.prompt + tokenizer.decode(ids))


if __name__ == "__main__":
    main()
