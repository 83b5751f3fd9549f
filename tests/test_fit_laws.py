"""fit_laws.py against planted laws, published answers, finite differences and bad tables."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fit_laws as fl
from helpers import ROOT, one_line, refused, write_lines, write_rows
from tools import fit_tables as ft
from tools.fit_tables import read_table, runs_of

FITS = ROOT.parent / "shared" / "fits"
shared = partial(read_table, FITS)
EARLY = np.array([np.log(270), np.log(1857), np.log(1.904), 0.301, 0.335])  # PAPER 2.1, 2.3
SPARSE = np.array([np.log(381773), np.log(4659), np.log(2.158), 0.710, 0.372])  # PAPER 2.3


def planted(coef, noise=0.0, tokens=12, name="early"):
    """A study of the paper's six sizes, and so many token counts."""
    return ft.plant(name, coef, noise, 0, tokens)


def write_results(folder, noise=0.002, seeds=1):
    """results.jsonl as train.py writes it: early and late, 4 sizes, 4 budgets."""
    rng, lines = np.random.default_rng(0), []
    laws = {"early": (np.log(60), np.log(800), np.log(0.9), 0.34, 0.40),
            "late": (np.log(66), np.log(800), np.log(0.9), 0.34, 0.40)}
    grid = [(N, D, s) for N in (50_000, 120_000, 300_000, 800_000)
            for D in (1_000_000, 2_000_000, 4_000_000, 8_000_000) for s in range(seeds)]
    for fusion, (N, D, seed) in ((f, g) for f in laws for g in grid):
        Nv, Dv = (int(0.5 * N**0.97) if fusion == "late" else 0), int(0.544 * D)
        loss = float(fl.predict(laws[fusion], N, D) * np.exp(noise * rng.normal()))
        lines.append({"run": f"{fusion}{N}-{D}-{seed}", "fusion": fusion, "moe": "none",
                      "width": N // 1000, "N": N, "N_vision": Nv, "D": D, "D_vision": Dv,
                      "C": 6 * (Nv * Dv + N * D), "loss": loss, "loss_caption": 0.8 * loss,
                      "loss_text": 1.2 * loss, "floor": 0.9, "floor_caption": 0.72,
                      "floor_text": 1.08, "mixture": "45-45-10", "seed": seed, "status": "ok"})
    lines.append(lines[0] | {"run": "broke", "status": "diverged", "loss": None})
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"run": "half wri'
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    return folder


def run(*args):
    return fl.main([str(a) for a in args])


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("coef", [EARLY, SPARSE])
def test_exact_planted_law_comes_back(coef):
    fit = fl.fit_law(planted(coef))
    np.testing.assert_allclose(fit.coef, coef, rtol=1e-6)
    assert fit.condition < 1e4 and not fit.flags and not fit.unidentified


def test_every_published_answer_within_its_error_and_the_page_of_fits(tmp_path, monkeypatch):
    """Besiroglu et al., Gadre et al., Llama 3, stated minima and exact tables: 52 numbers. What no
    noise enters of results/fits.md comes out again. The usual call stops above the minimum."""
    monkeypatch.setattr(ft, "measure", partial(ft.measure, starts=1, resamples=1))
    args = [FITS, "--studies", 12, "--resamples", 10, "--out", tmp_path / "fits.md"]
    ft.main([str(arg) for arg in args])
    ours, kept = (path.read_text("utf-8") for path in (args[-1], ROOT / "results" / "fits.md"))
    assert "Outside: 0 of 52." in ours
    exact = slice(kept.index("routed_lm"), kept.index("## Planted laws"))
    assert kept[exact] in ours
    assert float(re.search(r"F above the least .* (\S+) the best", ours)[1]) > 1e-6


def test_gradient_by_finite_differences():
    problem = fl.build_problem(planted(EARLY, noise=0.005), 1e-2)
    theta = problem.theta(EARLY) + 0.01 * np.array([1, -2, 0.5, 1, -1])
    weight = np.random.default_rng(1).integers(0, 3, len(problem.target)).astype(float)
    _, gradient = fl.objective(theta, problem, weight)
    for slope, step in zip(gradient, 1e-6 * np.eye(5)):
        up, down = (fl.objective(theta + s * step, problem, weight)[0] for s in (1, -1))
        assert slope == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-6)


