"""Compares the fast ways of a GPU with the plain ones, in values and gradients, on this machine.

    python -m tools.check

One line for each: attention (FlexAttention against the dense mask) and experts (grouped_mm against
the loop, with one expert idle). Exit status 1 where a fast way does not run, or differs by more
than LIMIT.

Dimensions: B rows, T positions, W width, E experts, S slots.
"""
from functools import partial

import torch

from model import PRESETS, Attention, attention_mask, block_mask, rope_table, split_heads
from moe import grouped_experts, grouped_mm_is_fast, looped_experts
from train import Parser

LIMIT = 0.02  # of the norm. Rounding to bf16 makes 0.005 to 0.01, a wrong mask more than 0.5.


def distance(ours, plain):
    """The largest |a - b| / |b| of pairs of tensors, or NaN where one holds NaN."""
    pairs = [(a.float(), b.float()) for a, b in zip(ours, plain, strict=True)]
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


def outputs(run, leaves, *args):
    """-> run's output, and the gradients that its sum of squares gives the leaves."""
    y = run(*leaves, *args)
    return [y.detach(), *torch.autograd.grad((y.float() ** 2).sum(), leaves)]


def random(*shape, device, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(len(shape))
    x = torch.randn(shape, device=device, generator=generator)
    return x.to(dtype).requires_grad_()


def two_documents(rows, length, device):
    """doc and image_id (B,T) of rows with two documents, each half an image and half text."""
    at = torch.arange(length, device=device).expand(rows, -1)                    # (B,T)
    doc = at // (length // 2) + 1
    return doc, torch.where(at % (length // 2) < length // 4, doc, -1)


def check_attention(device, head_dim):
    """The attention branch alone, because the residual would hide a wrong mask beside it."""
    if device.type != "cuda":
        return "not compared: FlexAttention has no gradients on a CPU"
    attention = Attention(4 * head_dim, head_dim, 0).to(device)
    rope = rope_table(1024, head_dim).to(device)
    ids = two_documents(2, 1024, device)
    x = random(2, 1024, 4 * head_dim, device=device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = outputs(attention, [x], attention_mask(*ids), rope)
        compiled = torch.compile(attention, fullgraph=True)
        return distance(outputs(compiled, [x], block_mask(*ids), rope), plain)


def check_experts(device):
    load = torch.tensor([50, 0, 78], device=device)                              # (E,)
    weights = [random(3, 64, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
    leaves = [random(128, 64, device=device, dtype=torch.bfloat16), *weights]    # x (S,W)
    if device.type == "cuda" and not grouped_mm_is_fast(leaves[0], weights[2]):
        return "not compared: training loops over the experts on this GPU"
    plain = outputs(looped_experts, leaves, load)
    return distance(outputs(grouped_experts, leaves, load), plain)


def main(argv=None):
    about = __doc__.split("Dimensions")[0]
    Parser(prog="python -m tools.check", description=about).parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    failed = []
    checks = {f"attention, heads of {dim}": partial(check_attention, head_dim=dim)
              for dim in sorted({split_heads(size["width"]) for size in PRESETS.values()})}
    for name, check in {**checks, "experts": check_experts}.items():
        try:
            found = check(device)
        except Exception as error:  # a compiler's are of nearly every type
            failed.append(name)
            found = "does not run: " + " ".join(str(error).split())[:160]
        if isinstance(found, float):
            failed += [name] * (not found <= LIMIT)  # NaN fails, too
            found = f"differs by {found:.4f} (limit {LIMIT})"
        print(f"{name}: {found}")
    if failed:
        raise SystemExit(f"{' and '.join(failed)}: the fast way is not right on this machine; "
                         "train with --compile off, which takes the dense mask")


if __name__ == "__main__":
    main()
