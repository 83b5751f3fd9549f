"""Scaling laws from finished runs, with their uncertainty.

    python fit_laws.py runs/demo    a folder that train.py wrote (results.jsonl)
    python fit_laws.py table.csv    .csv, .tsv or .jsonl with N, D, loss (params, tokens, val_loss)

The law L = E + A/N^alpha + B/D^beta (N parameters, D tokens, L nats) is fitted to each group of
runs as the paper does it (arXiv 2504.07951, App. C). The program prints the paper's Table 2 with
95 % intervals. E is the loss that no model beats; the best models for C FLOPs follow N ~ C^a,
D ~ C^b, D ~ N^d, and their loss L ~ C^c. A "?" marks what the runs do not determine. A run folder
gets laws.json and laws.png; a table is only read, unless --out or --json names a place.
Other laws and figures: python -m tools.laws_more, python -m tools.figures.

  --where RULE        only rows with, say, kept=1, C<1e21 or fusion!=late (repeatable)
  --group-by COL,COL  a law for each value of these columns; '' fits one law to all rows
                      (default: fusion, moe and mixture where there are any)
  --loss COL,COL      losses to fit (default: loss)
  --holdout K|RULE    fit without the K largest sizes, or rows such as 'N>1e9'; test on them
  --budget C,C        best N, D and loss for so many FLOPs, such as 2.5e20,1e21
  --compare A B       differences of two groups, with intervals
  --bootstrap K       resamples for the intervals (default: 1000)
  --out FOLDER        where to write laws.json and laws.png (default: the run folder)
  --json FILE         where to write the numbers instead of laws.json
"""

# Dimensions: n rows (runs), T terms of the law, P coefficients (T intercepts, then slopes),
# K starts or resamples.

import os
if __name__ == "__main__":  # before numpy is imported, because threads only slow such small arrays
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import difflib
import json
import operator
import re
import signal
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.optimize import minimize, nnls
from tqdm import tqdm


def check(condition, message):
    """End in one line that tells the user what to change, unless the condition holds."""
    if not condition:
        raise SystemExit(f"fit_laws.py: {message}")


@dataclass(frozen=True)
class Runs:
    """The rows of one group. Arrays are (n,) float64; only the table holds dicts."""

    name: str
    N: np.ndarray  # parameters of the decoder (active ones, if there are experts)
    D: np.ndarray  # tokens of all modalities
    L: np.ndarray  # validation loss in nats
    C: np.ndarray  # training FLOPs: 6 N D, and the encoder's
    table: np.ndarray  # the rows with all their columns
    vision: tuple = (0, 0, 1)  # late fusion (C.2): (rho, p, q) of D_v = rho D, N_v = exp(p) N^q
    floor: float = np.nan  # the true irreducible loss, where the data know it

    # only the procedural world knows its floor, and its tokens are bytes
    unit = property(lambda self: "nats a byte" if self.floor > 0 else "nats a token")

    def rows(self, keep):
        """The same group with the rows of a mask or of row numbers."""
        arrays = {k: v[keep] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)


# ---------------------------------------------------------------- the fit (App. C.1)
#
# With a = ln A, b = ln B and e = ln E, each term of the law is a straight line in theta:
#     ln L = logsumexp(a - alpha ln N, b - beta ln D, e)
# So one constant array, the design, holds the law of the fit: terms = design @ theta. The paper
# minimises the sum over runs of Huber(ln L predicted - ln L observed), delta = 1e-3, with L-BFGS-B
# from many starts. Most residuals exceed 1e-3, which makes this nearly a sum of absolute
# deviations, and one bad run does not move the law. The usual call of scipy stops too early and
# still reports success, for three reasons:
#   1. delta = 1e-3 makes the sum about 1e-3, and below 1 scipy's relative tolerance is an
#      absolute one. We divide F by delta, which makes it about 1, and set ftol to 1e-15.
#   2. ln A and alpha correlate at 0.999, because ln N is about 20 in every row. We centre:
#      instead of ln A and ln B, theta holds the logs of the terms at the mean ln N and ln D.
#   3. A gradient by differences is wrong from the eighth digit on. Ours is exact.
# Posed like this, the paper's own optimiser finds the minimum to 14 digits in 5 ms.

