"""The first thing to run on a rented machine: what is right there, and how fast it is.

    python -m tools.check                                      275m on a GPU, laptop on a CPU
    python -m tools.check --preset 932m --data data/real       the model that you will train

In three minutes it prints a line for each check: the machine's rates; each fast way beside the
plain way, in values and gradients (FlexAttention and the dense mask, grouped_mm and the loop over
the experts, bf16 and fp32, compiled and eager); a step of the model with its MFU, and its memory
beside what we predict; checkpoint and resume; all GPUs, also with --shard, beside one process. The
last line is the command to train with. If something is wrong, this command has the flags that avoid
it, and the exit status is 1. All flags of train.py work here. A CPU leaves out what needs a GPU.

Dimensions: B rows, T positions, W width, E experts, S slots.
"""
import gc
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from model import (Attention, Model, attention_mask, block_mask, flex_fits, rope_table,
                   training_memory)
from moe import grouped_experts, grouped_mm_is_fast, looped_experts
from tools import split_launcher
from tools.bench import Bench, random_batch, step

LIMIT = 0.02  # of the norm. Rounding to bf16 makes 0.005 to 0.01, a wrong mask more than 0.5.


def distance(ours, plain):
    """The largest |a - b| / |b| of pairs of tensors, or NaN if a tensor holds NaN."""
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


# ---- Right: a check returns a distance, which must stay below LIMIT, or a text to print ----------


def check_attention(run, machine):
    """The attention branch alone, because the residual would hide a wrong mask beside it."""
    head_dim, device = run.model.head_dim, machine.device
    if not flex_fits(run.model, machine.dtype):
        return "not compared, because training takes the dense mask here"
    attention = Attention(4 * head_dim, head_dim, 0).to(device)
    rope = rope_table(1024, head_dim).to(device)
    ids = two_documents(2, 1024, device)
    x = random(2, 1024, 4 * head_dim, device=device, dtype=machine.dtype)
    plain = outputs(attention, [x], attention_mask(*ids), rope)
    compiled = torch.compile(attention, fullgraph=True)
    return distance(outputs(compiled, [x], block_mask(*ids), rope), plain)


