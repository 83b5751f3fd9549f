"""One readable transformer over text and image patches, with early or late fusion.

Dimensions: B rows, T positions of a row, W width, H heads, Hd head dim, F ffn hidden, L layers,
            I images in the batch, P patches of an image, V vocabulary, K text targets, E experts.

We follow section 2 of "Scaling Laws for Native Multimodal Models" (arXiv 2504.07951). Where the
paper is silent (norms, positions, initial weights, heads) we follow DCLM, the decoder it cites.
"""
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe import MoE


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. 0 means: choose for me, by a rule that is ours and not the paper's."""
    fusion: Literal["early", "late"] = "early"  # the decoder reads raw patches, or a ViT's output
    moe: Literal["none", "learned", "modality"] = "none"  # experts picked by a router or modality
    experts: int = 8  # experts of a learned MoE layer
    top_k: int = 1  # experts a token goes to
    granularity: int = 1  # learned MoE: an expert has the dense layer's hidden size divided by this
    width: int = 48  # numbers in one hidden vector of the decoder
    depth: int = 4  # blocks of the decoder
    heads: int = 0  # attention heads; 0: the number that makes a head dim near 64
    image_size: int = 32  # pixels on a side of a square image
    patch_size: int = 8  # pixels on a side of a square patch
    context: int = 128  # positions of a row, text tokens and patches
    vocab_size: int = 264  # ids the model can read and write
    mlp_multiple: int = 0  # ffn hidden is 8/3 width rounded up to this; 0: 256, small widths 16
    vision_width: int = 0  # width of late fusion's encoder; 0: half of --width, in steps of 8
    vision_depth: int = 0  # blocks of late fusion's encoder; 0: as many as --depth
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, slower

    head_dim = property(lambda self: split_heads(self.width, self.heads))
    hidden = property(lambda self: ffn_hidden(self.width, self.mlp_multiple))
    n_patches = property(lambda self: (self.image_size // self.patch_size) ** 2)
    patch_dim = property(lambda self: 3 * self.patch_size ** 2)
    encoder_width = property(lambda self: self.vision_width or -(-self.width // 16) * 8)
    encoder_depth = property(lambda self: self.vision_depth or self.depth)

    def __post_init__(self):
        def check(holds, message):
            if not holds:
                raise SystemExit(message)
        check(self.image_size % self.patch_size == 0,
              f"--image-size {self.image_size} is no multiple of --patch-size {self.patch_size}")
        check(self.moe != "learned" or self.top_k <= self.experts,
              f"--top-k {self.top_k} exceeds --experts {self.experts}")
        check(self.moe == "learned" or self.granularity == 1,
              f"--granularity {self.granularity} needs --moe learned, not {self.moe}")
        check(self.hidden % self.granularity == 0,
              f"--granularity {self.granularity} does not divide ffn hidden {self.hidden}")
        check(self.context >= self.n_patches + 2,
              f"--context {self.context} does not hold BOS, an image and text: "
              f"use at least {self.n_patches + 2}")
        for name, width, heads in (("--width", self.width, self.heads),
                                   ("--vision-width", self.encoder_width, 0)):
            check(split_heads(width, heads), f"{name} {width} does not split into "
                  f"{heads or 'two or more'} heads of even size: use a multiple of 8")


def split_heads(width, heads=0):
    """The head dim of a layer of this width, or 0 where there is none. It is even, because RoPE
    turns pairs of numbers. heads = 0 takes the divisor of the width nearest 64 that leaves two or
    more heads, a multiple of 8 if one exists; ties go to the smaller. (2 is nearer than 127.)"""
    if heads:
        return width // heads if width % (2 * heads) == 0 else 0
    dims = [d for d in range(2, min(width // 2, 126) + 1, 2) if width % d == 0]
    return min(dims, key=lambda d: (d % 8 > 0, abs(d - 64), d), default=0)


def ffn_hidden(width, multiple=0):
    """SwiGLU's hidden size: 8/3 width, because its three matrices then cost what the usual two of
    4 x width do, rounded up. Below width 512, multiples of 256 would be mostly rounding."""
    multiple = multiple or (256 if width >= 512 else 16)
    return -(-int(8 * width / 3) // multiple) * multiple


# The paper's Table 6 (its 468M is 464M in the figures; 8.13b is from arXiv 2507.09404). A line has
# an early size and the late size of about the same FLOPs. MoE takes the early sizes and their `lr`.
PRESETS = {
    name: dict(fusion="late" if vision_width else "early", width=width, vision_width=vision_width,
               lr=lr, depth=24, context=1024, image_size=224, patch_size=14, vocab_size=50432)
    for name, width, vision_width, lr in (
        ("275m", 800, 0, 1.5e-3), ("289m", 768, 384, 1.5e-3),
        ("464m", 1088, 0, 1.5e-3), ("494m", 1024, 512, 1.5e-3),
        ("932m", 1632, 0, 5e-4), ("1b", 1536, 768, 5e-4),
        ("1.63b", 2208, 0, 4.2e-4), ("1.75b", 2048, 1024, 4.2e-4),
        ("2.28b", 2624, 0, 4e-4), ("2.43b", 2464, 1184, 3.8e-4),
        ("3.35b", 3232, 0, 3.5e-4), ("3.7b", 3072, 1536, 3.3e-4),
        ("8.13b", 5120, 0, 2.4e-4))}


def may_look(query, key, query_doc, key_doc, query_image, key_image):
    """The one rule of the mask, for int64 tensors that broadcast: positions in the row, documents
    and images (-1 = not an image) of the query and of the key -> bool, True = may look."""
    same_image = (query_image == key_image) & (query_image >= 0)
    return (query_doc == key_doc) & ((query >= key) | same_image)


def attention_mask(doc, image_id):
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
    at = torch.arange(doc.shape[1], device=doc.device)                           # (T,)
    mask = may_look(at[:, None], at[None, :], doc[:, :, None], doc[:, None, :],
                    image_id[:, :, None], image_id[:, None, :])                  # (B,T,T)
    return mask[:, None]                                                         # (B,1,T,T)


def block_mask(doc, image_id):
    """attention_mask for FlexAttention, which skips every block of 128 x 128 pairs without a True,
    so that documents in one row do not pay for each other. It is fast only under torch.compile."""
    def rule(b, h, query, key):
        return may_look(query, key, doc[b, query], doc[b, key],
                        image_id[b, query], image_id[b, key])
    rows, length = doc.shape
    return block_mask_maker(doc.is_cuda)(rule, rows, None, length, length, device=doc.device)


@functools.cache
def block_mask_maker(compiled):
    """create_block_mask, compiled on CUDA, because else each of many steps stores all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask  # its import takes a second
    return torch.compile(create_block_mask) if compiled else create_block_mask


def flex_fits(cfg, dtype):
    """Whether FlexAttention can run. It takes no head dim below 16, and in fp32 (a T4) no big one.
    Rows below 128 use another kernel, which before torch 2.13 needs a power of 2 as head dim."""
    return cfg.head_dim >= 16 and cfg.context >= 128 and dtype == torch.bfloat16


def rope_table(length, head_dim):
    """(T,Hd/2,2) float32: cos and sin of position * 10000^(-2j/Hd)."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)                  # (Hd/2,)
    angles = torch.arange(length)[:, None] * rates                               # (T,Hd/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()             # (T,Hd/2,2)


def rotate(x, rope):
    """x (B,T,H,Hd) -> float32, pair j of position t turned by its angle in rope (T,Hd/2,2)."""
    pairs = x.float().unflatten(-1, (-1, 2))                                     # (B,T,H,Hd/2,2)
    # One complex product is 6 times faster on a CPU, but torch.compile has no kernel for it.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None]
        return torch.view_as_real(turned).flatten(-2)                            # (B,T,H,Hd)
    a, b = pairs.unbind(-1)                                                      # (B,T,H,Hd/2)
    cos, sin = rope[:, None].unbind(-1)                                          # (T,1,Hd/2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


# Weights are fp32 and cast to the dtype of the activations (bf16 where a GPU has it). Autocast
# would keep the residual stream and the norms in fp32, which costs time and memory.
class Linear(nn.Linear):
    def __init__(self, fan_in, fan_out, layer=None):
        super().__init__(fan_in, fan_out, bias=False)
        init_weight(self.weight, fan_in, layer)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.LayerNorm):  # as in DCLM; F.rms_norm is 6 times slower on a CPU without compiler
    def __init__(self, width):
        super().__init__(width, bias=False)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias, self.eps)


def init_weight(weight, fan_in, layer=None):
    """As open_lm: a normal of std 1/sqrt(fan_in), truncated at 3 std. For a matrix that writes to
    the residual stream, give its layer (from 0): its std is divided by sqrt(2 (layer + 1))."""
    std = fan_in ** -0.5 / (1 if layer is None else math.sqrt(2 * (layer + 1)))
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


class Attention(nn.Module):
    # One matrix for q, k and v (or gate and up) would copy its gradients, up to 9 % of its time.
    def __init__(self, width, head_dim, layer):
        super().__init__()
        self.heads = (-1, head_dim)
        self.q, self.k, self.v = (Linear(width, width) for _ in range(3))
        self.q_norm, self.k_norm = Norm(width), Norm(width)
        self.out = Linear(width, width, layer)

    def forward(self, x, mask, rope, cache=None):
        """x (B,T,W) -> (B,T,W). mask: (B,1,T,T) bool, or numbers to add to the logits; a BlockMask;
        or None = every position sees all. rope: (T,Hd/2,2), or None = no rotation. cache: a list of
        this layer's keys and values, empty at first, which this call extends."""
        # QK-norm over the full width, before it is split into heads (DCLM), bounds the logits
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
        q, k = q.to(v.dtype), k.to(v.dtype)  # RoPE gave fp32
        if mask is None or isinstance(mask, torch.Tensor):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)          # (B,H,T,Hd)
        else:
            from torch.nn.attention.flex_attention import flex_attention
            y = flex_attention(q, k, v, block_mask=mask)                         # (B,H,T,Hd)
        return self.out(y.transpose(1, 2).flatten(-2))                           # (B,T,W)


class SwiGLU(nn.Module):
    def __init__(self, width, hidden, layer):
        super().__init__()
        self.experts = self.top_k = 1  # a dense layer is one expert for every token
        self.w_gate, self.w_up = Linear(width, hidden), Linear(width, hidden)
        self.w_down = Linear(hidden, width, layer)

    def forward(self, x, modality=None):  # only MoE uses modality and has stats
        hidden = F.silu(self.w_gate(x)) * self.w_up(x)                           # (B,T,F)
        return self.w_down(hidden), None                                         # (B,T,W)


class Block(nn.Module):
    """Pre-norm transformer block of the decoder or of the encoder."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        width, hidden = cfg.width, cfg.hidden // cfg.granularity
        self.attention_norm, self.ffn_norm = Norm(width), Norm(width)
        self.attention = Attention(width, cfg.head_dim, layer)
        if cfg.moe == "none":
            self.ffn = SwiGLU(width, hidden, layer)
        else:
            self.ffn = MoE(width, hidden, layer, cfg.experts, cfg.top_k, cfg.moe)

    def forward(self, x, mask=None, rope=None, modality=None, cache=None):
        """x (B,T,W), modality (B,T) 0 text, 1 image, -1 padding -> x (B,T,W), MoE stats or None.
        Stats are returned and not stored, because checkpointing runs a block twice."""
        x = x + self.attention(self.attention_norm(x), mask, rope, cache)
        y, stats = self.ffn(self.ffn_norm(x), modality)
        return x + y, stats


def run_block(block, *args):
    if block.checkpointing and block.training:
        return checkpoint(block, *args, use_reentrant=False)  # backward computes it again
    return block(*args)


class VisionEncoder(nn.Module):
    """Late fusion (paper 2.3): (I,P,patch_dim) in [-1,1] -> (I,P,W). A ViT built from decoder
    blocks (only they reproduce the paper's sizes); every patch sees every other. Positions are
    learned and there is no CLS token. The paper does not describe its connector; ours is linear."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.encoder_width
        self.patch = Linear(cfg.patch_dim, width)
        self.positions = nn.Parameter(torch.empty(cfg.n_patches, width))
        init_weight(self.positions, width)
        wide = replace(cfg, width=width, heads=0, moe="none", granularity=1)
        self.blocks = nn.ModuleList(Block(wide, layer) for layer in range(cfg.encoder_depth))
        self.norm = Norm(width)
        self.connector = Linear(width, cfg.width)

    def forward(self, patches):
        x = self.patch(patches) + self.positions.to(patches.dtype)               # (I,P,Wv)
        for block in self.blocks:
            x, _ = run_block(block, x)
        return self.connector(self.norm(x))                                      # (I,P,W)


class Output(NamedTuple):
    loss: torch.Tensor                  # () float32, SUM of the text targets' losses, nats
    balance: torch.Tensor               # () float32, SUM over tokens, mean over layers; 0 if dense
    token_loss: torch.Tensor            # (K,) float32, detached, in the order of target_index
    expert_counts: torch.Tensor | None  # (L,2,E) float32, MoE: (text, image) tokens per expert


class Model(nn.Module):
    """forward(batch) -> Output. data.collate says what a batch is."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        init_weight(self.embedding.weight, cfg.width)  # std 1/sqrt(W), as in open_lm
        late = cfg.fusion == "late"
        self.vision = VisionEncoder(cfg) if late else Linear(cfg.patch_dim, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.norm = Norm(cfg.width)
        # only weights that are not tied to the embedding reproduce the paper's counts
        self.head = Linear(cfg.width, cfg.vocab_size)
        # train.py sets both on CUDA: FlexAttention instead of a dense mask; activations in bf16
        self.flex, self.dtype = False, torch.float32
        self.register_buffer("rope", rope_table(cfg.context, cfg.head_dim), persistent=False)

    def embed(self, batch):
        """-> (B,T,W): the patch's embedding at patches, the token's elsewhere. Both always run (a
        text-only batch has a dummy image), because DDP would wait for a missing gradient."""
        # fp32 (FSDP's table is bf16), because a frequent token's gradient sums thousands of terms
        tokens = gather(self.embedding.weight.float(), batch["tokens"]).to(self.dtype)  # (B,T,W)
        if "images" not in batch:  # generate() past its prompt
            return tokens
        pixels = (batch["images"].float() / 127.5 - 1).to(self.dtype)            # (I,P,patch_dim)
        patches = self.vision(pixels).flatten(0, 1)                              # (I*P,W)
        at = batch["patch_index"]
        patches = gather(patches, at.clamp(min=0))                               # (B,T,W)
        return torch.where((at >= 0)[..., None], patches, tokens)

    def build_mask(self, batch, dense):
        """The mask for Attention, built once a forward pass for all layers."""
        doc, image_id = batch["doc"], batch["patch_index"] // self.cfg.n_patches  # -1 stays -1
        if self.flex and not dense:
            return block_mask(doc, image_id)
        mask = attention_mask(doc, image_id)                                     # (B,1,T,T)
        if mask.device.type == "cpu":  # else every layer would convert the bools again
            mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, -math.inf)
        return mask

    def decode(self, batch, caches=None, start=0):
        """-> (B,T,W) normalised hidden states, and the layers' MoE stats (list). With caches (a
        list for each layer) the batch follows the `start` positions that they already hold."""
        x = self.embed(batch)                                                    # (B,T,W)
        image = (batch["patch_index"] >= 0).long()
        modality = torch.where(batch["doc"] > 0, image, -1)                      # (B,T)
        # past the prompt the row is one text token, which may look at the whole cache
        mask = None if start else self.build_mask(batch, dense=caches is not None)
        rope = self.rope[start:start + x.shape[1]]                               # (T,Hd/2,2)
        stats = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x, layer_stats = run_block(block, x, mask, rope, modality, cache)
            stats.append(layer_stats)
        return self.norm(x), stats

    def forward(self, batch):
        """Next-token loss on text targets only (paper 2.1): logits exist only where needed."""
        x, stats = self.decode(batch)
        at = batch["target_index"]                                               # (K,)
        x = gather(x.flatten(0, 1), at)                                          # (K,W)
        targets = batch["targets"].flatten()[at]                                 # (K,)
        loss, token_loss = head_loss(x, self.head.weight, targets)
        balance, counts = token_loss.new_zeros(()), None
        if self.cfg.moe != "none":
            balance = torch.stack([s.balance for s in stats]).mean()
            counts = torch.stack([s.counts for s in stats])                      # (L,2,E)
        return Output(loss, balance, token_loss, counts)

    def num_params(self):
        """N reproduces the paper's sizes: it counts the matrices of the decoder blocks (only active
        experts, no router), the token embedding and the head. N_nonembedding leaves embedding and
        head out. N_vision counts the matrices of the encoder's blocks, N_total all parameters."""
        def matrices(modules, ndim=2):  # 3 for experts, a tensor a layer; shared ones count once
            return sum(p.numel() for name, p in nn.ModuleList(modules).named_parameters()
                       if p.ndim == ndim and "router" not in name)
        ffn, late = self.blocks[0].ffn, self.cfg.fusion == "late"
        inner = matrices(self.blocks) + matrices(self.blocks, 3) * ffn.top_k // ffn.experts
        return {"N": inner + matrices([self.embedding, self.head]),
                "N_total": sum(p.numel() for p in self.parameters()),
                "N_vision": matrices(self.vision.blocks) if late else 0,
                "N_nonembedding": inner}

    def flops(self, D, D_vision=0):
        """Training FLOPs (paper, Table 1): 6 (N_v D_v + N D); D_v of the D tokens are patches."""
        n = self.num_params()
        return 6 * (n["N_vision"] * D_vision + n["N"] * D)


def on_meta(cfg):
    """A Model of this config whose parameters have shapes but no memory, to count."""
    with torch.device("meta"):
        return Model(cfg)


def training_memory(cfg, ranks=1, shard=False, dtype=torch.bfloat16):
    """-> (fixed bytes on a GPU, bytes for each row of a micro-batch); see results/speed.md.

    A parameter takes 4 bytes of weight, 4 of gradient, 8 of Adam's moments, and 2 of a bf16 copy
    that backward needs. (Checkpointing casts anew. Instead it needs 4 for a short time, because DDP
    makes new buckets, or one GPU that resumes holds the moments twice.) DDP adds 4 for the
    gradients that it sends. FSDP divides the 16 by the ranks, and gathers embedding, head and two
    blocks with their gradients. The head takes 14 for each logit of a chunk and 12 for each weight.
    Activations take 24 for each token, layer and unit of width and 6 for each unit of ffn hidden
    (encoder: 40 at 3/4 of the positions); checkpointing keeps each layer's input and most of one
    layer. A real step takes 78 to 107 % of this estimate."""
    model, width, depth = on_meta(cfg), cfg.width, cfg.depth
    total, words = model.num_params()["N_total"], cfg.vocab_size * width
    block = sum(p.numel() for p in model.blocks[0].parameters())
    copies = 4 * (ranks > 1) + (4 if cfg.checkpointing else 2)
    fixed = 16 * total / ranks + 16 * (words + block) if shard else (16 + copies) * total
    fixed += 14 * 2 ** 27 + 12 * words
    ffn = 6 * cfg.hidden * (cfg.top_k / cfg.granularity if cfg.moe == "learned" else 1)
    layer = 24 * width + ffn + (8 * cfg.top_k * width if cfg.moe != "none" else 0)
    vision = 0.75 * 40 * cfg.encoder_width * cfg.encoder_depth if cfg.fusion == "late" else 0
    layers = depth * layer
    if cfg.checkpointing:
        layers, vision = 0.8 * layer + 2 * depth * width, vision / 20
    return fixed, cfg.context * (16 * width + layers + vision) * dtype.itemsize / 2


def gather(table, index):
    """table (N,W), index int64 of any shape (...) -> its rows (...,W)."""
    if table.is_cuda:  # F.embedding's backward has a race there (pytorch pull request 187687)
        return table.index_select(0, index.flatten()).unflatten(0, index.shape)
    return F.embedding(index, table)  # on a CPU its backward is far faster than table[index]'s


def head_loss(x, weight, targets, max_logits=2 ** 27):
    """x (K,W), weight (V,W), targets (K,) int64 -> their sum () and the losses (K,), detached, in
    float32 nats. If K * V > max_logits it works in chunks and computes their logits again in the
    backward pass, because at V = 50432 the logits would be a micro-batch's largest tensors."""
    weight = weight.float()  # FSDP's is bf16, in which 64 chunks' gradient was wrong by 1 %
    rows = max(1, max_logits // len(weight))

    def losses_of(x, targets):
        logits = F.linear(x, weight.to(x.dtype)).float()                         # (rows,V)
        return F.cross_entropy(logits, targets, reduction="none")

    if len(x) <= rows:
        losses = losses_of(x, targets)
    else:
        losses = torch.cat([checkpoint(losses_of, *chunk, use_reentrant=False)
                            for chunk in zip(x.split(rows), targets.split(rows))])
    return losses.sum(), losses.detach()


@torch.inference_mode()  # a sixth faster than no_grad for a small model
def generate(model, parts, max_new_tokens, stop=None, n_vocab=None, choose=torch.argmax):
    """Continues a prompt with a KV cache -> list of new ids; it ends before the id `stop`, or where
    the context is full. parts: lists of ids, and images uint8 (P,patch_dim), in any order. choose:
    logits (V,) -> id; ids from n_vocab on are padding. ValueError without a prompt or room."""
    batch = prompt_batch(parts, model.cfg, model.rope.device)
    length, context = batch["tokens"].shape[1], model.cfg.context
    if not 0 < length < context:
        raise ValueError(f"the prompt has {length} tokens and patches: give 1 to {context - 1}")
    caches, ids = [[] for _ in model.blocks], []
    for end in range(length, min(length + max_new_tokens, context)):
        x, _ = model.decode(batch, caches, end - batch["tokens"].shape[1])       # (1,T,W)
        logits = model.head(x[0, -1]).float().cpu()[:n_vocab]                    # (V,)
        token = int(choose(logits))
        if token == stop:
            break
        ids.append(token)
        batch = prompt_batch([[token]], model.cfg, model.rope.device)
    return ids


def prompt_batch(parts, cfg, device):
    """One row with one document: the fields of a batch that Model.decode reads."""
    images = [part for part in parts if isinstance(part, torch.Tensor)]
    ids = []  # -1 at patches
    for part in parts:
        ids += [-1] * cfg.n_patches if isinstance(part, torch.Tensor) else part
    tokens = torch.tensor([ids], device=device)                                  # (1,T)
    at = (tokens < 0).cumsum(1) - 1                                              # (1,T)
    batch = {"tokens": tokens.clamp(min=0), "patch_index": at.where(tokens < 0, -1),
             "doc": torch.ones_like(tokens)}                                     # (1,T) each
    if images:
        batch["images"] = torch.stack(images).to(device)                         # (I,P,patch_dim)
    return batch


def read_checkpoint(source, take):
    """A run's directory or .pt file -> take(its checkpoint, a dict on the CPU), or SystemExit."""
    path = Path(source, "ckpt.pt" if Path(source).is_dir() else "")
    if not path.is_file():
        runs = sorted(path.parent.glob("*/ckpt.pt"))
        hint = ", ".join(str(p.parent) for p in runs[:9])
        raise SystemExit(f"{path} does not exist: name a run of train.py ({hint or 'none here'})")
    try:  # weights_only, because a file from elsewhere must not run code
        # mmap reads only what is used, which is a few kB of many GB if only sizes are asked for.
        # But Windows would not let the run write its next checkpoint over a file that is mapped.
        ckpt = torch.load(path, map_location="cpu", weights_only=True,
                          mmap=sys.platform != "win32" and str(path).isprintable())
        if "config" in ckpt:
            return take(ckpt)
    except (Exception, SystemExit) as error:  # ModelConfig raises SystemExit, a foreign file any
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise SystemExit(f"{path} is not a checkpoint of this code ({reason}): "
                         "train again without it, or in another --out") from None
    raise SystemExit(f"{path} is not a checkpoint of train.py. If of open_lm or DCLM: "
                     f"python -m tools.convert {path} --out FILE.pt")


def adopt(model, weights, part, source):
    """Copies weights (name -> tensor) into a part of the model: "vision", the parameters that start
    with "vision.", or "decoder", all others. SystemExit, before anything is copied, if a name or
    shape differs. No shape shows the number of heads, so the caller takes it from the config."""
    def shapes(tensors):
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()
                if name.startswith("vision.") == (part == "vision")}
    ours, theirs = shapes(model.state_dict()), shapes(weights)
    for name in ours | theirs:
        need, have = (side.get(name, "missing") for side in (ours, theirs))
        remedy = ("give the --width, --depth, --moe, --patch-size, --vision-width and "
                  "--vision-depth of that run")
        if name == "embedding.weight" and need[0] != have[0]:
            remedy = "pack the data with the tokenizer of that run"
        if need != have:
            raise SystemExit(f"{source}: {name} is {have} there, {need} in this model: {remedy}")
    model.load_state_dict({name: weights[name] for name in ours}, strict=False)
