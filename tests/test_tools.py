"""The tools that read runs: table, curves and score."""
import json
import random
import re
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import train
from data import DataConfig, Procedural, get_tokenizer, patchify
from helpers import FLAGS, ROOT, python, read_log, refused, tiny, write_rows
from model import ModelConfig, on_meta, training_memory
from test_pack import llava, pack_one, picture, write_texts
from tools import board, curves, plan, score, sizes, sweep, table
from world import QUESTIONS

ENCODING, SHAPE = get_tokenizer(), tiny()
TINY = [*FLAGS, *"--depth 2 --context 256 --tokens 10K --eval-every 10".split()]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a run trained on conversations and one trained on the default mixture."""
    out = tmp_path_factory.mktemp("study")
    train.main([*TINY, "--out", str(out), "--mixture", "0-0-0-100"])
    train.main([*TINY, "--out", str(out), "--fusion", "late"])
    return out


@pytest.fixture(scope="module")
def sft_run(study):
    return next(study.glob("early*"))


def row(moe, seed, loss, **more):
    return {"run": f"{moe}-s{seed}", "moe": moe, "n_experts": 1 if moe == "none" else 4, "N": 1000,
            "D": 5120, "steps": 10, "tokens_per_step": 512, "loss": loss, "mixture": "45-45-10",
            "seed": seed, "tok_per_s": 100.0, "wall_s": 3.0 + seed, "status": "ok", **more}


ROWS = [row("none", 0, 1.0), row("none", 1, 1.2), row("none", 2, 1.4),
        row("learned", 0, 0.9), row("learned", 1, 1.0), row("learned", 2, 1.3)]


def cells(capsys, tmp_path, rows, *flags):
    """The printed table: a dict a line; and all that was printed."""
    write_rows(tmp_path / "results.jsonl", rows)
    table.main([str(tmp_path), *flags])
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]], text


def test_seeds_are_pooled_and_only_fields_that_vary_are_columns(capsys, tmp_path):
    (none, learned), _ = cells(capsys, tmp_path, ROWS)
    assert list(none) == ["moe", "n", "N", "D", "loss", "tokens/s", "Δ loss, %"]
    lines, _ = cells(capsys, tmp_path, ROWS, "--by", "moe,tokens_per_parameter,caption_share")
    assert [[line[x] for x in ("tokens_per_parameter", "caption_share")] for line in lines] == [
        ["5.12", "45"]] * 2
    assert [*none.values()][1:] == ["3", "1,000", "5,120", "1.2000 ± 0.2000", "100", "reference"]
    assert learned["moe"] == "learned" and learned["loss"] == "1.0667 ± 0.2082"
    rows = [{**r, "mfu": 0.4 + 0.01 * i, "facts_bits": i} for i, r in enumerate(ROWS)]  # measured
    assert [line["n"] for line in cells(capsys, tmp_path, rows)[0]] == ["3", "3"]
    rows = [{**r, "init": f"runs/text-s{r['seed']}"} for r in ROWS]  # differs as the seed does
    lines, _ = cells(capsys, tmp_path, rows, "--by", "moe")
    assert [line["n"] for line in lines] == ["3", "3"]


def test_a_run_that_two_studies_share_is_in_both(capsys, tmp_path):
    rows = [{**r, "study": study} for study in ("moe", "pairs") for r in ROWS]
    for rules in (["study=moe"], ["study!=pairs", "loss<2"]):
        flags = [word for rule in rules for word in ("--where", rule)]
        lines, _ = cells(capsys, tmp_path, rows, *flags, "--by", "moe")
        assert [line["n"] for line in lines] == ["3", "3"]
    assert cells(capsys, tmp_path, [*ROWS, ROWS[0] | {"loss": 1.6}])[0][0]["loss"][:3] == "1.4"
    rows = [r | {"scored": data, "accuracy": x * r["loss"]}  # asked about two data sets
            for data, x in (("a", 0.1), ("b", 0.3)) for r in ROWS[:3]]
    lines, _ = cells(capsys, tmp_path, rows, "--by", "scored", "--metric", "accuracy")
    assert [line["accuracy"] for line in lines] == ["0.1200 ± 0.0200", "0.3600 ± 0.0600"]


def test_two_folders_are_compared_as_two_studies(capsys, printed, tmp_path):
    for name, rows in (("before", ROWS[:3]), ("after", [{**r, "loss": 0.5} for r in ROWS[:3]])):
        (tmp_path / name).mkdir()
        cells(capsys, tmp_path / name, rows)
    said = printed(table.main, [str(tmp_path / "before"), str(tmp_path / "after"), "--by", "study",
                                "--against", "study=before"])
    after = next(line for line in said.splitlines() if "| after" in line)
    assert "0.5000 ± 0.0000" in after and "-57.5 [" in after


def test_the_difference_is_paired_over_shared_seeds(capsys, tmp_path):
    """Losses in per cent of the other: 0.9 / 1.0, 1.0 / 1.2, 1.3 / 1.4, with t = 4.3027 at 2
    degrees of freedom. Other measures as they are."""
    (_, learned), _ = cells(capsys, tmp_path, ROWS, "--by", "moe,experts")
    apart = [-10, -100 / 6, -100 / 14]
    mean, half = np.mean(apart), 4.302653 * np.std(apart, ddof=1) / 3 ** 0.5
    assert learned["Δ loss, %"] == f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    (none, learned), _ = cells(capsys, tmp_path, ROWS, "--against", "moe=learned")
    assert none["Δ loss, %"].startswith("+12.9") and learned["Δ loss, %"] == "reference"
    rows = [{**r, "accuracy": r["loss"] / 2} for r in ROWS]
    (_, learned), _ = cells(capsys, tmp_path, rows, "--metric", "accuracy")
    assert learned["Δ accuracy"].startswith("-0.0667 [")


def test_without_pairs_it_is_welchs_and_of_single_runs_it_has_no_interval(capsys, tmp_path):
    """Variances 0.02 and 0.005 of two runs each: Welch has 1.47 degrees of freedom. In per cent of
    the other line's mean, 1.1."""
    rows = [*ROWS[:2], row("learned", 2, 0.9), row("learned", 3, 1.0)]
    (_, learned), _ = cells(capsys, tmp_path, rows)
    freedom = 0.0125 ** 2 / (0.01 ** 2 + 0.0025 ** 2)
    half = table.stats.t.ppf(0.975, freedom) * 0.0125 ** 0.5
    low, high = (100 * (-0.15 + sign * half) / 1.1 for sign in (-1, 1))
    assert learned["Δ loss, %"] == f"-13.6 [{low:+.1f}, {high:+.1f}] Welch"
    (_, learned), _ = cells(capsys, tmp_path, [ROWS[0], ROWS[3]])
    assert learned["Δ loss, %"] == "-10.0 [—]" and learned["loss"] == "0.9000"
    rows = [*ROWS[:3], row("learned", 2, 2.5), row("learned", 3, 4.5)]  # one seed in common
    (_, learned), _ = cells(capsys, tmp_path, rows)
    assert learned["Δ loss, %"].startswith("+191.7 [") and learned["Δ loss, %"].endswith("Welch")


