"""Train many models: one train.py for each combination of comma-separated values.

    python -m tools.sweep --fusion early,late --width 16,32 --tokens 1M,2M --seed 0..4 --out runs/x
    python -m tools.sweep ... --part 2/4        on the second of four machines that share a study
    python -m tools.sweep ... --ranks 8         each model on eight GPUs, one model after the other
    python -m tools.sweep ... --dry-run --gpus 8xh100x0.4x2.5       what all of it would take

0..4 is short for 0,1,2,3,4. Budgets (--tokens) stay together, because they share a trunk. A machine
with GPUs trains one model on each GPU, or on --ranks GPUs by torchrun. A CPU trains one model on
each core, with one thread, because two threads on one small model are slower than two models on a
thread each. What a run prints goes to OUT/logs/RUN.log. All other flags go to train.py. Stop it
when you like, because the same command goes on where it stopped.
"""
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import torch
from tqdm import tqdm

import train
from data import check
from tools import make_folder, plan, split_launcher, usable_cores


def parse_grid(words):
    """Flags with comma lists -> [(the words of one train.py, its Runs)]. The longest come first, or
    else one process would still train the longest when all others have nothing left to do."""
    grid = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            grid[flag] = value if equals else None
        else:
            check(grid and grid[flag] is None, f"sweep: {word!r} follows no flag; put commas "
                  "between several values, as in --width 8,16")
            grid[flag] = word
    lists = [[value] if value is None or flag == "--tokens" else values_of(value)
             for flag, value in grid.items()]
    jobs = {}
    for values in itertools.product(*lists):
        argv = [word for pair in zip(grid, values) for word in pair if word is not None]
        runs = train.parse_runs(argv)
        name = runs[-1].name  # values that are given twice are one run
        check(jobs.get(name, (argv,))[0] == argv, f"sweep: {name} would be trained twice, because "
              f"some flag says how and not what to train ({', '.join(train.HOW)})")
        jobs[name] = argv, runs
    return sorted(jobs.values(), key=lambda job: cost(job[1][-1]), reverse=True)


def values_of(text):
    """"1,4..6" -> ["1", "4", "5", "6"]."""
    values = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        several = range(int(ends[1]), int(ends[2]) + 1) if ends else ()
        values += map(str, several or [part])
    return values


def cost(run):
    """The training FLOPs of a run's blocks, about."""
    return 72 * run.steps * run.train.tokens_per_step * run.model.width ** 2 * run.model.depth


