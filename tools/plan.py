"""What a run would take: time, memory, disk, data and price. It trains nothing.

    python train.py --dry-run                                   on this machine, timed here
    python train.py --dry-run --preset 932m --tokens 100B --gpus 8xh100x0.4x2.5
    python -m tools.sweep --dry-run --preset 275m,464m --tokens 1B,2B --gpus 8xh100x0.4x2.5

--gpus names the number of GPUs, the card, the MFU (default 0.4) and the dollars for an hour of one
GPU. All other flags are train.py's. For several runs the last line is their sum. There budgets
share their trunks, each run has the GPUs that tools.sweep --ranks would give it, and runs that have
finished count, too.
"""
import heapq
import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch

import train
from data import Loader, check
from model import on_meta, training_memory
from tools import end_with_the_pipe

# Text tokens and images in a sample of the paper's data. Captions follow from its Table 3; OBELICS
# has 115B tokens and 353M images in 141M documents, and DCLM 4T tokens in 3B documents.
SAMPLES = {"caption": ("DFN or COYO", 77, 1), "interleaved": ("OBELICS", 815, 2.5),
           "text": ("DCLM", 1330, 0)}


@dataclass(frozen=True)
class Cards(train.Machine):
    """GPUs to plan for as if they were this machine."""
    mfu: float = 0.4
    price: float = 0  # dollars for an hour of one card


def cards_of(text):
    """"8xh100x0.4x2.5" -> Cards."""
    try:
        parts = text.split("x")
        number, name, mfu, price = parts + ["", "", "0.4", "0"][len(parts):]
        peak, memory = train.CARDS[name.upper()]
        cards = Cards(torch.device("cuda"), ranks=int(number), name=name, memory=memory, peak=peak,
                      dtype=torch.bfloat16, mfu=float(mfu), price=float(price))
        good = cards.ranks > 0 and 0 < cards.mfu <= 1 and 0 <= cards.price < float("inf")
    except (ValueError, LookupError):
        good = False
    check(good, f"{text}: need number, card ({', '.join(train.CARDS)}), MFU (a share) and dollars "
          "for an hour, as 8xh100x0.4x2.5")
    return cards


def dollars(cards, seconds):
    """The price of all cards for so many seconds, idle or not, as a text; "" without a price."""
    price = seconds / 3600 * cards.ranks * cards.price if cards else 0
    return f", {price:,.0f} dollars" if price else ""


def published_positions(run, loader):
    """(text, image) positions of a row of the paper's data, without padding, for the run's image
    size and mixture."""
    image = 0
    for kind, share in loader.shares.items():
        _, words, images = SAMPLES.get(kind, SAMPLES["caption"])
        patches = images * run.model.n_patches
        image += share / 100 * run.model.context * patches / (words + patches)
    return run.model.context - image, image


def lacks_data(run):
    """Whether a size of the paper is planned without --data. If so, we assume the paper's data."""
    return run.train.preset != "laptop" and run.data.data == "procedural"


def positions(run, loader):
    """(text, image) positions of a row of this run's own data: the mean of its first 100 rows,
    because they have exactly the shares of the mixture."""
    if lacks_data(run):
        return published_positions(run, loader)
    rows = [loader[g] for g in range(100)]
    images = sum(int((row.patch >= 0).sum()) for row in rows) / 100
    return sum(row.used for row in rows) / 100 - images, images


def plan(run, place, machine):
    """Lines for a person, seconds of training, GB on disk. place: Cards, or the machine itself,
    whose speed is then measured."""
    cfg, shape, D = run.train, run.model, run.steps * run.train.tokens_per_step
    paper = cfg.preset != "laptop"
    check(place is not machine or place.memory or not paper, f"--preset {cfg.preset} is a size for "
          "GPUs: name those to plan for, as --gpus 8xh100x0.4")
    check(place.ranks > 1 or not cfg.shard, "--shard divides a model over several GPUs: name them "
          "as --gpus 8xh100, of a sweep with --ranks 8")
    loader = Loader(run.data, cfg.seed, shape)
    text, image = positions(run, loader)
    model, (micro_rows, times) = on_meta(shape), train.divide_step(run, place)
    n, C = model.num_params(), model.flops(D, image / shape.context * D)
    head = (f"{run.name}: N {n['N']:,}, D {D:,}, C {C:.3g} FLOPs, {run.steps:,} steps of "
            f"{micro_rows} rows x {times} micro-steps x {place.ranks} ranks, warmup {cfg.warmup}")
    if place is machine:
        seconds, told = measured_seconds(run, machine), f"{machine.name}, as measured just now"
    else:
        seconds = C / place.ranks / place.peak / place.mfu
        told = f"{place.ranks} {place.name} at MFU {place.mfu:g}{dollars(place, seconds)}"
    lines = [head, f"time: {timedelta(seconds=round(seconds))} on {told}"]
    if place.memory:
        fixed, row = training_memory(shape, place.ranks, cfg.shard, place.dtype)
        lines += [f"memory: {(fixed + row * micro_rows) / 1e9:.1f} GB of {place.memory / 1e9:.0f}"]
    disk, padding = 24 * n["N_total"] / 1e9, 1 - (text + image) / shape.context
    lines += [f"disk: {disk:.2f} GB for ckpt.pt and trunk.pt, half more while one is written",
              f"padding: {padding:.1%} of the positions" + ", without --data" * lacks_data(run),
              *(line_of(kind, share, run, loader) for kind, share in loader.shares.items()),
              *(f"note: {note}" for note in train.notes(run, place.memory, loader))]
    return lines, seconds, disk


