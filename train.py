"""Train one model, or a sweep of them; one loop from a laptop to a cluster.

    python train.py                                             # the laptop preset
    python train.py --width 32,64,96 --tokens 1M,2M,4M --fusion early,late --out runs/demo
    torchrun --standalone --nproc_per_node 8 train.py --preset 275m --data data/real --tokens 5B

Commas make a sweep over the product. Budgets (--tokens) of one model share one trunk at constant
learning rate and branch off for their cooldowns (Haegele et al. 2024; paper, section 4.1). What is
finished is skipped, what was interrupted goes on where it stopped, and several processes that are
started with the same command share the work.

Dimensions:  B rows in a micro-batch   T context
"""

import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (PRETRAINING, DataConfig, Loader, Parser, add_flags, parse_count, patchify,
                  usable_cores, vocab_size, write_whole)
from model import (PRESETS, Block, Model, ModelConfig, adopt, flex_error, generate,
                   read_weights, split_heads)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. 0 means: derived, by the rule in the comment."""

    out: str = "runs/demo"  # folder of the study: results.jsonl and one folder a run
    preset: str = "laptop"  # laptop, or a size of the paper's Table 6: 275m .. 8.13b, late 289m ..
    init: str = ""  # start from a run's folder ({seed} = its own), or a .pt of open_lm (5.12, 5.13)
    init_vision: str = ""  # late fusion: start from the encoder of this run (5.12)
    match: str = ""  # params, text, flops: the early width that equals late fusion of --width (5.9)
    equal_text: bool = False  # scale context and tokens so that any image size reads one text (5.8)
    tokens: str = "4M"  # D, training tokens; counts may end in K, M or B
    tokens_per_step: int = 1024  # tokens a step over all ranks; accumulation is derived
    micro_rows: int = 0  # rows at once on a device; 0 = what memory should allow
    lr: float = 0.0  # peak learning rate; 0 = by width: Table 6 of the paper, laptop 0.19 / width
    vision_lr: float = 1.0  # late fusion: the encoder's share of the rate, 0 = frozen (Table 8)
    warmup: int = 0  # steps; 0 = the paper's 1000 to 5000 by run length, 64 for laptop runs
    cooldown: float = 0.2  # final share of the steps, in which the rate falls to 0
    weight_decay: float = 1e-4  # per step at the peak rate (fully decoupled; paper, App. A)
    grad_clip: float = 1.0  # norm of the gradient; 0 = no clipping
    load_balancing_weight: float = 0.01  # of the load_balancing_loss of experts (section 4)
    seed: int = 0  # decides initial weights and data order
    eval_every: int = 0  # steps between validations; 0 = only at the end
    save_every: int = 500  # steps between checkpoints
    device: str = "auto"  # auto, cpu, cuda, mps
    compile: str = "auto"  # auto = on CUDA only; on, off
    jobs: int = 0  # sweep processes on this machine's CPU; 0 = one a core, each on one thread

    def __post_init__(self):
        for name, least in (("tokens_per_step", 1), ("micro_rows", 0), ("lr", 0), ("vision_lr", 0),
                            ("warmup", 0), ("weight_decay", 0), ("grad_clip", 0),
                            ("load_balancing_weight", 0), ("seed", 0), ("eval_every", 0),
                            ("save_every", 1), ("jobs", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} {getattr(self, name)} is below {least}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"--cooldown {self.cooldown} is not a share between 0 and 1")
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"--compile {self.compile}: need auto, on or off")
        if self.match not in ("", *MATCHES):
            raise ValueError(f"--match {self.match}: need one of {', '.join(MATCHES)}")

    def start(self, name):
        """The path in init or init_vision, its {seed} filled in: one command for several seeds."""
        return getattr(self, name).replace("{seed}", str(self.seed))


# Fields that say how or where a run is computed, not what it computes: no part of its identity.
HOW = ("out", "preset", "tokens", "micro_rows", "eval_every", "save_every", "device", "compile",
       "jobs", "workers", "checkpointing")
MATCHES = ("params", "text", "flops")
LAPTOP = dict(width=64, depth=4, context=256, image_size=32, patch_size=8)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep: three configs, every derived value filled in."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    steps: int
    branch: int  # first step of the cooldown: up to here, the run is its family's trunk
    name: str

    def identity(self):
        """What decides the numbers, tokens left out: cells that agree in it share a trunk."""
        fields = {**dataclasses.asdict(self.model), **dataclasses.asdict(self.data),
                  **dataclasses.asdict(self.train)}
        return {k: v for k, v in sorted(fields.items()) if k not in HOW}

    @property
    def family(self):
        return f"{zlib.crc32(json.dumps(self.identity()).encode()):08x}"

    @property
    def folder(self):
        return Path(self.train.out) / self.name


# ---------------------------------------------------------------------------------------------
# From the command line to a grid of cells
# ---------------------------------------------------------------------------------------------


def paper_warmup(steps, moe):
    """Section 4.1: 1000 steps for runs of up to 4000, 2500 up to 15000, else 5000; for MoE 2500
    up to 20000. Half of the run where that is longer than all of it: ours, for small budgets."""
    if moe:
        steps_of_warmup = 2500 if steps < 20000 else 5000
    else:
        steps_of_warmup = 1000 if steps <= 4000 else 2500 if steps <= 15000 else 5000
    return steps_of_warmup if steps_of_warmup <= steps else max(1, steps // 2)


def make_cell(given):
    """One cell from {field: value} of the flags that were given."""
    preset = given.get("preset", "laptop")
    if preset != "laptop" and preset not in PRESETS:
        raise SystemExit(f"--preset {preset}: need laptop or one of {', '.join(PRESETS)}")
    base = {"tokens_per_step": 2048 * 1024, **PRESETS.get(preset, {})}
    base = LAPTOP if preset == "laptop" else {k: v for k, v in base.items() if k != "lr"}
    values = {"tokens_per_step": TrainConfig.tokens_per_step, **base, **given}
    train = config_of(TrainConfig, values)
    path = train.start("init")
    known = sizes_of(path, given, preset) if path else {}
    values = {**values, **known, **given}
    values["vocab_size"] = max(base.get("vocab_size", 0), known.get("vocab_size", 0),
                               vocab_size(values.get("data", DataConfig.data)))
    if values.get("fusion") == "late":  # the same run whatever matches it
        given = {k: v for k, v in given.items() if k != "match"}
        values["match"] = ""
    try:
        steps = max(1, round(parse_count(train.tokens) / train.tokens_per_step))
    except ValueError:
        raise SystemExit(f"--tokens {train.tokens}: need a count as 500K, 2M or 1e6") from None
    if values.get("match"):
        values["width"] = matched_width(values)
    if train.equal_text:
        values.update(same_text(values, {**base, **known}))
    return cell_of(given, values, steps)


def cell_of(given, values, steps):
    """The cell of these fields, with what is left to derive."""
    model, data, train = (config_of(kind, values)
                          for kind in (ModelConfig, DataConfig, TrainConfig))
    rows_of(train.tokens_per_step, model.context)
    if train.init_vision and model.fusion != "late":
        raise SystemExit("--init-vision: only late fusion has an encoder; add --fusion late")
    warmup = 64 if train.preset == "laptop" else paper_warmup(steps, model.moe != "none")
    train = dataclasses.replace(train, lr=train.lr or default_lr(model, train.preset),
                                warmup=train.warmup or warmup)
    branch = steps - int(steps * train.cooldown)
    return Cell(model, data, train, steps, branch, run_name(model, train, given))


def rows_of(tokens_per_step, context):
    rows, rest = divmod(tokens_per_step, context)
    if rest:
        raise SystemExit(f"--tokens-per-step {tokens_per_step}: need whole rows, a multiple of "
                         f"--context {context}")
    return rows


def default_lr(model, preset):
    """Peak learning rate where none is given. Laptop: 0.19 / width, checked at five widths
    (results/README.md). With a preset, Table 6's; at a width between two of its (--width, --match)
    on the straight line between them in logarithms, beyond them that of the nearest: ours."""
    if preset == "laptop":
        return 0.19 / model.width
    rates = sorted((size["width"], size["lr"]) for size in PRESETS.values()
                   if size["fusion"] == model.fusion)
    if model.width in dict(rates):
        return dict(rates)[model.width]
    return float(np.exp(np.interp(np.log(model.width), *np.log(rates).T)))


@functools.cache
def known_sizes(path, heads):
    return read_weights(path, heads)[0]


def sizes_of(path, given, preset):
    """The model fields that the weights to start from decide. SystemExit where other flags say
    otherwise and no shape of a parameter would show it."""
    known = known_sizes(path, given.get("heads", 0))
    if "heads" in given and split_heads(known["width"], given["heads"]) != \
            split_heads(known["width"], known["heads"]):
        raise SystemExit(f"--heads {given['heads']}: {path} was trained with heads of "
                         f"{split_heads(known['width'], known['heads'])}; leave --heads out")
    sizes = PRESETS.get(preset, {}).items() if "fusion" in known else ()  # a run's own are whole
    for field, value in sizes:
        if field not in (*given, "lr") and known[field] != value:
            raise SystemExit(f"--preset {preset} has {field} {value}, {path} {known[field]}: give "
                             "the preset it was trained with, or none")
    return known


@functools.cache
def positions(data, context, image_size, patch_size):
    return Loader(data, 0, context, image_size, patch_size).positions()


def matched_width(values):
    """The width at which early fusion is nearest to late fusion of --width: in the parameters of
    decoder and encoder ("params"), in those of the decoder ("text"), or in training FLOPs (paper
    1.4: an encoder counts by the share of positions that are images)."""
    def count(fusion, width):
        fields = {**values, "fusion": fusion, "width": width}
        with torch.device("meta"):
            return Model(config_of(ModelConfig, fields)).num_params()

    shape = config_of(ModelConfig, values)
    if values["match"] == "text":
        return shape.width
    encoder = 1
    if values["match"] == "flops":
        text, image = positions(config_of(DataConfig, values), shape.context, shape.image_size,
                                shape.patch_size)
        encoder = image / (text + image)
    late, step = count("late", shape.width), 4 if shape.width < 512 else 16
    widths = [w for w in range(16, 4 * shape.width, step) if not w % (2 * (shape.heads or 1))]
    goal = late["N"] + encoder * late["N_vision"]
    above = bisect.bisect(widths, goal, key=lambda width: count("early", width)["N"])
    near = widths[max(0, above - 1):above + 1]
    return min(near, key=lambda width: abs(count("early", width)["N"] - goal))


def same_text(values, base):
    """Context and tokens a step at which a row holds as much text as it does with the base's
    patches (5.8: text tokens a sample are kept equal): images take more room, so rows grow."""
    data, wanted = config_of(DataConfig, values), {**base, **values}
    image_size, patch_size = wanted["image_size"], wanted["patch_size"]
    start = wanted["context"]
    goal, _ = positions(data, start, base["image_size"], base["patch_size"])
    context = start + (image_size // patch_size) ** 2
    for _ in range(4):  # text grows about as the row does: each round is nearer
        context = round(context * goal / positions(data, context, image_size, patch_size)[0])
    rows = rows_of(values["tokens_per_step"], start)
    return {"context": context, "tokens_per_step": rows * context}


def config_of(kind, values):
    names = [f.name for f in dataclasses.fields(kind)]
    try:
        return kind(**{name: values[name] for name in names if name in values})
    except ValueError as error:  # the configs check themselves; say it without a traceback
        raise SystemExit(f"train.py: {error}") from None


def run_name(model, train, given):
    """Readable, and different for every configuration: flags that have no place in it enter as a
    hash of their names and values."""
    moe = "" if model.moe == "none" else f"-{model.moe}"
    shown = ("fusion", "moe", "width", "depth", "tokens", "seed", "mixture")
    rest = {k: v for k, v in sorted(given.items()) if k not in shown + HOW}
    preset = "" if train.preset == "laptop" else f"-{train.preset}"
    mixture = f"-{given['mixture']}" if "mixture" in given else ""
    tail = f"-{zlib.crc32(json.dumps(rest).encode()):08x}" if rest else ""
    return (f"{model.fusion}{moe}{preset}-w{model.width}-d{model.depth}-{train.tokens}"
            f"-s{train.seed}{mixture}{tail}")


def parse_grid(argv):
    """The product of all comma lists on the command line, as cells."""
    parser = Parser(description=__doc__, prog="train.py")
    for kind in (TrainConfig, ModelConfig, DataConfig):
        add_flags(parser, kind, skip=("vocab_size",))
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    products = itertools.product(*given.values())
    cells = [make_cell(dict(zip(given, product))) for product in products]
    return list({cell.name: cell for cell in cells}.values())  # a value given twice is one run


# ---------------------------------------------------------------------------------------------
# Sharing the machine: ranks, devices, files
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where this process runs. rank and world are torchrun's, 0 and 1 without it."""

    device: torch.device
    rank: int
    world: int

    @staticmethod
    def start(name):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if name == "auto":
            mps = torch.backends.mps.is_available()
            name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise SystemExit(f"--device {name}: need auto, cpu, cuda or mps")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise SystemExit("--device cuda: torch sees no CUDA GPU here; try --device cpu")
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(name)
            torch.set_float32_matmul_precision("high")
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        return Machine(torch.device(name), rank, world)

    @property
    def is_cuda(self):
        return self.device.type == "cuda"

    def autocast(self):
        """bf16 on CUDA; fp32 elsewhere (bf16 is emulated, and 7 times slower, on most CPUs)."""
        if self.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def sum(self, tensor):
        """Sum over ranks."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def share(self, value):
        """Rank 0's value on every rank."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def peak_mem_mb(self):
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


