"""Train one model, for one or several token budgets; one loop from a laptop to a cluster.

    python train.py                                             the laptop preset, two minutes
    python train.py --fusion late --width 32 --tokens 1M,2M,4M --out runs/demo
    torchrun --standalone --nproc_per_node 8 train.py --preset 275m --data data/real --tokens 5B
    python train.py --dry-run --gpus 8xh100x0.4x2.5 --preset 932m --data data/real --tokens 5B

Budgets (--tokens) share one trunk at constant learning rate and branch off it for their cooldowns
(Haegele et al. 2024; paper, section 3). A finished run is skipped, an interrupted run goes on
where it stopped, and a longer budget starts from the trunk of a shorter one. --dry-run prints the
time and price of a run on --gpus NUMBERxCARDxMFUxDOLLARS. tools.sweep trains many runs.
"""
import argparse
import ast
import contextlib
import difflib
import errno
import functools
import gc
import inspect
import itertools
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import ChainMap
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DataConfig, Loader, check, patchify, read_meta, vocab_size
from model import (PRESETS, Block, Model, ModelConfig, adopt, flex_fits, generate,
                   read_checkpoint, split_heads, training_memory)

# Fields that say how or where a run is computed, which a checkpoint may differ in.
HOW = ("out", "data", "preset", "tokens", "micro_rows", "eval_every", "save_every", "device",
       "compile", "attention", "experts_by", "shard", "workers", "checkpointing")
IGNORED = (*HOW, "tokenizer")  # a tokenizer's path changes when its data move
SIZES = {name: {**size, "augment": True, "flip": True} for name, size in PRESETS.items()} | {
    "laptop": dict(tokens_per_step=512, vision_lr=1.0)}
# Published dense bf16 FLOP/s, and memory in bytes, for the MFU and for --dry-run.
CARDS = {"H100": (989e12, 80e9), "H200": (989e12, 141e9), "A100": (312e12, 80e9)}
source_of = functools.cache(inspect.getsource)  # 50 ms that each job of a sweep would pay


@dataclass(frozen=True)
class TrainConfig:
    """How to train. 0 means that the value is derived, as its line says."""

    out: str = "runs/demo"  # folder of the study: results.jsonl and one folder a run
    preset: str = "laptop"  # laptop, or a size of the paper: early 275m .. 8.13b, late 289m .. 3.7b
    init: str = ""  # start from the weights in this run folder; {seed} = the new run's (3.3, B.7)
    init_vision: str = ""  # late fusion: start from the encoder in this run folder (B.7)
    tokens: str = "3M"  # D, training tokens, as 500K or 2B; budgets such as 1M,2M share a trunk
    tokens_per_step: int = 2048 * 1024  # tokens in a step, summed over all ranks; laptop 512
    micro_rows: int = 0  # rows that a device computes at once; 0 = what its memory should allow
    lr: float = 0.0  # peak learning rate; 0 = by width W: Table 6; laptop .768/W^1.5, late .096/W
    vision_lr: float = 0.01  # late: the encoder's share of --lr (App. A); laptop 1; 0 = frozen
    warmup: int = 0  # steps; 0 = the paper's 1000 to 5000, from the shortest budget; laptop 64
    cooldown: float = 0.2  # final share of the steps, in which the rate falls to 0
    weight_decay: float = 1e-4  # per step at the peak rate (fully decoupled; paper, App. A)
    grad_clip: float = 1.0  # norm of the gradient; 0 = no clipping
    load_balancing_weight: float = 0.01  # of load_balancing_loss in the loss (section 4)
    seed: int = 0  # decides initial weights and data order
    eval_every: int = 0  # steps between validations; 0 = only at the end
    save_every: int = 500  # steps between checkpoints
    device: str = "auto"  # cpu, cuda or mps; auto = cuda where there is one, else cpu
    compile: Literal["auto", "on", "off"] = "auto"  # auto = on CUDA only
    attention: Literal["auto", "dense"] = "auto"  # auto = FlexAttention where blocks are compiled
    experts_by: Literal["auto", "loop"] = "auto"  # auto = one kernel where torch has a fast one
    shard: bool = False  # FSDP2: weights and optimizer divided over the ranks, for large models

    def __post_init__(self):
        check(self.preset in SIZES, f"--preset {self.preset}: need one of {', '.join(SIZES)}")
        check(self.cooldown <= 1, f"--cooldown {self.cooldown} is not a share between 0 and 1")

    def sources(self):
        """The runs that the decoder and the vision part start from, if any. {seed} stands for this
        run's own seed, so that one command starts several seeds."""
        paths = {"decoder": self.init, "vision": self.init_vision or self.init}
        return {part: path.replace("{seed}", str(self.seed))
                for part, path in paths.items() if path}


