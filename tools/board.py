"""Curves of runs in TensorBoard or Weights & Biases, while they train or afterwards.

    pip install tensorboard
    python -m tools.board runs/demo --follow          then: tensorboard --logdir runs/demo/board
    python -m tools.board runs/demo --to wandb        a study becomes one project

Training knows nothing of either, because this tool reads the log.jsonl and speed.jsonl of each
run, on any machine that sees the folder. With --follow it also sends what is written later.
"""
import contextlib
import functools
import time
from collections import defaultdict
from pathlib import Path

from data import check
from fit_laws import json_row
from tools import need
from train import Parser


def new_lines(path, seen):
    """The lines of a file after those that were seen. A last line without its end is left for the
    next time, because it is being written."""
    with open(path, "rb") as file:
        file.seek(seen[path])
        for line in file:
            if line.endswith(b"\n"):
                seen[path] += len(line)
                yield json_row(line)


def send(out, seen, writer_of):
    """Sends everything new of all runs in the folder `out`."""
    for path in sorted(out.glob("*/log.jsonl")) + sorted(out.glob("*/speed.jsonl")):
        for line in new_lines(path, seen):
            if "step" in line:  # a line without it is broken, as when a disk was full
                step = line.pop("step")
                for key, value in line.items():
                    writer_of(path.parent.name)(key, value, step)


def tensorboard(out):
    """-> a function that makes the writer of a run: (name of a curve, value, step) -> None."""
    need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    # purge what an earlier call sent, because everything is sent again
    return lambda name: SummaryWriter(out / "board" / name, purge_step=0).add_scalar


def wandb(out):
    """The same for Weights & Biases, whose own step may only rise. The two files of a run are sent
    one after the other, so every value carries its training step."""
    wandb = need("wandb", "wandb")

    def new_writer(name):
        run = wandb.init(project=out.name, id=name, name=name, resume="allow", reinit="create_new")
        run.define_metric("*", step_metric="training step")
        return lambda key, value, step: run.log({key: value, "training step": step})
    return new_writer


def main(argv=None):
    parser = Parser(prog="python -m tools.board", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of a study")
    parser.add_argument("--to", choices=("tensorboard", "wandb"), default="tensorboard")
    parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
    args = parser.parse_args(argv)
    check(any(args.out.glob("*/log.jsonl")), f"{args.out}: no run has begun here")
    writer_of = functools.cache({"tensorboard": tensorboard, "wandb": wandb}[args.to](args.out))
    seen = defaultdict(int)
    send(args.out, seen, writer_of)
    with contextlib.suppress(KeyboardInterrupt):
        while args.follow:
            time.sleep(5)
            send(args.out, seen, writer_of)
    print(f"sent {writer_of.cache_info().currsize} runs to {args.to}")


if __name__ == "__main__":
    main()