@contextlib.contextmanager
def locked(path, wait):
    """Yields True while this process holds the lock file, False if another one does. The kernel
    drops the lock of a killed process, so nothing is left to clean up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows, where main() starts no second process
            yield True
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free


def finished(out):
    """{run name: its line in OUT/results.jsonl}."""
    path = Path(out) / "results.jsonl"
    if not path.exists():
        return {}
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # half a line: being written, or of a full disk
            row = json.loads(line)
            rows[row["run"]] = row
    return rows


def append_result(out, row):
    """One more line in OUT/results.jsonl, from any number of processes."""
    path = Path(out) / "results.jsonl"
    with locked(path.with_name(".results.lock"), wait=True), open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")  # half a line, of a full disk: end it
        file.write((b"\n" if cut else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------


class Run:
    """A cell being trained: model, optimizer, step and log, and how they are saved and restored."""

    def __init__(self, cell, machine):
        self.cell, self.machine, self.step = cell, machine, 0
        torch.manual_seed(cell.train.seed)  # the same weights on every rank and device
        self.model = Model(cell.model).to(machine.device)
        self.optimizer = make_optimizer(self.model, cell.train, machine)
        self.loader = Loader(cell.data, cell.train.seed, cell.model.context,
                             cell.model.image_size, cell.model.patch_size)
        self.lines, self.pending = [], []  # of log.jsonl: not yet written, not yet read
        self.stopped = False  # somebody asked this run to stop
        self.last_loss, self.flushed = float("nan"), 0.0
        self.clock = None  # when the last step ended; None before a step that is not timed
        self.said = time.perf_counter()  # when something was last printed
        self.stats = {"padding": 0, "D_vision": 0, "timed": 0, "spent": 0.0}
        if machine.is_cuda:
            torch.cuda.reset_peak_memory_stats(machine.device)

    def config(self):
        cell = self.cell
        return {"model": dataclasses.asdict(cell.model), "train": dataclasses.asdict(cell.train),
                "data": {**dataclasses.asdict(cell.data), "tokenizer": self.loader.tokenizer}}

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "step": self.step, "stats": dict(self.stats),
                "identity": self.cell.identity(), "config": self.config()}

    def describe(self, rows, accumulation):
        """The derived numbers, said aloud."""
        cell, n = self.cell, self.model.num_params()
        D = cell.steps * cell.train.tokens_per_step
        self.machine.say(
            f"{cell.name}: N {n['N']:,} ({n['N_total']:,} in all, {n['N_vision']:,} vision), "
            f"D {D:,} = {cell.steps} steps of {cell.train.tokens_per_step:,} tokens "
            f"({rows} rows x {accumulation} micro-steps x {self.machine.world} ranks), "
            f"lr {cell.train.lr:.2g}, warmup {cell.train.warmup}, cooldown from {cell.branch}, "
            f"{device_name(self.machine)}, {'' if compiles(cell.train, self.machine) else 'not '}"
            "compiled" + (f", from step {self.step}" if self.step else ""))
        asked = parse_count(cell.train.tokens)
        if abs(D - asked) > 0.05 * asked and not cell.train.equal_text:
            self.machine.say(f"note: --tokens {cell.train.tokens} was rounded to whole steps; "
                             "--tokens-per-step makes them smaller")
        if self.machine.rank == 0:
            text = json.dumps(self.config(), indent=1)
            path = self.cell.folder / "config.json"
            write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def record(self, lag=0):
        """Reads the numbers of the steps since the last call, but for the newest `lag` (to read
        a number makes a GPU wait for it), and turns them into log lines. These hold nothing that
        depends on the machine's speed: a resumed run's log is the same, bit for bit. Returns ok,
        stopped (somebody asked a rank to) or diverged."""
        if time.perf_counter() - self.flushed > 1:  # so that one can watch the log grow
            self.flush()
        first = self.step - len(self.pending)
        status, ready = "ok", self.pending[:len(self.pending) - lag]
        for i, (lr, totals, norm) in enumerate(ready):
            loss, balance, count, padding, vision, stop = totals.tolist()
            line = {"step": first + i, "loss": loss / max(count, 1), "lr": lr,
                    "grad_norm": norm.item()}
            if self.cell.model.moe == "learned":
                line["load_balancing_loss"] = balance / max(count, 1)
            self.stats["padding"] += int(padding)
            self.stats["D_vision"] += int(vision)
            self.last_loss = line["loss"]
            if not math.isfinite(loss + line["grad_norm"]):
                return "diverged"
            self.lines.append(line)
            status = "stopped" if stop else status
        self.pending = self.pending[len(ready):]
        return status

    def tick(self):
        """Times a step; not the first after a start (torch compiles and allocates), a validation
        or a checkpoint."""
        now = time.perf_counter()
        if self.clock is not None:
            self.stats["timed"] += 1
            self.stats["spent"] += now - self.clock
        self.clock = now
        if not sys.stderr.isatty() and now - self.said > 30:  # where no progress bar is drawn
            self.said = now
            self.machine.say(f"{self.cell.name}: step {self.step} of {self.cell.steps}, "
                             f"loss {self.last_loss:.3f}")

    def save(self, name):
        """The log first: a checkpoint never knows of a step that the log does not."""
        self.flush(to_disk=True)
        if self.machine.rank == 0:
            write_whole(self.cell.folder / name, lambda path: torch.save(self.state(), path))
        self.clock = None

    def flush(self, to_disk=False):
        """Appends to log.jsonl; only a checkpoint has to wait for the disk."""
        if self.machine.rank == 0 and self.lines:
            with open(self.cell.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.lines)
        if self.machine.rank == 0 and to_disk:
            with open(self.cell.folder / "log.jsonl", "rb+") as file:
                os.fsync(file.fileno())
        self.lines, self.flushed = [], time.perf_counter()

    def restore(self, folder, name):
        """Takes over the state and the log of folder/name; the log may belong to another run of
        this family, whose first steps are this run's too."""
        try:
            state = torch.load(folder / name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
            raise SystemExit(f"{folder / name} is no checkpoint of this program "
                             f"({str(error).splitlines()[0][:80]}); delete it to train this run "
                             "from the start") from None
        if state["identity"] != self.cell.identity():
            changed = [k for k, v in self.cell.identity().items() if state["identity"].get(k) != v]
            raise SystemExit(f"{folder / name} was trained with another {', '.join(changed)}; "
                             "choose another --out, or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.stats = state["step"], state["stats"]
        if self.machine.rank == 0:
            with open(folder / "log.jsonl", encoding="utf-8") as file:
                kept = [line for line in file
                        if line.endswith("\n") and json.loads(line)["step"] < self.step]
            write_whole(self.cell.folder / "log.jsonl",
                        lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))

    def begin(self, cells):
        """From the run's own checkpoint, else from the longest trunk of its family, else fresh."""
        self.cell.folder.mkdir(parents=True, exist_ok=True)
        if (self.cell.folder / "ckpt.pt").exists():
            return self.restore(self.cell.folder, "ckpt.pt")
        trunks = [c for c in cells if c.branch <= self.cell.branch
                  and (c.folder / "trunk.pt").exists()]
        if trunks:
            return self.restore(max(trunks, key=lambda c: c.branch).folder, "trunk.pt")
        self.start_from()
        if self.machine.rank == 0:  # a log without a checkpoint: killed before the first one
            (self.cell.folder / "log.jsonl").write_text("", encoding="utf-8")

    def start_from(self):
        """Takes over the weights that --init and --init-vision name. The vision part comes with the
        decoder only where both are of one fusion."""
        cfg = self.cell.train
        paths = {"decoder": cfg.start("init"),
                 "vision": cfg.start("init_vision") or cfg.start("init")}
        read = {path: read_weights(path, self.cell.model.heads)  # a path in both places, once
                for path in {*paths.values()} - {""}}
        for part, path in paths.items():
            if not path:
                continue
            known, weights = read[path]
            if part == "decoder" or known.get("fusion") == self.cell.model.fusion:
                adopt(self.model, weights, part, path)
                what = "patch projection" if part == "vision" and not cfg.init_vision and \
                    self.cell.model.fusion == "early" else part
                self.machine.say(f"{self.cell.name}: {what} from {path}")
            elif cfg.init_vision:
                raise SystemExit(f"--init-vision {path}: not a run of late fusion")


def make_optimizer(model, cfg, machine):
    """AdamW, decay on matrices and embeddings only. "Fully decoupled" (section 4.2): weights
    shrink by weight_decay a step at the peak rate, whatever that rate is; torch multiplies its own
    weight_decay by lr, so it is divided out."""
    def group(vision, decay):
        params = [p for name, p in model.named_parameters()
                  if (late and name.startswith("vision.") and "connector" not in name) == vision
                  and (p.ndim >= 2 and "positions" not in name) == decay]
        peak = cfg.lr * (cfg.vision_lr if vision else 1.0)
        return {"params": params, "peak": peak,
                "weight_decay": cfg.weight_decay / peak if decay and peak else 0.0}

    late = model.cfg.fusion == "late"  # early fusion's patch projection is no encoder
    groups = [group(vision, decay) for vision in (False, True) for decay in (True, False)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, 0.95),
                             eps=1e-8, fused=machine.device.type in ("cpu", "cuda"))