@dataclass(frozen=True)
class Run:
    """One model at one token budget: three configs with every derived value filled in."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    steps: int
    branch: int  # first step of the cooldown; before it, the run is the trunk of longer budgets
    name: str
    folder = property(lambda self: Path(self.train.out) / self.name)


# ---- From the command line to runs ------------------------------------------------------------

def parse_runs(argv):
    """The command line -> a Run for each token budget, the smallest first."""
    lists = [f"{flag} {value}".strip() for flag, value in zip(["", *argv], argv)
             if "," in value and "--tokens" not in (flag, value.partition("=")[0])]
    check(not lists, f"train.py: {' '.join(lists)}: a list of values needs python -m tools.sweep")
    parser = Parser(description=__doc__, prog="train.py", usage="train.py [--flag VALUE ...]")
    for config in (TrainConfig, ModelConfig, DataConfig):
        add_flags(parser, config)
    try:
        return make_runs(vars(parser.parse_args(argv)))
    except OSError as error:  # a folder that may not be read, a name that is too long
        raise SystemExit(f"train.py: {error.filename}: {error.strerror}; name another") from None


def make_runs(given):
    """{field: value} of the flags that were given -> Runs. A flag overrides the sizes of weights to
    start from, these override the preset, and all other fields are derived or defaults."""
    asked = config_of(TrainConfig, given)
    data = given.get("data", DataConfig.data)
    if data != DataConfig.data:  # the run's name depends on what the folder holds
        given = {**given, "contents": read_meta(data)["contents"]}
    # a preset's lr and encoder belong to its own width, so they are derived from the final width
    preset, known = SIZES[asked.preset], {**sizes_of_weights(asked, given), **given}
    own = {} if known.get("width") in (None, preset.get("width")) else {"vision_width": 0}
    values = {**preset, "lr": 0.0, **own, **known}
    check(values.get("fusion") == "late" or not asked.init_vision,
          "--init-vision: only late fusion has an encoder; add --fusion late")
    for path in {*asked.sources().values()}:  # the name depends on initial weights, too
        given = {**given, path: read_checkpoint(path, lambda saved: zlib.crc32(
            saved["model"]["blocks.0.attention.q.weight"].numpy()))}
    # a preset has the paper's vocabulary, which a tokenizer with more ids enlarges
    values["vocab_size"] = max(values.get("vocab_size", 0), vocab_size(data))
    runs = sorted((make_run({**values, "tokens": tokens}, given) for tokens in
                   dict.fromkeys(asked.tokens.split(","))), key=lambda run: run.steps)
    warmup = runs[0].train.warmup  # the same for all budgets, or they would share no trunk
    return [replace(run, train=replace(run.train, warmup=warmup)) for run in runs]


def make_run(values, given):
    """The Run of one budget, from all known values."""
    model, data, train = (config_of(kind, values)
                          for kind in (ModelConfig, DataConfig, TrainConfig))
    check(train.tokens_per_step % model.context == 0, f"--tokens-per-step "
          f"{train.tokens_per_step}: need whole rows, a multiple of --context {model.context}")
    check(model.moe == "learned" or not {"experts", "top_k"} & given.keys(),
          f"--experts and --top-k need --moe learned, not {model.moe}")
    try:
        steps = round(whole_number(train.tokens) / train.tokens_per_step)
    except ValueError:
        raise SystemExit(f"--tokens {train.tokens}: need a count as 500K, 2M or 1e6") from None
    check(steps >= 1, f"--tokens {train.tokens} is less than a step: give more, or less than "
          f"--tokens-per-step {train.tokens_per_step}")
    warmup = 64 if train.preset == "laptop" else paper_warmup(steps, model.moe != "none")
    train = replace(train, lr=train.lr or default_lr(model, train.preset),
                    warmup=train.warmup or warmup)
    branch = steps - int(steps * train.cooldown)
    return Run(model, data, train, steps, branch, run_name(model, train, given))


def config_of(kind, values):
    """-> a config of this kind, from the values that are its fields. SystemExit for a count below 1
    (if its default is 1 or more), for --workers below -1 and for any other number below 0."""
    own = {field: values[field.name] for field in fields(kind) if field.name in values}
    for field, value in own.items():
        least = min(field.default, 1) if isinstance(field.default, int) else 0
        check(isinstance(value, str) or value >= least,
              f"--{field.name.replace('_', '-')} {value} is below {least}")
    return kind(**{field.name: value for field, value in own.items()})


def sizes_of_weights(asked, given):
    """-> {model field: value}, as the weights to start from need them. SystemExit if other flags or
    the data contradict them where no shape of a parameter would show it."""
    path = asked.sources().get("decoder")
    if not path:
        return {}
    known, theirs = read_checkpoint(path, lambda saved: (
        saved["config"]["model"], saved["config"].get("data", {}).get("tokenizer_hash")))
    check("contents" not in given or theirs in (None, read_meta(given["data"])["tokenizer_hash"]),
          f"{path} reads ids of another tokenizer than {given.get('data')}: pack that anew")
    heads = split_heads(known["width"], known["heads"])
    check("heads" not in given or split_heads(known["width"], given["heads"]) == heads,
          f"--heads {given.get('heads')}: {path} has heads of {heads}; leave --heads out")
    preset = PRESETS.get(asked.preset, {}) if "fusion" in known else {}
    for field in [f for f in preset if f in known.keys() - {"vocab_size", *given}]:
        check(known[field] == preset[field],
              f"--preset {asked.preset} has {field} {preset[field]}, {path} {known[field]}: leave "
              "--preset out")
    return {field: known[field] for field in known if field not in HOW}


def default_lr(model, preset):
    """Peak learning rate where none is given. That of the laptop was tuned (results/README.md).
    With a preset it is Table 6's. For widths that are not in the table the rule is ours: between
    two sizes it is linear in the logarithms, and beyond the ends it is that of the nearest size."""
    if preset == "laptop":
        return 0.096 / model.width if model.fusion == "late" else 0.768 / model.width ** 1.5
    rates = sorted((size["width"], size["lr"]) for size in PRESETS.values()
                   if size["fusion"] == model.fusion)
    if model.width in dict(rates):
        return dict(rates)[model.width]
    return float(np.exp(np.interp(np.log(model.width), *np.log(rates).T)))


def paper_warmup(steps, moe):
    """App. A: 1000 steps for runs of up to 4000, 2500 up to 15000, else 5000; for MoE 2500 below
    20000, else 5000. If the run is shorter than its warmup, half of the run (a rule of ours)."""
    limits = ((19999, 2500),) if moe else ((4000, 1000), (15000, 2500))
    warmup = next((warmup for most, warmup in limits if steps <= most), 5000)
    return warmup if warmup <= steps else max(1, steps // 2)


def run_name(model, train, given):
    """-> a readable name, different for every configuration, because flags without a place of their
    own enter it as a hash. If other code has made the folder of that name, a hash of this code is
    appended, because otherwise edited code would be answered with the old numbers."""
    shown = ("fusion", "moe", "width", "depth", "tokens", "seed", "mixture")
    rest = {k: v for k, v in sorted(given.items()) if k not in shown + HOW}
    words = (model.fusion, model.moe.replace("none", ""), train.preset.replace("laptop", ""),
             f"w{model.width}", f"d{model.depth}", train.tokens, f"s{train.seed}",
             given.get("mixture"), f"{zlib.crc32(json.dumps(rest).encode()):08x}" if rest else "")
    name = "-".join(filter(None, words))
    with contextlib.suppress(OSError, ValueError, LookupError):  # no such folder yet
        made = json.loads((Path(train.out) / name / "config.json").read_text("utf-8"))["made"]
        return name if made["code"] == code_version() else f"{name}-{code_version()}"
    return name


@functools.cache
def code_version():
    """A hash of what train.py and the modules beside it do, without comments and docstrings."""
    loaded = {os.path.realpath(getattr(m, "__file__", None) or "") for m in [*sys.modules.values()]}
    trees = [ast.parse(path.read_text("utf-8"))
             for path in sorted(Path(__file__).resolve().parent.glob("*.py"))
             if str(path) in loaded and path.stem != "fit_laws"]
    for node in itertools.chain(*map(ast.walk, trees)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    same = re.sub(r"\w+=\[\](, )?", "", "".join(map(ast.dump, trees)))  # Python 3.13 omits these
    return f"{zlib.crc32(same.replace(', )', ')').encode()):08x}"


class Parser(argparse.ArgumentParser):
    """argparse, except that an unknown flag is answered with the nearest known one."""

    def __init__(self, **options):
        if hasattr(sys.stdout, "reconfigure"):  # "?" for a letter that a file on Windows lacks
            sys.stdout.reconfigure(errors="replace")
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)

    def error(self, message):
        _, _, unknown = message.partition("unrecognized arguments: ")
        near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1, 0.0)
        hint = f"; did you mean {near[0]}?" if unknown and near else ""
        raise SystemExit(f"{self.prog}: {message}{hint} (--help lists all flags)")


def add_flags(parser, config):
    """One flag for each field of a config; the comment behind the field is the help. A flag that is
    not given has no value at all, because otherwise its default would override the preset."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source_of(config), re.MULTILINE))
    how = {bool: {"action": argparse.BooleanOptionalAction}, int: {"type": whole_number}}
    group = parser.add_argument_group(config.__name__, config.__doc__)
    for field in fields(config):
        kind = type(field.default)
        if field.name != "vocab_size":  # it follows from the data
            check(field.name in comments, f"{field.name}: its help must follow, after two spaces")
            text = comments[field.name].replace("%", "%%") + f" (default: {field.default})"
            words = get_args(field.type) or None  # of a Literal
            group.add_argument(f"--{field.name.replace('_', '-')}", help=text,
                               default=argparse.SUPPRESS,
                               **how.get(kind, {"type": kind, "choices": words}))