DELTA = 1e-3  # of the Huber loss
RIDGE = 1e5  # above this condition number the runs do not say which model is best
NAMES = ("A", "B", "E", "alpha", "beta")  # coef (5,) holds ln A, ln B, ln E, alpha, beta
DENSE = ((0, "N"), (1, "D"))  # for each slope its term and its variable


@dataclass(frozen=True)
class Problem:
    """What one fit minimises. theta (P,) is centred; coef (P,) is what the paper prints."""

    design: np.ndarray  # (T, n, P)
    target: np.ndarray  # (n,) ln L
    centring: np.ndarray  # (P, P): coef = theta @ centring
    delta: float  # of the Huber loss

    def theta(self, coef):
        return coef @ np.linalg.inv(self.centring)


def build_problem(runs, delta=DELTA, slopes=DENSE, terms=3):
    """Runs -> Problem of the law with these terms and slopes."""
    P = terms + len(slopes)
    design, centring = np.zeros((terms, len(runs.L), P)), np.eye(P)
    design[range(terms), :, range(terms)] = 1
    for j, (term, variable) in enumerate(slopes, terms):
        x = np.log(getattr(runs, variable))
        centring[j, term] = x.mean()
        if np.ptp(x) > 0.01:  # a variable that is constant, but for noise, has no slope
            design[term, :, j] = x.mean() - x
    return Problem(design, np.log(runs.L), centring, delta)


def residual(theta, problem):
    """theta (P,) -> predicted minus observed ln L (n,), each term's share of the loss (T, n)."""
    terms = problem.design @ theta  # (T, n)
    top = terms.max(0)  # without it exp overflows at far starts
    share = np.exp(terms - top)
    total = share.sum(0)
    return top + np.log(total) - problem.target, share / total


def objective(theta, problem, weight=1.0):
    """-> sum of Huber losses / delta, gradient (P,). weight (n,): how often a run was drawn."""
    r, share = residual(theta, problem)
    psi = np.clip(r, -problem.delta, problem.delta)  # the slope of the Huber loss
    loss = psi * (r - 0.5 * psi)  # r^2 / 2 within delta, a straight line beyond
    pull = share * (weight * psi)  # (T, n)
    gradient = np.tensordot(pull, problem.design, 2)  # (P,)
    return (weight * loss).sum() / problem.delta, gradient / problem.delta


def minimise(problem, starts, weight=1.0, bounds=None):
    """L-BFGS-B from each start (P,) -> scipy's best result: .x is theta, .fun the objective."""
    options = {"ftol": 1e-15, "gtol": 1e-10}
    found = [minimize(objective, start, (problem, weight), "L-BFGS-B",
                      jac=True, bounds=bounds, options=options) for start in starts]
    return min(found, key=lambda result: result.fun)


def projected_starts(problem, *grids):
    """-> our starts (K, P). With its slopes fixed at a point of a grid, the law is linear in A, B
    and E, and we solve for them. Most of these starts lead to the best minimum. Most of the paper's
    1764 do not, and none leads to a better minimum."""
    T, starts = len(problem.design), []
    least = 1e-3 * np.exp(problem.target.min())  # nnls can give 0, and ln 0 is no start
    for slopes in product(*(grids or [np.geomspace(0.05, 2.5, 12)] * 2)):
        X = np.exp(problem.design[:, :, T:] @ slopes - problem.target)  # X.T @ (A, B, E) = 1
        linear = nnls(X.T, np.ones(X.shape[1]))[0]
        starts.append([*np.log(np.maximum(linear, least)), *slopes])
    return np.array(starts)


def screen(problem, starts, count=12):
    """The `count` starts of (K, P) with the lowest objective."""
    scores = [objective(start, problem)[0] for start in starts]
    return starts[np.argsort(scores, kind="stable")[:count]]