def rate_at(step, cell):
    """The learning rate as a share of its peak: linear warmup, constant, then 1 - sqrt(t) over the
    last `cooldown` of the run. The paper says "inverse square root" to 0; a power law cannot
    reach 0, so we take Haegele et al.'s form, the one it builds on."""
    rate = min(1.0, (step + 1) / cell.train.warmup)
    if step >= cell.branch:
        rate *= 1 - math.sqrt((step - cell.branch) / (cell.steps - cell.branch))
    return rate


def micro_rows(cell, machine):
    """Rows of a micro-batch: the most that divide the rank's share of a step and fit in memory by
    a rough rule, about 40 bytes of activations for each token, layer and unit of width."""
    rows, context = cell.train.tokens_per_step // cell.model.context, cell.model.context
    if rows % machine.world:
        raise SystemExit(f"{rows} rows a step cannot be shared by {machine.world} ranks: make "
                         f"--tokens-per-step a multiple of {machine.world * context}")
    share = rows // machine.world
    layers = 2 if cell.model.checkpointing else cell.model.depth
    # a CPU's cache likes it small, and 2 GB of fp32 activations are enough
    limit = int(min(8192, 2e9 / (160 * cell.model.width * layers))) // context
    if machine.is_cuda:
        memory = torch.cuda.get_device_properties(machine.device).total_memory
        limit = int(0.4 * memory / (40 * cell.model.width * layers * context))
    wanted = cell.train.micro_rows or max(1, limit)
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, wanted))