def whole_number(text):
    """"2M" -> 2000000; K, M, B and plain numbers, 1e6 too. ValueError for anything else."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1)
    value = float(text[:-1] if scale > 1 else text) * scale
    # 16.5 heads are a mistake, but 4.1 * 1e6 is not quite whole; round() of 1e999 would raise
    if not abs(value) < 2**63 or abs(value - round(value)) > 1e-9 * abs(value):
        raise ValueError(text)
    return round(value)


# ---- The machine, and the files of a study ----------------------------------------------------

@dataclass(frozen=True)
class Machine:
    """Where this process runs. rank and ranks are torchrun's, 0 and 1 without it."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    name: str = ""
    memory: float = 0  # bytes of the GPU; 0 on a CPU, where the micro-batch does not depend on it
    peak: float = 0  # FLOP/s of which MFU is a share; 0 if the card is not in CARDS
    dtype: torch.dtype = torch.float32  # of activations; most CPUs emulate bf16, 7 times slower

    is_cuda = property(lambda self: self.device.type == "cuda")

    @staticmethod
    def start(name):
        """The device of this name, in the process group of torchrun if there is one."""
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
        usable = [kind for kind, backend in backends.items() if backend.is_available()]
        name = name if name != "auto" else "cuda" if "cuda" in usable else "cpu"
        check(name.split(":")[0] in usable,
              f"--device {name}: torch sees none here; need auto or {' or '.join(usable)}")
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name
        machine = Machine(torch.device(name), int(os.environ.get("RANK", "0")),
                          int(os.environ.get("WORLD_SIZE", "1")),
                          f"{name.split(':')[0]} x{torch.get_num_threads()} threads")
        if machine.is_cuda:
            torch.cuda.set_device(machine.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans 1 s for each new shape
            card = torch.cuda.get_device_properties(machine.device)
            peak = next((peak for known, (peak, _) in CARDS.items() if known in card.name), 0)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            machine = replace(machine, name=card.name, memory=card.total_memory, peak=peak,
                              dtype=torch.bfloat16 if bf16 else torch.float32)
        if "RANK" in os.environ:
            # two hours, because rank 0 alone reads and writes checkpoints, of up to 100 GB
            dist.init_process_group("nccl" if machine.is_cuda else "gloo",
                                    device_id=machine.device if machine.is_cuda else None,
                                    timeout=timedelta(hours=2))
        return machine

    def sum(self, tensor):
        """Sum over ranks."""
        if self.ranks > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def share(self, value):
        """Rank 0's value on every rank."""
        box = [value]
        if self.ranks > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def say(self, text):
        """Prints a line once, not once for each rank."""
        if self.rank == 0:
            print(text, flush=True)  # otherwise a pipe would hold it back


@contextlib.contextmanager
def only_process(folder, task):
    """Makes this folder and locks it against other processes until this one leaves or ends, even by
    a crash. SystemExit if another process holds the lock."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w", encoding="utf-8") as file:
        # Windows has no fcntl, and some disks of clusters have no locks
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"{folder}: another process {task} here; wait for it, or choose "
                                 "another --out") from None
        yield


def write_whole(path, write):
    """write(temporary path), then rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
    except RuntimeError as error:  # torch.save, where the disk is full
        reason = str(error).partition("\n")[0][:99]
        raise OSError(errno.EIO, f"not written (is the disk full? {reason})", str(path)) from error
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finished(out, tell=False):
    """{run name: its row of OUT/results.jsonl}. A line that is no row, such as the partial line
    that a full disk leaves, is skipped, and with `tell` its number is printed."""
    path, rows, broken = Path(out) / "results.jsonl", {}, []
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, *_ = row["run"], row["loss"], summary(row)
            rows[name] = row
        except Exception:  # what is no row can raise nearly anything
            broken.append(str(number))
    if broken and tell:
        print(f"note: {path} has no result in line {', '.join(broken[:9])}; the rest is used")
    return rows


def result_of(run, done):
    """The row of a finished run, or None. A row with this name is another run's if other code made
    it, or if other budgets on its command line gave it another warmup."""
    row, ours = done.get(run.name), {"warmup": run.train.warmup, "code": code_version()}
    return row if row and all(row.get(key, value) == value for key, value in ours.items()) else None


def append_result(out, row):
    """One more line in OUT/results.jsonl. It is written at once, so that the lines of several
    processes do not mix; a partial last line, which a full disk leaves, is ended first."""
    with open(Path(out) / "results.jsonl", "ab+", buffering=0) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        partial = file.read() not in (b"", b"\n")
        file.write(b"\n" * partial + json.dumps(row).encode() + b"\n")
        os.fsync(file.fileno())


# ---- A run in training ------------------------------------------------------------------------

class Trainer:
    """A run being trained: model, optimizer, step and log, and how they are saved and restored."""

    def __init__(self, run, machine):
        self.run, self.machine, self.step = run, machine, 0
        self.rows, self.accumulation = machine.share(divide_step(run, machine))  # rank 0 decides
        torch.manual_seed(run.train.seed)  # the same weights on every rank and device
        self.model = Model(run.model)
        self.adopt_weights()
        if run.model.fusion == "late" and not run.train.vision_lr:  # frozen, but for its connector
            self.model.vision.requires_grad_(False).connector.requires_grad_(True)
        if not run.train.shard:  # FSDP moves one block after the other
            self.model.to(machine.device)
        self.model.dtype = machine.dtype
        # auto: not on a CPU, where it takes 45 s to gain 1 to 4 % of a step (results/speed.md)
        self.compiled = {"on": True, "off": False, "auto": machine.is_cuda}[run.train.compile]
        if self.compiled:
            compile_blocks(self.model)
        self.model.flex = (self.compiled and run.train.attention == "auto"
                           and flex_fits(run.model, machine.dtype))
        for block in self.model.blocks:
            block.ffn.loop = run.train.experts_by == "loop"  # only MoE reads it
        self.forward = distribute(self.model, run.train.shard, machine)
        self.optimizer = make_optimizer(self.model, run.train, machine)  # not before sharding
        self.loader = Loader(run.data, run.train.seed, run.model)
        data = asdict(run.data) | self.loader.source.known_by
        self.config = {"model": asdict(run.model), "data": data, "train": asdict(run.train),
                       "made": {"code": code_version()}}
        self.stop = StopSignal()  # this process was asked to stop
        self.stopped = False  # any rank was asked to stop, and all ranks know it
        self.clock = None  # end of the last step; the first, which compiles, is not timed
        self.val = {}  # the last validation
        self.stats = dict.fromkeys("padding D_vision targets_per_token timed spent".split(), 0)
        if machine.is_cuda:
            torch.cuda.reset_peak_memory_stats(machine.device)

    def describe(self):
        """Says the derived numbers and writes config.json."""
        run, cfg, n = self.run, self.run.train, self.model.num_params()
        self.machine.say(
            f"{run.name}: N {n['N']:,} ({n['N_total']:,} in all, {n['N_vision']:,} vision), "
            f"D {run.steps * cfg.tokens_per_step:,} = {run.steps} steps of {self.rows} rows x "
            f"{self.accumulation} micro-steps x {self.machine.ranks} ranks, lr {cfg.lr:.2g}, "
            f"warmup {cfg.warmup}, cooldown from {run.branch}, {self.machine.name}"
            + ", compiled" * self.compiled + f", from step {self.step}" * (self.step > 0))
        for note in notes(run, self.machine.memory, self.loader):
            self.machine.say(f"note: {note}")
        if self.machine.rank == 0:
            (run.folder / "config.json").write_text(json.dumps(self.config, indent=1), "utf-8")

    def measure(self, totals, norm):
        """The step that has just ended as a line of log.jsonl (dict); None if the loss or the
        gradient is no longer a number. A line holds nothing that depends on the machine's speed, so
        that a resumed run's log is the same, bit for bit."""
        loss, balance, count, tokens, vision, stopped = totals.tolist()
        line = {"step": self.step - 1, "loss": loss / max(count, 1),
                "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
        if self.run.model.moe == "learned":
            line["load_balancing_loss"] = balance / max(tokens, 1)
        self.stopped = stopped > 0
        self.stats["targets_per_token"] = count / max(tokens, 1)
        self.stats["padding"] += self.run.train.tokens_per_step - int(tokens)
        self.stats["D_vision"] += int(vision)
        if self.clock:
            self.stats["timed"] += 1
            self.stats["spent"] += time.perf_counter() - self.clock
        return line if math.isfinite(loss + line["grad_norm"]) else None

    def log(self, line):
        """Writes the line of a step to log.jsonl, and its speed to speed.jsonl, because speed is
        different each time and a log must be reproducible. Returns what the bar shows (dict)."""
        speed = self.speed()
        if self.machine.rank == 0:
            for name, content in (("log", line), ("speed", {"step": line["step"], **speed})):
                with open(self.run.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(content) + "\n")
        self.clock = time.perf_counter()  # so that evaluations do not count as training
        shown = {**speed, **self.val}
        return {name: shown[name] for name in ("padding", "mfu", "val_loss") if name in shown}

    def speed(self):
        """The run's speed so far (dict). MFU counts the paper's FLOPs, 6 (N_v D_v + N D)."""
        stats, tokens = self.stats, self.run.train.tokens_per_step
        seen, rate = self.step * tokens, stats["timed"] * tokens / max(stats["spent"], 1e-9)
        found = {"wall_s": round(stats["spent"], 3), "tok_per_s": round(rate, 1),
                 "padding": round(stats["padding"] / seen, 4)}
        if self.machine.peak:
            flops = self.model.flops(seen, stats["D_vision"]) / seen * rate
            found["mfu"] = round(flops / self.machine.ranks / self.machine.peak, 4)
        return found

    def save(self, name):
        """Writes ckpt.pt, from which the run goes on, or trunk.pt, from which longer budgets start.
        The file is the same whether one process, DDP or FSDP writes it."""
        if not self.step:  # nothing is lost, and Adam has no moments yet
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=self.run.train.shard)
        weights, moments = get_state_dict(self.model, self.optimizer, options=options)
        state = {"model": weights, "optimizer": moments, "step": self.step, "stats": self.stats,
                 "config": self.config}
        if self.machine.rank == 0:
            state["log"] = (self.run.folder / "log.jsonl").read_text("utf-8", "replace")
            write_whole(self.run.folder / name, functools.partial(torch.save, state))
        if self.machine.ranks > 1:  # if another rank ended, torchrun would end rank 0 as it writes
            dist.barrier()
        self.clock = time.perf_counter()  # checkpoints do not count as training, either

    def restore(self, path):
        """Takes over the state and the log of a checkpoint, which may be another budget's, because
        the budgets share the trunk. Only rank 0 reads, because others need not have the file."""
        weights, moments = {}, {}
        if self.machine.rank == 0:
            weights, moments, self.step, self.stats, config, log = read_checkpoint(
                path, itemgetter("model", "optimizer", "step", "stats", "config", "log"))
            with zipfile.ZipFile(path) as file:  # torch.load would not notice a flipped bit
                damaged = file.testzip()
            check(not damaged, f"{path} is damaged, because the checksum of {damaged} differs: "
                  "delete it, and the same command goes on from what is left")
            changed = self.changed(config)
            check(not changed, f"{path} was trained with another {changed}; choose another --out, "
                  "or delete it")
            (self.run.folder / "log.jsonl").write_text(log, "utf-8")
        self.step, self.stats = self.machine.share((self.step, self.stats))
        options = StateDictOptions(full_state_dict=True,
                                   broadcast_from_rank0=self.machine.ranks > 1)
        set_model_state_dict(self.model, weights, options=options)
        weights.clear()  # by now a copy on the GPU, and the moments need the room
        set_optimizer_state_dict(self.model, self.optimizer, moments, options=options)

    def changed(self, config):
        """-> str, names of the fields that decide the numbers and differ in a checkpoint's config.
        If it is empty, the two runs share a trunk."""
        ours, theirs = ChainMap(*self.config.values()), ChainMap(*config.values())
        return ", ".join(k for k in ours if k not in IGNORED and ours[k] != theirs.get(k))

    def begin(self):
        """Starts from the run's own checkpoint, else from the longest trunk of another budget, else
        from fresh or given weights. Rank 0 decides, because others could see other files."""
        for kind in self.loader.val_kinds:  # a mistake must show before training, not after
            self.loader.source.val_row(kind, 0)
        own = self.run.folder / "ckpt.pt"
        found = self.trunks() if self.machine.rank == 0 and not own.exists() else {}
        path = self.machine.share(own if own.exists() else found.get(max(found, default=0)))
        if path:
            self.restore(path)
        elif self.machine.rank == 0:  # a log without a checkpoint: killed before the first one
            (self.run.folder / "log.jsonl").write_text("", encoding="utf-8")

    def trunks(self):
        """{step: trunk.pt} of the other budgets from which this run can go on."""
        found, code, out = {}, f"-{code_version()}", self.run.folder.parent
        name = self.run.name.removesuffix(code).replace(f"-{self.run.train.tokens}-", "-*-")
        for path in sorted([*out.glob(f"{name}/trunk.pt"), *out.glob(f"{name}{code}/trunk.pt")]):
            step, config, log = read_checkpoint(path, itemgetter("step", "config", "log"))
            changed = self.changed(config)
            if step <= self.run.branch and not changed:
                rate = self.optimizer.param_groups[0]["peak"] * rate_at(step - 1, self.run)
                changed = "schedule" * (json.loads(log.splitlines()[-1])["lr"] != rate)
                found |= {} if changed else {step: path}
            if changed:
                self.machine.say(f"note: {path} is of no use here, because of another {changed}")
        return found

    def adopt_weights(self):
        """Takes over the weights that --init and --init-vision name. The vision part comes with the
        decoder only if both use the same fusion."""
        for part, path in self.run.train.sources().items():
            known, weights, step = read_checkpoint(path, lambda saved: (
                saved["config"]["model"], saved["model"], saved.get("step", 0)))
            if part == "decoder" or known.get("fusion") == self.run.model.fusion:
                adopt(self.model, weights, part, path)
                self.machine.say(f"{self.run.name}: {part} from {path}, step {step}")
            else:
                check(not self.run.train.init_vision,
                      f"--init-vision {path}: not a run of late fusion")


def distribute(model, shard, machine):
    """-> the module to call in training. DDP holds the model on each rank. FSDP2 (shard) divides
    weights, gradients and moments for large models, and gathers each block when it runs.
    Inputs keep their dtype, because RoPE's angles in bf16 would not tell positions apart."""
    if shard:
        check(machine.ranks > 1, "--shard divides a model over several GPUs: start it by torchrun")
        torch._dynamo.config.specialize_int = True  # or late fusion's two head dims are variables
        policy = MixedPrecisionPolicy(machine.dtype, torch.float32, cast_forward_inputs=False)
        mesh = dist.init_device_mesh(machine.device.type, (machine.ranks,))
        for module in [m for m in model.modules() if isinstance(m, Block)] + [model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    elif machine.ranks > 1:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def make_optimizer(model, cfg, machine):
    """AdamW with decay on matrices and embeddings only, not on learned positions. The decay is
    fully decoupled (App. A): a step at the peak rate shrinks weights by the share weight_decay,
    whatever the peak is. torch's AdamW multiplies its own by lr, so we divide ours by the peak."""
    def group(vision, decay):
        params = [p for name, p in model.named_parameters()
                  if (late and name.startswith("vision.") and "connector" not in name) == vision
                  and (p.ndim >= 2 and "positions" not in name) == decay and p.requires_grad]
        peak = cfg.lr * (cfg.vision_lr if vision else 1.0)
        return {"params": params, "peak": peak,
                "weight_decay": cfg.weight_decay / peak if decay and peak else 0.0}

    late = model.cfg.fusion == "late"  # early fusion's patch projection is no encoder
    groups = [group(vision, decay) for vision in (False, True) for decay in (True, False)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, 0.95),
                             eps=1e-8, fused=machine.device.type in ("cpu", "cuda"))


def rate_at(step, run):
    """The learning rate as a share of its peak: linear warmup, constant, then 1 - sqrt(t) over the
    last `cooldown` of the run. The paper says "inverse square root" to 0, but a power law cannot
    reach 0, so we take the form of Haegele et al., on whose schedule it builds."""
    rate = min(1.0, (step + 1) / run.train.warmup)
    if step >= run.branch:
        rate *= 1 - math.sqrt((step - run.branch) / (run.steps - run.branch))
    return rate


def divide_step(run, machine):
    """-> (rows of a micro-batch, micro-steps). It takes the most rows that divide the rank's share
    of a step and fit in memory. SystemExit if none does."""
    rows, context = run.train.tokens_per_step // run.model.context, run.model.context
    check(rows % machine.ranks == 0, f"{rows} rows a step cannot be shared by {machine.ranks} "
          f"ranks: make --tokens-per-step a multiple of {machine.ranks * context}")
    share = rows // machine.ranks
    if run.train.micro_rows:
        limit = run.train.micro_rows
    elif machine.memory:
        limit = rows_that_fit(run.model, machine, run.train.shard)
        check(limit >= 1, f"{run.name} does not fit in {machine.memory / 1e9:.0f} GB: "
              + what_would_fit(run, machine))
    else:  # small batches stay in a CPU's cache, and 2 GB of activations are enough
        layers = 2 if run.model.checkpointing else run.model.depth
        limit = int(min(8192, 2e9 / (160 * run.model.width * layers))) // context
    micro_rows = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, limit))
    return micro_rows, share // micro_rows


