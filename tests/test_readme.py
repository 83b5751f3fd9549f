"""Every command of the README, of results/experiments.md and of the lecture runs, small, in order.

    python -m pytest tests/test_readme.py -q
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch

import fit_laws
import train
from helpers import ROOT, write_lines
from test_pack import llava, picture, write_tar, zstd
from test_sample import open_lm_state
from tools import sweep

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "results" / "experiments.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
LECTURE = (ROOT / "results" / "lecture.md").read_text(encoding="utf-8")
SMALL = ("--preset laptop --width 16 --depth 1 --context 128 --image-size 32 --patch-size 8 "
         "--tokens 2K,4K --tokens-per-step 512 --warmup 2 --val-rows 2 --device cpu").split()


def commands(text=README):
    """All commands in the sh blocks, one string each."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def words_of(command, home):
    """The words that a shell would make of it: $(...) is replaced by what that prints."""
    def said(inner):
        words = [sys.executable, *shlex.split(inner[1])[1:]]
        if "--data" in words:  # the reader's own data have images of 32 pixels here
            words += ["--preset", "laptop", "--image-size", "32"]
        return subprocess.run(words, cwd=home, check=True, capture_output=True, text=True).stdout

    words = shlex.split(re.sub(r"\$\((.*?)\)", said, command))
    found = [[str(path.relative_to(home)) for path in home.glob(word)] if "*" in word else [word]
             for word in words]
    return [word for place in found for word in place]


def small(words):
    """The same command, shrunk: of a flag given twice the last counts."""
    trains = {"train.py", "tools.sweep", "tools.check"} & set(words)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        words = ["2" if before == "--nproc_per_node" else word
                 for before, word in zip(["", *words], words)]
    words[0] = sys.executable
    if trains:
        words += SMALL
    if "tools.pack" in words:
        words += ["--image-size", "32", "--tokenizer", "bytes", "--val-fraction", "0.2"]
    if {"fit_laws.py", "tools.laws_more", "tools.multiplier"} & set(words):
        words += ["--bootstrap", "20"]
    return words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A clone with the files that the README speaks of as the reader's own."""
    home = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, home)
    for folder in ("results", "tests", "tools"):
        shutil.copytree(ROOT / folder, home / folder)
    make_sources(home)
    return home


def make_sources(home):
    """A few files in the layouts of DFN, OBELICS, DCLM and LLaVA, and a cat."""
    pictures = [picture((60, 40), colour=(5 * i, 255 - 5 * i, 99)) for i in range(50)]
    for shard in range(2):
        write_tar(home / f"dfn/0000{shard}.tar", [
            member for i, image in enumerate(pictures)
            for member in ((f"{i:05}.png", image), (f"{i:05}.txt", f"picture {i}"))])
    records = [{"texts": ["before", None, "after it"], "images": [None, image, None]}
               for image in pictures]
    for folder in ("obelics", "dclm", "llava"):
        (home / folder).mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), home / "obelics/a.parquet")
    lines = "".join(json.dumps({"text": f"text number {i} " * 9}) + "\n" for i in range(200))
    (home / "dclm/a.jsonl.zst").write_bytes(zstd(lines.encode()))
    (home / "cat.png").write_bytes(pictures[0])
    for name, n in (("train", 100), ("vqa", 5)):
        talks = [llava(f"{i}.png", "<image>\nWhat is it?", "Red.") for i in range(n)]
        write_lines(home / "llava" / f"{name}.json", json.dumps(talks))
    for i in range(100):
        (home / "llava" / f"{i}.png").write_bytes(pictures[i % 50])


def prepare(command, home):
    """What an earlier command would have left behind, had it not been shrunk: enough runs for a
    law, and a run to start from or to read, which is any finished one of the same kind."""
    for study in re.findall(r"fit_laws\.py runs/(\w+)", command):
        folder = home / "runs" / study
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / "laptop_study.jsonl", folder / "results.jsonl")
    named = r"runs/[\w.-]+/[\w.{}-]+(?![\w.{}*-])"  # a glob names no single run
    for path in re.findall(named, command.replace("{seed}", "0")):
        kind = next((k for k in ("late", "early-learned") if k in path), "early-w")
        donor = next(p.parent for p in home.glob(f"runs/*/{kind}*/ckpt.pt")
                     if "0-0-0-100" not in p.parent.name)
        if not (home / path).exists() and not path.endswith(".jsonl"):
            shutil.copytree(donor, home / path)
    if "dclm_1b.pt" in command:  # with the sizes of SMALL
        torch.save(open_lm_state(16, 1, 2, 48, 264), home / "dclm_1b.pt")


