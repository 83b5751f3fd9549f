"""python -m pytest tests/test_train.py -q"""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch

import train
from helpers import (FLAGS, ROOT, one_line, only_run, read_log, read_weights, refused,
                     write_rows)
from model import PRESETS
from tools.bench import repeated

CPU = train.Machine(torch.device("cpu"))


def trained(out, *flags):
    """Trains in this process; the rows of results.jsonl by run name."""
    train.main([*FLAGS, "--out", str(out), *flags])
    return train.finished(out)


def run_of(*flags):
    return train.parse_runs([*FLAGS, *flags])[-1]


# -- trunk and branches, resuming ----------------------------------------------------------------


def test_a_branch_equals_the_separate_run_with_that_budget(tmp_path, printed):
    """Log and final weights, number for number, for three budgets that share a trunk."""
    said = printed(trained, tmp_path / "sweep", "--tokens", "5K,10K,20K")
    assert "from step 8" in said and "from step 16" in said  # the cooldown is the last fifth
    for tokens in ("5K", "10K", "20K"):
        trained(tmp_path / tokens, "--tokens", tokens)
        alone = only_run(tmp_path / tokens)
        branch = tmp_path / "sweep" / alone.name
        assert read_log(alone) == read_log(branch)
        torch.testing.assert_close(read_weights(alone)[1], read_weights(branch)[1], rtol=0, atol=0)
        row, other = (train.finished(p)[alone.name] for p in (tmp_path / tokens, branch.parent))
        assert all(row[k] == other[k] for k in ("loss", "D", "D_vision", "C", "padding"))


def test_sigterm_saves_before_it_stops(tmp_path):
    words = [*FLAGS, "--out", str(tmp_path), "--tokens", "200K", "--save-every", "1000000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], text=True,
                               stdout=subprocess.PIPE)
    process.stdout.readline()  # the description: training begins
    time.sleep(0.5)
    process.terminate()
    rest = process.stdout.read()
    assert process.wait() == 130 and "goes on from here" in rest
    folder = only_run(tmp_path)
    step = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    assert len(read_log(folder)) == step > 0


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path):
    (tmp_path / "ckpt.pt").write_text("old", "utf-8")
    with pytest.raises(ZeroDivisionError):
        train.write_whole(tmp_path / "ckpt.pt", lambda path: path.write_text("ne", "utf-8") / 0)
    assert (tmp_path / "ckpt.pt").read_text("utf-8") == "old"


def test_a_trunk_that_does_not_serve_is_named(tmp_path, printed):
    """A preset's warmup depends on the shortest budget."""
    flags = "--preset 275m --warmup 0 --image-size 32 --patch-size 8".split()
    trained(tmp_path, *flags, "--tokens", "10K")
    said = printed(trained, tmp_path, *flags, "--tokens", "20K")
    assert "trunk.pt" in said and "warmup" in said and "from step" not in said
    said = printed(trained, tmp_path, *flags, "--tokens", "10K,20K", "--seed", "1")
    assert "another warmup" not in said
    refused("another warmup", trained, tmp_path, *flags, "--tokens", "10K,20K")  # 10K gives it


def test_an_edit_of_the_code_is_trained_anew(tmp_path, capsys, monkeypatch):
    """In a folder of its own. The old code then finds its own run again."""
    before, = trained(tmp_path, "--tokens", "5K")
    with monkeypatch.context() as edited:
        edited.setattr(train, "code_version", lambda: "edited")
        after = trained(tmp_path, "--tokens", "5K")
        assert after.keys() == {before, f"{before}-edited"}
        assert "other code" in capsys.readouterr().out
        assert trained(tmp_path, "--tokens", "5K") == after
        trained(tmp_path, "--tokens", "10K")
        assert "from step" in capsys.readouterr().out  # the trunk of its own code
    assert after[before]["code"] != after[f"{before}-edited"]["code"] == "edited"
    assert trained(tmp_path, "--tokens", "5K").items() >= after.items()
    shutil.rmtree(tmp_path / before)  # a row alone is no answer of another code, either
    monkeypatch.setattr(train, "code_version", lambda: "third")
    assert trained(tmp_path, "--tokens", "5K")[before]["code"] == "third"