def test_units_do_not_matter():
    """Parameters in billions, or absurdly large numbers: same exponents, same objective."""
    runs = planted(EARLY, noise=0.004)
    fit = fl.fit_law(runs)
    for n, d in ((1e-9, 1e-9), (1e30, 1e-6)):
        other = fl.fit_law(runs_of(runs.N * n, runs.D * d, runs.L))
        np.testing.assert_allclose(other.coef[2:], fit.coef[2:], rtol=1e-6)
        assert other.objective == pytest.approx(fit.objective, rel=1e-9)


def test_noise_leaves_no_bias_and_intervals_cover():
    """12 of the 200 studies of results/fits.md: late fusion and the sparse row among them."""
    errors, hits = np.concatenate(list(ft.coverage(12, 150).values()), 1)  # (2, 12, 5)
    assert (np.abs(errors.mean(0)) < 3.5 * errors.std(0) / np.sqrt(12)).all()
    assert hits.mean() >= 0.85 and (hits.mean(0) >= 0.75).all()


def test_bootstrap_matches_published_standard_errors():
    runs = shared("chinchilla_epoch", rule="kept240=1")
    weight = fl.draw_weights(runs, 400, 0)
    draws = fl.bootstrap(runs, fl.fit_law(runs), weight)
    assert (weight.sum(1) == 240).all()
    np.testing.assert_allclose(draws.std(0)[3:], [0.0154, 0.0206], rtol=0.15)
    np.testing.assert_allclose(np.exp(draws[:, 2]).std(), 0.026, rtol=0.15)


def test_small_tables_get_more_starts():
    """With 16 rows one resample in eight has another best minimum than the whole table."""
    runs = shared("steplaw_moe")
    weight = fl.draw_weights(runs, 40, 0)
    problem, fit = fl.build_problem(runs, 1e-3), fl.fit_law(runs)
    draws = problem.theta(fl.bootstrap(runs, fit, weight))
    ours = np.array([fl.objective(theta, problem, w)[0] for theta, w in zip(draws, weight)])
    warm = np.array([fl.minimise(problem, [problem.theta(fit.coef)], w).fun for w in weight])
    assert (ours < warm * (1 - 1e-4)).any() and (ours < warm * (1 + 1e-6)).all()


def test_constant_tokens_are_flagged_and_get_no_confident_interval(tmp_path, capsys):
    fit = fl.fit_law(shared("routed_lm"))
    assert {"B", "beta", "E"} <= set(fit.unidentified) and fit.condition > 1e12
    assert "D is the same" in fit.flags[0]
    table = FITS / "routed_lm.csv"
    out = tmp_path / "laws.json"
    group = run(table, "--bootstrap", 10, "--budget", "1e20", "--json", out)["groups"][0]
    assert group["ci"]["beta"] is None and group["ci"]["a"] is None
    said = capsys.readouterr().out
    assert f"{group['alpha']:.4f}?" in said and "times the parameters" not in said
    assert "routed_lm.csv" in said and "run two token counts" in said
    assert "NaN" not in out.read_text(encoding="utf-8")
    run(table, "--bootstrap", 0, "--budget", "1e20")


def test_ridge_is_flagged(tmp_path, capsys, pages):
    """Nothing says then which model is best, in words, numbers or the figure."""
    N = np.geomspace(1e7, 1e10, 30)
    L = fl.predict(EARLY, N, 20 * N)
    fit = fl.fit_law(runs_of(N, 20 * N, L))
    assert {"alpha", "beta"} <= set(fit.unidentified) and fit.condition > 1e5
    assert "ridge" in fit.flags[0]
    rows = [{"N": n, "D": 20 * n, "loss": loss, "moe": moe}
            for moe in ("none", "learned") for n, loss in zip(N, L)]
    found = run(write_rows(tmp_path / "ridge.jsonl", rows), "--budget", "1e20", "--bootstrap", 20,
                "--group-by", "moe", "--compare", "none", "learned", "--holdout", 1,
                "--out", tmp_path)
    said = capsys.readouterr().out
    assert np.isnan(found["groups"][0]["budgets"][0]["N"]) and "at C = 1e+20: N nan?" in said
    assert re.search(r"alpha +\S+\? \[\?, \?\]", said) and re.search(r"mean error \S+\? %", said)
    thick = [line for line in pages[str(tmp_path / "laws.png")].axes[0].lines
             if line.get_linewidth() == 2.5]
    assert len(thick) == 2 and all(np.isnan(line.get_ydata()).all() for line in thick)


