"""Our call of L-BFGS-B beside the usual one: seconds, and how far above the minimum they stop.

    OMP_NUM_THREADS=1 python -m tools.bench_fit TABLES     one thread, a minute

TABLES is a folder with chinchilla_epoch.csv, the 245 runs that Besiroglu et al. (2024) published,
as columns N, D, loss and kept240 (1 for the 240 rows they fit).

The usual call has scipy's default tolerances, coefficients that are not centred, an objective that
is not divided by delta, and a gradient by differences.
"""

import time
from itertools import product
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

import fit_laws as fl
from tools import markdown
from train import Parser

BEST = 0.0010182740178006  # the least objective known on these 240 rows


def runs_of(N, D, L, name="table", **more):
    """Columns -> Runs with C = 6 N D."""
    N, D, L = (np.asarray(x, float) for x in (N, D, L))
    return fl.Runs(name, N, D, L, **{"C": 6 * N * D, "table": np.array([{}] * len(N))} | more)


def read_table(folder, name, loss="loss", rule="N>0"):
    """The rows of a published table that fit a rule -> Runs."""
    rows = fl.read_rows(folder / f"{name}.csv")
    rows = [row for row, good in zip(rows, fl.select(rows, rule)) if good]
    return runs_of(*(fl.positive(rows, key) for key in ("N", "D", loss)), name)


def usual_call(runs, start, weight=1.0):
    """The best that scipy's defaults find from one start (5,) -> objective."""
    N, D, L = np.log(runs.N), np.log(runs.D), np.log(runs.L)

    def objective(coef):
        a, b, e, alpha, beta = coef
        terms = np.stack([a - alpha * N, b - beta * D, np.full_like(N, e)])
        return (weight * huber(1e-3, logsumexp(terms, axis=0) - L)).sum()

    return minimize(objective, start, method="L-BFGS-B").fun


def seconds(work):
    """-> the result, the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure(folder, starts=24, resamples=40):
    """Rows of a table as text: what, ours, the usual call on a few starts and resamples."""
    runs = read_table(folder, "chinchilla_epoch", rule="kept240=1")
    problem, rng = fl.build_problem(runs, 1e-3), np.random.default_rng(0)
    fit, took = seconds(lambda: fl.fit_law(runs))
    weight = fl.draw_weights(240, 1000, 0)
    draws, refits = seconds(lambda: fl.bootstrap(runs, fit, weight))
    logs, e, slopes = range(0, 31, 5), (-1, -0.5, 0.5, 1), (0, 0.5, 2.5)
    grid = np.array([*product(logs, logs, e, slopes, slopes)], float)  # the paper's 1764 starts
    some = grid[rng.choice(len(grid), starts, replace=False)]
    found, cold = seconds(lambda: [usual_call(runs, start) for start in some])
    best = [fl.objective(problem.theta(coef), problem, w)[0] * 1e-3
            for coef, w in zip(draws, weight[:resamples])]
    usual, warm = seconds(lambda: [usual_call(runs, fit.coef, w) for w in weight[:resamples]])
    above = np.array(usual) / best - 1
    cold, warm = cold / starts, warm / resamples
    return [
        ["one fit", f"{took:.2f} s",
         f"{cold * len(grid):.0f} s from the paper's {len(grid)} starts (one: {cold:.3f} s)"],
        ["F above the least known, relative", f"{fit.objective / BEST - 1:.0e}",
         (f"{min(found) / BEST - 1:.0e} the best, {np.median(found) / BEST - 1:.0e} the median of "
          f"{starts} random starts")],
        ["1000 refits, starting at the fit", f"{refits:.1f} s", f"{1000 * warm:.0f} s"],
        ["F of the refits above ours", "",
         f"median {np.median(above):.0e}, worst {above.max():.0e} of {resamples}"]]


def main(argv=None):
    p = Parser(prog="python -m tools.bench_fit", description=__doc__)
    p.add_argument("tables", type=Path, help="folder with the published table")
    print(markdown(["", "ours", "the usual call"], measure(p.parse_args(argv).tables)))


if __name__ == "__main__":
    main()