def test_each_line_is_compared_with_its_like(capsys, tmp_path):
    rows = [row(moe, seed, loss * (1 + seed / 10) + width, width=width, run=f"{moe}{width}{seed}")
            for width in (16, 8) for moe, loss in (("none", 1.0), ("learned", 0.7))
            for seed in (-1, 1)]
    lines, _ = cells(capsys, tmp_path, rows, "--by", "width,moe", "--against", "moe=none")
    assert [line["Δ loss, %"][:4] for line in lines] == ["refe", "-3.3", "refe", "-1.8"]
    rows = [row("none", 0, 2.0), row("none", 0, 1.0, run="longer", steps=20),
            row("learned", 0, 0.9, N=2000, steps=20)]  # as many tokens count more than tokens / N
    flags = "--by", "moe,tokens_per_parameter", "--against", "moe=none"
    assert cells(capsys, tmp_path, rows, *flags)[0][-1]["Δ loss, %"] == "-10.0 [—]"
    rows = [row(width, 0, 1.0, n_experts=n, width=width, run=f"{n}{width}")
            for n in (8, 4, None) for width in (16, 32)]  # rows that lack a number come first
    lines, _ = cells(capsys, tmp_path, rows, "--by", "n_experts,width")
    assert [line["n_experts"][0] for line in lines] == [*"NN4488"]