def test_the_sample_at_the_end_is_made_in_evaluation_mode(tmp_path, monkeypatch):
    """As tools.sample makes it, or a model with dropout would say two things."""
    modes = []
    monkeypatch.setattr(train, "generate", lambda model, *_: modes.append(model.training) or [])
    trained(tmp_path, "--tokens", "5K")
    assert modes == [False]


def test_a_preset_at_another_width_has_the_encoder_of_that_width():
    for flags, encoder in (([], 384), (["--width", "1536"], 768), (["--width", "24"], 16),
                           (["--width", "1536", "--vision-width", "512"], 512)):
        run, = train.parse_runs(["--preset", "289m", "--tokens", "100M", *flags])
        assert run.model.encoder_width == encoder


def test_runs_of_other_numbers_have_other_names():
    flags = ["", "--weight-decay 0.1", "--grad-clip 0", "--lr 0.001", "--vision-lr 0.5", "--flip",
             "--warmup 9", "--cooldown 0.5", "--load-balancing-weight 0.1", "--val-rows 3",
             "--augment", "--context 256", "--tokens-per-step 1024", "--heads 1",
             "--mlp-multiple 8", "--patch-size 16"]
    assert len({run_of(*words.split()).name for words in flags}) == len(flags)
    assert run_of("--micro-rows", "1").name == run_of().name  # the same numbers


def test_only_what_the_code_does_makes_its_version(tmp_path, monkeypatch):
    """A module that a user adds counts if it is imported, and not if it only lies there."""
    for name in ("world", "data", "moe", "model", "train"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text("utf-8"), "utf-8")
        monkeypatch.setattr(sys.modules[name], "__file__", str(tmp_path / f"{name}.py"))
    (tmp_path / "plots.py").write_text("half a line (", "utf-8")
    version = train.code_version.__wrapped__
    same = version()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "link" / ".." / tmp_path.name / "train.py"))
    assert version() == same
    mask = tmp_path / "model.py"
    text = mask.read_text("utf-8")
    mask.write_text(text.replace('    """The one rule of the mask', '    """A # rule'), "utf-8")
    assert mask.read_text("utf-8") != text and version() == same == train.code_version()
    mask.write_text(text.replace("query >= key", "query > key"), "utf-8")
    assert version() != same
    mask.write_text(text, "utf-8")
    own = ModuleType("muon")
    own.__file__ = str(tmp_path / "muon.py")
    monkeypatch.setitem(sys.modules, "muon", own)
    (tmp_path / "muon.py").write_text("momentum = 0.95\n", "utf-8")
    first = version()
    (tmp_path / "muon.py").write_text("momentum = 0.5\n", "utf-8")
    assert len({same, first, version()}) == 3


def test_rows_that_are_written_at_once_do_not_mix(tmp_path):
    """Nor with half a line, which is passed over and ended."""
    (tmp_path / "results.jsonl").write_text('{"run": "b", "lo', encoding="utf-8")
    rows = [{"run": str(i), "status": "ok", "N": 1, "D": 1, "loss": 1.0, "tok_per_s": 9,
             "text": "x" * 3000}
            for i in range(64)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda row: train.append_result(tmp_path, row), rows))
    assert len(train.finished(tmp_path)) == 64


# -- the same numbers, however the work is divided -------------------------------------------------


def test_accumulation_equals_the_big_batch(tmp_path):
    """Micro-batches hold unequal numbers of targets: a mean of means would show here."""
    for rows in "41":
        trained(tmp_path / rows, "--tokens", "10K", "--micro-rows", rows)
    logs = (read_log(only_run(tmp_path / rows)) for rows in "41")
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_balance_loss_is_a_mean_over_tokens():
    """And the loss one over targets: the gradient is that of both."""
    run = run_of("--moe", "learned", "--load-balancing-weight", "0.5")
    trainer = train.Trainer(run, CPU)
    batch, = trainer.loader.train_batches(0, 1, 4, 4)
    tokens, targets = (batch["doc"] > 0).sum(), len(batch["target_index"])
    ffn = trainer.model.blocks[0].ffn
    ffn.load.copy_(torch.arange(1.0, 9.0))  # or it has no gradient
    out = trainer.model(batch)
    wanted, = torch.autograd.grad(out.loss / targets + 0.5 * out.balance / tokens, ffn.router)
    trainer.stats["targets_per_token"] = float(targets / tokens)  # as the step before had it
    train.forward_and_backward(trainer, iter([batch]))
    torch.testing.assert_close(ffn.router.grad / targets, wanted)


