"""Measure every speed mark of this project on the device at hand, in one run.

    python -m tools.bench                                           ten to fifteen minutes on a CPU
    python -m tools.bench --json results/bench-cpu.json
    python -m tools.bench --only efficiency                         one table
    python -m tools.bench --only parts          what each optimisation gains

What we compare runs interleaved in one process, A B C and then C B A. Each round gives one ratio,
and a mark applies to the median of the rounds, beside which stand the quartiles. On a CPU the clock
is the process's CPU time on one thread, because busy neighbours disturb it least, unless a row says
wall. Each round has a matrix product, so that a share of its rate compares times close together.

FLOPs are those of matrix products, forward and backward: 6 for each weight and position (4 for the
patch projection, whose input needs no gradient), the head on text targets and active experts only.
Attention is 6 L W T a position, because half of all pairs are causal (we ignore what documents
leave out and images add). In the encoder it is 12 L W P, because every patch sees every other.

Dimensions: B rows, T context, W width, H heads, Hd head dim, L layers, P patches of an image,
            V vocabulary, E experts, h, w height and width of a picture.
"""
import contextlib
import gc
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model as model_file
import moe
import train
from model import (Model, Output, ffn_hidden, generate, on_meta, prompt_batch, rope_table, rotate,
                   training_memory)
from tools import markdown, need, usable_cores
from tools.pack import pack

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"1M": dict(width=128, depth=5, heads=4), "5M": dict(width=256, depth=6, heads=4),
         "20M": dict(width=512, depth=6, heads=8)}
# 16 rows of the paper's context, 8 times a step, so that clipping and AdamW cost what they cost in
# a real run
GPU_STEP = {"tokens_per_step": 8 * 16 * 1024, "micro_rows": 16}
GPU_MARKS = {
    "gpu275m": {"275m early": ">= 0.45", "275m late": ">= 0.45", "275m MoE": ">= 0.40",
                "275m MoE / dense step": "<= 1.35", "275m step, mask on / causal only": "<= 1.05",
                "275m step, compiled / eager": "<= 1"},
    "gpu932m": {"932m early": ">= 0.55"},
    "gpumemory": {"275m peak memory / arithmetic": "<= 1.25",
                  "3.35b peak memory / arithmetic": "<= 1.25"}}


class Row:
    """The median and the quartiles of one measured thing. samples: a value a round; None if it
    was not measured here. mark: as "<= 1.05", or empty if the value need not reach any."""

    def __init__(self, what, samples, mark="", note=""):
        self.what, self.mark, self.note = what, mark, note
        self.low = self.value = self.high = None
        if samples is not None:
            self.low, self.value, self.high = np.percentile(samples, [25, 50, 75]).tolist()

    @property
    def verdict(self):
        if self.value is None:
            return "not measured here"
        if not self.mark:
            return ""
        sign, bound = self.mark.split()
        good = self.value <= float(bound) if sign == "<=" else self.value >= float(bound)
        return "reached" if good else "NOT reached"


@dataclass
class Bench:
    """Where and how thoroughly to measure."""

    machine: train.Machine
    quick: bool
    folder: Path  # temporary

    def rounds(self, n):
        return 2 if self.quick else n

    def interleave(self, entries, rounds, clock=None):
        """{name: work(round)} -> {name: (rounds,) seconds}. Each work is warmed up before."""
        cuda, took = self.machine.is_cuda, {name: [] for name in entries}
        wait = torch.cuda.synchronize if cuda else int
        clock = clock or (time.perf_counter if cuda else time.process_time)
        for work in entries.values():
            work(0)
        for r in range(self.rounds(rounds)):
            for name in list(entries)[::-1 if r % 2 else 1]:
                wait()
                start = clock()
                entries[name](r)
                wait()
                took[name].append(clock() - start)
        return {name: np.array(times) for name, times in took.items()}

    def product(self, side):
        """Work of 2 side^3 FLOPs, in the dtype that training uses here."""
        dtype = torch.bfloat16 if self.machine.is_cuda else torch.float32
        a, b = (torch.randn(side, side, device=self.machine.device).to(dtype) for _ in range(2))
        return lambda r: a @ b