def rows_that_fit(model, machine, shard):
    """Rows of a micro-batch in 0.92 of the GPU's memory; the rest is the allocator's and CUDA's."""
    fixed, row = training_memory(model, machine.ranks, shard, machine.dtype)
    return int((0.92 * machine.memory - fixed) // row)


def what_would_fit(run, machine):
    """Advice for a model that is too large: flags, then more GPUs, with which it would fit."""
    saving = replace(run.model, checkpointing=True)
    if rows_that_fit(saving, machine, run.train.shard) >= 1:
        return "it would with --checkpointing"
    for ranks, model in itertools.product((machine.ranks, 8, 64), (run.model, saving)):
        if ranks > 1 and rows_that_fit(model, replace(machine, ranks=ranks), True) >= 1:
            more = " --checkpointing" * (model is saving)
            return f"it would with --shard{more} on {ranks} GPUs"
    return "take a smaller --preset"


@torch.no_grad()
def evaluate(trainer):
    """{loss_caption, ..., loss, floor_caption, ...}: text cross-entropy in nats a token over the
    fixed validation rows of each kind, and the mean over kinds (Table 1). Ranks share the rows."""
    machine, loader, kinds, result = trainer.machine, trainer.loader, trainer.loader.val_kinds, {}
    names = ("loss", "floor") if loader.source.knows_floor else ("loss",)
    trainer.model.eval()
    for kind in kinds:
        total = torch.zeros(3, dtype=torch.float64)  # loss, floor, targets
        for batch in loader.val_batches(kind, trainer.rows, machine.rank, machine.ranks):
            loss = trainer.model(to_device(batch, machine)).token_loss.cpu().double().sum()
            total += torch.tensor([loss, batch["nll"].double().sum(), len(batch["nll"])])
        *sums, count = machine.sum(total).tolist()
        result |= {f"{name}_{kind}": value / max(count, 1) for name, value in zip(names, sums)}
    trainer.model.train()
    return result | {name: sum(result[f"{name}_{kind}"] for kind in kinds) / len(kinds)
                     for name in names}


def to_device(batch, machine):
    return {k: v.to(machine.device, non_blocking=machine.is_cuda) for k, v in batch.items()}


def train(trainer):
    """Trains to the last step; returns ok, diverged or stopped. The order is nanoGPT's."""
    run, machine, cfg = trainer.run, trainer.machine, trainer.run.train
    trainer.describe()
    batches = trainer.loader.train_batches(
        trainer.step, run.steps, cfg.tokens_per_step // run.model.context, trainer.rows,
        machine.rank, machine.ranks, machine.is_cuda)
    seconds = 0.1 if sys.stderr.isatty() else 30  # a file does not want ten lines a second
    bar = tqdm(total=run.steps * cfg.tokens_per_step, initial=trainer.step * cfg.tokens_per_step,
               desc=run.name, unit="tok", unit_scale=True, leave=False, mininterval=seconds,
               delay=seconds, disable=machine.rank > 0)
    with trainer.stop, bar:
        while trainer.step < run.steps:
            # learning rate
            for group in trainer.optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(trainer.step, run)

            # micro-steps
            totals = forward_and_backward(trainer, batches)
            if totals is None:
                trainer.save("ckpt.pt")
                return "stopped"

            # clip and step: divide gradients by totals[2], the targets of all micro-batches and
            # ranks, and multiply by the number of ranks, because DDP has averaged over them
            grads = [p.grad for p in trainer.model.parameters() if p.requires_grad]
            torch._foreach_mul_(grads, machine.ranks / totals[2].clamp(min=1))
            norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(),
                                                  cfg.grad_clip or math.inf)
            if cfg.shard:
                norm = norm.full_tensor()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.step += 1

            # evaluation and log
            line = trainer.measure(totals, norm)
            if line is None:
                return "diverged"
            if cfg.eval_every and trainer.step % cfg.eval_every == 0:
                trainer.val = {f"val_{k}": v for k, v in evaluate(trainer).items()}
                line |= trainer.val
            bar.set_postfix({"loss": line["loss"], **trainer.log(line)}, refresh=False)
            bar.update(cfg.tokens_per_step)

            # checkpoint
            at_end = trainer.step == run.steps
            if trainer.step == run.branch:  # a longer budget, perhaps tomorrow's, starts from here
                trainer.save("trunk.pt")
            if trainer.step % cfg.save_every == 0 or at_end or trainer.stopped:
                trainer.save("ckpt.pt")
            if trainer.stopped and not at_end:
                return "stopped"
    return "ok"


