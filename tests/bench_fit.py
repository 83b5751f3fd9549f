"""One fit and 4000 bootstrap refits, ours beside scipy's minimize without gradient, in one run.

    python tests/bench_fit.py          one thread, about two minutes; needs scipy and ../shared/fits

scipy is timed on a random few of its starts and resamples, and scaled up: the table says so.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before numpy: threads slow such small problems down

import time
from itertools import product

import numpy as np
from fit_tables import fl, markdown, shared
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

BEST = 0.0010182740178006  # the least objective known on these 240 rows


def timed(work, repeats=1):
    """-> last result, the median of the seconds it took."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - start)
    return result, float(np.median(took))


def by_scipy(runs, start, weight=1.0, tight=False):
    """L-BFGS-B from one start, gradient by differences: what published fits do -> objective.

    Its ftol is absolute below 1, where this objective lives: `tight` scales it up as well.
    """
    scale = 1e4 if tight else 1.0
    options = {"ftol": 1e-15, "gtol": 1e-8, "maxfun": 100_000, "maxiter": 10_000} if tight else {}

    N, D, L = np.log(runs.N), np.log(runs.D), np.log(runs.L)

    def objective(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * N, b - beta * D, np.full_like(N, e)])
        return scale * (weight * huber(1e-3, logsumexp(terms, axis=0) - L)).sum()

    return minimize(objective, start, method="L-BFGS-B", options=options).fun / scale


def measure(starts=24, resamples=40, count=4000, repeats=7):
    """-> rows of the table as text: what, ours, scipy's, ratio."""
    runs = shared("chinchilla_epoch", keep=lambda row: row["kept240"] == "1")
    fit, ours = timed(lambda: fl.fit_law(runs), repeats)
    weight = fl.draw_weights(runs.cluster, count, 0)
    draws, ours_boot = timed(lambda: fl.bootstrap(runs, fit, weight))
    grid = list(product(range(0, 31, 5), range(0, 31, 5), (-1, -0.5, 0.5, 1), *[(0, 0.5, 2.5)] * 2))
    rng = np.random.default_rng(0)
    chosen = [np.array(grid[i], float) for i in rng.choice(len(grid), starts, replace=False)]
    found, took = timed(lambda: [by_scipy(runs, start) for start in chosen])
    each = took / starts
    quick, q_took = timed(lambda: [by_scipy(runs, fit.coef, w) for w in weight[:resamples]])
    warm, took = timed(lambda: [by_scipy(runs, fit.coef, w, True) for w in weight[:resamples]])
    problem = fl.pose(runs, 1e-3)
    best = fl.objective(problem, problem.theta(draws[:resamples]), weight[:resamples])[0]
    cold = 21 * each * count  # published bootstraps took as long as 21 starts for each resample
    q_took, took = (x / resamples * count for x in (q_took, took))
    return [
        ["one fit, all 1764 starts", f"{ours:.3f} s", f"{each * len(grid):.0f} s",
         f"{each * len(grid) / ours:,.0f}"],
        ["F above the least known, relative", f"{fit.objective / BEST - 1:.0e}",
         f"{min(found) / BEST - 1:.0e} (best of the {starts})", ""],
        [f"{count} refits, scipy from 21 starts each", f"{ours_boot:.1f} s", f"{cold:.0f} s",
         f"{cold / ours_boot:,.0f}"],
        [f"{count} refits, scipy warm, default tolerances", f"{ours_boot:.1f} s",
         f"{q_took:.0f} s", f"{q_took / ours_boot:,.0f}"],
        [f"{count} refits, scipy warm, tight tolerances", f"{ours_boot:.1f} s",
         f"{took:.0f} s", f"{took / ours_boot:,.0f}"],
        ["F of its default refits above ours, median and worst", "",
         f"{np.median(quick / best - 1):.0e}, {(quick / best - 1).max():.0e}", ""],
        ["F of its tight refits above ours, median and worst", "",
         f"{np.median(warm / best - 1):.0e}, {(warm / best - 1).max():.0e}", ""]], starts, resamples


if __name__ == "__main__":
    rows, starts, resamples = measure()
    print(markdown(["", "ours", "scipy, scaled up", "ratio"], rows))
    print(f"scipy timed on {starts} random starts and {resamples} resamples; one thread each")