def test_diverged_runs_are_counted_and_named(capsys, tmp_path):
    """Also when they ended before their last token."""
    bad = row("learned", 2, None, status="diverged", D=2048, tok_per_s=0.0)
    (_, learned), text = cells(capsys, tmp_path, [*ROWS[:5], bad])
    assert learned["n"] == "2 (+ 1 diverged)" and learned["loss"].startswith("0.9500")
    assert "diverged: learned-s2" in text and learned["tokens/s"] == "100"
    (_, learned), _ = cells(capsys, tmp_path, [*ROWS[:3], bad])
    assert (learned["n"], learned["loss"], learned["Δ loss, %"]) == ("0 (+ 1 diverged)", "—", "—")


@pytest.mark.parametrize("flags, named", [
    (["--by", "fusion"], "fusion"), (["--metric", "loss,lost"], "lost"),
    (["--by", "top-k"], "top-k"), (["--by", "mixture"], "--by .*moe"),
    (["--against", "moe=modality"], "moe=modality"), (["--plot", "moe"], "--plot moe"),
    (["--where", "moe"], "--where .*'moe'"), (["--where", "loss>9"], "loss>9"),
    (["--metric", "mixture"], "mixture"), (["no/such/folder"], "no/such/folder")])
def test_mistakes_end_in_one_clear_line(capsys, tmp_path, flags, named):
    refused(named, cells, capsys, tmp_path, ROWS, *flags)


def test_runs_that_would_share_a_line_are_refused_once_with_all_that_tells_them_apart(
        capsys, tmp_path):
    rows = [row("none", 0, 1.0), row("learned", 0, 0.9),
            row("none", 0, 0.8, steps=8) | {"run": "longer"}]
    refused("give --by mixture,moe,D$", cells, capsys, tmp_path, rows, "--by", "mixture")
    assert len(cells(capsys, tmp_path, rows, "--by", "mixture,moe,D")[0]) == 3


def test_a_field_that_older_rows_lack_tells_nothing_that_another_does():
    new, old = {"fusion": "early", "heads": 0, "code": "b"}, {"fusion": "early", "code": "a"}
    assert table.varying([new, old]) == ["code"]


def test_a_plot_against_a_share_of_the_mixture(capsys, tmp_path, monkeypatch):
    rows = [row("none", seed, share / 100 * (1 + seed * noise), mixture=f"{share}-{90 - share}-10",
                fusion=fusion, run=f"{fusion}{share}{seed}")
            for share in (20, 70) for fusion, noise in (("early", 0.1), ("late", 0.2))
            for seed in (-1, 1)]
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda self, x, y, sd, label, **_:
                        drawn.append((label, [*x], [*np.round(y, 6)], [*np.round(sd, 6)]))
                        or self.plot(x, y, label=label))
    flags = "--plot", "caption_share", "--metric", "loss", "--out", str(tmp_path / "f.png")
    cells(capsys, tmp_path, rows, *flags)
    sd = np.round(np.array([[0.02, 0.07], [0.04, 0.14]]) * 2 ** 0.5, 6).tolist()
    assert drawn == [("early fusion", [20, 70], [0.2, 0.7], sd[0]),
                     ("late fusion", [20, 70], [0.2, 0.7], sd[1])]
    drawn.clear()  # early above late, in pairs of one seed: 0.9 / 0.8 and 1.1 / 1.2
    cells(capsys, tmp_path, rows, *flags, "--against", "fusion=late")
    (_, _, means, _), = drawn
    assert means == pytest.approx(2 * [50 * (0.9 / 0.8 + 1.1 / 1.2) - 100], abs=1e-5)


def test_curves_of_any_folders_over_tokens_flops_and_seconds(study, sft_run, pages,
                                                              tmp_path):
    """Also of one run alone. Names are words, and tell the runs apart."""
    late = next(study.glob("late*"))
    row = train.finished(study)[late.name]

    def drawn(*flags):
        curves.main([*map(str, flags), "--out", f"{len(pages)}.png"])
        axes = pages[f"{len(pages) - 1}.png"].axes
        return len(axes), {line.get_label(): line for ax in axes for line in ax.lines}

    for over, total in (("tokens", row["D"]), ("flops", row["C"]),
                        ("seconds", row["D"] / row["tok_per_s"])):
        n_axes, lines = drawn(study, "--over", over)
        assert set(lines) == {"early fusion, dense, width 16", "late fusion, dense, width 16"}
        last = max(line["step"] for line in read_log(late) if "val_loss" in line) + 1
        spent = lines["late fusion, dense, width 16"].get_xdata()
        assert spent[-1] == pytest.approx(total * last / row["steps"])
    for over, seen in (("tokens", 1), ("flops", 0)):  # of a run that has not ended
        (tmp_path / "new").mkdir(exist_ok=True)
        for name in ("log.jsonl", "config.json"):
            (tmp_path / "new" / name).write_bytes((late / name).read_bytes())
        assert len(curves.read([tmp_path], over)[0]) == seen
    assert drawn(late, sft_run)[0] == n_axes
    line = drawn(late)[1]["late fusion, dense, width 16"]  # of the last panel
    assert [*line.get_ydata()] == [step["val_loss_text"] for step in read_log(late)
                                  if "val_loss" in step]


