"""Every speed mark of this project, measured on the device at hand, in one run.

    python tests/bench.py                                           ten to fifteen minutes on a CPU
    python tests/bench.py --runs 3 --json results/bench-cpu.json    the median of three runs
    python tests/bench.py --only efficiency                         one table

What is compared runs interleaved, A B C, then C B A, in one process; each round gives one ratio,
and their median is judged (beside it the quartiles). The clock of a CPU is the process's CPU time
on one thread, which busy neighbours disturb least, unless a row says wall. A matrix product is in
each round, so that a share of its rate compares neighbouring moments.

FLOPs are those of matrix products, forward and backward: 6 for each weight and position (4 for the
patch projection, whose input needs no gradient), the head on text targets and active experts only.
Causality is counted once: attention is 6 L W T a position, half of all pairs (what documents leave
out and images add is not counted); the encoder's, which sees every patch, is 12 L W P.

Dimensions: B rows, T context, W width, L layers, P patches of an image, V vocabulary.
"""
import contextlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bench_parts
import data
import model as model_file
import train
from helpers import make_batch
from model import Model, Output, ffn_hidden, generate, prompt_batch, training_memory

SIZES = {"1M": dict(width=128, depth=5, heads=4), "5M": dict(width=256, depth=6, heads=4),
         "20M": dict(width=512, depth=6, heads=8)}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # published dense bf16 FLOP/s
GPU_MARKS = {
    "gpu275m": {"275m early": ">= 0.45", "275m late": ">= 0.45", "275m MoE": ">= 0.40",
                "275m MoE / dense step": "<= 1.35", "275m step, mask on / causal only": "<= 1.05",
                "275m step, compiled / eager": "<= 1"},
    "gpu932m": {"932m early": ">= 0.55"},
    "gpumemory": {"275m peak memory / arithmetic": "<= 1.25",
                  "3.35b peak memory / arithmetic": "<= 1.25"}}


class Row:
    """One measured thing. samples: a value a round (or a run); None: not measured here."""

    def __init__(self, what, samples, mark="", note=""):
        self.what, self.mark, self.note = what, mark, note  # mark: "<= 1.05", or empty: told only
        self.low, self.value, self.high = 3 * [None] if samples is None else \
            np.percentile(samples, [25, 50, 75]).tolist()

    @property
    def verdict(self):
        if self.value is None:
            return "not measured here"
        sign, bound = self.mark.split() if self.mark else ("", 0)
        good = self.value <= float(bound) if sign == "<=" else self.value >= float(bound)
        return ("reached" if good else "NOT reached") if sign else ""


@dataclass
class Bench:
    """Where and how thoroughly to measure."""

    machine: train.Machine
    quick: bool
    folder: Path  # temporary

    def rounds(self, n):
        return 2 if self.quick else n

    def interleave(self, entries, rounds, clock=None):
        """{name: work(round)} -> {name: (rounds,) seconds}, warmed up before."""
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

    def child(self, *args):
        """This file in a process of its own (see `alone`), whose peak memory is its own."""
        if self.machine.is_cuda:
            torch.cuda.empty_cache()  # what this process no longer uses is the child's
        command = [sys.executable, __file__, "--child", json.dumps(args)]
        return float(subprocess.check_output(command, text=True).split()[-1])


# ------------------------------------------------------------------------ what is compared


def step_flops(cfg, positions, images, targets, full=False):
    """FLOPs of one forward and backward pass; full: decoder attention over all T x T pairs."""
    def block(width, hidden, keys):
        return 4 * width**2 + 3 * width * hidden + width * keys

    learned, wide, encoder = cfg.moe == "learned", cfg.width, 0
    hidden = cfg.hidden * cfg.top_k // cfg.granularity if learned else cfg.hidden
    decoder = block(cfg.width, hidden, cfg.context * (2 if full else 1))
    decoder = cfg.depth * (decoder + learned * cfg.experts * cfg.width)
    if cfg.fusion == "late":
        wide = cfg.encoder_width
        inside = block(wide, ffn_hidden(wide, cfg.mlp_multiple), 2 * cfg.n_patches)
        encoder = cfg.encoder_depth * inside + wide * cfg.width  # blocks, connector
    patches, head = images * cfg.n_patches, targets * cfg.width * cfg.vocab_size
    return 6 * (positions * decoder + head + patches * encoder) + 4 * patches * cfg.patch_dim * wide