def in_child(function, *args):
    """function(*args) in a process of its own, whose peak memory is its own."""
    if torch.cuda.is_available():
        gc.collect()  # compiled models are in reference cycles
        torch.cuda.empty_cache()  # so that the child has what this process no longer uses
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ---- What is compared ----------------------------------------------------------------------------


def step_flops(cfg, positions, images, targets):
    """FLOPs of one forward and backward pass over so many positions, images and text targets."""
    def block(width, hidden, keys):
        return 4 * width**2 + 3 * width * hidden + width * keys

    learned, wide, encoder = cfg.moe == "learned", cfg.width, 0
    hidden = cfg.hidden * cfg.top_k // cfg.granularity if learned else cfg.hidden
    router = learned * cfg.experts * cfg.width
    decoder = cfg.depth * (block(cfg.width, hidden, cfg.context) + router)
    if cfg.fusion == "late":
        wide = cfg.encoder_width
        inside = block(wide, ffn_hidden(wide, cfg.mlp_multiple), 2 * cfg.n_patches)
        encoder = cfg.encoder_depth * inside + wide * cfg.width  # blocks, connector
    patches, head = images * cfg.n_patches, targets * cfg.width * cfg.vocab_size
    return 6 * (positions * decoder + head + patches * encoder) + 4 * patches * cfg.patch_dim * wide


def config_of(given):
    return train.make_runs(given)[0].model


def typical_flops(cfg):
    """FLOPs a token where 45 % of the positions are image patches."""
    return step_flops(cfg, 1, 0.45 / cfg.n_patches, 0.55)


class StockBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width, False), nn.GELU(),
                                 nn.Linear(4 * width, width, False))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))         # (B,T,3,H,Hd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # (B,H,T,Hd) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))                          # (B,T,W)
        return x + self.ffn(self.norm2(x))