def test_a_curve_is_named_by_what_decides_it():
    """Not by the folder it lies in, which two rates of learning also differ in."""
    run = {"fusion": "early", "moe": "none", "width": 16, "seed": 0}
    told = curves.names([{**run, "lr": lr, "out": f"runs/{lr}"} for lr in (0.01, 0.02)])
    assert told == [f"early fusion, dense, width 16, lr {lr}" for lr in (0.01, 0.02)]


@pytest.mark.parametrize("text,normal", [
    ("The  two dogs.", "2 dogs"), ("dont", "don't"), ("1,000", "1000"), ("3.5", "3.5"),
    ("U.S.A.", "usa"), ("black/white", "black white"), ("black / white", "black white"),
    ("T-shirt", "t shirt"), ("yes!", "yes"), ("red, blue", "red blue"), ("red,blue", "red blue"),
    ("10:30", "10:30"), ("man's", "man's"), ("None", "0"), ("an apple\na pear", "apple pear"),
    ("couldnt've", "couldn't've"), ("Im", "im"), ("1,000 t-shirts", "1000 tshirts"), ("", "")])
def test_vqa_normalise_does_what_the_official_evaluation_does(text, normal):
    assert score.vqa_normalise(text) == normal


def test_vqa_accuracy_of_ten_references_and_of_one():
    """With k equal references: k of the 10 subsets have k - 1 of them, the others k."""
    for k, right in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        references = ["Two."] * k + ["three"] * (10 - k)
        assert score.vqa_accuracy("the 2", references) == pytest.approx(right)
    assert score.vqa_accuracy("A cat.", ["cat"]) == 1 and score.vqa_accuracy("cats", ["cat"]) == 0


def test_cider_d_of_captions_whose_value_is_known():
    """All n-grams differ between the two pictures, so each of the four cosines is 1; of a text of
    two words only two of the four exist. "x x" for "x": the count is clipped to 1, with a weight of
    ln 2 each the cosine is 1 / 2, one of the four, and it is one word longer."""
    texts, short = ["a red cat sleeps", "one blue dog runs"], ["red cat", "blue dog"]
    assert score.cider_d(texts, [[text] for text in texts]) == pytest.approx(10)
    assert score.cider_d(short, [[text] for text in short]) == pytest.approx(5)
    upper = [text.upper() for text in texts]
    assert score.cider_d(upper, [[text, "x"] for text in texts]) == pytest.approx(5)  # 10 and 0
    assert score.cider_d(texts, [["two green hens sit"], ["it rains very hard"]]) == 0
    assert score.cider_d(texts[:1], [texts[:1]]) == 0  # no idf without other pictures
    part = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4  # of the n-grams are in the reference
    assert score.cider_d(["a red cat eats", texts[1]], [*zip(texts)]) == pytest.approx(5 + 5 * part)
    longer = 10 * (0.5 / 4) * np.exp(-1 / 72)
    assert score.cider_d(["x x", "z"], [["x"], ["y"]]) == pytest.approx((longer + 0) / 2)


def text_of(prompt):
    ids = [i for part in prompt if isinstance(part, list) for i in part]
    return ENCODING.decode([i for i in ids if i != ENCODING.eot_token])


def vqa(folder, records):
    (folder / "images").mkdir()
    (folder / "images" / "red.png").write_bytes(picture())
    (folder / "vqa.json").write_text(json.dumps(records), "utf-8")
    return folder / "vqa.json"