@torch.no_grad()
def evaluate(run):
    """{loss_caption, ..., loss, floor_caption, ...}: text cross-entropy in nats a token over the
    fixed validation rows of each kind, and the mean over kinds (section 1.1). Each rank reads its
    share; the model is the bare one, so that ranks may differ in their number of batches."""
    machine, cell, result = run.machine, run.cell, {}
    run.model.eval()
    for kind in run.loader.val_kinds():
        total = torch.zeros(5, dtype=torch.float64)  # loss, floor, targets, right, answers
        for batch in run.loader.val_batches(kind, micro_rows(cell, machine), machine.rank,
                                            machine.world):
            with machine.autocast():
                inputs = to_device(batch, machine)
                loss = run.model(inputs).token_loss.cpu().double().sum()
                right = (0, 0) if kind in PRETRAINING else right_answers(run.model, inputs)
            total += torch.tensor([loss, batch["nll"].double().sum(), len(batch["nll"]), *right])
        loss, floor, count, right, answers = machine.sum(total).tolist()
        result[f"loss_{kind}"] = loss / max(count, 1)
        if answers:
            result[f"accuracy_{kind}"] = right / answers
        if run.loader.knows_floor:
            result[f"floor_{kind}"] = floor / count
    run.model.train()
    for name in ("loss", "floor", "accuracy"):
        values = [v for k, v in result.items() if k.startswith(name + "_")]
        if values:
            result[name] = sum(values) / len(values)
    return result


