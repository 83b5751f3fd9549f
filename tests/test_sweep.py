"""Sweeps and matched sizes: python -m pytest -q tests/test_sweep.py"""
import os
import signal
import subprocess
import sys
import time

import pytest

import train
from helpers import FLAGS, ROOT, read_log, refused
from tools import sizes, sweep


def start(out, *flags):
    command = [sys.executable, "-m", "tools.sweep", *FLAGS, "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(folder, pattern, process):
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_grid_is_the_product_of_its_lists_and_budgets_stay_together():
    jobs = sweep.parse_grid([*FLAGS, "--width=16,24,16", "--fusion", "early,late", "--augment",
                             "--no-flip", "--tokens", "5K,10K", "--init-vision", ""])
    assert len(jobs) == 4 and all(len(runs) == 2 for _, runs in jobs)
    assert {(run.model.width, run.model.fusion) for _, runs in jobs for run in runs} == {
        (16, "early"), (16, "late"), (24, "early"), (24, "late")}
    assert jobs[0][1][0].model.width == 24  # the longest first
    assert all(run.data.augment > run.data.flip for _, runs in jobs for run in runs)


def test_a_span_of_seeds_is_their_list():
    jobs = sweep.parse_grid([*FLAGS, "--width", "16", "--seed", "1,4..6", "--out", "../1..2"])
    assert sorted(run.train.seed for _, (run,) in jobs) == [1, 4, 5, 6]
    assert {run.train.out for _, (run,) in jobs} == {"../1..2"}
    refused("6..4", sweep.parse_grid, [*FLAGS, "--seed", "6..4"])


def test_a_sweep_trains_every_run_once_and_skips_what_is_finished(tmp_path, monkeypatch):
    """One of its runs diverges, which is a result and stops nothing. Slurm's rank is not theirs."""
    monkeypatch.setenv("RANK", "1")
    flags = ["--width", "16,24", "--lr", "1e-3,1e30", "--grad-clip", "1e30", "--tokens", "3K,5K"]
    for part in ("1/2", "2/2", "1/1"):  # two machines share it, then it is started again
        process = start(tmp_path, *flags, "--part", part)
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        assert said.startswith("8 runs, 8" if part == "1/1" else "4 runs, 0"), said
    rows = read_log(tmp_path, "results.jsonl")
    assert len(rows) == len({row["run"] for row in rows}) == 8
    assert sorted((row["status"], row["loss"] is None) for row in rows) == (
        [("diverged", True)] * 4 + [("ok", False)] * 4)


def test_children_die_with_a_parent_that_is_killed(tmp_path):
    process = start(tmp_path, "--width", "16,24", "--tokens", "2M", "--save-every", "5")
    wait_for(tmp_path, "*/ckpt.pt", process)
    process.kill()
    process.communicate()
    sizes_before = None
    for _ in range(100):  # a child that lived would go on writing its log
        time.sleep(0.1)
        now = [path.stat().st_size for path in tmp_path.glob("*/log.jsonl")]
        if now == sizes_before:
            break
        sizes_before = now
        time.sleep(1.5)
    assert now == sizes_before and not train.finished(tmp_path)


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_stopped_sweep_saves_and_says_so(tmp_path, ranks):
    """Two ranks are torchrun's, which passes the signal on."""
    process = start(tmp_path, "--width", "16,24", "--tokens", "2M", "--save-every", "1000000",
                    "--ranks", ranks)
    wait_for(tmp_path, "*/speed.jsonl", process)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 130 and "goes on from here" in errors
    assert "killed" not in errors and list(tmp_path.glob("*/ckpt.pt"))


def test_the_reason_of_ranks_is_told_and_not_that_of_torchrun(tmp_path):
    run, = train.parse_runs([*FLAGS, "--tokens", "3K", "--width", "16", "--out", str(tmp_path)])
    run.folder.mkdir()
    (run.folder / "ckpt.pt").write_bytes(b"no checkpoint")
    process = start(tmp_path, "--tokens", "3K", "--width", "16", "--ranks", "2")
    _, errors = process.communicate()
    assert process.returncode == 1 and "ckpt.pt" in errors.splitlines()[0], errors


def test_each_model_on_two_ranks(tmp_path):
    """(Their numbers are those of one: tests/test_ranks.py.)"""
    process = start(tmp_path, "--tokens", "3K,5K", "--width", "16", "--ranks", "2")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [row["world_size"] for row in train.finished(tmp_path).values()] == [2, 2]


def test_a_study_that_is_deleted_under_a_sweep(tmp_path):
    """The sweep ends with a line for its run, not with an error of its own."""
    process = start(tmp_path / "out", "--width", "16", "--tokens", "2M")
    wait_for(tmp_path, "out/*/log.jsonl", process)
    (tmp_path / "out").rename(tmp_path / "gone")
    _, errors = process.communicate()
    assert process.returncode == 1 and "1 of 1 runs" in errors and "Traceback" not in errors


def test_a_child_that_is_killed_is_named_and_the_others_go_on(tmp_path):
    process = start(tmp_path, "--width", "16,24", "--tokens", "60K", "--jobs", "1")
    wait_for(tmp_path, "*w24*/log.jsonl", process)
    found = subprocess.run(["pgrep", "-f", f"child --width 24 .*{tmp_path}"], text=True,
                           capture_output=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1 and "SIGKILL" in errors and "1 of 2 runs" in errors
    assert [row["width"] for row in train.finished(tmp_path).values()] == [16]


@pytest.mark.parametrize("flags,words", [
    (["--width", "16,33"], "width 33"), (["--widht", "16,32"], "--width"),
    (["--part", "3/2"], "--part 3/2"), (["16"], "16"), (["--micro-rows", "1,2"], "twice"),
    (["--jobs", "-1"], "--jobs -1"), (["--part", "2/2"], "--part 2/2"),
    (["--ranks", "0"], "--ranks 0"), (["--ranks", "3"], "--ranks 3"),
    (["--dry-run", "--ranks", "2", "--gpus", "1xh100"], "--ranks 2"),
    (["--gpus", "1xh100"], "--gpus"), (["--part", "²/2"], "--part")])
def test_mistakes_end_in_one_clear_line_before_anything_is_trained(tmp_path, flags, words):
    refused(words, sweep.main, [*FLAGS, "--out", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_each_gpu_gets_a_run(monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep.places("auto", 0, 1) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "012"]
    assert sweep.places("auto", 0, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}]
    refused("--ranks 4", sweep.places, "auto", 0, 4)
    refused("CUDA_VISIBLE_DEVICES", sweep.places, "cuda:1", 0, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert sweep.places("cuda", 1, 1) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    assert sweep.places("cpu", 4, 1) == [{"OMP_NUM_THREADS": "1"}] * 4


# -- sizes -----------------------------------------------------------------------------------------


def test_early_fusion_is_matched_to_late(printed):
    """By parameters, by the text model, by FLOPs (B.4)."""
    def match(flags):
        return printed(sizes.main, f"--match {flags}".split()).split()

    late, = train.parse_runs(["--fusion", "late", "--width", "96"])
    n, N, share = train.Model(late.model).num_params(), {}, 0.27  # of the positions are images
    for rule in ("params", "text", "flops"):
        early, = train.parse_runs(match(f"{rule} --width 96"))
        assert early.model.fusion == "early"
        N[rule] = train.Model(early.model).num_params()["N"]
    for rule, encoder in (("params", 1), ("flops", share)):
        assert N[rule] == pytest.approx(n["N"] + encoder * n["N_vision"], rel=0.05), rule
    assert N["text"] < N["flops"] < N["params"] and N["text"] == n["N"]
    assert match("text --width 8")[-1] == "8"
    # with the paper's share of images, 0.544, and not the world's
    assert match("flops --preset 1.75b")[-1] == "2192"
    assert int(match("params --width 16 --vision-width 128")[-1]) > 64  # beside a large encoder


def test_every_resolution_reads_the_same_text(printed):
    flags = "--equal-text --image-size 48 --tokens 20K,40K".split()
    _, large = train.parse_runs(printed(sizes.main, flags).split())
    small, = train.parse_runs(["--tokens", "40K"])
    text, images = zip(*(sizes.positions(run, run.model) for run in (small, large)))
    assert large.steps == small.steps and images[1] > 1.9 * images[0]
    assert len({run.train.tokens_per_step / run.model.context for run in (small, large)}) == 1
    assert text[0] == pytest.approx(text[1], rel=0.02)


def test_the_table_of_sizes_has_the_papers_and_their_experts(printed):
    lines = printed(sizes.main, ["--budget", "1e21"]).splitlines()
    assert sum(line.startswith(("275m", "8.13b")) for line in lines) == 4
    assert len(lines) == 1 + 13 + 7 + 3
    tokens = 1e21 / (6 * 274_841_600)  # of 275m, early: 6 N FLOPs each
    assert float(lines[1].split()[-1]) == pytest.approx(tokens / 1e9, abs=0.05)
    experts, late = (next(line.split() for line in lines if line.startswith(name))
                     for name in ("275m  early moe", "289m"))
    assert [experts[5], experts[8]] == lines[1].split()[4:8:3]  # the active parameters only
    N, N_vision, _, flops, whole, divided, _, tokens = map(float, late[-8:])
    assert N + N_vision == pytest.approx(0.289, abs=1e-3) and whole > 2 * divided
    assert 1e3 / tokens == pytest.approx(flops, rel=4e-3) == 6 * (N + 0.544 * N_vision)