# -- schedule and results --------------------------------------------------------------------------


def test_schedule_rises_stays_and_ends_at_zero():
    run = run_of("--tokens", "51200", "--warmup", "10")  # 100 steps
    rates = [train.rate_at(step, run) for step in range(101)]
    assert rates[0] == 0.1 and rates[9:80] == [1.0] * 71
    assert all(a > b for a, b in pairwise(rates[80:])) and rates[100] == 0
    assert rates[85] == 0.5  # 1 - sqrt(t), a quarter into the cooldown
    assert run_of("--tokens", "4608").branch == 8  # of 9 steps


def test_a_schedule_of_the_budget_shares_no_trunk(tmp_path, capsys, monkeypatch):
    """A cosine down to the end of the run, as one would write into rate_at: a longer budget may not
    go on from rates that were a shorter one's."""
    monkeypatch.setattr(train, "rate_at",
                        lambda step, run: 0.5 + 0.5 * math.cos(math.pi * step / run.steps))
    for out, tokens in ((tmp_path / "both", "10K,20K"), (tmp_path / "alone", "20K")):
        train.main([*FLAGS, "--out", str(out), "--tokens", tokens])
    assert "another schedule" in capsys.readouterr().out
    both, alone = (train.finished(out) for out in (tmp_path / "both", tmp_path / "alone"))
    (name, row), = alone.items()
    assert both[name]["loss"] == row["loss"]