def fit_law(runs, delta=DELTA):
    """Runs -> coef (5,), objective (the sum of Huber losses) and the doubts of `diagnose`."""
    n = len(runs.N)
    check(n >= 6, f"{runs.name}: {n} usable rows, but a law needs at least 6; add runs")
    check(np.ptp(np.log(runs.N)) > 0.01, f"{runs.name}: all N are equal; run two sizes or more")
    check(np.ptp(runs.L) > 0, f"{runs.name}: all losses are equal; is --loss the right column?")
    problem = build_problem(runs, delta)
    best = minimise(problem, screen(problem, projected_starts(problem)))
    return SimpleNamespace(coef=best.x @ problem.centring, objective=best.fun * delta,
                           **diagnose(runs, problem, best.x))


def diagnose(runs, problem, theta):
    """How far to trust theta: -> the condition number of dr / dcoef (2e2 on a good grid, 1e7 where
    D/N is constant), flags (what the runs lack), names of what they leave unidentified."""
    r, share = residual(theta, problem)
    jacobian = np.einsum("tn,tnp->np", share, problem.design)  # dr / dtheta
    curvature = jacobian.T @ jacobian
    curvature += 1e-12 * curvature.max() * np.eye(len(theta))  # or a free direction has no inverse
    spread = 1.9 * max(np.median(np.abs(r)), 1e-5)
    error = spread * np.sqrt(np.diag(np.linalg.inv(curvature)))  # rough standard errors
    jacobian = jacobian @ np.linalg.inv(problem.centring).T  # dr / dcoef, as others print it
    norm = np.linalg.norm(jacobian, axis=0).clip(1e-300)
    condition, flags, weak = min(np.linalg.cond(jacobian / norm), 1e17), [], []
    if np.ptp(np.log(runs.D)) < 0.01:
        flags.append("D is the same in all runs: B, beta and E cannot be told apart; "
                     "run two token counts")
    elif condition > RIDGE:
        flags.append("the runs lie on a ridge, because N and D grow together or one has only two "
                     "values, or the loss hardly changes with one; run three sizes, and three "
                     "token counts at each, further apart")
    for term, names, j in ((0, "A alpha", 3), (1, "B beta", 4), (2, "E", 2)):
        size = 1 if j == 2 else theta[j]  # an error of 0.5 in ln E, or of half an exponent
        gone = share[term].max() < 1e-3 or condition > RIDGE
        if gone or not 0 < size <= 2 or error[j] > 0.5 * size:
            weak += names.split() + [*"abd"] * (j > 2)
    return {"condition": condition, "flags": flags, "unidentified": sorted({*weak})}


def draw_weights(runs, count, seed):
    """Draws trunks, with replacement -> how often each run was drawn, (count, n). To draw single
    runs makes intervals too narrow (alpha's held the truth in 77 of 100 simulated studies), because
    budgets share the errors of their trunk. It draws single runs if each model has one seed."""
    keys = ("fusion", "moe", "n_experts", "top_k", "mixture")
    models = [f"{N} {[*map(row.get, keys)]}" for N, row in zip(runs.N, runs.table)]
    names = [f"{model} {row.get('seed')}" for model, row in zip(models, runs.table)]
    alone = len({*names}) == len({*models})
    trunk = np.unique(range(len(names)) if alone else names, return_inverse=True)[1]
    rng, n = np.random.default_rng(seed), trunk.max() + 1
    return rng.multinomial(n, np.full(n, 1 / n), size=count)[:, trunk].astype(float)


def bootstrap(runs, fit, weight):
    """Refits each resample of weight (K, n), starting at the full fit -> coef (K, 5). Below 20 rows
    it tries three more starts, because one small resample in eight has another best minimum."""
    problem = build_problem(runs)
    starts = [problem.theta(fit.coef)]
    if len(runs.N) < 20:
        starts.extend(screen(problem, projected_starts(problem), 3))
    bar = tqdm(weight, "bootstrap", leave=False, delay=2, disable=None)
    found = [minimise(problem, starts, w).x for w in bar]
    return np.reshape(found, (-1, 5)) @ problem.centring


def interval(samples):
    """(K,) bootstrap values -> [2.5 %, 97.5 %] of the finite ones; None if half are not finite."""
    x = samples[np.isfinite(samples)]
    return np.percentile(x, [2.5, 97.5]).tolist() if 2 * len(x) > len(samples) else None