def test_the_commands_run_in_their_order(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    todo = [command for command in commands() if not re.match("pip |.*pytest", command)]
    *_, nodes = (command for command in todo if "--nnodes" in command)
    assert train.parse_runs([*nodes.split("train.py ")[1].split(), "--data", "procedural"])
    todo.remove(nodes)
    for command in todo:
        prepare(command, workplace)
        run_here(command, small(words_of(command, workplace)))
    assert len(todo) >= 8


def small_experiment(command, home):
    """One seed and few budgets; what a sweep is about stays, the paper's sizes do not."""
    alone = command.replace("--ranks 8 --shard ", "")  # tests/test_sweep.py runs several ranks
    words = words_of(alone.replace("{seed}", "0"), home)
    if "tools.sweep" in words:  # two values of each list
        words = [",".join(word.split(",")[:2]) for word in words]
    trains, paper = "train.py" in words or "tools.sweep" in words, "--preset" in words
    budget = "2K,4K" if trains and "," in words[words.index("--tokens") + 1] else "4K"
    if trains and not paper:  # what a sweep is about stays: image size, context, widths
        words = [sys.executable, *words[1:], "--width", "16", "--depth", "1", "--tokens-per-step",
                 "512", "--context", "256", "--warmup", "2", "--val-rows", "2", "--device", "cpu"]
    else:
        words = small(words)
    if trains:
        words += ["--tokens", budget, "--seed", "0"]
    return words + ["--quick"] * ("tools.bench" in words) + ["-n", "2"] * ("tools.score" in words)


def run_here(command, words):
    """A command of ours without a process of its own, because most of its time is the start."""
    print(command)  # pytest shows it if it fails
    tool, *flags = words[2:] if words[1] == "-m" else words[1:]
    if tool == "tools.sweep":  # one after the other; tests/test_sweep.py runs real ones
        return [train.main(argv) for argv, _ in sweep.parse_grid(flags)]
    if tool in ("world.py", "tools.bench", "torch.distributed.run") or "--dry-run" in flags:
        return subprocess.run(words, check=True)  # a process of their own
    return importlib.import_module(tool.removesuffix(".py")).main(flags)


def test_the_experiments_run_in_their_order(workplace, monkeypatch):
    """The paper's experiments of results/experiments.md, each tiny."""
    monkeypatch.chdir(workplace)
    todo = commands(EXPERIMENTS)
    shutil.rmtree(workplace / "runs", ignore_errors=True)  # the README uses some of the names too
    if not (workplace / "data" / "real").exists():
        todo = [next(c for c in commands() if "tools.pack" in c), *todo]
    for command in todo:
        prepare(command, workplace)
        run_here(command, small_experiment(command, workplace))
    assert len(todo) >= 30


def test_the_lecture_runs_with_its_exercises(workplace, monkeypatch):
    """Its six live commands and those of the answers, which stand in the text as `python ...`."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("builtins.input", lambda question: "0.3")  # the game asks for guesses
    answers = re.findall(r"`(python [^`]+)`", LECTURE)
    todo = commands(LECTURE) + [" ".join(command.split()) for command in answers]
    for command in todo:
        words = words_of(command, workplace)
        if "--dry-run" not in words:
            words = small(words)
            if "--tokens" in words:  # it trains
                words += ["--tokens", "4K", "--seed", "0"]
                words += ["--eval-every", "4"] * ("--eval-every" in words)
        run_here(command, words)
    assert len(todo) >= 10


def test_what_reads_the_results_reads_them(workplace, monkeypatch):
    """The commands of results/README.md on the rows beside it."""
    monkeypatch.chdir(workplace)
    todo = [command for command in commands(RESULTS) if "results/laptop" in command
            or "results/experiments" in command]
    for command in todo:
        run_here(command, small(shlex.split(command)))
    assert len(todo) == 6


def test_the_first_block_is_two_lines():
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1].strip().splitlines()
    assert len(first) == 2 and "python train.py" in first[0] and "pytest" in first[1]


def test_the_numbers_of_the_study_are_those_of_its_results():
    """The README's table is what fit_laws.py makes of the committed results."""
    study = str(ROOT / "results" / "laptop_study.jsonl")
    for group in fit_laws.main([study, "--bootstrap", "0"])["groups"]:
        row = next(line for line in README.splitlines() if line.startswith(f"| {group['name']} |"))
        shown = [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d+", row.split("[")[0])]
        assert shown[0] == pytest.approx(group["E"], abs=6e-4), row
        assert float(row.split("|")[-2]) == pytest.approx(group["r2"], abs=6e-4), row