def typical_flops(given):
    """Config, and FLOPs a token where 45 % of the positions are image patches."""
    cfg = train.make_cell(given).model
    return cfg, step_flops(cfg, 1, 0.45 / cfg.n_patches, 0.55)


class StockBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
        self.up, self.down = nn.Linear(width, 4 * width, False), nn.Linear(4 * width, width, False)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))         # (B,T,3,H,Hd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                     # (B,H,T,Hd) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))                          # (B,T,W)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stock(nn.Module):
    """The reference: a plain causal text transformer of the same shape in stock torch; every
    position is a token and a target."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Parameter(0.02 * torch.randn(cfg.context, cfg.width))
        self.blocks = nn.ModuleList(StockBlock(cfg.width, cfg.width // cfg.head_dim)
                                    for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)

    def forward(self, batch):
        tokens = batch["tokens"]
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).flatten(0, 1)                           # (B*T,V)
        loss = F.cross_entropy(logits.float(), tokens.roll(-1, 1).flatten(), reduction="sum")
        return Output(loss, tokens.numel(), {}, loss.detach(), None)


def trainee(bench, given, kind=Model):
    """A model with train.py's optimizer: as much of a train.Run as a step needs."""
    torch.manual_seed(0)
    cell = train.make_cell({"tokens_per_step": 2048, **given})
    network = kind(cell.model).to(bench.machine.device)
    run = SimpleNamespace(cell=cell, machine=bench.machine, model=network,
                          optimizer=train.make_optimizer(network, cell.train, bench.machine))
    train.compile_blocks(run)
    return run


def step(run, batch):
    """One training step as in train.train: forward, backward, clip, AdamW."""
    totals = train.micro_step(run, run.model, batch)
    torch._foreach_mul_([p.grad for p in run.model.parameters()], 1 / totals[2].clamp(min=1))
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.cell.train.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def causal_only():
    """No mask is built, and attention is asked for causality alone, as in text models."""
    attention = F.scaled_dot_product_attention

    def causal(q, k, v, attn_mask=None):
        return attention(q, k, v, is_causal=True)

    with mock.patch.object(model_file, "attention_mask", lambda *ids: None), \
            mock.patch.object(F, "scaled_dot_product_attention", causal):
        yield


def make_loader(cell):
    shape = cell.model
    return data.Loader(cell.data, 0, shape.context, shape.image_size, shape.patch_size)


