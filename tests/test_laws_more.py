"""Other laws and approaches: planted laws come back, published answers hold, figures are drawn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import fit_laws as fl
from helpers import one_line, write_rows
from test_fit_laws import EARLY, SPARSE, planted
from tools import bench, board, curves, figures, multiplier, save, sizes
from tools import fit_tables as ft
from tools import laws_more as more
from tools.fit_tables import runs_of


def mixtures(beta_of_last=0.335, noise=0.0):
    """Three groups with their own A, B, E and shared exponents, but for the last beta."""
    for k, law in enumerate(((270, 1857, 1.904), (290, 1800, 1.95), (260, 1900, 1.85))):
        coef = np.array([*np.log(law), 0.301, beta_of_last if k == 2 else 0.335])
        yield planted(coef, noise, 6, f"m{k}")


def isoflop_runs():
    """Seven sizes at each of six budgets."""
    C = np.repeat(np.geomspace(1e19, 1e22, 6), 7)
    N = fl.optimum(EARLY, C)[0] * np.tile(np.geomspace(0.5, 2, 7), 6)
    return runs_of(N, C / (6 * N), fl.predict(EARLY, N, C / (6 * N)), "all")


def write_table(path, groups):
    """All groups, each of which has its name as mixture."""
    return write_rows(path, [{"N": N, "D": D, "loss": L, "mixture": runs.name}
                             for runs in groups for N, D, L in zip(runs.N, runs.D, runs.L)])


def test_tied_exponents_win_where_they_are_equal():
    equal = np.array([*EARLY[:4], EARLY[3]])
    found = more.tied_law(planted(equal, 0.003))
    assert found["tied"]["exponent"] == pytest.approx(0.301, abs=0.02)
    assert found["tied"]["aic"] < found["free"]["aic"] + 2
    runs = planted(SPARSE, 0.003)
    found = more.tied_law(runs)
    assert found["tied"]["aic"] > found["free"]["aic"] + 20
    off = [np.log(fl.predict(fl.fit_law(runs.rows(~here)).coef, N, runs.D[here]) / runs.L[here])
           for N in np.unique(runs.N) for here in [runs.N == N]]  # by a law of the other sizes
    assert found["free"]["left_out_pct"] == pytest.approx(100 * np.abs(off).mean(), rel=1e-3)


def test_joint_law_shares_exponents():
    def joint(groups):
        studies = [SimpleNamespace(runs=runs, weight=np.ones((2, 36))) for runs in groups]
        return more.joint_law(studies)

    found = joint(mixtures())
    law = found["groups"]["m2"]
    np.testing.assert_allclose([law[k] for k in fl.NAMES], [260, 1900, 1.85, 0.301, 0.335], 1e-4)
    assert law["ci"]["E"] == pytest.approx([1.85, 1.85], rel=1e-4)
    assert [found["rivals"][k]["coefficients"] for k in ("joint", "separate")] == [11, 15]
    rivals = joint(mixtures(beta_of_last=0.5))["rivals"]
    assert rivals["separate"]["aic"] < rivals["joint"]["aic"] - 20


def test_sparse_law_of_table_12():
    runs = ft.plant_sparse(0, 1)
    law = more.sparse_law(runs, np.ones((1, len(runs.N))))
    truth = [*np.exp(ft.SPARSE_TRUTH[:5]), *ft.SPARSE_TRUTH[5:]]
    np.testing.assert_allclose([law[k] for k in more.SPARSE_NAMES], truth, rtol=1e-3)
    aic = {name: rival["aic"] for name, rival in law["rivals"].items()}
    assert aic["with S"] < min(aic["separate"], aic["without"]) - 20
    assert law["rivals"]["separate"]["coefficients"] == 25 and law["sparsities"][-1] == 0.9375
    active = more.active_share(runs)
    assert more.sparse_law(runs.rows(active > 0.4), np.ones((1, 96))) is None
    experts = [{"n_experts": 1 / share, "top_k": 1} for share in active]
    np.testing.assert_allclose(more.active_share(SimpleNamespace(table=experts)), active)
    planted = ft.plant_sparse(0.005, 1)
    weak = more.sparse_law(planted, fl.draw_weights(planted, 10, 0))["not_identified"]
    assert {"C", "lambda", "A"} & {*weak} and not {"B", "beta"} & {*weak}


def test_parabolas_find_the_optimum_of_a_law():
    runs = isoflop_runs()
    budgets = more.isoflop_budgets(runs)
    assert [len(rows) for rows in budgets] == [7] * 6
    found, closed = more.isoflop(runs, budgets, np.ones(42)), fl.derive(EARLY)
    for name in "ab":
        assert found[f"{name}_isoflop"] == pytest.approx(closed[name], abs=2e-3)
    assert found["a_isoflop"] + found["b_isoflop"] == pytest.approx(1)
    assert more.isoflop_budgets(planted(EARLY)) == []  # a grid has no budgets
    falling = fl.replace(runs, L=2 + 1e9 / runs.N)
    assert np.isnan(more.isoflop(falling, budgets, np.ones(42))["a_isoflop"])
    assert np.isnan(more.isoflop(runs, budgets, np.zeros(42))["a_isoflop"])


def test_sensitivity_names_what_moves_the_law():
    runs = planted(EARLY)
    runs.L[7] *= 1.3
    found = more.sensitivity(runs, fl.fit_law(runs))
    assert list(found) == ["delta 0.0001", "delta 0.01", "one size left out", "worst 1 left out"]
    assert found["worst 1 left out"]["alpha"] == pytest.approx([0.301] * 2, rel=1e-6)
    assert np.ptp(found["one size left out"]["beta"]) < 1e-3


def test_profile_intervals_hold_the_truth_or_say_that_there_is_no_end():
    runs = planted(EARLY, 0.004)
    for name, (lo, hi) in more.profile(runs, fl.fit_law(runs)).items():
        assert lo < {"E": 1.904, "alpha": 0.301, "beta": 0.335}[name] < hi < 1.5 * lo
    constant = runs.rows(runs.D == runs.D[0])
    found = more.profile(constant, fl.fit_law(constant))
    assert np.isnan(found["beta"]).all()


def test_the_noise_of_seeds_is_told_from_the_error_of_the_law():
    """Two seeds, one 2 % above the law and one 2 % below: their means lie on it."""
    runs = planted(EARLY)
    twice = runs.rows(np.tile(np.arange(len(runs.N)), 2))
    twice.L[:] *= np.repeat(np.exp([0.02, -0.02]), len(runs.N))
    found = more.noise(EARLY, twice)
    assert found["seed_sd_pct"] == pytest.approx(2 * 2 ** 0.5)
    assert found["means_mae_pct"] == pytest.approx(0, abs=1e-9) and found["means_r2"] == 1
    assert more.noise(EARLY, runs) == {}


def test_plan_of_the_paper():
    """Dense rows have the frontier only, the sparse row has A and B and so N and D too."""
    paper = more.main(["--plan", "--budget", "1e21,24hx8xh100x0.4"])["paper"]
    dense, sparse = paper["early AVG"][0], paper["sparse early AVG"][0]
    assert dense["N"] is None and dense["frontier_loss"] == pytest.approx(2.740, abs=1e-3)
    assert [sparse["N"], sparse["loss"]] == pytest.approx([9.557970e8, 2.62512156], rel=1e-6)
    assert paper["late AVG"][1]["C"] == pytest.approx(24 * 3600 * 8 * 989e12 * 0.4)


def test_command_line_writes_everything(tmp_path, capsys):
    table = write_table(tmp_path / "t.jsonl", mixtures(noise=0.002))
    more.main([table, "--bootstrap", "5", "--json", str(tmp_path / "more.json")])
    found = json.loads((tmp_path / "more.json").read_text(encoding="utf-8"))
    assert [group["name"] for group in found["groups"]] == ["m0", "m1", "m2"]
    assert {"E", "ci", "tied", "sparse", "sensitivity", "profile"} <= found["groups"][0].keys()
    assert {*found["joint"]["all"]["groups"]} == {"m0", "m1", "m2"}
    assert "one alpha and beta" in capsys.readouterr().out
    table = write_table(tmp_path / "i.jsonl", [isoflop_runs()])
    group = more.main([table, "--bootstrap", "5"])["groups"][0]
    assert group["isoflop_budgets"] == 6 and np.ptp(group["ci"]["b_isoflop"]) > 0


@pytest.mark.parametrize("tool, flags, named", [
    (more, [], "--plan"), (more, ["--plan"], "--budget"), (more, ["none.csv"], "none.csv"),
    (more, ["t.csv", "--compare", "a", "b"], "--compare"), (more, ["--boostrap"], "--bootstrap"),
    (figures, [], "table"), (figures, ["t.csv", "--json", "x"], "--json"),
    (multiplier, ["t.csv"], "--compare"),
    (bench, ["--only", "everything"], "ceiling"), (board, ["nowhere"], "no run"),
    (curves, ["nowhere"], "--eval-every"), (sizes, ["--width", "32"], "--width")])
def test_mistakes_end_in_one_line(tool, flags, named):
    assert named in one_line(SystemExit, tool.main, flags)


@pytest.mark.parametrize("groups, resamples", [([isoflop_runs()], "0"),
                                               (mixtures(noise=0.002), "5")])
def test_figures(groups, resamples, tmp_path, monkeypatch):
    """Their panels agree with each other and with the runs."""
    groups, pages, out = [*groups], [], tmp_path / "new"
    monkeypatch.setattr(figures, "save", lambda *args: pages.append(args[0]) or save(*args))
    table = write_table(tmp_path / "t.jsonl", groups)
    figures.main([table, "--bootstrap", resamples, "--out", str(out)])
    for name in ("laws_more", "residuals"):
        assert (out / f"{name}.png").stat().st_size > 20_000
    (*best, _, above), (losses, *errors) = (
        [[line.get_data() for line in axes.lines] for axes in page.axes[:5]] for page in pages)
    for (C, N), (_, D), (_, ratio) in zip(*best):
        assert ratio == pytest.approx(D / N) and C == pytest.approx(6 * N * D, rel=0.05)
    for k, runs in enumerate(groups):
        _, law = losses[k + 1]  # beside the diagonal
        for panel, x in zip(errors, (runs.N, runs.D, runs.C)):
            np.testing.assert_allclose(panel[k], [x, 100 * (runs.L / law - 1)])
        assert len(groups) == 1 or {*np.sign(above[2 * k][1])} == {(0, 1, -1)[k]}  # by their E


def test_the_multiplier_of_a_planted_pair(tmp_path, printed):
    """The second group learns from N and D as the first does from N / 2 and D / 2, and its encoder
    adds half of the compute: it needs six times the compute, at every budget."""
    rows = []
    for fusion, waste in (("early", 1), ("late", 2)):
        for N in (1e4, 3e4, 1e5, 3e5):
            for D in (1e6, 4e6, 1.6e7):
                loss = 0.09 + 300 * (waste / N) ** 0.8 + 400 * (waste / D) ** 0.6
                rows.append({"N": N, "D": D, "loss": loss, "floor": 0.09, "fusion": fusion,
                             "N_vision": (waste - 1) * N, "D_vision": D / 2})
    path = write_rows(tmp_path / "results.jsonl", rows)
    for pair, value in ((["early", "late"], "6.00"), (["late", "early"], "0.17")):
        said = printed(multiplier.main, [path, "--compare", *pair, "--bootstrap", "20"])
        assert said.count(f" FLOPs: {value} [{value}, {value}]\n") == 3
    said = printed(multiplier.main, [path, "--compare", "early", "late", "--bootstrap", "1",
                                     "--budget", "1e9,1e12"])
    lines = [line for line in said.splitlines() if "FLOPs:" in line]
    assert [line.endswith(", outside the range") for line in lines] == [True, False]