def check_experts(run, machine):
    """grouped_mm beside the loop over the experts, where one expert is idle."""
    device = machine.device
    load = torch.tensor([50, 0, 78], device=device)                              # (E,)
    weights = [random(3, 64, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
    leaves = [random(128, 64, device=device, dtype=torch.bfloat16), *weights]    # x (S,W)
    if machine.is_cuda and not grouped_mm_is_fast(leaves[0], weights[2]):
        return "not compared, because training loops over the experts on this GPU"
    plain = outputs(looped_experts, leaves, load)
    return distance(outputs(grouped_experts, leaves, load), plain)


def loss_and_gradient(run, machine, dtype, compiled=False):
    """Loss and gradient of two blocks of the model on random rows -> two tensors. Each token goes
    to every expert, because rounding changes the router's choice between experts that nearly tie,
    which would change the gradient more than any fault."""
    cfg = replace(run.model, depth=2, vision_depth=2, checkpointing=False,
                  top_k=run.model.experts if run.model.moe == "learned" else 1)
    torch.manual_seed(0)
    model = Model(cfg).to(machine.device)
    model.dtype, model.flex = dtype, compiled and flex_fits(cfg, dtype)
    if compiled:
        train.compile_blocks(model)
    rows = 8 if machine.is_cuda else 1  # with 8, torch takes the kernels of training
    batch = train.to_device(random_batch(cfg, rows, np.random.default_rng(0)), machine)
    out = model(batch)
    (out.loss / len(out.token_loss)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [out.loss.detach()[None], gradient]


def check_bf16(run, machine):
    return distance(loss_and_gradient(run, machine, torch.bfloat16),
                    loss_and_gradient(run, machine, torch.float32)) / 3  # gradients are coarser


def check_compiled(run, machine):
    if not machine.is_cuda and run.train.compile != "on":
        return "not compared, because a CPU does not compile unless --compile on is given"
    return distance(loss_and_gradient(run, machine, machine.dtype, compiled=True),
                    loss_and_gradient(run, machine, machine.dtype))


def check_ranks(folder, rows, run, machine, ranks=1, flags=()):
    """Train two budgets, the second from the trunk of the first -> the relative distance of its
    validation loss from that of a run which trains the second budget alone in one process."""
    def loss(name, ranks, tokens, *flags):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        out, script = folder / name, Path(train.__file__)
        done = subprocess.run(
            [sys.executable, *launch * (ranks > 1), str(script), "--out", str(out), "--tokens",
             tokens, "--tokens-per-step", str(128 * rows), "--warmup", "5", "--val-rows", "16",
             "--compile", "off", "--device", machine.device.type, *flags],
            capture_output=True, text=True, check=False)
        if done.returncode:
            own, report = split_launcher(done.stderr)
            raise RuntimeError(own.strip() or report or f"exit status {done.returncode}")
        return list(train.finished(out).values())[-1]["loss"]
    alone = loss("alone", 1, "80K")  # only the first check trains it
    return abs(loss(f"{ranks}{len(flags)}", ranks, "40K,80K", *flags) / alone - 1)


# ---- Fast ----------------------------------------------------------------------------------------


def seconds(machine, *works):
    """The median wall-clock time of each call in seconds, after one call of each to warm up."""
    bench = Bench(machine, quick=False, folder=Path())
    took = bench.interleave(dict(enumerate(works)), 5, time.perf_counter)
    return [np.median(times) for times in took.values()]


def rates(run, machine):
    side = 8192 if machine.is_cuda else 1536
    a = random(side, side, device=machine.device, dtype=machine.dtype).detach()
    b = torch.empty_like(a)
    product, copy = seconds(machine, lambda r: a @ a, lambda r: b.copy_(a))
    return (f"matrix products {2 * side ** 3 / product / 1e12:.2f} TFLOP/s, memory "
            f"{2 * a.nbytes / copy / 1e9:,.0f} GB/s")


def speed(run, machine):
    """Time a step of two micro-steps on random rows of two documents each -> a text. FLOPs are the
    paper's 6 N D, as in speed.jsonl and --gpus."""
    if run.train.shard:
        return "not measured, because --shard needs all GPUs"
    trainer = train.Trainer(run, machine)
    trainer.accumulation = 2
    batch = train.to_device(random_batch(run.model, trainer.rows, np.random.default_rng(0)),
                            machine)
    took, = seconds(machine, lambda r: step(trainer, batch))
    took /= 2  # seconds a micro-step
    tokens = trainer.rows * run.model.context
    flops = trainer.model.flops(tokens, len(batch["images"]) * run.model.n_patches) / took
    told = (f"{trainer.rows} rows x {run.model.context} in {1e3 * took:,.0f} ms, "
            f"{tokens / took:,.0f} tokens/s, {flops / 1e12:.2f} TFLOP/s")
    if machine.peak:
        told += f", MFU {flops / machine.peak:.1%}"
    if machine.is_cuda:
        fixed, row = training_memory(run.model, dtype=machine.dtype)
        told += (f"; memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, by the arithmetic "
                 f"{(fixed + trainer.rows * row) / 1e9:.1f}")
        del trainer, batch
        gc.collect()  # a compiled model is in a reference cycle
        torch.cuda.empty_cache()  # so that the ranks of the next checks have this memory
    return told


# ---- The list ------------------------------------------------------------------------------------


def main(argv=None):
    parser = train.Parser(prog="python -m tools.check", description=__doc__)
    _, words = parser.parse_known_args(argv)
    cuda = torch.cuda.is_available()
    if cuda and not any(word.startswith("--preset") for word in words):
        words += ["--preset", "275m"]
    *_, run = train.parse_runs(words)
    machine = train.Machine.start(run.train.device)
    ranks = torch.cuda.device_count() if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        larger = "--shard" if "--shard" in train.what_would_fit(run, machine) else "--checkpointing"
        ranked = partial(check_ranks, Path(folder), 8 * ranks)
        checks = {  # name: (function, the flag that avoids the fault, if there is one)
            "rates": (rates, ""), "attention": (check_attention, "--attention dense"),
            "experts": (check_experts, "--experts-by loop"),
            "bf16": (check_bf16, "--device cpu"), "compiled": (check_compiled, "--compile off"),
            run.name: (speed, larger), "resume": (ranked, "")}
        if ranks > 1:
            checks[f"{ranks} ranks"] = partial(ranked, ranks=ranks), ""
            sharded = partial(ranked, ranks=ranks, flags=["--shard"])
            checks[f"{ranks} ranks, sharded"] = sharded, ""
        print(f"torch {torch.__version__}, {machine.name}, {max(1, ranks * cuda)} of them")
        avoid = [flag for name, (work, flag) in checks.items()
                 if not fine(name, work, run, machine)]
    launch = f"torchrun --standalone --nproc_per_node {ranks}" if cuda and ranks > 1 else "python"
    for flag, example in (("--data", "data/real"), ("--tokens", "5B"), ("--out", "runs/real")):
        if run.train.preset != "laptop" and flag not in [word.partition("=")[0] for word in words]:
            words += [flag, example]
    print(f"train with: {launch} train.py {' '.join([*words, *filter(None, avoid)])}")
    if avoid:
        raise SystemExit("something is wrong on this machine: the flags at the end avoid it")


def fine(name, work, run, machine):
    """Runs one check and prints its line. False where it found a fault."""
    try:
        found, good = work(run, machine), True
    except (Exception, SystemExit) as error:  # a compiler's errors are of nearly every type
        found, good = "does not run: " + " ".join(str(error).split())[-200:], False
    if isinstance(found, float):  # NaN is a fault, too
        found, good = f"differs by {found:.5f} (limit {LIMIT})", found <= LIMIT
    print(f"{name}: {found}")
    return good


if __name__ == "__main__":
    main()