def places(device, jobs, ranks):
    """-> the environment variables of each place, which is the GPUs or the cores of one model."""
    check(":" not in device, f"--device {device}: a sweep gives each run GPUs of its own; choose "
          "them as CUDA_VISIBLE_DEVICES=1,3")
    if device not in ("cpu", "mps") and torch.cuda.is_available():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count())))
        gpus = seen.split(",")
        check(len(gpus) >= ranks, f"--ranks {ranks}: this machine has {len(gpus)} GPUs")
        groups = [gpus[i:i + ranks] for i in range(0, len(gpus) - ranks + 1, ranks)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups][:jobs or None]
    if device == "mps":
        check(ranks == 1, f"--ranks {ranks}: MPS has one device")
        return [{}]
    return [{"OMP_NUM_THREADS": "1"}] * (jobs or max(1, usable_cores() // ranks))


def start(argv, run, place, ranks):
    """Start a child that trains and logs to OUT/logs/RUN.log. torchrun gets its own process group,
    because otherwise it would receive two signals, a Ctrl-C and then ours."""
    path = run.folder.parent / "logs" / f"{run.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of torchrun or slurm, but each child is alone
    env = {k: v for k, v in os.environ.items() if k not in launched} | place
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split()
    with open(path, "a", encoding="utf-8") as log:
        begin = log.tell()  # an earlier try wrote what stands before
        child = subprocess.Popen(
            [sys.executable, *launch * (ranks > 1), "-m", "tools.sweep", "--child", *argv], env=env,
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=ranks > 1)
    child.log, child.begin, child.asked = path, begin, False  # asked to stop
    return child


def be_child(argv):
    """Run train.py in a process that ends with its parent, however the parent dies, because the
    standard input is closed then, and the read returns."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    sys.exit(train.main(argv))


def failure(child):
    """Why a child ended, in a line; None if it ended well."""
    code = child.returncode
    if code in (0, 130):
        return None
    gone = not child.log.exists()
    text = b"" if gone else child.log.read_bytes()[child.begin:]
    text, report = split_launcher(text.decode("utf-8", "replace"))
    if code < 0 or "(SIGKILL)" in report:  # it was killed, or one of several ranks
        name = signal.Signals(-code).name if code < 0 else "SIGKILL"
        return (f"killed by {name} (was there enough memory? try fewer --jobs or smaller "
                f"--micro-rows); see {child.log}")
    lines = [line for line in text.splitlines() if line and not line.startswith("terminate called")]
    ours = [line for line in lines if not line.startswith("[rank")]  # from a rank that lost another
    last = "".join((ours or lines)[-1:]) or "it said nothing, as where the disk is full"
    return f"{child.log} was deleted" if gone else f"{last} (see {child.log})"


def share_done(run):
    """The share of a run that is done, by the steps in its log."""
    path = run.folder / "log.jsonl"
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().decode("utf-8", "replace").splitlines()[:-1]  # it may be partial
    except FileNotFoundError:
        return 0
    return (json.loads(lines[-1])["step"] + 2) / run.steps if len(lines) > 1 else 0


def train_all(jobs, free, ranks, bar, stop):
    """Keeps all places busy until every job has ended -> failures, a list of lines."""
    runs, waiting, children, failures = [run for _, all in jobs for run in all], list(jobs), {}, []
    out, told = runs[0].train.out, set(train.finished(runs[0].train.out))
    while waiting and not stop.asked or children:
        while waiting and free and not stop.asked:
            argv, (*_, longest) = waiting.pop(0)
            place = free.pop()
            children[longest.name] = start(argv, longest, place, ranks), place
        time.sleep(0.5)
        for name, (child, place) in list(children.items()):
            ended = child.poll() is not None
            if ended:
                del children[name]
                free.append(place)
                why = failure(child)
                failures += [f"{name}: {why}"] if why and not stop.asked else []
            # we ask once, because a second signal would interrupt the saving
            if stop.asked and not ended and not child.asked:
                child.terminate()
                child.asked = True
        rows = train.finished(out)
        for name in [run.name for run in runs if run.name in rows.keys() - told]:
            with contextlib.suppress(BrokenPipeError):  # a reader that has left, such as head
                tqdm.write(train.summary(rows[name]), file=sys.stdout)
        told |= rows.keys()
        bar.update(sum(cost(run) * share_done(run) for run in runs) - bar.n)
    return failures


def tell(jobs, args):
    """What the jobs would take, on GPUs that need not be here."""
    os.environ.pop("RANK", None)  # only this process prints the plan
    torch.set_num_threads(1)  # as each child will have
    jobs = [runs for _, runs in jobs]
    machine = train.Machine.start(jobs[0][0].train.device)
    if args.gpus:
        free = range(args.gpus.ranks // args.ranks)[:args.jobs or None]
        check(free, f"--ranks {args.ranks}: --gpus has fewer GPUs than that")
    else:
        free = places(machine.device.type, args.jobs, args.ranks)
    plan.tell(jobs, args.gpus, machine, args.ranks, len(free))


def main(argv=None):
    parser = train.Parser(prog="python -m tools.sweep", description=__doc__)
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time; 0 = one a "
                        "core, or one a GPU")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs (processes) of each model")
    parser.add_argument("--dry-run", action="store_true", help="what it would take: time, memory, "
                        "disk, price; trains nothing")
    parser.add_argument("--gpus", type=plan.cards_of, metavar="8xh100x0.4x2.5",
                        help="with --dry-run: number, card, MFU and dollars an hour")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only this part of the study")
    parser.add_argument("--child", action="store_true", help=train.argparse.SUPPRESS)
    args, words = parser.parse_known_args(argv)
    if args.child:
        return be_child(words)
    jobs = parse_grid(words)
    part, _, parts = args.part.partition("/")
    check(part.isdecimal() and parts.isdecimal() and 0 < int(part) <= int(parts),
          f"--part {args.part}: need I/N, as 2/4 for the second of four machines")
    check(args.jobs >= 0 < args.ranks, f"--jobs {args.jobs}, --ranks {args.ranks}: need 0 or more "
          "jobs and at least one rank")
    jobs = jobs[int(part) - 1::int(parts)]
    runs = [run for _, all in jobs for run in all]
    check(runs, f"--part {args.part}: there are fewer runs than parts")
    for run in runs:
        rows = run.train.tokens_per_step // run.model.context
        check(rows % args.ranks == 0, f"--ranks {args.ranks}: {rows} rows a step cannot be shared "
              "by so many")
    check(args.dry_run or not args.gpus, "--gpus: only --dry-run plans for GPUs")
    if args.dry_run:
        return tell(jobs, args)
    make_folder(runs[0].train.out)
    free = places(runs[0].train.device, args.jobs, args.ranks)
    done = train.finished(runs[0].train.out)
    ended = {run.name for run in runs if train.result_of(run, done)}
    print(f"{len(runs)} runs, {len(ended)} of them finished before, "
          f"{min(len(free), len(jobs))} at a time", flush=True)
    bar = tqdm(total=sum(map(cost, runs)), unit="FLOP", unit_scale=True,
               disable=not sys.stderr.isatty())
    todo = [job for job in jobs if any(run.name not in ended for run in job[1])]
    with train.StopSignal() as stop, bar:
        failures = train_all(todo, free, args.ranks, bar, stop) if todo else []
    for line in failures:
        print(line, file=sys.stderr)
    if stop.asked:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    done = train.finished(runs[0].train.out)
    missing = [run.name for run in runs if not train.result_of(run, done)]
    check(not missing, f"{len(missing)} of {len(runs)} runs are not finished; the same command "
          "goes on from here")


if __name__ == "__main__":
    main()