def tell(jobs, cards, machine, ranks, at_once):
    """Print the plan of each run, and the sum of all. A job is a list of runs that share a trunk.
    Each job has `ranks` ranks, and `at_once` jobs train at the same time."""
    machine, free, disk = replace(machine, ranks=ranks), [0.0] * at_once, 0.0
    place, n_runs = replace(cards, ranks=ranks) if cards else machine, sum(map(len, jobs))
    for runs in jobs:
        took = 0.0
        for run in runs:
            lines, seconds, size = plan(run, place, machine)
            print(*lines, sep="\n", flush=True)
            cooldown = 1 - run.branch / run.steps  # only the longest budget pays for the trunk
            took, disk = took + seconds * (1 if run is runs[-1] else cooldown), disk + size
        heapq.heapreplace(free, free[0] + took)  # a job starts when the first place becomes free
    if n_runs > 1:
        busy = sum(free) / at_once / max(free)
        idle = f", {busy:.0%} of them in use (--ranks divides a run)"
        idle *= cards is not None and busy < 0.8
        print(f"all {n_runs} runs, {min(at_once, len(jobs))} at a time: "
              f"{timedelta(seconds=round(max(free)))}{dollars(cards, max(free))}{idle}, "
              f"{disk:,.2f} GB of disk")


def line_of(kind, share, run, loader):
    """What a run needs of one kind of documents."""
    shape, rows = run.model, run.steps * run.train.tokens_per_step // run.model.context
    tokens, epochs = rows * shape.context * share / 100, loader.epochs(rows)[kind]
    line = f"{kind}: {share} % of the rows, {tokens:,.0f} tokens"
    if epochs:  # it is 0 for the procedural world
        return f"{line}, {epochs:.2f} epochs of {run.data.data}"
    if kind not in SAMPLES or run.train.preset == "laptop":
        return line
    name, words, images = SAMPLES[kind]
    samples = tokens / (words + images * shape.n_patches)
    # a short side of 8/7 is kept, for crops, and a photograph is a third longer than high
    size = samples * (4 * words + images * 3 * (shape.image_size * 8 / 7) ** 2 * 4 / 3)
    return f"{line}; of {name}: {samples:,.0f} samples, {size / 1e9:,.1f} GB packed"


def measured_seconds(run, machine):
    """The seconds of a whole run: its number of micro-steps times the median of three that we time
    here. A first one is not timed, because in it torch allocates and compiles."""
    rows, times = train.divide_step(run, machine)
    alone = replace(run, train=replace(run.train, shard=False, micro_rows=rows))
    trainer, ends = train.Trainer(alone, replace(machine, ranks=1)), []
    trainer.accumulation = 1
    batches = trainer.loader.train_batches(0, 4, rows, rows)
    for _ in range(4):
        train.forward_and_backward(trainer, batches)[0].item()
        ends.append(time.perf_counter())
    return run.steps * times * float(np.median(np.diff(ends)))


def main(argv=None):
    parser = train.Parser(prog="python -m tools.plan", description=__doc__)
    parser.add_argument("--gpus", type=cards_of, metavar="8xh100x0.4x2.5")
    args, words = parser.parse_known_args(argv)
    runs = train.parse_runs(words)
    if os.environ.pop("RANK", "0") != "0":  # set by torchrun: one rank prints for all of them
        return
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    machine = train.Machine.start(runs[0].train.device)
    tell([runs], args.gpus, machine, args.gpus.ranks if args.gpus else ranks, at_once=1)


if __name__ == "__main__":
    end_with_the_pipe()
    main()