def make_batches(bench, cell, n=4):
    """Steps' batches: the loader's for a laptop; random ones, 45 % image, for the paper's sizes."""
    rows, context = cell.train.tokens_per_step // cell.model.context, cell.model.context
    if cell.train.preset == "laptop":
        loader = make_loader(cell)
        made = [loader.batch([loader.row(i * rows + b) for b in range(rows)]) for i in range(n)]
    else:
        half = "tI" + "t" * (context // 2 - 1 - cell.model.n_patches)
        text = "t" * (context // 2)
        packed = [[half, text if b % 5 == 4 else half] for b in range(rows)]  # 9 images in 5 rows
        made = [make_batch(cell.model, packed, seed) for seed in range(n)]
    return [train.to_device(batch, bench.machine) for batch in made]


def compare(bench, size, kinds, rounds, marks, ratios=(), extra=None):
    """Training steps of {name: flags} side by side, beside `extra` {name: work}. One row for each
    of `marks` {name: mark}, its FLOPs as a share of the GEMM rate, and for each of `ratios`, (what,
    name / name, mark). "stock" and "causal" are the models above."""
    def work(r, name):
        with causal_only() if name == "causal" else contextlib.nullcontext():
            step(runs[name], batches[r % 4])

    runs = {name: trainee(bench, given, Stock if name == "stock" else Model)
            for name, given in kinds.items()}
    for run in [runs[name] for name in runs if name == "causal"]:
        run.model.flex = False  # its block mask would not be causal_only's
    batches = make_batches(bench, next(iter(runs.values())).cell)
    side, gpu = (8192, torch.cuda.get_device_name()) if bench.machine.is_cuda else (1536, "")
    took = bench.interleave({"gemm": bench.product(side), **(extra or {}),
                             **{name: partial(work, name=name) for name in runs}}, rounds)
    rate = next((peak for key, peak in PEAKS.items() if key in gpu), 2 * side**3 / took["gemm"])
    tokens, order = batches[0]["tokens"].numel(), np.arange(bench.rounds(rounds)) % 4
    counts = [(tokens, len(batch["images"]), len(batch["target_index"])) for batch in batches]
    flops = {name: np.array([step_flops(run.cell.model, *n) for n in counts])[order]
             for name, run in runs.items() if name != "stock"}
    if "late" in runs:
        took["early FLOPs"] = took["early"] * flops["late"] / flops["early"]
    rows = []
    for name, mark in marks.items():
        seconds = np.median(took[name])
        rows.append(Row(f"{size} {name}, share of {'peak' if gpu else 'the GEMM rate'}",
                        flops[name] / took[name] / rate, mark, f"{1e3 * seconds:,.0f} ms, "
                        f"{tokens / seconds:,.0f} tokens/s, "
                        f"{np.median(flops[name]) / tokens / 1e6:,.1f} MFLOP/token"))
    for what, names, mark in ratios:
        above, below = (took[name] for name in names.split(" / "))
        rows.append(Row(f"{size} {what}", above / below, mark))
    return rows


# ------------------------------------------------------------------------- marks of a CPU


def ceiling(bench):
    sides = (4096, 8192) if bench.machine.is_cuda else (1024, 1536, 2048)
    took = bench.interleave({side: bench.product(side) for side in sides}, 9)
    rates = np.concatenate([2 * side**3 / took[side] / 1e9 for side in sides])
    rows = [Row("matrix products, GFLOP/s", rates, note=f"best {rates.max():,.0f}; sides {sides}")]
    if bench.machine.is_cuda:
        x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        y = torch.empty_like(x)
        took = bench.interleave({"copy": lambda r: y.copy_(x)}, 9)
        rows.append(Row("copy bandwidth, GB/s, read and write", 2 * x.numel() / took["copy"] / 1e9))
    return rows


def steps(bench, size, rounds, mark, stock_mark):
    shape = SIZES[size]
    run = trainee(bench, shape)
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    plain = torch.optim.AdamW(run.model.parameters())
    adamw = {"fused": lambda r: run.optimizer.step(), "default": lambda r: plain.step()}
    return compare(
        bench, size, {"early": shape, "causal": shape, "stock": shape,
                      "late": {**shape, "fusion": "late"}, "MoE": {**shape, "moe": "learned"},
                      "modality": {**shape, "moe": "modality"}}, rounds,
        {"early": mark, "late": "", "MoE": "", "modality": ""},
        [("step / stock causal transformer", "early / stock", stock_mark),
         ("step, mask on / causal only", "early / causal", "<= 1.05"),
         ("step, 8 experts / dense", "MoE / early", "<= 1.10"),
         ("step, modality experts / dense", "modality / early", "<= 1.10"),
         ("late step / early x FLOP ratio", "late / early FLOPs", "<= 1.10"),
         ("AdamW, fused / default", "fused / default", "<= 0.5")], adamw)


def compiled(bench):
    """Told only: train.py compiles on CUDA alone."""
    if bench.quick or not shutil.which(os.environ.get("CXX", "g++")):
        return [Row("1M step, compiled / eager", None, note="--quick, or no C++ compiler")]
    start = time.perf_counter()
    rows = compare(bench, "1M", {"eager": SIZES["1M"], "fast": {**SIZES["1M"], "compile": "on"}},
                   9, {}, [("step, compiled / eager", "fast / eager", "")])
    rows[0].note = f"{time.perf_counter() - start:.0f} s with the start-up and 20 steps"
    return rows


def loading(bench):
    """The loader beside the 1M step: packed JPEGs and the procedural world, 8 rows."""
    shape, small = SIZES["1M"], bench.folder / "small"
    make_tar(small.with_suffix(".tar"), 64 if bench.quick else 400)
    quiet_pack(small.with_suffix(".tar"), small, 32)
    loaders = {name: make_loader(train.make_cell({**shape, **given})) for name, given in
               (("world", {}), ("packed", {"data": str(small), "mixture": "100-0-0"}))}

    def work(r, loader):
        loader.batch([loader.row(8 * r + i) for i in range(8)])

    return compare(bench, "1M", {"early": shape}, 9, {},
                   [("loader / step, packed captions of 32 px", "packed / early", "<= 0.02"),
                    ("loader / step, procedural world", "world / early", "<= 0.02")],
                   {name: partial(work, loader=loader) for name, loader in loaders.items()})


def upkeep(bench):
    """Evaluation and checkpoints of `python train.py`; by the wall: a disk takes no CPU time."""
    cell = train.make_cell({"out": str(bench.folder / "upkeep")})
    run = train.Run(cell, bench.machine)
    run.begin([cell])
    batches = make_batches(bench, cell)

    def evaluation(r):
        run.loader.val.clear()  # in a run there is one, and it makes its rows
        train.evaluate(run)

    took = bench.interleave({"step": lambda r: step(run, batches[r % 4]), "evaluation": evaluation,
                             "save": lambda r: run.save("ckpt.pt")}, 5, time.perf_counter)
    saves = -(-cell.steps // cell.train.save_every)
    extra = took["evaluation"] + saves * took["save"]
    seconds = [np.median(took[name]) for name in ("evaluation", "save", "step")]
    return [Row("evaluation and checkpoints, share of a default run (wall)",
                extra / (extra + cell.steps * took["step"]), "<= 0.05",
                "{:.2f} s + {} x {:.3f} s beside {} x {:.3f} s".format(
                    seconds[0], saves, seconds[1], cell.steps, seconds[2]))]


def overhead(bench):
    """train.train beside its bare steps. The mask, which the forward pass makes, counts as
    overhead; the Python inside torch's modules does not."""
    n = 8 if bench.quick else 40
    cell = train.make_cell({"width": 64, "tokens": str(n * 1024),
                            "out": str(bench.folder / "overhead")})
    run, rows = train.Run(cell, bench.machine), 1024 // cell.model.context
    run.begin([cell])
    run.save = run.describe = lambda *args: None  # `upkeep` has the checkpoint
    run.said = float("inf")  # no line of progress amid the table
    batches = make_batches(bench, cell, n)

    def loop(r):
        run.step = 0
        train.train(run, [cell])

    def masks(r):
        for batch in batches:
            model_file.attention_mask(batch["doc"], batch["patch_index"] // cell.model.n_patches)

    took = bench.interleave({
        "loop": loop, "bare": lambda r: [step(run, batch) for batch in batches], "mask": masks,
        "data": lambda r: list(run.loader.train_batches(0, n, rows, rows))}, 7)
    extra = took["loop"] - took["bare"] + took["mask"]
    each = {name: f"{1e3 * np.median(times) / n:.2f} ms" for name, times in took.items()}
    return [Row("overhead of a step at width 64, without data", (extra - took["data"]) /
                took["loop"], "<= 0.10", f"step {each['loop']}, mask {each['mask']}"),
            Row("overhead of a step at width 64, with procedural data", extra / took["loop"],
                note=f"data {each['data']}")]


def generation(bench):
    """Untrained models: 256 positions with the cache and without; one caption of the default."""
    @torch.no_grad()
    def uncached(r, network):
        ids = [0]
        while len(ids) < length:
            x, _ = network.decode(prompt_batch([ids], network.cfg, "cpu"))
            ids.append(int(network.head(x[0, -1]).argmax()))

    rows, length = [], 64 if bench.quick else 256
    for name, shape in (("the default model", {}), ("5M", SIZES["5M"])):
        network = Model(train.make_cell(shape).model).eval()
        took = bench.interleave({"cached": lambda r: generate(network, [[0]], length - 1),
                                 "uncached": partial(uncached, network=network)}, 5)
        rows.append(Row(f"{name}: decoding {length} tokens, uncached / cached",
                        took["uncached"] / took["cached"], ">= 5",
                        f"{1e3 * np.median(took['cached']) / length:.2f} ms a token"))
        if not shape:
            image = torch.zeros(network.cfg.n_patches, network.cfg.patch_dim, dtype=torch.uint8)
            caption = {"caption": lambda r: generate(network, [[0], image], 64)}
            rows.append(Row("caption of an image, 64 tokens, seconds (wall)", bench.interleave(
                caption, 5, time.perf_counter)["caption"], "<= 1"))
    return rows


def parts(bench):
    """Told only: what each optimisation of the model gains, see bench_parts.py."""
    found = bench_parts.pairs(bench.machine.device)
    found["decoding: inference_mode / no_grad"] = bench_parts.decoding(train.make_cell({}).model)
    rows = []
    for what, works in found.items():
        took = bench.interleave(dict(enumerate(works)), 15)
        rows.append(Row(what, took[0] / took[1], note="{:.2f} and {:.2f} ms".format(
            *(1e3 * np.median(took[i]) for i in (0, 1)))))
    return rows


def start_training(folder, *flags, threads=1, ranks=1):
    """train.py in a session of its own, as torchrun starts its ranks: Linux may share the cores
    out among sessions first, and a session of two processes would get the less."""
    folder.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *launcher[:5 * (ranks > 1)], str(ROOT / "train.py"), "--out",
               str(folder), "--device", "cpu", "--jobs", "1", "--val-rows", "1", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        return folder, subprocess.Popen(command, stdout=log, stderr=log, env=env,
                                        start_new_session=True)


def speed(started):
    """tokens/s of all of them together."""
    try:
        codes = [process.wait() for _, process in started]
    finally:  # Ctrl-C does not reach another session
        for _, process in started:
            process.terminate()
    if any(codes):
        raise SystemExit((started[0][0] / "log.txt").read_text("utf-8")[-800:])
    return sum(line["tok_per_s"] for folder, _ in started
               for line in train.finished(folder).values())


def parallel(bench):
    """Two processes, two threads or two ranks: train.py at width 64, tokens/s by the wall."""
    tokens, rates = 40 if bench.quick else 120, {"pair": [], "threads": [], "DDP": []}
    budget = ["--tokens", f"{tokens}K"]
    for r in range(bench.rounds(3)):
        out = Path(tempfile.mkdtemp(dir=bench.folder))
        starts = {
            "pair": lambda: [start_training(out / f"pair{i}", *budget) for i in range(2)],
            "threads": lambda: [start_training(out / "threads", *budget, threads=2)],
            "DDP": lambda: [start_training(out / "ddp", "--tokens", f"{2 * tokens}K",
                                           "--tokens-per-step", "2048", ranks=2)]}
        for name in list(starts)[::-1 if r % 2 else 1]:
            rates[name].append(speed(starts[name]()))
    rates = {name: np.array(rate) for name, rate in rates.items()}
    note = ", ".join(f"{name} {np.median(rate):,.0f}" for name, rate in rates.items())
    return [Row("sweep, two processes / one with two threads (wall)", rates["pair"] /
                rates["threads"], ">= 1", f"tokens/s: {note}"),
            Row("DDP of two ranks / two processes (wall)", rates["DDP"] / rates["pair"], ">= 0.9")]


# --------------------------------------------------------------------- marks of any device


def efficiency(bench):
    """Paper, Fig. 4: early and late fusion at equal training FLOPs a token: widths that match
    within 3 % and whose head dims are 32 or more; on a GPU the pairs of Table 6."""
    if bench.machine.is_cuda:
        pairs = [[{"preset": name, "tokens_per_step": 8192} for name in pair]
                 for pair in (("275m", "289m"), ("464m", "494m"), ("932m", "1b"))]
    else:
        pairs = [({"width": early}, {"fusion": "late", "width": late})
                 for early, late in ((128, 120), (168, 160), (224, 216))]
    rows = []
    for early, late in pairs[:1] if bench.quick else pairs:
        (a, flops), (b, late_flops) = typical_flops(early), typical_flops(late)
        name = f"early w{a.width}, late w{b.width}:"
        rows += compare(bench, name, {"early": early, "late": late}, 9, {"early": "", "late": ""},
                        [("step time, early / late", "early / late", "")])
        rows[-1].note = f"FLOPs {flops / late_flops:.3f}"
        peaks = [bench.child("peak", given) for given in (early, late)]
        rows.append(Row(f"{name} peak memory, early / late", peaks[0] / peaks[1],
                        note="{:,.0f} and {:,.0f} MB".format(*peaks)))
    return rows


def alone(bench, task, argument):
    """In a process of its own: MB that two training steps add, or that reading a set takes."""
    if task == "peak":
        before = memory("VmRSS")
        run = trainee(bench, argument)
        for batch in make_batches(bench, run.cell, 2):
            step(run, batch)
        return bench.machine.peak_mem_mb() if bench.machine.is_cuda else memory("VmHWM") - before
    packed, rng = data.Packed(argument), np.random.default_rng(0)
    plan = data.Plan(packed, "caption", 1024, 256)  # held while documents are read, as in a run
    for i in range(0, packed.n_docs("caption"), -(-packed.n_docs("caption") // 200)):
        packed.document("caption", i, 224, rng, augment=True)
    return memory("RssAnon") if plan.n_rows else 0


def memory(field):
    """MB of this process: VmRSS now, RssAnon now without mapped files, VmHWM the peak (that of
    getrusage would be the parent's too)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise SystemExit("bench.py: efficiency and slope need Linux; --only the other marks")
    return int(re.search(rf"{field}:\s*(\d+)", status.read_text("utf-8"))[1]) / 1024


def make_tar(path, n, side=(500, 375)):
    """n JPEGs that compress about as photographs do, with captions, as img2dataset writes them."""
    Image, rng, blobs = data.need("PIL.Image", "pillow"), np.random.default_rng(0), []
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            small = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize(side, Image.Resampling.BICUBIC))    # (h,w,3)
            noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(noisy).save(file, "JPEG", quality=85)
            blobs.append(file.getvalue())
            text = f"picture {i}: {rng.integers(9**9)} coloured clouds on a wall".encode()
            for name, content in ((f"{i:06}.jpg", blobs[-1]), (f"{i:06}.txt", text)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return blobs


def quiet_pack(tar, out, image_size):
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data.pack({"caption": [str(tar)]}, out, image_size=image_size, workers=1,
                  val_fraction=0.1 if image_size < 224 else 0)


def packing(bench):
    """pack beside bare Pillow, then loading what was packed; images a second and core."""
    Image, n = data.need("PIL.Image", "pillow"), 40 if bench.quick else 200
    out = bench.folder / "photos"
    blobs = make_tar(out.with_suffix(".tar"), n)

    def pillow(r):
        for blob in blobs:
            image = Image.open(io.BytesIO(blob)).convert("RGB")
            np.asarray(image.resize((341, 256), Image.Resampling.BICUBIC))

    def load(r):
        packed, rng = data.Packed(out), np.random.default_rng(r)
        for i in range(n):
            image, = packed.document("caption", i, 224, rng, augment=True).images
            data.patchify(image, 14)

    pack = partial(quiet_pack, out.with_suffix(".tar"), out, 224)
    took = bench.interleave({"pack": lambda r: pack(), "pillow": pillow, "load": load}, 5,
                            time.process_time)
    rates = {name: n / times for name, times in took.items()}
    rows = [Row("pack / Pillow's decode and resize", rates["pack"] / rates["pillow"], ">= 0.80",
                f"{np.median(rates['pack']):.0f} images/s a core, 500 x 375"),
            Row("load, random crop, patchify at 224 px, images/s a core", rates["load"])]
    for preset, mfu in (("275m", 0.45), ("932m", 0.55)):
        wanted = mfu * PEAKS["H200"] / typical_flops({"preset": preset})[1] * 0.45 / 256
        rows.append(Row(f"loader workers for {preset} at {mfu:.0%} of an H100",
                        wanted / rates["load"], note=f"{wanted:,.0f} images of 256 patches a s"))
    return rows


def slope(bench):
    """Memory of a process that reads sparse packed sets of growing size."""
    sizes = (1, 10) if bench.quick else (1, 10, 100)
    used = [bench.child("read", str(sparse(bench.folder / f"sparse{size}", size * 10**9)))
            for size in sizes]
    return [Row("memory for reading packed images, MB a GB of them",
                (used[-1] - used[0]) / (sizes[-1] - sizes[0]), "<= 1", ", ".join(
                    f"{mb:.0f} MB at {size} GB" for mb, size in zip(used, sizes)))]


def sparse(folder, size, tokens=32, sides=(256, 341)):
    """A packed set of one sparse shard: whole tables, but headers of 200 documents alone."""
    shard, item = folder / "caption" / "shard", 4 * tokens + 8 + 3 * sides[0] * sides[1]
    shard.mkdir(parents=True)
    n = size // item
    table = np.stack([np.arange(n) * item, np.full(n, tokens), np.ones(n)], 1)   # (n,3)
    table.astype(np.int64).tofile(shard / "train.docs")
    with open(shard / "data", "wb") as file:
        file.truncate(n * item)
        for i in range(0, n, -(-n // 200)):
            file.seek(i * item)
            file.write(np.array([data.IMAGE, *range(tokens - 1), *sides], np.int32).tobytes())
    splits = {"train": {"caption": {"shards": [{"name": "shard", "docs": n}]}}}
    (folder / "data.json").write_text(json.dumps({"tokenizer": "bytes", "splits": splits}),
                                      encoding="utf-8")
    return folder


def scaling(bench):
    """932m on 8 H100s, on paper: 2 (n-1)/n of the fp32 gradients cross each GPU's link once a
    step, beside the backward pass (2/3 of the time) of the last micro-batch of 16 rows."""
    n, link, micro = 8, 450e9, 16 * 1024
    cfg, flops = typical_flops({"preset": "932m"})
    with torch.device("meta"):
        size = 4 * Model(cfg).num_params()["N_total"]
    talk, token = size * 2 * (n - 1) / n / link, flops / (0.55 * PEAKS["H100"])  # seconds
    work, hidden = 2048 * 1024 / n * token, micro * token * 2 / 3
    return [Row("DDP scaling on paper, 932m on 8 H100s", work / (work + max(0, talk - hidden)),
                ">= 0.95", f"{size / 1e9:.2f} GB x {2 * (n - 1) / n} / {link / 1e9:.0f} GB/s = "
                f"{1e3 * talk:.0f} ms, hidden by {1e3 * hidden:.0f} ms of backward, step "
                f"{1e3 * work:.0f} ms; all of it exposed: {work / (work + talk):.3f}")]


def gpu_flags(preset, **more):
    return {"preset": preset, "tokens_per_step": 16 * 1024, **more}


def gpu_275m(bench):
    """bf16, compiled blocks, random batches of 16 rows of 1024; late fusion: the size 289m."""
    early, marks = gpu_flags("275m"), GPU_MARKS["gpu275m"]
    ratios = {"MoE / dense step": "MoE / early", "step, mask on / causal only": "early / causal",
              "step, compiled / eager": "early / eager"}
    return compare(
        bench, "275m", {"early": early, "causal": early, "eager": {**early, "compile": "off"},
                        "late": gpu_flags("289m"), "MoE": {**early, "moe": "learned"}}, 9,
        {name: marks[f"275m {name}"] for name in ("early", "late", "MoE")},
        [(what, names, marks[f"275m {what}"]) for what, names in ratios.items()])


def gpu_memory(bench):
    """Peaks with checkpointing beside the arithmetic of `model.py --sizes`: that they are measured
    shows that a step fits."""
    rows = []
    for preset in ("275m", "3.35b"):
        given = gpu_flags(preset, checkpointing=True)
        with torch.device("meta"):
            network = Model(train.make_cell(given).model)
        whole, _, row = training_memory(network)
        wanted = whole + 16 * row
        peak, what = bench.child("peak", given) * 2**20, f"{preset} peak memory / arithmetic"
        rows.append(Row(what, peak / wanted, GPU_MARKS["gpumemory"][what],
                        f"{peak / 1e9:.1f} GB with checkpointing, 16 rows"))
    return rows


# ------------------------------------------------------------------------------ the whole run


MARKS = {  # name: (function, kind of device it needs)
    "ceiling": (ceiling, "any"),
    "1m": (partial(steps, size="1M", rounds=9, mark=">= 0.50", stock_mark="<= 1.10"), "cpu"),
    "5m": (partial(steps, size="5M", rounds=5, mark=">= 0.70", stock_mark="<= 1.05"), "cpu"),
    "20m": (partial(compare, size="20M", kinds={"early": SIZES["20M"]}, rounds=5,
                    marks={"early": ">= 0.72"}), "cpu"),
    "compiled": (compiled, "cpu"), "loading": (loading, "cpu"),
    "upkeep": (upkeep, "cpu"), "overhead": (overhead, "cpu"), "generation": (generation, "cpu"),
    "parts": (parts, "cpu"), "parallel": (parallel, "cpu"), "packing": (packing, "any"),
    "slope": (slope, "any"),
    "scaling": (scaling, "any"), "efficiency": (efficiency, "any"), "gpu275m": (gpu_275m, "cuda"),
    "gpu932m": (partial(compare, size="932m", kinds={"early": gpu_flags("932m")}, rounds=5,
                        marks={"early": ">= 0.55"}), "cuda"), "gpumemory": (gpu_memory, "cuda")}


def measure(bench, name):
    function, device = MARKS[name]
    if device in ("any", bench.machine.device.type):
        try:
            return function(bench)
        except (SystemExit, subprocess.CalledProcessError, torch.OutOfMemoryError) as error:
            # no Pillow, say, or no memory: the other marks are worth having
            return [Row(name, None, note=str(error)[-200:])]
    if device == "cuda":
        return [Row(what, None, mark, "no GPU") for what, mark in GPU_MARKS[name].items()]
    return [Row(f"{name}: marks of a CPU", None)]


def merge(runs):
    """Rows of several whole runs -> rows whose samples are the runs' medians."""
    told = {}
    for row in (row for rows in runs for row in rows):
        told.setdefault(row.what, []).append(row)
    return [Row(what, None if same[0].value is None else [row.value for row in same],
                same[0].mark, same[-1].note) if len(same) > 1 else same[0]
            for what, same in told.items()]


def show(rows):
    def number(x):
        return "" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3f}"

    lines = [["what", "measured", "quartiles", "mark", "", ""]]
    lines += [[row.what, number(row.value), f"{number(row.low)} {number(row.high)}", row.mark,
               row.verdict, row.note] for row in rows]
    wide = [max(len(line[i]) for line in lines) for i in range(5)]
    for *cells, note in lines:
        print("  ".join(cell.ljust(n) for cell, n in zip(cells, wide)) + "  " + note)


def hardware(machine):
    if machine.is_cuda:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text("utf-8")) if info.is_file() else None
    return f"{found[1] if found else platform.processor()}, {data.usable_cores()} cores"


def main(argv=None):
    parser = data.Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--only", default=",".join(MARKS), help="of " + ",".join(MARKS))
    parser.add_argument("--quick", action="store_true", help="two rounds: to see that it runs")
    parser.add_argument("--runs", type=int, default=1, help="repeat, and judge the medians")
    parser.add_argument("--child", type=json.loads, help="used by the program itself")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if set(names) - set(MARKS) or args.runs < 1:
        raise SystemExit(f"bench.py: --only takes some of {','.join(MARKS)}; --runs at least 1")
    machine, runs = train.Machine.start("auto"), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        bench = Bench(machine, args.quick, Path(folder))
        if args.child:
            return print(alone(bench, *args.child))
        for n in range(args.runs):
            runs.append([])
            bench.folder = Path(folder, str(n))
            bench.folder.mkdir()
            for name in tqdm(names, f"run {n + 1} of {args.runs}"):
                runs[-1] += measure(bench, name)
    rows = merge(runs)
    about = {"hardware": hardware(machine), "torch": torch.__version__, "runs": args.runs,
             "threads": torch.get_num_threads()}
    print(" ".join(f"{key}: {value}" for key, value in about.items()))
    show(rows)
    if args.json:
        told = [{**vars(row), "verdict": row.verdict} for row in rows]
        Path(args.json).write_text(json.dumps({**about, "rows": told}, indent=1) + "\n",
                                   encoding="utf-8")


if __name__ == "__main__":
    main()