def right_answers(model, batch):
    """(answers that are right in every token, answers), an answer being a run of targets. Each
    token is judged after the true ones before it: greedy decoding would get the same answers
    exactly right, at a hundred times the cost."""
    at = batch["target_index"]
    if not len(at):  # rows without an answer: questions longer than they are
        return 0, 0
    x, _ = model.decode(batch)                                                   # (B,T,W)
    said = model.head(x.flatten(0, 1)[at]).argmax(-1)                            # (K,)
    wrong = (said != batch["targets"].flatten()[at]).long()                      # (K,)
    begins = torch.ones_like(at)
    begins[1:] = (at[1:] != at[:-1] + 1) | (at[1:] % batch["targets"].shape[1] == 0)
    number = begins.cumsum(0) - 1                                                # (K,) its answer's
    mistakes = torch.zeros(int(number[-1]) + 1, dtype=torch.long, device=at.device)
    mistakes.index_add_(0, number, wrong)                                        # (answers,)
    return int((mistakes == 0).sum()), len(mistakes)


def to_device(batch, machine):
    return {k: v.to(machine.device, non_blocking=machine.is_cuda) for k, v in batch.items()}


def train(run, cells):
    """Trains to the last step; returns ok, diverged or stopped. The order is nanoGPT's."""
    cell, machine, cfg = run.cell, run.machine, run.cell.train
    rows_per_step, rows = cfg.tokens_per_step // cell.model.context, micro_rows(cell, machine)
    accumulation = rows_per_step // rows // machine.world
    run.describe(rows, accumulation)
    compile_blocks(run)
    forward = run.model
    if machine.world > 1:  # the only buffer, the rope table, is the same everywhere: not sent
        forward = DistributedDataParallel(run.model, broadcast_buffers=False)
    batches = run.loader.train_batches(run.step, cell.steps, rows_per_step, rows, machine.rank,
                                       machine.world, machine.is_cuda)
    bar = tqdm(total=cell.steps, initial=run.step, desc=cell.name, unit="step", leave=False,
               disable=machine.rank > 0 or not sys.stderr.isatty())
    grows = any(c.branch > cell.branch for c in cells)  # a longer run will leave from this trunk
    with StopSignal() as stop, bar:
        while run.step < cell.steps:
            # learning rate
            for group in run.optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(run.step, cell)

            # micro-steps: gradients add up, and go between ranks with the last one only
            totals = torch.zeros(6, device=machine.device)
            for i in range(accumulation):
                if stop.asked and machine.world == 1:  # this step is done again after a restart
                    run.record()
                    run.save("ckpt.pt")
                    return "stopped"
                alone = machine.world == 1 or i == accumulation - 1
                with contextlib.nullcontext() if alone else forward.no_sync():
                    totals += micro_step(run, forward, to_device(next(batches), machine))
            totals[5] = stop.asked
            totals = machine.sum(totals)

            # clip and step: one division, by the targets of all micro-batches and ranks (DDP has
            # averaged over ranks, hence their number)
            grads = [p.grad for p in run.model.parameters()]
            torch._foreach_mul_(grads, machine.world / totals[2].clamp(min=1))
            norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(),
                                                  cfg.grad_clip or math.inf)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            # log
            run.pending.append((run.optimizer.param_groups[0]["lr"], totals, norm))
            run.step += 1
            at_branch, at_end = run.step == cell.branch and grows, run.step == cell.steps
            evaluating = cfg.eval_every and run.step % cfg.eval_every == 0
            saving = run.step % cfg.save_every == 0 or at_branch or at_end
            status = run.record(lag=1 if machine.is_cuda and not (saving or evaluating) else 0)
            run.tick()
            bar.update()
            bar.set_postfix_str(f"loss {run.last_loss:.3f}", refresh=False)
            if status == "diverged":
                return status
            run.stopped |= status == "stopped"

            # evaluation and checkpoint
            if evaluating:
                run.lines[-1].update({f"val_{k}": v for k, v in evaluate(run).items()})
                run.clock = None
            if at_branch:
                run.save("trunk.pt")
            if run.stopped and not saving:
                saving = run.record() != "diverged"
            if saving:
                run.save("ckpt.pt")
            if run.stopped and not at_end:
                return "stopped"
    return "ok"