RECORDS = [llava("red.png", "<image>\nwhat colour?", "red") | {
               "answers": ["red", {"answer": "red"}, "dark red"]},  # LLaVA's way and VQA's
           llava(None, "one?", "two", "three?", "four") | {"answers": ["to which?"]}]


def test_conversations_become_questions_with_their_history(tmp_path):
    documents = score.conversations(vqa(tmp_path, RECORDS), SHAPE, ENCODING)
    first, second, third = score.exchanges(documents, SHAPE, ENCODING)
    assert first[1][1].shape == (4, 48) and text_of(first[1]) == "\nquestion: what colour?\nanswer:"
    assert first[2] == ["red", "red", "dark red"]
    assert text_of(second[1]) == "\nquestion: one?\nanswer:" and second[2] == ["two"]
    assert text_of(third[1]) == text_of(second[1]) + " two\nquestion: three?\nanswer:"
    assert third[1].count([ENCODING.eot_token]) == 2 and third[2] == ["four"]  # also after " two"


def test_held_out_captions_keep_their_pictures():
    """Several to a row, each with its own. A caption is the answer to its picture."""
    cfg, rng = ModelConfig(context=256), random.Random("val/caption")
    source = Procedural(DataConfig(), 0, cfg)
    found = score.held_out(SimpleNamespace(cfg=cfg), {"mixture": "100-0-0", "tokenizer": "bytes"},
                           "procedural", 4)
    for _, (start, image), (truth,) in score.exchanges(found, cfg, ENCODING):
        document = source.document("caption", rng, "val")
        assert start == [ENCODING.eot_token]
        assert np.array_equal(image, patchify(document.images[0], cfg.patch_size))
        assert truth == ENCODING.decode(document.tokens[1:].tolist()).strip()


def test_held_out_questions_come_from_all_over_a_packed_set(tmp_path):
    """Not from its beginning, which is the first file, and never the rest of one that was cut."""
    for name in ("a", "b"):
        records = [llava(None, f"{i}?", name) for i in range(100)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records), "utf-8")
    pack_one(tmp_path, "text", write_texts(tmp_path / "t.jsonl", "t"))
    pack_one(tmp_path, "conversation", tmp_path / "*.json", split="val")
    model = SimpleNamespace(cfg=tiny(context=64))
    found = [*score.held_out(model, {"mixture": "0-0-0-100", "tokenizer": "bytes"},
                             str(tmp_path / "out"), 20)]
    answers = [tokens[-1] for _, tokens, *_ in found]
    assert len(found) == 20 and abs(answers.count(ord("a")) - 10) <= 1
    assert all(tokens[0] == ENCODING.eot_token for _, tokens, *_ in found)


def test_score_names_what_it_cannot_find(sft_run, tmp_path):
    path = vqa(tmp_path, [{**RECORDS[0], "image": "blue.png"}])
    broken = tmp_path / "broken.json"
    broken.write_text("{", "utf-8")
    for flags, named in ((["no/run"], "no/run"), ([sft_run, "--data", "no.json"], "no.json"),
                         ([sft_run, "--data", path], "vqa.json, record 0: missing image"),
                         ([sft_run, "--data", broken], broken.name), ([sft_run, "-n", 0], "-n 0")):
        refused(named, score.main, [*map(str, flags)])


def test_scores_of_a_model_that_knows_the_answers(sft_run, tmp_path, monkeypatch, capsys):
    """The tiny model knows nothing, so the true answers stand in for what it says."""
    truths = iter(["dark red", "two", "five"])
    monkeypatch.setattr(score, "generate",
                        lambda *_, **__: ENCODING.encode_ordinary(f" {next(truths)}"))
    out = tmp_path / "scores.jsonl"
    score.main([str(sft_run), "--data", str(vqa(tmp_path, RECORDS)), "--json", str(out)])
    result = json.loads(out.read_text("utf-8"))
    assert result["accuracy"] == pytest.approx((2 / 9 + 1 + 0) / 3) and result["n_scored"] == 3
    assert result["run"] == sft_run.name and result["width"] == 16  # the run's own row is in it
    assert result["study"] == sft_run.parent.name  # or runs of one name would be one line
    assert "true: 'two'" in capsys.readouterr().out
    said = 3 * [("a", "x", ["x"])] + [("b", "x", ["y"])]
    assert score.scores(said)["accuracy"] == 0.75  # the mean of questions, not of kinds