# ---------------------------------------------------------------- compute-optimal models

def predict(coef, N, D):
    """Loss in nats. coef (5,) takes N and D of any shape; coef (K, 5) takes numbers or (K,)."""
    a, b, e, alpha, beta = np.transpose(coef)
    return np.exp(e) + np.exp(a - alpha * np.log(N)) + np.exp(b - beta * np.log(D))


def encoder(N, vision):
    """Parameters of the vision encoder beside a decoder of N parameters."""
    return np.exp(vision[1]) * N ** vision[2]


def optimum(coef, C, vision=(0, 0, 1)):
    """The best model for C FLOPs -> N, D, loss, shaped like C; for coef (K, 5), (K,); NaN if none.
    C = 6 (N_v D_v + N D) = 6 g N D, where g >= 1 is the encoder's part. At fixed C, a rise of
    ln N lowers ln D by s, so alpha A/N^alpha = s beta B/D^beta at the best N. Without an encoder
    g = s = 1. With one, g and s hardly depend on N, and repeating the formula finds them."""
    a, b, _, alpha, beta = np.transpose(coef)
    g = s = 1.0
    with np.errstate(all="ignore"):  # the log of an exponent below 0 is NaN
        odds = a - b + np.log(alpha) - np.log(beta)
        for _ in range(60):
            N = np.exp((odds - np.log(s) + beta * np.log(C / (6 * g))) / (alpha + beta))
            extra = vision[0] * encoder(N, vision) / N
            g, s = 1 + extra, (1 + vision[2] * extra) / (1 + extra)
        D = C / (6 * g * N)
        return N, D, predict(coef, N, D)


def derive(coef):
    """Coefficients (5,) or (K, 5) -> {name: value}, with a, b, d for C = 6 N D."""
    *logs, alpha, beta = np.transpose(coef)
    with np.errstate(all="ignore"):  # exponents can be 0, and a resample's A infinite
        a, d = beta / (alpha + beta), alpha / beta
        return dict(zip(NAMES, [*np.exp(logs), alpha, beta]), a=a, b=1 - a, d=d)


def envelope(C, L, cut):
    """c of the frontier L ~ C^c from `cut` FLOPs on; NaN where it has one point.
    As in the paper (C.3), it is fitted along the hull at 200 values of C in equal steps."""
    x, y = np.log(C), np.log(L)
    rows = [np.lexsort((y, x))[0]]  # the falling lower convex hull, from left to right
    while True:
        right = np.flatnonzero(x > x[rows[-1]])  # go where the line falls most steeply
        slope = (y[right] - y[rows[-1]]) / (x[right] - x[rows[-1]])
        if slope.min(initial=0) == 0:
            break
        rows.append(right[slope.argmin()])
    first, last = max(cut, C[rows[0]]), C[rows[-1]]
    if last < first * (1 + 1e-9):
        return np.nan
    at = np.log(np.linspace(first, last, 200))
    return np.polyfit(at, np.interp(at, x[rows], y[rows]), 1)[0]


# ---------------------------------------------------------------- reading tables

ALIASES = {"n": "N", "params": "N", "parameters": "N", "d": "D", "tokens": "D",
           "loss": "loss", "val_loss": "loss", "c": "C", "flops": "C"}
SIGNS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne, "<": operator.lt,
         "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def read_rows(path):
    """Run folder, .jsonl, .csv or .tsv -> list of dicts, also under the keys N, D, loss and C."""
    try:
        path = Path(path, "results.jsonl" if Path(path).is_dir() else "")
        kind = path.suffix.lower()
        check(path.is_file() and kind in (".jsonl", ".csv", ".tsv"),
              f"{path}: no such table (run folder, .jsonl, .csv or .tsv)")
        lines = [*filter(str.strip, path.read_text("utf-8-sig").splitlines())]
        comma = max(",;\t", key="".join(lines[:1]).count)
        table = csv.DictReader(lines, None, "status", delimiter=comma, skipinitialspace=True)
        rows = list(map(json_row, lines) if kind == ".jsonl" else table)
    except (OSError, ValueError, csv.Error) as error:
        check(False, f"{path}: no readable table in UTF-8 ({error})")
    for row in rows:
        for key in sorted(row, key=len, reverse=True):  # "tokens" first: "d" may be a width
            row.setdefault(ALIASES.get(key.strip().lower(), key.strip()), row[key])
    return rows