def micro_step(run, forward, batch):
    """Adds the gradient of the *sum* of a micro-batch's token losses to .grad: a mean over
    micro-batches of unequal numbers of targets would weigh their tokens unequally. Returns (6,):
    sums of loss and load_balancing_loss, targets, padding, image positions, 0 (room for a flag)."""
    with run.machine.autocast():
        out = forward(batch)
    balance = out.aux.get("load_balancing_loss", torch.zeros_like(out.loss)) * out.count
    (out.loss + run.cell.train.load_balancing_weight * balance).backward()
    padding, image = (batch["doc"] == 0).sum(), (batch["patch_index"] >= 0).sum()
    zero = torch.zeros_like(out.loss)
    return torch.stack([out.loss.detach(), balance.detach(), zero + out.count, zero + padding,
                        zero + image, zero]).detach()


def compiles(cfg, machine):
    """auto: on CUDA. On a CPU it gains 4 % of a step for 45 s of start-up (results/speed.md)."""
    return cfg.compile == "on" or cfg.compile == "auto" and machine.is_cuda


def compile_blocks(run):
    """Compiles each block, not the model: seconds of start-up instead of minutes, and the head's
    changing number of targets recompiles nothing. With it comes FlexAttention, where it works."""
    model, machine = run.model, run.machine
    if not compiles(run.cell.train, machine):
        return
    torch.compiler.reset()  # else a sweep's later models find the cache full and run uncompiled
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
    if machine.is_cuda:
        with machine.autocast():
            why = flex_error(model.blocks[0], model.rope, micro_rows(run.cell, machine))
        model.flex = why is None
        machine.say("attention: " + (f"dense mask (FlexAttention: {why})" if why else
                                     "FlexAttention, images and documents by block mask"))