def forward_and_backward(trainer, batches):
    """The micro-steps of one step. Gradients of the *sum* of the token losses add up in .grad,
    because a mean over micro-batches of unequal numbers of targets would weigh their tokens
    unequally; ranks exchange them in the last micro-step only (FSDP: in each). Returns (6,), summed
    over micro-steps and ranks: loss, load_balancing_loss, targets, tokens (padding left out), image
    positions, ranks that were asked to stop. Returns None if this process is alone and was asked to
    stop, because a restart does the whole step again."""
    machine, loads = trainer.machine, 0
    totals = torch.zeros(6, device=machine.device)
    # train() divides all gradients by the targets, but balance must be divided by the tokens. So we
    # multiply it by targets per token of the step before, because this step's is not known yet.
    weight = trainer.run.train.load_balancing_weight * trainer.stats["targets_per_token"]
    for i in range(trainer.accumulation):
        if trainer.stop.asked and machine.ranks == 1:
            return None
        batch = to_device(next(batches), machine)
        # FSDP sends gradients every time, because no rank could hold all of them
        wait = i < trainer.accumulation - 1 and hasattr(trainer.forward, "no_sync")
        with trainer.forward.no_sync() if wait else contextlib.nullcontext():
            out = trainer.forward(batch)
            (out.loss + weight * out.balance).backward()
        seen = (out.loss.detach(), out.balance.detach(), len(out.token_loss),
                (batch["doc"] > 0).sum(), (batch["patch_index"] >= 0).sum())
        for total, value in zip(totals, seen):
            total += value
        if trainer.run.model.moe == "learned":
            loads = loads + out.expert_counts.sum(1)  # (layers, experts)
    if trainer.run.model.moe == "learned":
        for block, load in zip(trainer.model.blocks, machine.sum(loads)):
            block.ffn.load.copy_(load)
    totals[5] += trainer.stop.asked  # an assignment would wait for the GPU
    return machine.sum(totals)