def json_row(line):
    """A line -> its row (dict). A killed run can leave a broken line, which gets a status."""
    try:
        return {**json.loads(line)}
    except (ValueError, TypeError, RecursionError):
        return {"status": "broken line"}


def column(rows, name):
    """The cells of a column. SystemExit, with the nearest name, if there is no such column."""
    names = dict.fromkeys(key for row in rows for key in row)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else "columns: " + ", ".join(names)
    check(name in names or not len(rows), f"no column {name!r} in the table; {hint}")
    return [row.get(name) for row in rows]


def number(cell):
    """One cell -> float; NaN if it is no number."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def positive(rows, name):
    """A column -> (n,) float64; NaN for all that is missing or no positive finite number."""
    x = np.array([number(row.get(name)) for row in rows])
    return np.where(np.isfinite(x) & (x > 0), x, np.nan)


def select(rows, rule):
    """(n,) bool: where a rule such as kept240=1, C<1e21 or fusion!=late holds."""
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=|!=|==?|<|>)\s*(.*?)\s*", rule)
    check(match, f"rule {rule!r}: write COLUMN=VALUE, or != < <= > >= for =")
    name, sign, value = match.groups()
    read = str if np.isnan(number(value)) else number
    check(read is number or sign[0] in "=!", f"rule {rule!r}: {value!r} is not a number")
    return np.array([SIGNS[sign](read(cell), read(value)) for cell in column(rows, name)])


def keep(rows, mask, reason, notes):
    """The rows where the mask is True. A note says how many others were left out, and why."""
    kept = [row for row, good in zip(rows, mask) if good]
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} rows left out: {reason}")
    return kept


def load(args):
    """Command line -> rows of finished runs, notes on the others."""
    rows = [row for path in args.path for row in read_rows(path)]
    notes = [f"{len(rows)} rows read from {', '.join(args.path)}"]
    status = [str(row.get("status") or "ok") for row in rows]
    bad = ", ".join(sorted({*status} - {"ok"}))
    rows = keep(rows, [s == "ok" for s in status], f"status is {bad}", notes)
    for rule in args.where:
        rows = keep(rows, select(rows, rule), f"not {rule}", notes)
    check(rows, f"{'; '.join(notes)}; no row is left to fit")
    return rows, notes


def make_runs(rows, name, loss, args, notes):
    """Rows of one group, column of losses -> Runs. Rows of equal N and D are seeds; all stay."""
    for k in ("N", "D", loss):
        column(rows, k)
        rows = keep(rows, positive(rows, k) > 0, f"{k} is not a positive number in {name}", notes)
    check(rows, f"{name}: no row is left; correct these columns")
    N, D, L = (positive(rows, key) for key in ("N", "D", loss))
    Nv, Dv = positive(rows, "N_vision"), positive(rows, "D_vision")
    floor = positive(rows, "floor" + loss.removeprefix("loss")).mean()
    for key in ("n_experts", "top_k", "image_size", "context"):
        kinds = {str(row.get(key)) for row in rows}
        if len(kinds) > 1 and key not in (args.group_by or ""):
            notes.append(f"{name}: one law for {key} {', '.join(sorted(kinds))} (--group-by)")
    models = {(row["N"], row["D"], str(row.get("seed", row[loss]))) for row in rows}
    if len(models) < len(rows):
        notes.append(f"{name}: {len(rows) - len(models)} runs have the N, D and seed of another "
                     "(or loss, without seeds): copies, or other flags (--where, --group-by)")
    if len({str(row.get("seed", i)) for i, row in enumerate(rows)}) == 1 < len(rows):
        notes.append(f"{name}: one seed; if token counts share a trunk, intervals are too narrow")
    C, vision = 6 * (np.nan_to_num(Nv * Dv) + N * D), (0, 0, 1)
    if np.isfinite(Nv * Dv).all() and np.ptp(N) > 0:
        q, p = np.polyfit(np.log(N), np.log(Nv), 1)
        vision = (np.median(Dv / D), p, q)
    return Runs(name, N, D, L, C, np.array(rows), vision, floor)


def quality(coef, runs):
    """Errors of a law on runs: R2 of ln L, MSE of L, mean |error| and mean error in %."""
    error = predict(coef, runs.N, runs.D) / runs.L - 1
    spread = max(np.log(runs.L).var(), 1e-300)
    return {"n": len(error), "r2": 1 - (np.log1p(error) ** 2).mean() / spread,
            "mse": ((runs.L * error) ** 2).mean(),
            "mae_pct": 100 * np.abs(error).mean(), "bias_pct": 100 * error.mean()}


def study(runs, args, stream):
    """Fit and resample one group -> its runs, fit and record (all numbers, as in laws.json), and of
    K resamples the weight (K, n), refits draws (K, 5), samples {name: (K,)}.
    `stream` seeds the resamples, so that groups are independent."""
    rule = args.holdout or "N<0"
    if rule.isdecimal():
        check(int(rule), "--holdout 0 holds nothing out: give 1 or more sizes")
        rule = f"N>={np.unique(runs.N)[-int(rule) :][0]}"
    held = select(runs.table, rule)
    test, runs = runs.rows(held), runs.rows(~held)
    fit = fit_law(runs)
    weight = draw_weights(runs, args.bootstrap, [0, stream])
    draws = bootstrap(runs, fit, weight)
    cut = runs.C.min() ** 0.75 * runs.C.max() ** 0.25  # the frontier counts from here on
    values, samples = derive(fit.coef), derive(draws)
    drawn = [envelope(runs.C[w > 0], runs.L[w > 0], cut) for w in weight]
    values["c"], samples["c"] = envelope(runs.C, runs.L, cut), np.array(drawn)
    if fit.condition > RIDGE:  # resamples stop anywhere on a ridge
        samples |= dict.fromkeys(fit.unidentified, np.full(len(draws), np.nan))
    ci = {k: interval(x) for k, x in samples.items()} if args.bootstrap else {}
    s = SimpleNamespace(runs=runs, fit=fit, weight=weight, draws=draws, samples=samples)
    s.record = {
        "name": runs.name, **values, **quality(fit.coef, runs), "ci": ci,
        "floor": runs.floor, "cut": cut, "objective": fit.objective,
        "condition": fit.condition, "flags": fit.flags, "not_identified": fit.unidentified,
        "holdout": quality(fit.coef, test) if held.any() else None,
        "budgets": [at_budget(s, C)[0] for C in args.budget]}
    return s


def at_budget(s, C):
    """Compute-optimal model for C FLOPs -> its numbers, (K,) bootstrap losses."""
    N, D, loss = optimum(s.fit.coef, C, s.runs.vision)
    losses = optimum(s.draws, C, s.runs.vision)[2]
    if s.fit.condition > RIDGE:
        N, D, loss, losses = np.nan, np.nan, np.nan, np.nan * losses
    found = {"C": C, "N": N, "D": D, "loss": loss, "ci": {"loss": interval(losses)}}
    return found | {"extrapolates": not s.runs.C.min() <= C <= s.runs.C.max()}, losses


def gather(args):
    """-> notes, a study for each group and loss that has enough rows."""
    rows, notes = load(args)
    by = [key for key in ("fusion", "moe") if any(key in row for row in rows)]
    by += ["mixture"] if len({str(row.get("mixture")) for row in rows}) > 1 else []
    if args.group_by is not None:
        by = args.group_by.split(",") if args.group_by else []
    cells = [map(str, column(rows, key)) for key in by]
    keys = list(zip(*cells)) or [()] * len(rows)
    studies = []
    for key, loss in product(dict.fromkeys(keys), args.loss.split(",")):
        group = [row for row, other in zip(rows, keys) if other == key]
        name = " ".join(word for word in key if args.group_by or word != "none") or "all"
        name += "" if loss == "loss" else " " + loss.removeprefix("loss_")
        try:
            runs = make_runs(group, name, loss, args, notes)
            studies.append(study(runs, args, len(studies)))
            notes += [f"{name}: {flag}" for flag in studies[-1].fit.flags]
        except SystemExit as error:
            notes.append(str(error).removeprefix("fit_laws.py: "))
    notes = list(dict.fromkeys(notes))  # the losses of one group share theirs
    check(studies, "; ".join(notes))
    names = [s.runs.name for s in studies]
    for name in args.compare or ():
        check(name in names, f"--compare: no group {name!r}; groups: {', '.join(names)} "
              "(--group-by COLUMN makes others)")
    return notes, studies


# ---------------------------------------------------------------- what the user sees

EXPONENTS = ("E", "alpha", "beta", "a", "b", "c", "d")  # the columns of the paper's Table 2


def span(ends, form=".3f"):
    """[lo, hi] as text; "?" where there is no interval."""
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "[?, ?]"


def print_table(records):
    """The paper's Table 2, an interval under each number, "?" at what is not identified."""
    line = "  " + 7 * "{:17}"
    print("\n" + line.format(*EXPONENTS))
    for g in records:
        print(f"{g['name']}: {g['n']} runs, mean error {g['mae_pct']:.2f} % of the loss")
        print(line.format(*(f"{g[k]:.4f}{'?' * (k in g['not_identified'])}" for k in EXPONENTS)))
        if g["ci"]:
            print(line.format(*(span(g["ci"][k]) for k in EXPONENTS)))