class StopSignal:
    """Turns Ctrl-C and SIGTERM (a rented machine being taken back) into a flag that the loop
    looks at after each step, so that it can save first. A second Ctrl-C stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step ...", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def result_row(run, status, losses):
    """The line of results.jsonl."""
    cell, n = run.cell, run.model.num_params()
    model, cfg = cell.model, cell.train
    D, stats = run.step * cfg.tokens_per_step, run.stats
    D_vision, speed = stats["D_vision"], stats["timed"] * cfg.tokens_per_step
    experts = {"none": 1, "modality": 2, "learned": model.experts}[model.moe]
    return {
        "run": cell.name, "fusion": model.fusion, "moe": model.moe, "n_experts": experts,
        "top_k": model.top_k if model.moe == "learned" else 1, "granularity": model.granularity,
        "width": model.width, "depth": model.depth,
        "vision_width": model.encoder_width if n["N_vision"] else 0, **n,
        "D": D, "D_vision": D_vision, "padding": stats["padding"] / max(D, 1),
        "C": run.model.flops(D, D_vision), **losses, "mixture": cell.data.mixture,
        "data": cell.data.data, "image_size": model.image_size, "patch_size": model.patch_size,
        "context": model.context, "tokens_per_step": cfg.tokens_per_step, "steps": cell.steps,
        "lr": cfg.lr, "vision_lr": cfg.vision_lr, "warmup": cfg.warmup, "seed": cfg.seed,
        "init": cfg.init, "init_vision": cfg.init_vision, "match": cfg.match,
        "tok_per_s": round(speed / max(stats["spent"], 1e-9), 1),
        "wall_s": round(stats["spent"], 2),
        "peak_mem_mb": round(run.machine.peak_mem_mb(), 1), "device": device_name(run.machine),
        "world_size": run.machine.world, "torch": torch.__version__, "git": git_commit(),
        "status": status,
    }


def device_name(machine):
    if machine.is_cuda:
        return torch.cuda.get_device_name(machine.device)
    return f"{machine.device.type} x{torch.get_num_threads()} threads"


def git_commit():
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


# ---------------------------------------------------------------------------------------------
# A grid of runs
# ---------------------------------------------------------------------------------------------


def run_cell(cell, cells, machine):
    """Trains one cell and appends its line to results.jsonl; False if it was asked to stop."""
    run = Run(cell, machine)
    run.begin(cells)
    try:
        status = train(run, cells)
    except torch.OutOfMemoryError:
        raise SystemExit(f"{cell.name}: out of memory; try a smaller --micro-rows, which "
                         "accumulates more, or --checkpointing") from None
    run.flush()
    if status == "stopped":
        machine.say(f"{cell.name}: saved at step {run.step} of {cell.steps}; the same command "
                    "goes on from here")
        return False
    losses = evaluate(run) if status == "ok" else {"loss": None}
    if status == "ok" and not math.isfinite(losses["loss"]):
        status, losses = "diverged", {"loss": None}
    row = result_row(run, status, losses)
    if machine.rank == 0:
        append_result(cell.train.out, row)
    machine.say(summary(row))
    if status == "ok" and len(cells) == 1:
        show_sample(run)
    return not run.stopped


def summary(row):
    """One line for a person."""
    if row["status"] != "ok":
        return f"{row['run']}: {row['status']} (the loss was no longer a number)"
    def pair(kind):
        floor, right = row.get(f"floor{kind}"), row.get(f"accuracy{kind}")
        beside = f"{100 * right:.0f} % right" if right is not None else \
            f"floor {floor:.3f}" if floor is not None else ""
        return f"{row[f'loss{kind}']:.3f}" + (f" ({beside})" if beside else "")
    kinds = " | ".join(f"{key[5:]} {pair(key[4:])}" for key in row if key.startswith("loss_"))
    return (f"{row['run']}: N {row['N']:,} D {row['D']:,} | loss {pair('')} | {kinds} | "
            f"{row['tok_per_s']:,.0f} tokens/s")


def run_grid(cells, machine):
    """Family by family, the longest first, or one process would end up alone with it; budgets
    ascending, since each leaves from the trunk of the one before."""
    def cost(cell):
        return cell.steps * cell.train.tokens_per_step * cell.model.width**2 * cell.model.depth

    for name in dict.fromkeys(c.family for c in sorted(cells, key=cost, reverse=True)):
        family = sorted((c for c in cells if c.family == name), key=lambda c: c.steps)
        out = Path(family[0].train.out)
        lock = locked(out / ".claims" / name, wait=False) if machine.rank == 0 else \
            contextlib.nullcontext(True)
        with lock as mine:
            if not machine.share(mine):
                machine.say(f"{family[0].name} and its longer runs: another process is on them")
                continue
            if not run_family(family, machine):
                return False
    return True


def run_family(family, machine):
    """What is not finished of a family; False if it was asked to stop."""
    for cell in family:
        row = machine.share(finished(cell.train.out).get(cell.name))
        if row:
            machine.say(f"finished before: {summary(row)}")
        elif not run_cell(cell, family, machine):
            return False
    return True


def run_jobs(cells, argv, jobs):
    """A CPU sweep: single-thread copies of this very command, which share the grid through its
    locks (two threads on one small model are slower than two models on a thread each)."""
    out = Path(cells[0].train.out)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, os.path.abspath(__file__), *argv, "--jobs", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [open(out / f"worker-{i}.log", "w", encoding="utf-8") for i in range(jobs)]
    workers = [subprocess.Popen(command, env=env, stdout=log, stderr=log) for log in logs]
    bar = tqdm(total=sum(cell.steps for cell in cells), unit="step", desc=f"{jobs} processes",
               disable=not sys.stderr.isatty())
    seen = set(finished(out))
    with StopSignal() as stop, bar:
        while any(worker.poll() is None for worker in workers):
            time.sleep(1)
            if stop.asked:
                for worker in workers:
                    worker.terminate()
            rows = finished(out)
            for name in rows.keys() - seen:
                tqdm.write(summary(rows[name]), file=sys.stdout)
            seen |= rows.keys()
            bar.update(sum(steps_done(cell) for cell in cells) - bar.n)
    for worker, log in zip(workers, logs):
        log.close()
        if worker.returncode and not stop.asked:
            last = Path(log.name).read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise SystemExit(f"{''.join(last)}\n({log.name} has all of it)")
    if stop.asked:
        raise SystemExit("stopped; the same command goes on from here")


def steps_done(cell):
    """Steps in a run's log so far."""
    path = cell.folder / "log.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode("utf-8", "replace").splitlines()[:-1]  # the last may be half
    return json.loads(lines[-1])["step"] + 2 if len(lines) > 1 else 0