def test_a_prompt_that_fills_the_context_is_a_wrong_answer(sft_run, tmp_path, printed):
    source = vqa(tmp_path, 2 * [llava(None, "why? " * 100, "because")])
    said = printed(score.main, [str(sft_run), "--data", str(source), "-n", "1"])
    assert "accuracy 0, cider_d 0, n_scored 1" in said


def test_several_runs_are_asked_about_what_they_were_trained_on(study, tmp_path, printed):
    """A path that is no run, as in the glob study/*, is named and skipped."""
    paths, out = [str(path) for path in sorted(study.glob("*"))], str(tmp_path / "scores.jsonl")
    said = printed(score.main, [*paths, "-n", "2", "--max-new-tokens", "4", "--json", out])
    assert f"{study / 'results.jsonl'} is skipped" in said
    early, late = map(json.loads, Path(out).read_text("utf-8").splitlines())
    assert (early["fusion"], early["n_scored"], early["scored"]) == ("early", 8, "procedural")
    assert {f"accuracy_{kind}" for kind in QUESTIONS} <= {*early}
    assert early["loss"] == pytest.approx(np.mean([early[f"loss_{kind}"] for kind in QUESTIONS]))
    assert late["fusion"] == "late" and "accuracy_caption" in late
    assert "accuracy_colour" in printed(table.main, [out, "--by", "fusion"])


# -- board -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_a_board_gets_every_curve_with_its_step(to, tmp_path, monkeypatch):
    """Fakes stand for the two packages, which need not be installed."""
    sent = []

    class Fake(ModuleType):
        def init(self, **options):
            return self

        def define_metric(self, *names, **options):
            pass

        def log(self, values):
            sent.append((*values.items(),))

        def SummaryWriter(self, folder, purge_step):
            assert folder == tmp_path / "board" / "a" and purge_step == 0  # all is sent anew
            return self

        def add_scalar(self, key, value, step):
            sent.append(((key, value), ("training step", step)))
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, Fake(name))

    def sleep(seconds):  # while it does, the run goes on; then comes Ctrl-C
        if len(sent) == 3:
            raise KeyboardInterrupt
        with open(log, "a", encoding="utf-8") as file:
            file.write('ss": 4.0}\n')  # the rest of a line that was being written
    monkeypatch.setattr("time.sleep", sleep)
    log = tmp_path / "a" / "log.jsonl"
    log.parent.mkdir()
    full = '{"step": 0, "loss": 5.0}\n{"st\n{"step": 1, "lo'  # the disk was, for a moment
    log.write_text(full, encoding="utf-8")
    log.with_name("speed.jsonl").write_text('{"step": 0, "tok_per_s": 9}\n', encoding="utf-8")
    board.main([str(tmp_path), "--to", to, "--follow"])
    assert sent == [((key, value), ("training step", step)) for key, value, step in (
        ("loss", 5.0, 0), ("tok_per_s", 9, 0), ("loss", 4.0, 1))]


# -- plan ------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_run_takes_and_trains_nothing(tmp_path, monkeypatch):
    """From any folder. The time is the median of three micro-steps, here 3, times their number."""
    flags = "--dry-run --width 16 --tokens 1M".split()
    said = python(ROOT / "train.py", *flags, cwd=tmp_path).stdout
    assert "1,953 steps" in said and "time: 0:0" in said and "padding: 0" in said
    assert not list(tmp_path.iterdir())
    run, = train.parse_runs([*TINY, "--micro-rows", "1"])  # 20 steps of 2 micro-steps
    clock = iter([0, 5, 7, 10]).__next__
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=clock))
    assert plan.measured_seconds(run, train.Machine.start("cpu")) == 20 * 2 * 3


def tokens_of(said):
    return int(re.search(r"D ([\d,]+)", said)[1].replace(",", ""))