def print_group(g):
    """One group in sentences: what its law says of more compute, and what the flags ask for."""
    unsure = "?" * ("a" in g["not_identified"])
    advice = "these runs do not say how to spend more compute" if unsure else (
        f"for 10 times the compute, take {10 ** g['a']:.1f} times the parameters and "
        f"{10 ** g['b']:.1f} times the tokens")
    floor = f"; the true floor of the loss is {g['floor']:.4f}" if g["floor"] > 0 else ""
    print(f"\n{g['name']}: {advice}{floor}")
    for b in g["budgets"]:
        print("  at C = {C:.3g}: N {N:.3g}{0}, D {D:.3g}{0}, loss {loss:.4f}".format(unsure, **b),
              span(b["ci"]["loss"], ".4f") + ", outside the range" * b["extrapolates"])
    if g["holdout"]:
        print("  {n} runs held out: mean error {mae_pct:.2f}{0} % of the loss, "
              "{bias_pct:+.2f}{0} % with its sign".format(unsure, **g["holdout"]))
    print("  A {A:.5g}, B {B:.5g}, R2 of ln L {r2:.5f}, MSE {mse:.2e}, sum of Huber losses "
          "{objective:.4g}, condition {condition:.2g}".format(**g))


def compare(studies, args):
    """Print and return the differences of two groups (first minus second) with intervals."""
    found, out = {s.runs.name: s for s in studies}, {}
    one, two = (found[name] for name in args.compare)
    gaps = {k: (one.record[k] - two.record[k], one.samples[k] - two.samples[k]) for k in EXPONENTS}
    for C in args.budget or [min(one.runs.C.max(), two.runs.C.max())]:
        (x, xs), (y, ys) = at_budget(one, C), at_budget(two, C)
        gaps[f"loss at {C:.6g}"] = x["loss"] - y["loss"], xs - ys
    print("\n{} minus {}; a lower loss is better".format(*args.compare))
    for k, (gap, many) in gaps.items():
        out[k] = {"difference": gap, "ci": interval(many)}
        unsure = "?" * (k in one.fit.unidentified + two.fit.unidentified)
        print(f"  {k:16} {gap:+.4f}{unsure} {span(out[k]['ci'], '+.4f')}")
    return out