def notes(run, memory, loader):
    """-> list of str, notes on settings that are legal, but perhaps not meant."""
    cfg, model, stored = run.train, run.model, loader.source.stored_size
    asked, rows = whole_number(cfg.tokens), run.steps * cfg.tokens_per_step // model.context
    often = [f"{kind} {n:.1f}" for kind, n in loader.epochs(rows).items() if n > 4]
    told = {
        f"--tokens {cfg.tokens} was rounded to whole steps; --tokens-per-step makes them smaller":
            abs(run.steps * cfg.tokens_per_step / asked - 1) > 0.05,
        f"--preset {cfg.preset} is a size for CUDA, which is not here; --dry-run --gpus plans it":
            cfg.preset != "laptop" and not memory,
        f"the images were packed at {stored} pixels, and are enlarged to {model.image_size}":
            stored < model.image_size,
        f"--warmup {cfg.warmup} is longer than the {run.branch} steps before the cooldown":
            cfg.warmup > run.branch,
        f"epochs of {', '.join(often)}: beyond 4, seeing data again helps less than new data would":
            len(often) > 0,
        f"other code has trained this before, so this is another run, in {run.folder}":
            run.name.endswith(code_version())}
    return [note for note, holds in told.items() if holds]


def compile_blocks(model):
    """Compiles each block and not the model, because that takes seconds instead of minutes, and the
    head's changing number of targets then recompiles nothing."""
    torch.compiler.reset()  # otherwise a later budget finds the cache full and runs uncompiled
    gc.collect()  # the last budget's compiled model is a reference cycle, and would fill the GPU
    # All blocks share one cache, and late fusion has 6 graphs (encoder, decoder; training, not).
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.optimize_ddp = False  # it would cut each block where DDP's buckets end
    warnings.filterwarnings("ignore", "TensorFloat32")  # the router's fp32 is on purpose
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
        if hasattr(module, "looped"):  # a step without tokens for an expert would make a new graph
            module.looped = torch.compiler.disable(module.looped)