def test_a_dry_run_for_gpus_that_are_not_here(printed):
    """8 H100 at MFU 0.5 and 3 dollars: 6 N D FLOPs decide hours and price."""
    assert (plan.cards_of("8xh100").mfu, plan.cards_of("8xh100x0.5").price) == (0.4, 0)
    flags = ["--preset", "932m", "--tokens", "10B"]
    said = printed(plan.main, [*flags, "--gpus", "8xh100x0.5x3"])
    hours = 6 * 931_676_160 * 10e9 / (8 * 989e12 * 0.5) / 3600
    assert f"time: {str(timedelta(hours=hours))[:4]}" in said
    assert f"{hours * 8 * 3:.0f} dollars" in said
    cfg = train.make_runs({"preset": "932m"})[0].model
    D, (fixed, row) = tokens_of(said), training_memory(cfg, 8)
    captions = 0.45 * D / (77 + 256)  # of 77 tokens and an image of 16 x 16 patches
    size = captions * (4 * 77 + 3 * 256 * 256 * 4 / 3) / 1e9
    for line in (f"memory: {(fixed + 16 * row) / 1e9:.1f} GB of 80",
                 f"disk: {24 * on_meta(cfg).num_params()['N_total'] / 1e9:.2f} GB",
                 f"{0.45 * D:,.0f} tokens; of DFN or COYO: {captions:,.0f} samples, {size:,.1f} GB",
                 "of OBELICS", "of DCLM"):
        assert line in said
    said = printed(plan.main, [*flags, "--shard", "--gpus", "8xh100"])
    fixed, row = training_memory(cfg, 8, True)
    rows = int(re.search(r"steps of (\d+) rows", said)[1])
    assert f"memory: {(fixed + rows * row) / 1e9:.1f} GB of 80" in said
    refused("--gpus 8xh100", plan.main, [*flags, "--shard", "--gpus", "1xh100"])
    refused("checkpointing|shard", plan.main,
            ["--preset", "8.13b", "--tokens", "10B", "--gpus", "1xa100"])


def test_samples_are_those_of_the_published_data():
    """OBELICS: 115B tokens and 353M images in 141M documents; DCLM: 4T in 3B (their own papers)."""
    told = {"interleaved": (115e9 / 141e6, 353e6 / 141e6), "text": (4e12 / 3e9, 0)}
    for kind, sample in told.items():
        assert plan.SAMPLES[kind][1:] == pytest.approx(sample, rel=0.01)


def test_a_dry_run_of_a_paper_size_needs_neither_its_data_nor_its_gpu(printed):
    """The share of images is the paper's, 0.544 (App. C.2), and nothing so large is built here."""
    said = printed(plan.main, ["--preset", "289m", "--tokens", "5B", "--gpus", "8xh100"])
    n = on_meta(train.make_runs({"preset": "289m"})[0].model).num_params()
    D = tokens_of(said)
    flops = 6 * D * (n["N"] + 0.544 * n["N_vision"])
    assert float(re.search(r"C (\S+) FLOPs", said)[1]) == pytest.approx(flops, rel=2e-3)
    refused("--gpus", plan.main, ["--preset", "8.13b", "--tokens", "5B", "--device", "cpu"])


def test_a_dry_run_of_a_sweep_adds_up(printed):
    """6 N D at MFU 0.5; the shorter budget costs its cooldown only, a fifth of it. Of two sizes on
    two GPUs the larger takes longer; on one, or where each takes both, they follow each other."""
    flags = ["--preset", "275m,464m", "--tokens", "1B,4B", "--dry-run", "--gpus"]
    larger, smaller = (6 * N * (4e9 + 0.2e9) / (989e12 * 0.5) / 3600
                       for N in (464_027_648, 274_841_600))
    both = larger + smaller
    for gpus, more, at_once, dollars in ((1, "", 1, both), (2, "", 2, 2 * larger),
                                         (2, "--ranks=2", 1, both), (2, "--jobs=1", 1, 2 * both)):
        said = printed(sweep.main, [*flags, f"{gpus}xh100x0.5x1", *more.split()])
        last, disk = said.splitlines()[-1], sum(map(float, re.findall(r"disk: (\S+)", said)))
        assert float(last.split()[-4]) == pytest.approx(disk, abs=0.03)
        assert f"all 4 runs, {at_once} at a time" in last and f" {dollars:.0f} dollars" in last
        assert ("in use" in last) == (at_once > 1 and smaller < 0.6 * larger)


@pytest.mark.parametrize("read, texts", [
    (plan.cards_of, ["8xh100x4", "0xh100", "8xtpu", "8", "8xh100x0.4x-1", "xxxxxx", "8xh100xnan",
                     ""]),
    (sizes.in_flops, ["", "0", "nan", "24hx8xh100x4", "24hx", "1e20,,"])])
def test_gpus_and_budgets_that_mean_nothing(read, texts):
    for text in texts:
        refused("h100", read, text)