def draw(studies, path):
    """The runs of each size (mean and deviation over seeds), each law's frontier and its band."""
    try:
        from matplotlib import figure
    except ImportError:
        return print("no figure: pip install matplotlib")
    ax, sizes = figure.Figure(figsize=(8.3, 6), layout="constrained").subplots(), {}
    for s, ink, mark in zip(studies, 9 * ("k", "C1", "C0", "C4"), 9 * "o^sDv"):
        runs, look = s.runs, {"color": ink, "marker": mark, "mfc": "none", "lw": 2.5}
        for N in np.unique(runs.N):
            seeds = [runs.rows((runs.N == N) & (runs.D == D)) for D in {*runs.D[runs.N == N]}]
            C, L, sd = zip(*sorted((r.C[0], r.L.mean(), r.L.std()) for r in seeds))
            ax.errorbar(C, L, sd, elinewidth=1.5, **look | {"lw": 0.6})
            sizes[N] = max(sizes.get(N, (0, 0)), (L[-1], C[-1]))
        C = np.r_[np.geomspace(runs.C.min(), runs.C.max()), runs.C.max() * np.geomspace(1, 5)]
        best = [at_budget(s, x)[0] for x in C]
        L, *band = np.array([(b["loss"], *(b["ci"]["loss"] or [np.nan] * 2)) for b in best]).T
        ax.fill_between(C, *band, color=ink, alpha=0.13, lw=0)
        ax.plot(C, L, "--", color=ink)
        ax.plot(C[:50], L[:50], markevery=[], label=runs.name, **look)
    for floor in {round(s.runs.floor, 4) for s in studies if s.runs.floor > 0}:
        ax.axhline(floor, color="0.4", ls="-.", label=f"true floor {floor}")
    for N, (L, C) in sorted(sizes.items())[:: len(sizes) // 7 + 1]:
        ax.text(1.1 * C, 1.02 * L, f"{N:,.0f}", rotation=30, rotation_mode="anchor",
                bbox={"fc": "w", "lw": 0, "pad": 0.5, "alpha": 0.8})
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=f"loss ({runs.unit})")
    ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    page = ax.legend(title="thin: one N; thick: best N, 95 % band; dashed: no runs").figure
    write(path, lambda path: page.savefig(path, dpi=150))