class StopSignal:
    """Turns Ctrl-C and SIGTERM (a rented machine being taken back) into a flag that the loop
    looks at after each step, so that it can save first. A second Ctrl-C stops at once."""

    asked = False

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise SystemExit("stopped; the same command goes on from the last checkpoint")
        self.asked = True
        print("\nstopping after this step ...", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- The result of a run ----------------------------------------------------------------------

def result_row(trainer, status, losses):
    """The line of results.jsonl: all that decides the numbers (0 = derived), and the numbers."""
    run, machine, n = trainer.run, trainer.machine, trainer.model.num_params()
    known = {name: value for part in trainer.config.values() for name, value in part.items()
             if name not in (*IGNORED, "experts")}
    D, D_vision = trainer.step * run.train.tokens_per_step, trainer.stats["D_vision"]
    ffn = trainer.model.blocks[0].ffn
    return {
        "run": run.name, **known, "data": run.data.data, "n_experts": ffn.experts,
        "top_k": ffn.top_k, "vision_width": run.model.encoder_width if n["N_vision"] else 0, **n,
        "D": D, "D_vision": D_vision, "C": trainer.model.flops(D, D_vision), **losses,
        "steps": run.steps, **trainer.speed(), "device": machine.name, "world_size": machine.ranks,
        "peak_mem_mb": torch.cuda.max_memory_allocated() // 2**20 if machine.is_cuda else 0,
        "torch": torch.__version__, "git": git_commit(), "status": status,
    }


def git_commit():
    """The commit of the code that trains, -dirty after an edit; "" or None where there is none."""
    command = "git describe --always --dirty --exclude=*".split()
    with contextlib.suppress(OSError):  # no git here
        return subprocess.run(command, cwd=Path(__file__).resolve().parent, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True).stdout.strip()


def summary(row):
    """A row of results in one line for a person."""
    if row["status"] != "ok":
        return f"{row['run']}: {row['status']} (the loss was no longer a number)"
    parts = [f"{row['run']}: N {row['N']:,} D {row['D']:,}"]
    for name in sorted(name for name in row if name.startswith("loss")):  # the mean comes first
        floor = row.get(name.replace("loss", "floor"))
        parts.append(f"{name.removeprefix('loss_')} {row[name]:.3f}"
                     + (f" (floor {floor:.3f})" if floor is not None else ""))
    return " | ".join([*parts, f"{row['tok_per_s']:,.0f} tokens/s"])


def show_sample(trainer):
    """Prints what the data say of a held-out picture, and what the model says."""
    source, cfg, encoding = trainer.loader.source, trainer.run.model, trainer.loader.encoding
    if "caption" not in trainer.loader.val_kinds or trainer.run.train.shard:
        return  # FSDP gives a block a copy of the cache, so ours would stay empty
    row, stop = source.val_row("caption", 0), encoding.eot_token
    image = torch.from_numpy(patchify(row.images[0], cfg.patch_size))  # (patches, patch_dim)
    truth = itertools.takewhile(lambda token: token not in (stop, -1), row.target[cfg.n_patches:])
    with torch.compiler.set_stance("force_eager"):  # a growing prompt would compile at each token
        said = generate(trainer.model.eval(), [[stop], image], 64, stop, encoding.n_vocab)
    more = '--prompt "the "' if "text" in trainer.loader.shares else "--image YOUR.jpg"
    trainer.machine.say(f"a held-out picture: {encoding.decode(list(truth))!r}\n"
                        f"the model says:     {encoding.decode(said)!r}\n"
                        f'ask it more:        python -m tools.sample "{trainer.run.folder}" {more}')


def train_one(run, machine):
    """Trains one run and appends its line to results.jsonl. False if it was asked to stop."""
    trainer = Trainer(run, machine)
    trainer.begin()
    status = train(trainer)
    if status == "stopped":
        machine.say(f"{run.name}: saved at step {trainer.step}; the same command goes on from here")
        return False
    losses = evaluate(trainer) if status == "ok" else {"loss": math.nan}
    if not math.isfinite(losses["loss"]):  # None, because JSON has no NaN
        status, losses = "diverged", {"loss": None}
    row = result_row(trainer, status, losses)
    if machine.rank == 0:
        append_result(run.train.out, row)
    machine.say(summary(row))
    if status == "ok":
        show_sample(trainer)
    return not machine.sum(torch.tensor(int(trainer.stop.asked)))  # of any rank


def main(argv):
    """Trains unfinished runs, the shortest first, because others use its trunk -> exit status."""
    if "--dry-run" in argv:  # a tool answers, because it trains nothing
        tool = Path(__file__).with_name("tools") / "plan.py"
        check(tool.is_file(), f"--dry-run needs {tool}, which is not there")
        sys.argv[1:] = [word for word in argv if word != "--dry-run"]
        runpy.run_path(str(tool), run_name="__main__")
        return 0
    runs = parse_runs(argv)
    machine = Machine.start(runs[0].train.device)
    status = 0
    for run in runs:
        try:
            done = finished(run.train.out, tell=machine.rank == 0 and run is runs[0])
            row = machine.share(result_of(run, done))  # or ranks could disagree
            if row:
                machine.say(f"finished before (another --out trains it again): {summary(row)}")
                continue
            with contextlib.nullcontext() if machine.rank else only_process(run.folder, "trains"):
                row = machine.share(result_of(run, finished(run.train.out)))  # ended meanwhile
                status = 0 if row or train_one(run, machine) else 130
        except torch.OutOfMemoryError:
            raise SystemExit(f"{run.name}: out of memory; try --checkpointing, or a smaller "
                             "--micro-rows, which accumulates more") from None
        except OSError as error:
            raise SystemExit(f"{error.filename or run.folder}: {error.strerror or error}; make "
                             "room, and the same command goes on, or name another --out") from None
        except Exception:  # a traceback that lives on would keep the loader's workers alive
            sys.excepthook(*sys.exc_info())
            raise SystemExit(1) from None
        if status:
            break
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)  # a normal exit would abort if a thread of gloo holds a tensor
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last checkpoint") from None