def test_a_warmup_longer_than_the_trunk_makes_no_jump():
    run = run_of("--tokens", "51200", "--warmup", "200")  # 100 steps
    rates = [train.rate_at(step, run) for step in range(101)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.1 and rates[79] == 0.4


def test_settings_of_the_presets_are_the_papers():
    rates = {}
    for size in PRESETS:
        run, = train.parse_runs(["--preset", size, "--tokens", "4B"])
        cfg, rates[size] = run.train, run.train.lr
        assert (run.model.width, run.model.depth) == (PRESETS[size]["width"], 24)
        assert (cfg.tokens_per_step, cfg.warmup, cfg.cooldown) == (2048 * 1024, 1000, 0.2)
        assert (cfg.vision_lr, cfg.load_balancing_weight) == (0.01, 0.01)
        assert (cfg.weight_decay, cfg.grad_clip) == (1e-4, 1)
        assert run.data.shares == {"caption": 45, "interleaved": 45, "text": 10}
    assert rates == {
        "275m": 1.5e-3, "289m": 1.5e-3, "464m": 1.5e-3, "494m": 1.5e-3, "932m": 5e-4, "1b": 5e-4,
        "1.63b": 4.2e-4, "1.75b": 4.2e-4, "2.28b": 4e-4, "2.43b": 3.8e-4, "3.35b": 3.5e-4,
        "3.7b": 3.3e-4, "8.13b": 2.4e-4}


def test_warmups_are_the_papers():
    for moe, warmups in ((False, {600: 300, 4000: 1000, 4001: 2500, 15000: 2500, 15001: 5000}),
                         (True, {3000: 2500, 19999: 2500, 20000: 5000})):
        assert {steps: train.paper_warmup(steps, moe) for steps in warmups} == warmups
    for moe in ("learned", "modality"):
        run, = train.parse_runs(["--preset", "275m", "--tokens", "8B", "--moe", moe])
        assert run.train.warmup == 2500


def test_learning_rates_between_and_beyond_the_papers_widths():
    def lr(*flags):
        return train.parse_runs(["--preset", "275m", "--tokens", "4B", *flags])[0].train.lr

    assert lr("--width", "400") == pytest.approx(1.5e-3)
    assert 5e-4 < lr("--width", "1344") < 1.5e-3  # half way from 1088 to 1632
    assert lr("--width", "1360", "--lr", "1e-4") == 1e-4
    assert [run_of(*late).train.lr for late in ((), ("--fusion", "late"))] == [0.012, 0.006]


@pytest.mark.parametrize("flags", ["", "--fusion late --vision-lr 0.1"])
def test_decay_is_fully_decoupled(flags):
    """With no gradient, a step at the peak rate shrinks weights by weight_decay, whatever the rate
    is, and leaves gains and positions alone."""
    run = run_of("--lr", "0.02", "--weight-decay", "0.25", *flags.split())
    model = train.Model(run.model)
    optimizer = train.make_optimizer(model, run.train, CPU)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 0.75 if p.ndim >= 2 and "positions" not in name else 1.0
        torch.testing.assert_close(p.detach(), before[name] * share)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.defaults["eps"] == 1e-8
    for moments in optimizer.state.values():  # paper, App. A: betas of 0.9 and 0.95
        torch.testing.assert_close(moments["exp_avg"], 0.1 * torch.ones_like(moments["exp_avg"]))
        assert moments["exp_avg_sq"].flatten()[0] == pytest.approx(0.05)


def test_gradients_are_clipped(tmp_path):
    """To a norm far below AdamW's eps: then nothing is learned."""
    trained(tmp_path, "--tokens", "5K", "--grad-clip", "1e-12", "--weight-decay", "0")
    assert min(line["loss"] for line in read_log(only_run(tmp_path))) > 5


def test_the_seed_decides_weights_and_data():
    a, b, c = (train.Trainer(run_of("--seed", seed), CPU) for seed in "001")
    for what in (lambda t: t.model.head.weight, lambda t: torch.tensor(t.loader[0].tokens)):
        assert torch.equal(what(a), what(b)) and not torch.equal(what(a), what(c))


def test_results_say_what_the_paper_counts(tmp_path):
    row, = trained(tmp_path, "--tokens", "5K", "--fusion", "late").values()
    assert row["D"] == row["steps"] * row["tokens_per_step"] == 5120
    assert row["C"] == 6 * (row["N"] * row["D"] + row["N_vision"] * row["D_vision"])
    loader = train.Loader(run_of().data, 0, run_of().model)
    rows = [loader[g] for g in range(40)]
    assert row["D_vision"] == sum((r.patch >= 0).sum() for r in rows) and row["status"] == "ok"
    assert row["padding"] == pytest.approx(1 - sum(r.used for r in rows) / row["D"], abs=1e-4)
    kinds = ("caption", "interleaved", "text")
    assert row["loss"] == pytest.approx(sum(row[f"loss_{k}"] for k in kinds) / 3)
    assert row["floor"] == pytest.approx(sum(row[f"floor_{k}"] for k in kinds) / 3)
    for name in ("run fusion moe n_experts top_k width depth N N_total N_vision N_nonembedding D "
                 "D_vision C loss loss_caption floor_text mixture image_size patch_size context "
                 "tokens_per_step steps lr seed tok_per_s peak_mem_mb wall_s device torch git "
                 "status").split():
        assert name in row
    names = [*row]  # tools.table names a line by the first of those that tell it apart
    first = [names.index(name) for name in ("fusion", "width", "image_size", "context", "lr")]
    assert first == sorted(first)
    lines = read_log(only_run(tmp_path), "speed.jsonl")
    assert [line["step"] for line in lines] == list(range(10))
    seconds = [line["wall_s"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] > 0 and lines[-1]["tok_per_s"] > 0


def test_mfu_is_a_share_of_each_card():
    trainer = train.Trainer(run_of("--fusion", "late"), CPU)
    trainer.machine = replace(CPU, ranks=2, peak=1e7)
    trainer.step, n = 4, trainer.model.num_params()
    trainer.stats |= {"timed": 2, "spent": 1.0, "D_vision": 1024}  # half of all; 1024 a second
    flops = 6 * (n["N"] + n["N_vision"] / 2) * 1024
    assert trainer.speed()["mfu"] == pytest.approx(flops / 2 / 1e7, abs=1e-4)


def test_a_second_ctrl_c_ends_at_once_in_one_line():
    stop = train.StopSignal()
    stop.ask(signal.SIGINT, None)
    assert stop.asked
    one_line(SystemExit, stop.ask, signal.SIGINT, None)


# -- before a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, word", [
    (["--preset", "275m", "--fusion", "late", "--image-size", "32", "--patch-size", "8"], "preset"),
    (["--preset", "275m", "--width", "16", "--image-size", "32", "--patch-size", "8",
      "--tokens-per-step", "1024", "--warmup", "2"], "preset"),
    (["--warmup", "1000"], "warmup"),
    (["--tokens", "700"], "tokens")])
