"""tools.scoreboard and tools.game: verdicts and scores of rows whose answer is known."""
import io

import numpy as np
import pytest

import fit_laws
from helpers import ROOT, refused, write_rows
from tools import game, scoreboard, table

STUDY = str(ROOT / "results" / "laptop_study.jsonl")


def pairs(early, late=(1.0, 1.1, 1.2), width=16, **more):
    """A run of early and one of late fusion for each seed, with these losses."""
    return [{"study": "pairs", "run": f"{fusion}-w{width}-s{seed}", "fusion": fusion, "moe": "none",
             "width": width, "D": 1000, "seed": seed, "loss": loss, **more}
            for fusion, losses in (("early", early), ("late", late))
            for seed, loss in enumerate(losses)]


def verdicts(capsys, tmp_path, rows, *flags):
    """{the paper's claim: cells of its line}; of one that was not measured there are no cells."""
    scoreboard.main([write_rows(tmp_path / "rows.jsonl", rows), *flags])
    lines = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {cells[1]: cells for cells in lines if len(cells) == 5}
    missing = next(cells[0] for cells in lines if cells[0].startswith("Not measured"))
    for claim in (finding.claim for finding in scoreboard.FINDINGS):
        assert (claim in found) != (claim in missing)
    return found


LEAD = "early is lower than late (here of equal width)"


@pytest.mark.parametrize("early, verdict", [
    ((0.9, 1.0, 1.07), "**replicates**"),  # 10 % lower in each pair, although the seeds overlap
    ((1.1, 1.2, 1.33), "**does not**"),
    ((1.003, 1.098, 1.201), "**no effect** larger than 0.7 %"),
    ((0.8, 1.2, 1.1), "inconclusive")])
def test_a_verdict_follows_from_the_interval_of_the_pairs(early, verdict, capsys, tmp_path):
    cells = verdicts(capsys, tmp_path, pairs(early))[LEAD]
    assert cells[-1].startswith(verdict) and cells[3] == str(len(early))
    per_cent = 100 * (np.array(early) / (1.0, 1.1, 1.2)[:len(early)] - 1)
    half = table.stats.t.ppf(0.975, 2) * per_cent.std(ddof=1) / 3 ** 0.5
    assert cells[2].startswith(f"{per_cent.mean():+.1f} [{per_cent.mean() - half:+.1f}")


def test_the_loss_of_one_kind_takes_the_place_of_the_mean(capsys, tmp_path):
    rows = [row | {"loss_text": 3 - row["loss"]} for row in pairs((0.9, 1.0, 1.07))]
    assert "replicates" in verdicts(capsys, tmp_path, rows)[LEAD][-1]
    assert "does not" in verdicts(capsys, tmp_path, rows, "--loss", "loss_text")[LEAD][-1]


def test_so_many_seeds_decide():
    """With the number that it names the interval of the same spread leaves out 0; with one less it
    does not."""
    x = np.array([-1.0, -2.0, -9.0])
    seeds = int(scoreboard.judge(x, -1)[1].split()[2])
    half = [table.stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / n ** 0.5 for n in (seeds - 1, seeds)]
    assert half[1] <= 4 < half[0]


def test_only_runs_that_differ_in_the_setting_alone_are_pairs(capsys, tmp_path):
    """Late runs of another length are no partners, and a diverged run takes its pair away."""
    rows = pairs((0.9, 1.0, 1.07))
    for row in rows[3:]:
        row["D"] = 2000
    assert LEAD not in verdicts(capsys, tmp_path, rows)
    assert LEAD not in verdicts(capsys, tmp_path, pairs((1.0,)))  # one seed has no interval
    rows = pairs((0.9, 1.0, 1.07, 1.1), (1.0, 1.1, 1.2, None))
    assert verdicts(capsys, tmp_path, rows)[LEAD][3] == "3"


def test_a_flag_that_older_rows_do_not_name_is_shared(capsys, tmp_path):
    """They have its default. Another weight decay is another setting, another last digit is not."""
    rows = pairs((0.9, 1.0, 1.07), depth=4.000000000000001)
    for row in rows[:3]:
        row |= {"weight_decay": 1e-4, "depth": 4.000000000000002}
    assert verdicts(capsys, tmp_path, rows)[LEAD][3] == "3"
    for row in rows[:3]:
        row["weight_decay"] = 0.1
    assert LEAD not in verdicts(capsys, tmp_path, rows)