def test_budgets_of_one_trunk_are_drawn_together():
    """Where the table says the seeds; of one seed, and of a table without, each run is drawn."""
    grid = [(N, D, s) for N in (1e4, 1e5) for D in (1e6, 2e6, 4e6) for s in range(3)]
    for several in (True, False):
        table = np.array([{"seed": s if several else 0} for *_, s in grid])
        weight = fl.draw_weights(SimpleNamespace(N=np.array([N for N, *_ in grid]), table=table),
                                 50, 0)
        assert weight.shape == (50, 18)
        spread = [np.ptp(weight[:, [g[0::2] == (N, s) for g in grid]], 1).max()
                  for N in (1e4, 1e5) for s in range(3)]  # within a trunk
        assert (max(spread) == 0) == several
    pooled = np.array([{"seed": s, "n_experts": n} for s in (0, 1) for n in (1, 8)])
    draws = fl.draw_weights(SimpleNamespace(N=np.ones(4), table=pooled), 50, 0)
    assert np.ptp(draws[:, :2], 1).max() > 0  # two models of one size and seed are two trunks
    draws = fl.draw_weights(SimpleNamespace(N=np.ones(9), table=np.array([{}] * 9)), 50, 0)
    assert (draws.sum(1) == 9).all() and np.ptp(draws[0]) > 0


@pytest.mark.parametrize("head, columns", [
    ("d,n,params,tokens,train_loss,val_loss", "9,{i},{N},{D},1,{L}"),  # a width, a row's number
    ('"N", "D", "loss"', '"{N}", "{D}", "{L}"')])
def test_columns_are_taken_by_their_clearest_name(tmp_path, head, columns):
    runs = planted(EARLY)
    lines = [columns.format(i=i, N=N, D=D, L=L)
             for i, (N, D, L) in enumerate(zip(runs.N, runs.D, runs.L))]
    group, = run(write_lines(tmp_path / "t.csv", head, *lines), "--bootstrap", 0)["groups"]
    assert group["alpha"] == pytest.approx(EARLY[3], rel=1e-6)


def test_a_loss_of_another_name_is_no_floor(tmp_path, capsys):
    runs = planted(EARLY)
    rows = [{"N": N, "D": D, "bpb": L} for N, D, L in zip(runs.N, runs.D, runs.L)]
    group, = run(write_rows(tmp_path / "t.jsonl", rows), "--loss", "bpb", "--bootstrap",
                 0)["groups"]
    assert np.isnan(group["floor"]) and "true floor" not in capsys.readouterr().out
    assert (runs.unit, replace(runs, floor=0.9).unit) == ("nats a token", "nats a byte")


def test_what_one_law_should_not_take_for_one_model_is_noted(tmp_path, printed):
    """Runs of an edited code beside the old ones. Early runs in one group with late ones leave
    the encoder's FLOPs as they are."""
    folder = write_results(tmp_path / "demo")
    rows = [row for row in fl.read_rows(folder) if row.get("loss")]
    assert "of another" not in printed(run, folder, "--bootstrap", 0)
    twin = rows[0] | {"run": "edited", "code": "new", "loss": 2 * rows[0]["loss"]}
    write_rows(folder / "results.jsonl", [*rows, twin])
    said = printed(run, folder, "--bootstrap", 0)
    assert re.search("early: 1 .*N, D and seed of another", said)
    assert "early: one seed" in said and "late: one seed" in said
    copies = [{k: row[k] for k in ("N", "D", "loss")} for row in rows if row["fusion"] == "late"]
    said = printed(run, write_rows(tmp_path / "twice.jsonl", copies * 2), "--bootstrap", 0)
    assert "all: 16 runs have" in said and "one seed" not in said
    args = fl.parse_args([str(folder), "--group-by", "", "--bootstrap", "0"])
    _, (pooled,) = fl.gather(args)
    assert pooled.runs.C.tolist() == [row["C"] for row in [*rows, twin]]


def test_groups_by_two_columns_have_two_names(tmp_path):
    rows = [{"N": N, "D": D, "loss": L + shift, "moe": moe, "aux": aux}
            for shift, moe, aux in ((0, "none", "8"), (1, "8", "none"))
            for N, D, L in zip(*(getattr(planted(EARLY), x) for x in "NDL"))]
    found = run(write_rows(tmp_path / "t.jsonl", rows), "--bootstrap", 0, "--group-by", "moe,aux")
    assert [group["name"] for group in found["groups"]] == ["none 8", "8 none"]