def test_what_is_legal_but_perhaps_not_meant_is_noted(flags, word):
    run = run_of("--tokens", "20K", *flags)
    loader = train.Loader(run.data, 0, run.model)
    assert any(f"--{word}" in note for note in train.notes(run, 0, loader))
    assert not train.notes(run_of("--tokens", "20K"), 0, loader)


def test_vision_learning_rate_zero_freezes_the_encoder(tmp_path):
    trained(tmp_path, "--tokens", "5K", "--fusion", "late", "--vision-lr", "0")
    torch.manual_seed(0)
    before = train.Model(run_of("--fusion", "late").model).state_dict()
    for name, value in read_weights(only_run(tmp_path))[1].items():
        frozen = name.startswith("vision.") and "connector" not in name
        assert torch.equal(value, before[name]) == frozen, name
    trainer = train.Trainer(run_of("--fusion", "late", "--vision-lr", "0"), CPU)
    trainer.model(next(trainer.loader.val_batches("caption", 2))).loss.backward()
    learned = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert {n for n in learned if n.startswith("vision.")} == {"vision.connector.weight"}


# -- the paper's experiments ---------------------------------------------------------------------


def test_both_parts_can_be_initialised(tmp_path):
    """The decoder of a text-only run, the encoder of a late one, or both of one; at rate 0."""
    trained(tmp_path / "text", "--tokens", "5K", "--mixture", "0-0-100")
    trained(tmp_path / "late", "--tokens", "5K", "--fusion", "late", "--seed", "1",
            "--checkpointing")
    text, late = (str(only_run(tmp_path / name)) for name in ("text", "late"))
    still = ["--fusion", "late", "--tokens", "5K", "--lr", "1e-20", "--weight-decay", "0"]
    trained(tmp_path / "both", *still, "--init", text.replace("-s0", "-s{seed}"),
            "--init-vision", late)
    again, = trained(tmp_path / "again", *still, "--init", late).values()
    assert again["init"] == late and not run_of("--init", late).model.checkpointing
    refused(f"--init-vision {text}", trained, tmp_path / "wrong", *still,
            "--init-vision", text)  # early fusion has no encoder
    text, late, both, again = (read_weights(only_run(tmp_path / name))[1]
                               for name in ("text", "late", "both", "again"))
    for name, value in both.items():
        assert torch.allclose(value, (late if name.startswith("vision.") else text)[name]), name
        assert torch.allclose(again[name], late[name]), name


def test_weights_that_were_trained_on_start_another_run(tmp_path):
    """The path is the same, and the numbers of before would be no answer."""
    trained(tmp_path, "--tokens", "5K")
    start = ["--init", str(only_run(tmp_path)), "--tokens", "5K"]
    before = run_of(*start).name
    path = only_run(tmp_path) / "ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["model"]["blocks.0.attention.q.weight"] = 2 * ckpt["model"]["blocks.0.attention.q.weight"]
    torch.save(ckpt, path)
    assert run_of(*start).name != before