def flops(text):
    """C,C such as 2.5e20,1e21 -> list of FLOPs."""
    return [float(C) for C in text.split(",")]


def parse_args(argv=None, manual=__doc__, switches=()):
    """Command line -> namespace; a mistake ends in one line with the nearest flag."""
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.format_help = lambda: f"{p.format_usage()}\n{manual}"
    p.error = lambda message: check(False, f"{message}; see --help")
    p.add_argument("path", nargs="*")
    p.add_argument("--where", action="append", default=[])
    p.add_argument("--group-by")
    p.add_argument("--loss", default="loss")
    p.add_argument("--holdout")
    p.add_argument("--budget", type=flops, default=[])
    p.add_argument("--compare", nargs=2)
    p.add_argument("--bootstrap", type=int, default=1000)
    p.add_argument("--out", type=Path)
    p.add_argument("--json", type=Path)
    for flag in switches:
        p.add_argument(flag, action="store_true")
    args, unknown = p.parse_known_args(argv)
    for flag in unknown[:1]:
        near = difflib.get_close_matches(flag, p._option_string_actions, 1)
        p.error(f"unknown {flag}" + "".join(f", did you mean {x}" for x in near))
    check(args.path or switches, "give a run folder or a table")
    check(args.bootstrap >= 0, "--bootstrap is negative")
    home = Path(*args.path[:1])
    args.out = args.out or (home if home.is_dir() else None)
    return args


def write(path, save):
    """Makes the folder, then calls save(path). A failure ends the program in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as error:
        check(False, f"{path}: cannot write: {error.strerror}; choose another --out")
    print(f"wrote {path}")


def write_json(path, content):
    """Numbers that are not finite become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write(path, lambda path: path.write_text(json.dumps(content, indent=1), encoding="utf-8"))


def main(argv=None):
    """Read, fit, print, write; returns what the JSON file holds."""
    args = parse_args(argv)
    notes, studies = gather(args)
    result = {"groups": [s.record for s in studies], "notes": notes}
    print("\n".join(notes))
    print_table(result["groups"])
    if args.compare:
        result["compare"] = compare(studies, args)
    for record in result["groups"]:
        print_group(record)
    if args.json or args.out:
        write_json(args.json or args.out / "laws.json", result)
    if args.out:
        draw(studies, args.out / "laws.png")
    return result


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends it without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