def test_loss_without_floor_is_flagged():
    N, D = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    L = 80 * N**-0.2 + 90 * D**-0.2
    fit = fl.fit_law(runs_of(N, D, L * np.exp(0.003 * np.random.default_rng(1).normal(size=36))))
    assert "E" in fit.unidentified


def test_exponents_of_the_paper():
    """Table 9's closed form and Table 2's early AVG row; many laws at once give the same."""
    v, sparse = fl.derive(EARLY), fl.derive(SPARSE)
    assert [round(v[k], 4) for k in "abd"] == [0.5267, 0.4733, 0.8985]
    assert [round(sparse[k], 4) for k in "abd"] == [0.3438, 0.6562, 1.9086]
    both = np.array([EARLY, SPARSE])
    assert (fl.derive(both)["a"] == [v["a"], sparse["a"]]).all()
    assert (fl.optimum(both, 1e21)[2] == [fl.optimum(c, 1e21)[2] for c in both]).all()
    assert np.isnan(fl.optimum([*EARLY[:3], -0.1, 0.3], 1e20)).all(), "there is no optimum"


@pytest.mark.parametrize("vision", [(0.544, -0.5, 0.95), (0.544, -12, 1.6), (3.0, 0.0, 0.5)])
def test_late_optimum_is_the_best_of_a_fine_grid(vision):
    C = 1e21
    N, D, loss = fl.optimum(EARLY, C, vision)
    grid = np.geomspace(N / 3, N * 3, 20001)
    best = fl.predict(EARLY, grid, C / (6 * (grid + vision[0] * fl.encoder(grid, vision))))
    assert loss <= best.min() + 1e-12 and grid[best.argmin()] == pytest.approx(N, rel=1e-3)
    assert 6 * D * (N + vision[0] * fl.encoder(N, vision)) == pytest.approx(C)


def test_envelope_recovers_a_power_law():
    C = np.geomspace(1e18, 1e22, 30)
    L = 30 * C**-0.049
    assert fl.envelope(C, L, 3e19) == pytest.approx(-0.049, rel=1e-9)
    both = fl.envelope(np.r_[C, C], np.r_[1.3 * L, L], 3e19)  # runs above the frontier
    assert both == pytest.approx(-0.049, rel=1e-9)
    assert np.isnan(fl.envelope(C, L, 1e23))
    C, L = np.array([1.0, 10, 100]), np.array([1, 10**-0.1, 10**-0.15])
    assert fl.envelope(C, L, 1) == pytest.approx(-0.0619, abs=1e-4)  # steps of C, not of its log


def test_results_folder_end_to_end(tmp_path, printed):
    folder = write_results(tmp_path / "demo")
    text = printed(run, folder, "--bootstrap", 100, "--compare", "early", "late", "--budget", 1e13)
    for words in ("broken line", "diverged", "early", "late", "true floor", "laws.json"):
        assert words in text
    content = json.loads((folder / "laws.json").read_text(encoding="utf-8"))
    assert [g["name"] for g in content["groups"]] == ["early", "late"]
    for group in content["groups"]:
        assert group["n"] == 16 and group["r2"] > 0.99
        assert set(group["ci"]) >= {"E", "A", "B", "alpha", "beta", "a", "b", "c", "d"}
        assert group["ci"]["E"][0] < 0.9 < group["ci"]["E"][1] and group["floor"] == 0.9
        assert group["budgets"][0]["ci"]["loss"][0] < group["budgets"][0]["loss"]
    gap = content["compare"]["loss at 1e+13"]
    assert gap["ci"][0] < gap["difference"] < gap["ci"][1] < 0
    assert (folder / "laws.png").stat().st_size > 20_000


def test_what_a_study_derives_from_its_rows(tmp_path):
    """Where its frontier begins, which budgets lie beyond its runs, its encoder, the largest budget
    that two groups share, and resamples of its own."""
    folder, C = write_results(tmp_path / "demo"), [6 * 50_000 * 1e6, 6 * 800_000 * 8e6]
    early, _ = run(folder, "--bootstrap", 0, "--budget", "1e11,1e13,1e15")["groups"]
    assert early["cut"] == pytest.approx(C[0] ** 0.75 * C[1] ** 0.25)
    assert [budget["extrapolates"] for budget in early["budgets"]] == [True, False, True]
    gaps = run(folder, "--bootstrap", 2, "--compare", "early", "late")["compare"]
    assert f"loss at {C[1]:.6g}" in gaps
    _, (early, late) = fl.gather(fl.parse_args([str(folder), "--bootstrap", "5"]))
    assert late.runs.vision == pytest.approx((0.544, np.log(0.5), 0.97), abs=2e-3)
    assert not np.array_equal(early.weight, late.weight)