def test_flags_that_contradict_the_weights_are_refused(tmp_path):
    """Sizes come from them, and what would not show in the shape of a parameter is refused."""
    trained(tmp_path, "--width", "24", "--depth", "2", "--heads", "2", "--tokens", "2K")
    start = ["--init", str(only_run(tmp_path)), "--tokens", "5K"]
    shape = train.parse_runs(start)[0].model
    assert (shape.width, shape.depth, shape.context) == (24, 2, 128)
    refused("--heads 4", train.parse_runs, [*start, "--heads", "4"])
    refused("--preset 289m has fusion late", train.parse_runs, [*start, "--preset", "289m"])
    path = only_run(tmp_path) / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    saved["config"]["data"]["tokenizer_hash"] = 1
    torch.save(saved, path)
    packed = repeated(tmp_path / "packed", 10**6)
    meta = json.loads((packed / "data.json").read_text("utf-8"))
    write_rows(packed / "data.json", [meta | {"tokenizer_hash": 1}])
    train.parse_runs([*start, "--data", str(packed)])
    write_rows(packed / "data.json", [meta | {"tokenizer_hash": 2}])
    refused("another tokenizer", train.parse_runs, [*start, "--data", str(packed)])


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags, named", [
    ("--widht 32", "--width"), ("--width 16,32", "tools.sweep"),
    ("--fusion early,late", "tools.sweep"), ("--width 33", "width 33"), ("--width abc", "--width"),
    ("--width 16.5", "--width"), ("--context 8", "context 8"), ("--image-size 30", "image"),
    ("--tokens-per-step 100", "multiple of --context"), ("--preset huge", "--preset huge"),
    ("--data no/such/folder", "no/such/folder"),
    *((f"--mixture {mixture}", f"--mixture {mixture}")
      for mixture in ("45-45", "50-50-50", "a-b-c", "45-45-10-1", "10" + 9 * "-10")),
    ("--seed 1.5", "--seed"), ("--compile yes", "--compile"), ("--granularity 2", "granularity"),
    ("--granularity 0", "below 1"), ("--depth 0", "--depth 0"), ("--heads -1", "--heads -1"),
    ("--fusion middle", "early"), ("--val-rows 0", "below 1"), ("--workers -2", "below -1"),
    ("--patch-size 0", "below 1"), ("--lr nan", "--lr nan is below 0"), ("--moe x", "modality"),
    *((f"--tokens {count}", "--tokens") for count in ("5Q", "0", "-1", "2,5B", "1e999", "nan")),
    ("--init no/such/run", "no/such/run"), ("--init-vision no/such/run", "--fusion late")])
def test_mistakes_end_in_one_line_before_anything_is_written(tmp_path, flags, named):
    line = one_line(SystemExit, train.main, [*FLAGS, "--out", str(tmp_path), *flags.split()])
    assert named in line and not list(tmp_path.iterdir())


def test_a_context_that_is_too_short_to_validate_ends_before_training(tmp_path):
    refused("--context 64: no interleaved document", trained, tmp_path, "--context", "64",
            "--tokens", "2K")
    assert not [*tmp_path.glob("*/log.jsonl")]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x", "utf-8")
    refused("file.*--out", trained, tmp_path / "file", "--tokens", "2K")
    assert (tmp_path / "file").read_text("utf-8") == "x"


def test_a_run_learns_at_the_scheduled_rate_and_its_loss_is_in_nats(tmp_path):
    """The floor is the README's. Experts are balanced only where their loss has a weight."""
    run, logs = run_of("--tokens", "20K"), {}
    for weight in ("0", "1"):
        out = tmp_path / weight
        row, = trained(out, "--tokens", "20K", "--load-balancing-weight", weight, "--moe",
                       "learned").values()
        assert row["load_balancing_weight"] == float(weight)  # by which tools.table can tell them
        logs[weight] = read_log(only_run(out))
        rates = [line["lr"] / run.train.lr for line in logs[weight]]
        assert rates == pytest.approx([train.rate_at(step, run) for step in range(run.steps)])
        assert logs[weight][0]["load_balancing_loss"] == pytest.approx(1)  # of an even load
        assert row["floor"] == pytest.approx(0.094, abs=0.002)
        assert 1 < row["loss"] < 0.5 * logs[weight][0]["loss"]
    balance = [logs[weight][-1]["load_balancing_loss"] for weight in ("0", "1")]
    assert balance[1] < 0.7 * balance[0]