def test_a_pair_shares_what_no_side_of_the_finding_names(capsys, tmp_path):
    """8 experts at another rate, of late fusion or deeper than the dense models are no partners."""
    claim = "8 experts are lower than dense"
    dense = [row | {"study": "moe", "lr": 0.01} for row in pairs((1.0, 1.1, 1.2))[:3]]
    experts = [row | {"moe": "learned", "n_experts": 8, "top_k": 1, "granularity": 1,
                      "loss": 0.9 * row["loss"], "run": f"e{row['seed']}"} for row in dense]
    assert verdicts(capsys, tmp_path, dense + experts)[claim][-1] == "**replicates**"
    for other in ({"lr": 0.02}, {"fusion": "late"}, {"depth": 8}):
        rows = dense + [row | other for row in experts]
        assert claim not in verdicts(capsys, tmp_path, rows), other
    late = [row | {"moe": "learned", "n_experts": 8, "study": "pairs"} if row["fusion"] == "late"
            else row for row in pairs((1.0, 1.1, 1.2))]
    assert LEAD not in verdicts(capsys, tmp_path, late)
    both = dense + experts + [row | {"lr": 0.02, "run": row["run"] + "-2"}
                              for row in dense + experts]
    assert verdicts(capsys, tmp_path, both)[claim][3] == "3"  # the mean over the rates


def test_the_ends_of_a_lead_are_the_smallest_and_the_largest(capsys, tmp_path):
    """fixed_128 comes after fixed_16, although it would not in a dictionary."""
    rows = [row | {"study": f"fixed_{width}", "run": f"{row['run']}-{width}"}
            for width, loss in ((16, 0.7), (32, 0.8), (128, 0.9))
            for row in pairs((loss, loss * 1.1, loss * 1.21), (1.0, 1.1, 1.21), width=width)]
    assert verdicts(capsys, tmp_path, rows)["this lead shrinks with size"][2].startswith("+20.0")
    refused("loss_txt", verdicts, capsys, tmp_path, rows, "--loss", "loss_txt")


def test_the_seeds_that_count_have_every_width(capsys, tmp_path):
    """The lead grows from 10 % to 20 %, where the paper found that it shrinks."""
    rows = pairs((0.9, 1.0, 1.07)) + pairs((0.8, 0.89), (1.0, 1.1), width=32)
    found = verdicts(capsys, tmp_path, rows)
    assert found[LEAD][3] == "2"
    change = found["this lead shrinks with width"]
    assert change[2].startswith("-10.0 [") and change[-1] == "**does not**"
    assert change[1] not in verdicts(capsys, tmp_path, pairs((0.9, 1.0, 1.07)))
    rows += [row | {"seed": 2, "run": row["run"] + "-64"} for row in rows[-4::2]]
    rows[-2:] = [row | {"width": 64} for row in rows[-2:]]  # seed 2 has widths 16 and 64
    assert verdicts(capsys, tmp_path, rows)[LEAD][3] == "2"


def test_two_runs_of_one_setting_are_refused(capsys, tmp_path):
    rows = pairs((0.9, 1.0, 1.07))
    rows.append(rows[0] | {"run": "again-w16-s0"})
    refused("again-w16-s0", verdicts, capsys, tmp_path, rows)


def test_the_readme_holds_what_the_tool_prints(printed):
    said = printed(scoreboard.main, [str(ROOT / "results" / "experiments.jsonl")])
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")


def largest(rows):
    return max(row["N"] for row in rows)


def test_the_game_scores_guesses_beside_a_law_that_has_not_seen_the_answers(capsys, tmp_path):
    """Its law is that of --holdout 1, and its hidden runs are those of the largest width."""
    rows = [r for r in fit_laws.read_rows(STUDY) if r["seed"] == 0]  # of several, it takes the mean
    study = write_rows(tmp_path / "study.jsonl", rows)
    truth = sorted((row["D"], row["loss"]) for row in rows
                   if row["fusion"] == "late" and row["N"] == largest(rows))
    guesses = ",".join(str(1.1 * loss) for _, loss in truth)
    you, law = game.main([study, "--group", "late", "--guess", guesses])
    assert you == pytest.approx(10)
    told, end = capsys.readouterr().out.split("you and the law")
    assert ("you beat" in end) == (you < law)
    assert f"{largest(rows):,}" not in told and f"{min(row['N'] for row in rows):,}" in told
    groups = fit_laws.main([study, "--bootstrap", "0", "--holdout", "1"])["groups"]
    held, = (group["holdout"] for group in groups if group["name"] == "late")
    assert law == pytest.approx(held["mae_pct"]) and held["n"] == len(truth)


def test_the_game_asks_for_what_is_not_given(monkeypatch):
    """And again where the answer is no loss."""
    asked, typed = [], iter(["abc", *5 * ["0.3"]])
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(typed))
    game.main([STUDY])
    hidden = f"{largest(fit_laws.read_rows(STUDY)):,}"
    assert len(asked) == 6 and len({*asked}) == 5 and all(hidden in line for line in asked)


@pytest.mark.parametrize("flags, named", [
    ("--guess 0.3,0.2", "5 losses"), ("--guess 1,1,1,1,x", "x"), ("--guess 1,1,1,1,-1", "-1"),
    ("--group mid", "early learned"), ("--gues 1", "--guess"), ("", "--guess")])
def test_mistakes_in_the_game_end_in_one_line(flags, named, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))  # nobody is there to play
    refused(named, game.main, [STUDY, *flags.split()])