def test_errors_are_in_per_cent_and_intervals_hold_95_of_them():
    runs = planted(EARLY)
    errors = fl.quality(EARLY, replace(runs, L=runs.L / 1.02))  # predicted 2 % too high
    assert errors["bias_pct"] == pytest.approx(2) == errors["mae_pct"]
    assert errors["mse"] == pytest.approx(np.mean((0.02 * runs.L / 1.02) ** 2))
    assert errors["r2"] == pytest.approx(1 - np.log(1.02) ** 2 / np.log(runs.L).var())
    assert fl.interval(np.array([*range(1001), np.nan])) == [25, 975]


def test_one_plot_holds_runs_frontiers_bands_sizes_and_the_floor(tmp_path, pages):
    folder = write_results(tmp_path / "demo", noise=0.05, seeds=3)
    run(folder, "--bootstrap", 20)
    ax, = pages[str(folder / "laws.png")].axes
    assert {text.get_text() for text in ax.texts} == {"50,000", "120,000", "300,000", "800,000"}
    rows = [row for row in fl.read_rows(folder) if row.get("loss")]
    curves = [line for line in ax.lines if line.get_linewidth() == 2.5]
    for curve in curves:
        mine = [row for row in rows if row["fusion"] == curve.get_label()]
        means = {np.mean([r["loss"] for r in mine if (r["N"], r["D"]) == (row["N"], row["D"])])
                 for row in mine}  # 16 points of three seeds each
        colour, C = curve.get_color(), curve.get_xdata()
        shown = [c for c in ax.containers if c.lines[0].get_color() == colour]
        drawn = sorted(y for c in shown for y in c.lines[0].get_ydata())
        assert drawn == pytest.approx(sorted(means))
        assert all(np.ptp(bar[:, 1]) > 0 for c in shown for bar in c.lines[2][0].get_segments())
        dashed, = (line for line in ax.lines if line.get_color() == colour and line.is_dashed())
        ends = [end(row["C"] for row in mine) for end in (min, max)]
        assert [C[0], C[-1]] == pytest.approx(ends)
        assert dashed.get_xdata()[-1] == pytest.approx(5 * ends[1])  # beyond the runs
    assert len(curves) == 2 and sum("PolyCollection" in type(c).__name__
                                    for c in ax.collections) == 2
    early = json.loads((folder / "laws.json").read_text(encoding="utf-8"))["groups"][0]
    coef = [*np.log([early[name] for name in "ABE"]), early["alpha"], early["beta"]]
    C, L = curves[0].get_data()
    assert L == pytest.approx(fl.optimum(coef, C)[2])
    floor, = (line for line in ax.lines if line.get_label() == "true floor 0.9")
    assert [*floor.get_ydata()] == [0.9, 0.9]


def test_kinds_seeds_and_holdout(tmp_path):
    folder, out = write_results(tmp_path / "demo", seeds=2), tmp_path / "numbers.json"
    flags = [folder / "results.jsonl", "--bootstrap", 0, "--json"]
    groups = run(*flags, out, "--loss", "loss,loss_caption,loss_text", "--holdout", 1)["groups"]
    assert [g["name"] for g in groups[:2]] == ["early", "early caption"] and len(groups) == 6
    assert groups[1]["floor"] == pytest.approx(0.72) and groups[0]["n"] == 24
    assert groups[0]["holdout"]["n"] == 8 and groups[0]["holdout"]["mae_pct"] < 2
    assert json.loads(out.read_text(encoding="utf-8"))["groups"][0]["ci"] == {}
    rule = run(*flags, out, "--holdout", "D>5e6")["groups"]
    assert rule[0]["holdout"]["n"] == 8
    kept, = run(*flags, out, "--where", "fusion!=late", "--where", "D<5e6")["groups"]
    assert (kept["name"], kept["n"]) == ("early", 24)
    wide = run(*flags, tmp_path / "a/b.json", "--group-by", "")
    assert [g["name"] for g in wide["groups"]] == ["all"]
    assert (tmp_path / "a/b.json").is_file()