class Stock(nn.Module):
    """The reference is a plain causal text transformer of the same shape in stock torch, in which
    every position is a token and a target."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Parameter(0.02 * torch.randn(cfg.context, cfg.width))
        heads = cfg.width // cfg.head_dim
        self.blocks = nn.Sequential(*(StockBlock(cfg.width, heads) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.cfg = cfg  # make_optimizer asks it for the fusion

    def forward(self, batch):
        tokens = batch["tokens"]
        x = self.blocks(self.embedding(tokens) + self.positions)                 # (B,T,W)
        logits = self.head(self.norm(x)).flatten(0, 1)                           # (B*T,V)
        loss = F.cross_entropy(logits.float(), tokens.roll(-1, 1).flatten(), reduction="sum")
        each = loss.detach().expand(tokens.numel())  # only its length is looked at
        return Output(loss, torch.zeros_like(loss), each, None)

    def flops(self, tokens, patches=0):
        return 0  # a Trainer computes an MFU of it, which nobody reads


def trainee(machine, given, kind=Model):
    """A train.Trainer, whose model may be another kind of module."""
    run = train.make_runs({"tokens_per_step": 2048, "micro_rows": 2048, **given})[0]
    with mock.patch.object(train, "Model", kind):
        return train.Trainer(run, machine)


def step(trainer, batch):
    """One training step as in train.train: forward, backward, clip, AdamW."""
    totals = train.forward_and_backward(trainer, iter([batch] * trainer.accumulation))
    grads = [p.grad for p in trainer.model.parameters()]
    torch._foreach_mul_(grads, 1 / totals[2].clamp(min=1))
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.run.train.grad_clip)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def causal_only():
    """Within this context attention is only causal, as in text models, and a single number is built
    in place of the mask."""
    attention = F.scaled_dot_product_attention

    def causal(q, k, v, attn_mask=None):
        return attention(q, k, v, is_causal=True)

    with mock.patch.object(model_file, "attention_mask", lambda doc, _: doc[:1, :1] > 0), \
            mock.patch.object(F, "scaled_dot_product_attention", causal):
        yield


def make_batches(trainer, n=4):
    """n micro-batches: the loader's for a laptop, random ones for the paper's sizes."""
    run, rows = trainer.run, trainer.rows
    batches = trainer.loader.train_batches(0, n, rows, rows)
    if run.train.preset != "laptop":
        batches = (random_batch(run.model, rows, np.random.default_rng(i)) for i in range(n))
    return [train.to_device(batch, trainer.machine) for batch in batches]


def random_batch(cfg, n_rows, rng):
    """Rows of two documents, each an image and a random text that fill half a row."""
    rows = [data.Row(cfg.context, cfg.n_patches, eot=0) for _ in range(n_rows)]
    for row in [*rows, *rows]:
        image = rng.integers(256, size=(cfg.image_size, cfg.image_size, 3), dtype=np.uint8)
        text = rng.integers(cfg.vocab_size, size=max(1, cfg.context // 2 - 1 - cfg.n_patches))
        row.add(data.Document(np.array([data.IMAGE, *text]), [image]))
    return data.collate(rows, cfg.patch_size)


def compare(bench, size, kinds, rounds, marks, ratios=(), extra=None, note=""):
    """Times training steps of {name: flags} side by side, with `extra` {name: work} beside them.

    Yields a row for each of `marks` {name: mark}, a step's FLOPs as a share of the GEMM rate, and
    for each of `ratios`, (what, "name / name", mark). The names "stock" and "causal" stand for the
    reference above and for a step under causal_only."""
    def work(r, name):
        with causal_only() if name == "causal" else contextlib.nullcontext():
            step(trainers[name], batches[r % 4])

    trainers = {name: trainee(bench.machine, given, Stock if name == "stock" else Model)
                for name, given in kinds.items()}
    if "causal" in trainers:
        trainers["causal"].model.flex = False  # causal_only builds no block mask
    batches = make_batches(next(iter(trainers.values())))
    side = 8192 if bench.machine.is_cuda else 1536
    took = bench.interleave({"gemm": bench.product(side), **(extra or {}),
                             **{name: partial(work, name=name) for name in trainers}}, rounds)
    rate = bench.machine.peak or 2 * side**3 / took["gemm"]
    often = next(iter(trainers.values())).accumulation
    tokens, order = often * batches[0]["tokens"].numel(), np.arange(bench.rounds(rounds)) % 4
    counts = [(batch["tokens"].numel(), len(batch["images"]), len(batch["target_index"]))
              for batch in batches]
    flops = {name: often * np.array([step_flops(trainer.run.model, *n) for n in counts])[order]
             for name, trainer in trainers.items()}
    if "late" in trainers:
        took["early FLOPs"] = took["early"] * flops["late"] / flops["early"]
    for name, mark in marks.items():
        seconds, share = np.median(took[name]), flops[name] / took[name] / rate
        of = "peak" if bench.machine.peak else "the GEMM rate"
        yield Row(f"{size} {name}, share of {of}", share, mark,
                  f"{1e3 * seconds:,.0f} ms, {tokens / seconds:,.0f} tokens/s, "
                  f"{np.median(flops[name]) / tokens / 1e6:,.1f} MFLOP/token")
    for what, names, mark in ratios:
        above, below = names.split(" / ")
        yield Row(f"{size} {what}", took[above] / took[below], mark, note)


# ---- Marks of a CPU ------------------------------------------------------------------------------


def ceiling(bench):
    sides = (4096, 8192) if bench.machine.is_cuda else (1024, 1536, 2048)
    took = bench.interleave({side: bench.product(side) for side in sides}, 9)
    rates = np.concatenate([2 * side**3 / took[side] / 1e9 for side in sides])
    yield Row("matrix products, GFLOP/s", rates, "", f"best {rates.max():,.0f}; sides {sides}")


def steps(bench, size, rounds, mark, stock_mark):
    shape = SIZES[size]
    trainer = trainee(bench.machine, shape)
    for p in trainer.model.parameters():
        p.grad = torch.randn_like(p)
    plain = torch.optim.AdamW(trainer.model.parameters())
    adamw = {"fused": lambda r: trainer.optimizer.step(), "default": lambda r: plain.step()}
    kinds = {"early": shape, "causal": shape, "stock": shape, "late": {**shape, "fusion": "late"},
             "MoE": {**shape, "moe": "learned"}, "modality": {**shape, "moe": "modality"}}
    return compare(
        bench, size, kinds, rounds, {"early": mark, "late": "", "MoE": "", "modality": ""},
        [("step / stock causal transformer", "early / stock", stock_mark),
         ("step, mask on / causal only", "early / causal", "<= 1.05"),
         ("step, 8 experts / dense", "MoE / early", "<= 1.10"),
         ("step, modality experts / dense", "modality / early", "<= 1.10"),
         ("late step / early x FLOP ratio", "late / early FLOPs", "<= 1.10"),
         ("AdamW, fused / default", "fused / default", "<= 0.5")], adamw)


def loading(bench):
    """The loader beside the 1M step: packed JPEGs and the procedural world, 8 rows."""
    shape, small = SIZES["1M"], bench.folder / "small"
    make_tar(small, 64 if bench.quick else 400)
    quiet_pack(small, 32, val_fraction=0.1)
    packed = {**shape, "data": str(small), "mixture": "100-0-0"}
    loaders = {name: trainee(bench.machine, given).loader
               for name, given in (("world", shape), ("packed", packed))}

    def work(r, loader):
        data.collate([loader[8 * r + i] for i in range(8)], loader.patch_size)

    return compare(bench, "1M", {"early": shape}, 9, {},
                   [("loader / step, packed captions of 32 px", "packed / early", "<= 0.02"),
                    ("loader / step, procedural world", "world / early", "<= 0.02")],
                   {name: partial(work, loader=loader) for name, loader in loaders.items()})


def overhead(bench):
    """train.train beside its bare steps. The mask, which the forward pass makes, counts as
    overhead; the Python inside torch's modules does not."""
    n = 8 if bench.quick else 40
    trainer = trainee(bench.machine, {"tokens_per_step": 512, "out": str(bench.folder),
                                      "tokens": str(512 * n)})
    trainer.run.folder.mkdir(parents=True, exist_ok=True)
    trainer.begin()
    trainer.save = trainer.describe = lambda *args: None  # the time of a checkpoint is the disk's
    batches, loader = make_batches(trainer, n), trainer.loader
    rows, n_patches = len(batches[0]["doc"]), trainer.run.model.n_patches

    def loop(r):
        trainer.step = 0
        train.train(trainer)

    def masks(r):
        for batch in batches:
            model_file.attention_mask(batch["doc"], batch["patch_index"] // n_patches)

    took = bench.interleave({
        "loop": loop, "bare": lambda r: [step(trainer, batch) for batch in batches], "mask": masks,
        "data": lambda r: list(loader.train_batches(0, n, rows, rows))}, 7)
    extra = took["loop"] - took["bare"] + took["mask"]
    each = {name: f"{1e3 * np.median(times) / n:.2f} ms" for name, times in took.items()}
    yield Row("overhead of a default step, without data", (extra - took["data"]) / took["loop"],
              "<= 0.10", f"step {each['loop']}, mask {each['mask']}")
    yield Row("overhead of a default step, with procedural data", extra / took["loop"],
              note=f"data {each['data']}")


def generation(bench):
    """Untrained models decode 256 positions with a cache and without, and the default a caption."""
    def cached(r, network, prompt, n):
        generate(network, prompt, n)

    @torch.no_grad()
    def uncached(r, network):
        ids = [0]
        while len(ids) < length:
            x, _ = network.decode(prompt_batch([ids], network.cfg, "cpu"))
            ids.append(int(network.head(x[0, -1]).argmax()))

    length = 64 if bench.quick else 256
    for name, shape in (("the default model", {}), ("5M", SIZES["5M"])):
        network = Model(config_of({**shape, "context": 256})).eval()
        took = bench.interleave({
            "cached": partial(cached, network=network, prompt=[[0]], n=length - 1),
            "uncached": partial(uncached, network=network)}, 5)
        yield Row(f"{name}: decoding {length} tokens, uncached / cached",
                  took["uncached"] / took["cached"], ">= 5",
                  f"{1e3 * np.median(took['cached']) / length:.2f} ms a token")
        if not shape:
            image = torch.zeros(network.cfg.n_patches, network.cfg.patch_dim, dtype=torch.uint8)
            caption = partial(cached, network=network, prompt=[[0], image], n=64)
            took = bench.interleave({"caption": caption}, 5, time.perf_counter)
            yield Row("caption of an image, 64 tokens, seconds (wall)", took["caption"], "<= 1")


def tokens_per_second(bench, threads, *command):
    """Tokens per second of wall-clock time, summed over the runs that a command trains at once."""
    folder = tempfile.mkdtemp(dir=bench.folder)
    command = [sys.executable, *command, "--out", folder, "--device", "cpu", "--val-rows", "1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    data.check(done.returncode == 0, f"{' '.join(command[1:3])} failed: {done.stdout[-800:]}")
    return sum(row["tok_per_s"] for row in train.finished(folder).values())


def parallel(bench):
    """The default model in two processes, with two threads, and in two ranks."""
    n, rates = 40 if bench.quick else 120, {"pair": [], "threads": [], "DDP": []}
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 train.py"
    works = {"pair": ("1", f"-m tools.sweep --jobs 2 --seed 0,1 --tokens {n}K"),
             "threads": ("2", f"train.py --tokens {n}K"),
             "DDP": ("1", f"{torchrun} --tokens {2 * n}K --tokens-per-step 2048")}
    for r in range(bench.rounds(3)):
        for name in list(works)[::-1 if r % 2 else 1]:
            threads, command = works[name]
            rates[name].append(tokens_per_second(bench, threads, *command.split()))
    rates = {name: np.array(rate) for name, rate in rates.items()}
    note = ", ".join(f"{name} {np.median(rate):,.0f}" for name, rate in rates.items())
    yield Row("sweep, two processes / one with two threads (wall)",
              rates["pair"] / rates["threads"], ">= 1", f"tokens/s: {note}")
    yield Row("DDP of two ranks / two processes (wall)", rates["DDP"] / rates["pair"], ">= 0.9")


# ---- Marks of any device -------------------------------------------------------------------------


def efficiency(bench):
    """Paper, Fig. 4: early and late fusion at equal training FLOPs a token. On a CPU the widths
    match within 3 % and have head dims of 32 or more; on a GPU they are pairs of Table 6."""
    if bench.machine.is_cuda:
        pairs = [[{"preset": name, **GPU_STEP} for name in pair]
                 for pair in (("275m", "289m"), ("464m", "494m"), ("932m", "1b"))]
    else:
        pairs = [({"width": early}, {"fusion": "late", "width": late})
                 for early, late in ((128, 120), (168, 160), (224, 216))]
    for early, late in pairs[:1] if bench.quick else pairs:
        a, b = config_of(early), config_of(late)
        name = f"early w{a.width}, late w{b.width}:"
        ratio = "step time, early / late", "early / late", ""
        yield from compare(bench, name, {"early": early, "late": late}, 9,
                           {"early": "", "late": ""}, [ratio],
                           note=f"FLOPs {typical_flops(a) / typical_flops(b):.3f}")
        peaks = [in_child(peak_of_steps, bench.machine, given) for given in (early, late)]
        yield Row(f"{name} peak memory, early / late", peaks[0] / peaks[1],
                  note="{:,.0f} and {:,.0f} MB".format(*peaks))


def peak_of_steps(machine, given):
    """MB that two training steps add to a process."""
    torch.set_num_threads(1)
    before = 0 if machine.is_cuda else memory("VmRSS")
    trainer = trainee(machine, given)
    for batch in make_batches(trainer, 2):
        step(trainer, batch)
    return (torch.cuda.max_memory_allocated() / 2**20 if machine.is_cuda
            else memory("VmHWM") - before)


def memory_of_reading(folder):
    """MB of a process that holds a plan of a packed folder and has read 200 of its documents."""
    shards, rng = data.Shards(folder), np.random.default_rng(0)
    plan, n = data.Plan(shards, "caption", 1024, 256), len(shards.docs["caption"])
    for i in range(0, n, -(-n // 200)):
        shards.document("caption", i, 224, rng=rng, augment=True)
    return memory("RssAnon") if plan.n_rows else 0


def memory(field):
    """MB of this process: VmRSS is its memory now, RssAnon its memory now without mapped files, and
    VmHWM its peak (getrusage would give the parent's peak, too)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # Linux alone has it
    return int(re.search(rf"{field}:\s*(\d+)", status)[1]) / 1024


def make_tar(folder, n, side=(500, 375)):
    """Puts n JPEGs that compress about as photographs do, with captions, into FOLDER.tar and
    returns the bytes of each JPEG."""
    Image, rng, blobs = need("PIL.Image", "pillow"), np.random.default_rng(0), []
    folder.mkdir()
    for i in range(n):
        small = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(side, Image.Resampling.BICUBIC))        # (h,w,3)
        noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        blobs.append(file.getvalue())
        (folder / f"{i:06}.jpg").write_bytes(blobs[-1])
        text = f"picture {i}: {rng.integers(9**9)} coloured clouds on a wall"
        (folder / f"{i:06}.txt").write_text(text, encoding="utf-8")
    shutil.make_archive(str(folder), "tar", folder)
    return blobs


def quiet_pack(folder, image_size, val_fraction):
    """FOLDER.tar -> FOLDER, packed."""
    shutil.rmtree(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pack({"caption": [f"{folder}.tar"]}, folder, "bytes", image_size, "train", val_fraction,
             workers=1)


def packing(bench):
    """pack beside bare Pillow, then loading what was packed; images a second and core."""
    Image, n = need("PIL.Image", "pillow"), 40 if bench.quick else 200
    out = bench.folder / "photos"
    blobs = make_tar(out, n)

    def pillow(r):
        for blob in blobs:
            image = Image.open(io.BytesIO(blob)).convert("RGB")
            np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))

    def load(r):
        shards, rng = data.Shards(out), np.random.default_rng(r)
        for i in range(n):
            image, = shards.document("caption", i, 224, rng=rng, augment=True).images
            data.patchify(image, 14)

    took = bench.interleave({"pack": lambda r: quiet_pack(out, 224, val_fraction=0),
                             "pillow": pillow, "load": load}, 5, time.process_time)
    rates = {name: n / times for name, times in took.items()}
    yield Row("pack / Pillow's decode and resize", rates["pack"] / rates["pillow"], ">= 0.80",
              f"{np.median(rates['pack']):.0f} images/s a core, 500 x 375")
    yield Row("load, random crop, patchify at 224 px, images/s a core", rates["load"])
    for preset, mfu in (("275m", 0.45), ("932m", 0.55)):
        flops = typical_flops(config_of({"preset": preset}))
        wanted = mfu * train.CARDS["H100"][0] / flops * 0.45 / 256
        yield Row(f"loader workers for {preset} at {mfu:.0%} of an H100", wanted / rates["load"],
                  note=f"{wanted:,.0f} images of 256 patches a s")


def slope(bench):
    """Memory of a process that reads packed sets of growing size."""
    sizes = (1, 10) if bench.quick else (1, 10, 100)  # GB
    used = [in_child(memory_of_reading, repeated(bench.folder / f"repeated{size}", size * 10**9))
            for size in sizes]
    yield Row("memory for reading packed images, MB a GB of them",
              (used[-1] - used[0]) / (sizes[-1] - sizes[0]), "<= 1",
              ", ".join(f"{mb:.0f} MB at {size} GB" for mb, size in zip(used, sizes)))


def repeated(folder, size, tokens=32, h=256, w=341):
    """A packed set of `size` bytes whose documents all lie at the same place of its file. We
    only count the tables of documents, not what is mapped from a file."""
    shard, pixels = folder / "caption" / "shard", 3 * h * w
    shard.mkdir(parents=True)
    np.array([data.IMAGE, *range(tokens - 1)], np.int32).tofile(shard / "tokens")
    (shard / "images").write_bytes(np.array([h, w], np.int32).tobytes() + bytes(pixels))
    n = size // (4 * tokens + 8 + pixels)
    np.tile(np.array([0, 0, tokens, 1]), (n, 1)).tofile(shard / "train.docs")    # int64 (n,4)
    splits = {"train": {"caption": {"shards": [{"name": "shard", "docs": n}]}}}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "image_size": 224, "splits": splits}
    (folder / "data.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def scaling(bench):
    """932m on 8 H100s, on paper: 2 (n-1)/n of the fp32 gradients cross each GPU's link once a
    step, beside the backward pass (2/3 of the time) of the last micro-batch of 16 rows."""
    n, link, micro = 8, 450e9, 16 * 1024
    cfg = config_of({"preset": "932m"})
    size = 4 * on_meta(cfg).num_params()["N_total"]
    talk = size * 2 * (n - 1) / n / link  # seconds
    token = typical_flops(cfg) / (0.55 * train.CARDS["H100"][0])
    work, hidden = 2048 * 1024 / n * token, micro * token * 2 / 3
    yield Row("DDP scaling on paper, 932m on 8 H100s", work / (work + max(0, talk - hidden)),
              ">= 0.95", f"{size / 1e9:.2f} GB x {2 * (n - 1) / n} / {link / 1e9:.0f} GB/s = "
              f"{1e3 * talk:.0f} ms, hidden by {1e3 * hidden:.0f} ms of backward, step "
              f"{1e3 * work:.0f} ms; all of it exposed: {work / (work + talk):.3f}")


# ---- Parts of the 1M model -----------------------------------------------------------------------

B, T, W, H, HIDDEN, V, E = 8, 256, 128, 4, 352, 264, 8  # 8 rows of 256


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
    gate, up = F.linear(x, weight).chunk(2, dim=-1)                              # (B,T,HIDDEN) each
    return F.linear(F.silu(gate) * up, down)


def two_matrices(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def five_layers(q, k, v, mask):
    return sum(F.scaled_dot_product_attention(q, k, v, attn_mask=mask) for _ in range(5))


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
            both(lambda x, w: F.cross_entropy(F.linear(F.embedding(at, x), w), targets[at]),
                 lambda x, w: F.cross_entropy(F.linear(x, w), targets, ignore_index=-1),
                 leaf(B * T, W), leaf(V, W)),
    }


def attention_parts():
    """A row holds four documents of 64 positions; the first 16 of each are an image."""
    at = torch.arange(T)
    doc = (at // 64).expand(B, -1)                                               # (B,T)
    mask = model_file.attention_mask(doc, torch.where(at % 64 < 16, doc, -1))    # (B,1,T,T)
    return {
        "rope: one complex product / four real ones":
            both(rotate, real_rope, leaf(B, T, H, W // H), rope_table(T, W // H)),
        "attention of five layers: mask as numbers once / as bool in each":
            both(lambda *qkv: five_layers(*qkv, torch.where(mask, 0.0, -torch.inf)),
                 lambda *qkv: five_layers(*qkv, mask), *(leaf(B, H, T, W // H) for _ in range(3))),
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
    }


def decoding():
    network = Model(config_of({})).eval()
    slower = torch.no_grad()(generate.__wrapped__)
    return {"decoding: inference_mode / no_grad": tuple(
        lambda r, run=run: run(network, [[0]], 64) for run in (generate, slower))}


def parts(bench):
    """The time of each optimisation that we kept over the time of the plainer way it replaced, in
    forward and backward pass of the part alone, at the shapes of the 1M model, without a mark."""
    groups = attention_parts(), dense_parts(), expert_parts(), decoding()
    for what, (kept, replaced) in [pair for group in groups for pair in group.items()]:
        took = bench.interleave({"kept": kept, "replaced": replaced}, 15)
        each = [f"{1e3 * np.median(times):.2f}" for times in took.values()]
        yield Row(what, took["kept"] / took["replaced"], note=f"{' and '.join(each)} ms")


# ---- Marks of a GPU ------------------------------------------------------------------------------


def gpu_275m(bench):
    """In bf16, with compiled blocks, on random batches of 16 rows of 1024; late fusion is 289m."""
    early, marks = {"preset": "275m", **GPU_STEP}, GPU_MARKS["gpu275m"]
    ratios = {"MoE / dense step": "MoE / early", "step, mask on / causal only": "early / causal",
              "step, compiled / eager": "early / eager"}
    kinds = {"early": early, "causal": early, "eager": {**early, "compile": "off"},
             "late": {"preset": "289m", **GPU_STEP}, "MoE": {**early, "moe": "learned"}}
    return compare(bench, "275m", kinds, 9,
                   {name: marks[f"275m {name}"] for name in ("early", "late", "MoE")},
                   [(what, names, marks[f"275m {what}"]) for what, names in ratios.items()])


def gpu_932m(bench):
    kinds = {"early": {"preset": "932m", **GPU_STEP}}
    return compare(bench, "932m", kinds, 5, {"early": GPU_MARKS["gpu932m"]["932m early"]})


def gpu_memory(bench):
    """Peak memory with checkpointing beside the prediction of model.py. If there is a peak at all,
    a step has fitted."""
    for preset in ("275m", "3.35b"):
        given = {"preset": preset, "checkpointing": True, **GPU_STEP}
        whole, row = training_memory(config_of(given))
        peak = in_child(peak_of_steps, bench.machine, given) * 2**20
        yield Row(f"{preset} peak memory / arithmetic", peak / (whole + 16 * row), "<= 1.25",
                  f"{peak / 1e9:.1f} GB with checkpointing, 16 rows")


# ---- The whole run -------------------------------------------------------------------------------


MARKS = {  # name: (the kind of device it needs, function)
    "ceiling": ("any", ceiling),
    "1m": ("cpu", partial(steps, size="1M", rounds=9, mark=">= 0.50", stock_mark="<= 1.10")),
    "5m": ("cpu", partial(steps, size="5M", rounds=5, mark=">= 0.70", stock_mark="<= 1.05")),
    "20m": ("cpu", partial(compare, size="20M", kinds={"early": SIZES["20M"]}, rounds=5,
                           marks={"early": ">= 0.72"})),
    "compiled": ("cpu", partial(
        compare, size="1M", kinds={"eager": SIZES["1M"], "fast": {**SIZES["1M"], "compile": "on"}},
        rounds=9, marks={}, ratios=[("step, compiled / eager", "fast / eager", "")])),
    "loading": ("cpu", loading), "overhead": ("cpu", overhead),
    "generation": ("cpu", generation), "parallel": ("cpu", parallel), "packing": ("any", packing),
    "slope": ("any", slope), "scaling": ("any", scaling), "efficiency": ("any", efficiency),
    "parts": ("cpu", parts),
    "gpu275m": ("cuda", gpu_275m), "gpu932m": ("cuda", gpu_932m),
    "gpumemory": ("cuda", gpu_memory)}


def measure(bench, name, device, function):
    """The rows of one measurement. A row that failed or needs another device has no value."""
    if device not in ("any", bench.machine.device.type):
        marks = GPU_MARKS.get(name, {f"{name}: marks of a CPU": ""})
        return [Row(what, None, mark, f"needs {device}") for what, mark in marks.items()]
    try:
        return list(function(bench))
    except (Exception, SystemExit) as error:  # Pillow may be missing, but other marks still count
        return [Row(name, None, note=" ".join(str(error).split())[-200:])]


def show(rows):
    """Prints a markdown table."""
    def number(x):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"

    print(markdown(["what", "measured", "from .. to", "mark", "", "note"], *(
        [row.what, *(["", ""] if row.value is None else
                     [number(row.value), f"{number(row.low)} to {number(row.high)}"]),
         row.mark, row.verdict, row.note] for row in rows)))


def hardware(machine):
    if machine.is_cuda:
        return machine.name
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text("utf-8")) if info.is_file() else []
    return f"{[*names, platform.processor()][0]}, {usable_cores()} cores"


def main(argv=None):
    parser = train.Parser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--only", default=",".join(MARKS), help="some of " + ",".join(MARKS))
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    data.check(set(names) <= set(MARKS), f"--only takes some of {','.join(MARKS)}")
    machine, rows = train.Machine.start("auto"), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        for name in tqdm(names):
            rows += measure(Bench(machine, args.quick, Path(folder)), name, *MARKS[name])
    about = {"hardware": hardware(machine), "torch": torch.__version__,
             "threads": torch.get_num_threads()}
    print(" ".join(f"{key}: {value}" for key, value in about.items()))
    show(rows)
    if args.json:
        told = [{**vars(row), "verdict": row.verdict} for row in rows]
        Path(args.json).write_text(json.dumps({**about, "rows": told}, indent=1) + "\n",
                                   encoding="utf-8")


if __name__ == "__main__":
    main()