def show_sample(run):
    """A held-out picture, what the data says of it, and what the model says."""
    loader, model = run.loader, run.model
    kind = loader.val_kinds()[0]  # captions, or the first kind of question
    rows = (loader.fill(kind, n, "val") for n in range(loader.val_rows(kind)))
    row = next((row for row in rows if row.patch[1] == 0), None)  # begins with a picture
    if row is None:
        return
    first = int((row.target >= 0).argmax()) + 1  # positions up to the first prediction
    image = torch.from_numpy(patchify(row.images[0], loader.patch_size))
    asked = row.tokens[:first][row.patch[:first] < 0].tolist()
    truth = itertools.takewhile(lambda token: token not in (loader.eot, -1), row.target[first - 1:])
    prompt = [asked[:1], image, asked[1:]]  # end-of-text, the picture, the question if there is one
    room = model.cfg.context - model.cfg.n_patches - len(asked)
    if room < 1:
        return
    with torch.compiler.set_stance("force_eager"):  # a growing prompt would compile at each token
        said = generate(model, prompt, min(64, room), stop=loader.eot,
                        n_vocab=loader.encoding.n_vocab)
    question = loader.encoding.decode(asked[1:])
    more = "--image cat.png --prompt $'" + repr(question)[1:] if question else '--prompt "the "'
    run.machine.say(f"a held-out picture: {question and question.strip() + ' '}"
                    f"{loader.encoding.decode(list(truth))!r}\n"
                    f"the model says:     {loader.encoding.decode(said)!r}\n"
                    f"ask it more:        python model.py {run.cell.folder} {more}")


def main(argv):
    cells = parse_grid(argv)
    cfg = cells[0].train
    families = len({cell.family for cell in cells})
    on_cpu = cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available()
                                     and not torch.backends.mps.is_available())
    alone = not on_cpu or "RANK" in os.environ or os.name == "nt"  # no locks on Windows
    jobs = 1 if alone else min(cfg.jobs or usable_cores(), families)
    if jobs > 1:
        run_jobs(cells, argv, jobs)
    else:
        machine = Machine.start(cfg.device)
        done = run_grid(cells, machine)
        if machine.world > 1:
            dist.destroy_process_group()
        if not done:
            raise SystemExit(130)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoint") from None