def test_aliases_and_dirt(tmp_path, capsys):
    r = planted(EARLY, tokens=5)
    rows = [f"{n!r};{d!r};{x!r}" for n, d, x in np.transpose([r.N, r.D, r.L]).tolist()]
    dirt = ["oops;1e9;3", "1e9;-5;3", "1e9;1e9;nan", "1e9;1e9;-2", "1e9;1e9", "1e9;2e9;3;1"]
    path = write_lines(tmp_path / "t.csv", "Params;tokens;val_loss", *rows, *dirt)
    for loss in ("loss", "val_loss"):
        group = run(path, "--loss", loss, "--bootstrap", 0)["groups"][0]
        assert group["n"] == 30 and group["alpha"] == pytest.approx(0.301, rel=1e-6)
    text = capsys.readouterr().out
    for words in ("N is not a positive", "D is not a positive",
                  "3 rows left out: loss is not a positive number"):
        assert words in text


def test_a_table_is_only_read(tmp_path, monkeypatch, capsys):
    """Nothing is written into the current folder, and every written file is named."""
    path = write_results(tmp_path / "demo") / "results.jsonl"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = path.read_bytes()
    group = run(path, "--bootstrap", 0)["groups"][0]
    said = capsys.readouterr().out
    assert not list(Path().iterdir()) and path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.jsonl"]
    assert f"{10 ** group['a']:.1f} times the parameters" in said
    assert f"{10 ** group['b']:.1f} times the tokens" in said
    assert f"A {group['A']:.5g}" in said
    run(path, "--bootstrap", 0, "--json", "laws.json")
    assert capsys.readouterr().out.endswith("wrote laws.json\n")
    assert [p.name for p in Path().iterdir()] == ["laws.json"]


def rows_of(N="{k}e6", D="{k}e7", loss="{x}"):
    """Eight rows of a table, where {k} is 1 to 8 and {x} falls with it."""
    return "\n".join(f"{N},{D},{loss}".format(k=k, x=4 - k / 10) for k in range(1, 9))


BAD = {
    "five rows": ("\n".join(rows_of().splitlines()[:5]), [], "at least 6"),
    "one size": (rows_of(N="1e6"), [], "two sizes"),
    "one loss": (rows_of(loss="3"), [], "all losses are equal"),
    "zero D": (rows_of(D="0"), [], "D is not a positive number"),
    "mostly nan": (rows_of(loss="nan") + "\n" + rows_of(N="1e6"), [], "two sizes"),
    "empty": ("", [], "0 rows"),
    "nothing kept": ("1e6,1e7,3", ["--where", "N>1e9"], "not N>1e9"),
    "all held out": (rows_of(), ["--holdout", "9"], "at least 6"),
    "misspelt holdout": (rows_of(), ["--holdout", "foo>3"], "no column 'foo'"),
    "column": ("1e6,1e7,3", ["--loss", "lss"], "did you mean loss"),
    "rule": ("1e6,1e7,3", ["--where", "N~3"], "COLUMN=VALUE"),
    "rule column": ("1e6,1e7,3", ["--where", "kept=1"], "no column 'kept'"),
    "rule number": ("1e6,1e7,3", ["--where", "loss<low"], "'low' is not a number"),
    "flag": ("1e6,1e7,3", ["--boostrap", "3"], "did you mean --bootstrap"),
    "number": ("1e6,1e7,3", ["--bootstrap", "-3"], "--bootstrap"),
    "word": ("1e6,1e7,3", ["--bootstrap", "few"], "--bootstrap"),
    "budget": ("1e6,1e7,3", ["--budget", "much"], "'much'"),
    "negative budget": ("1e6,1e7,3", ["--budget", "-1e20"], "--budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path):
    rows, flags, words = BAD[case]
    path = write_lines(tmp_path / "bad.csv", "N,D,loss", rows)
    message = one_line(SystemExit, run, path, "--out", tmp_path, *flags)
    assert words in message
    assert flags or path.name in message
    assert not (tmp_path / "laws.json").exists()


def test_bad_paths_and_groups(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path, write_lines(tmp_path / "t.txt")):
        refused("no such table", run, path)
    (tmp_path / "latin.csv").write_bytes(b"N,D,loss\n1,2,\xff\n")
    refused("UTF-8", run, tmp_path / "latin.csv")
    (tmp_path / "empty.csv").write_bytes(b"")
    refused("empty.csv", run, tmp_path / "empty.csv")
    folder = write_results(tmp_path / "demo")
    flags = [folder, "--bootstrap", 0]
    refused("no group 'mid'; groups: early, late", run, *flags, "--compare", "early", "mid")
    refused("cannot write", run, *flags, "--out", folder / "results.jsonl")
