"""fit_laws.py: from finished runs to scaling laws, with their uncertainty.

    python fit_laws.py runs/demo       a folder that train.py wrote (results.jsonl)
    python fit_laws.py table.csv       any table with columns N, D, loss
    python fit_laws.py runs/demo --compare early late --budget 1e14,1e15

fits  L = E + A/N^alpha + B/D^beta  (N parameters, D tokens, L loss in nats) to each group of
runs as the paper does (arXiv 2504.07951, App. C), prints its Table 2 with 95 % intervals, and
writes laws.json, laws.png and laws.svg. E is the loss no model beats; N ~ C^a, D ~ C^b and
D ~ N^d describe the best models for C FLOPs; L ~ C^c is their frontier.
"""

# Reading order: the fit (one lecture), its uncertainty, compute-optimal models, then tables,
# printing, figures, main.
# Dimensions: n rows (runs), T = 3 terms of the law, P = 5 coefficients, K problems solved at
# once (starts of one fit, resamples of a bootstrap), Q budgets.

import argparse
import csv
import difflib
import json
import os
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

COEFFICIENTS = ("A", "B", "E", "alpha", "beta")  # order of every (.., 5) array; A, B, E as logs
EXPONENTS = ("E", "alpha", "beta", "a", "b", "c", "d")  # columns of the paper's Table 2
FAMILY = ("fusion", "moe", "mixture")  # columns that tell one law from another by default
LEAST_ROWS, MOST_ROWS = 6, 5_000


@dataclass(frozen=True)
class Runs:
    """The rows that enter one fit. Arrays are (n,) float64."""

    name: str
    N: np.ndarray  # parameters of the decoder (MoE: active)
    D: np.ndarray  # tokens, all modalities
    L: np.ndarray  # loss, nats
    C: np.ndarray  # training FLOPs
    cluster: np.ndarray  # (n,) labels: rows that the bootstrap draws together
    vision: tuple | None = None  # late fusion: (rho, p, q), D_v = rho D, N_v = exp(p) N^q
    floor: float | None = None  # the true irreducible loss, where the data know it

    def rows(self, keep):
        """The same group with the rows of the mask `keep`."""
        return replace(self, **{k: getattr(self, k)[keep] for k in ("N", "D", "L", "C", "cluster")})


@dataclass(frozen=True)
class Fit:
    """A fitted law and how far to trust it."""

    coef: np.ndarray  # (5,) ln A, ln B, ln E, alpha, beta
    objective: float
    gradient: float  # largest |dF/dtheta| at the optimum, divided by delta * n
    condition: float  # of the Jacobian with unit columns: 2e2 on a good grid, 1e7 on a ridge
    starts: tuple  # (screened, polished, polished ones that reach the best objective)
    residuals: np.ndarray  # (n,) ln predicted - ln observed
    flags: tuple = ()  # sentences, one for each reason for doubt
    loose: tuple = ()  # coefficients that the data do not identify


# ---------------------------------------------------------------- the fit (App. C.1)
#
# With a = ln A, b = ln B, e = ln E every TERM of the law is a straight line in theta:
#     ln L = logsumexp(a - alpha ln N,  b - beta ln D,  e)
# so the law is one constant array, the design: terms = design @ theta. The paper minimises
# the SUM over runs of Huber(ln L predicted - ln L observed) with delta = 1e-3. Most residuals
# are larger than 1e-3, so this is nearly least absolute deviations: one bad run does not move
# it, but the valley is so flat that optimisers with default tolerances stop early and report
# success. With P = 5 we can afford the exact Hessian, hence Newton and a gradient of zero.


@dataclass(frozen=True)
class Problem:
    """What one fit minimises. theta (.., 5) is centred, coef (.., 5) is the paper's own."""

    design: np.ndarray  # (T, n, P)
    target: np.ndarray  # (n,) ln L
    centre: np.ndarray  # (2,) mean ln N, mean ln D
    delta: float

    def coef(self, theta):
        """Undo the centring."""
        return np.concatenate([theta[..., :2] + theta[..., 3:] * self.centre, theta[..., 2:]], -1)

    def theta(self, coef):
        """Centre: ln A and alpha are otherwise correlated at 0.999."""
        return np.concatenate([coef[..., :2] - coef[..., 3:] * self.centre, coef[..., 2:]], -1)


def pose(runs, delta):
    """Runs -> Problem."""
    logs = np.log([runs.N, runs.D])  # (2, n)
    centre = logs.mean(1)
    x = logs - centre[:, None]
    x[np.ptp(x, axis=1) < 0.01] = 0  # a constant column has noise, but no slope
    design = np.zeros((3, len(runs.N), 5))
    design[[0, 1, 2], :, [0, 1, 2]] = 1
    design[[0, 1], :, [3, 4]] = -x
    return Problem(design, np.log(runs.L), centre, delta)


def residual(problem, theta):
    """theta (K, P) -> each term's share of the loss p (T, K, n), residuals r (K, n)."""
    z = theta @ problem.design.transpose(0, 2, 1)  # (T, K, n)
    top = z.max(0)  # without it exp overflows at far starts
    p = np.exp(z - top)
    total = p.sum(0)
    return p / total, top + np.log(total) - problem.target


def huber(r, delta):
    """-> loss (r^2/2 within delta, a straight line beyond) and its derivative psi, like r."""
    psi = np.clip(r, -delta, delta)
    return psi * (r - 0.5 * psi), psi


def objective(problem, theta, weight):
    """F (K,), gradient (K, P), Hessian (K, P, P) of the weighted sum of Huber losses.

    weight (K, n): how often a resample drew each run; ones for the fit itself. The matrix
    products are so small that BLAS starts no threads, which would slow them down.
    """
    design = problem.design
    p, r = residual(problem, theta)
    loss, psi = huber(r, problem.delta)
    jac = np.einsum("tkn,tpn->kpn", p, design.transpose(0, 2, 1).copy())  # dr/dtheta
    pull = weight * psi
    gradient = np.einsum("kn,kpn->kp", pull, jac)
    # Huber adds J J' where |r| < delta; r itself is curved: sum_t p_t M_t M_t' - J J'.
    inner = weight * (np.abs(r) <= problem.delta) - pull
    hessian = (jac * inner[:, None]) @ jac.transpose(0, 2, 1)  # (K, P, P)
    squares = (design[..., None] * design[..., None, :]).reshape(*design.shape[:2], -1)
    hessian += ((pull * p) @ squares).sum(0).reshape(hessian.shape)  # (T, K, P*P) -> (K, P, P)
    return (weight * loss).sum(-1), gradient, hessian


def newton(problem, theta, weight=None, free=None, steps=300):
    """Damped Newton on K problems at once: -> theta (K, P), F (K,), |gradient|/(delta n) (K,).

    Negative curvature is turned positive, a step that does not lower F is refused and damped
    ten times more, and solved problems leave the batch. `free` (P,) of 0 and 1 holds
    coefficients where they are.
    """
    theta = theta.copy()
    weight = np.ones((len(theta), len(problem.target))) if weight is None else weight
    free = np.ones(theta.shape[1]) if free is None else free
    F, g, H = objective(problem, theta, weight)
    damping, live = np.full(len(F), 1e-3), np.arange(len(F))
    scale = problem.delta * weight.sum(-1)
    for _ in range(steps):
        curve, axes = np.linalg.eigh(H[live] * free * free[:, None])
        curve = np.abs(curve)
        curve += damping[live, None] * curve.max(-1, keepdims=True) + 1e-300
        along = np.einsum("kji,kj->ki", axes, g[live] * free) / curve
        step = -np.einsum("kij,kj->ki", axes, along) * free
        step /= np.maximum(np.abs(step).max(-1, keepdims=True) / 2, 1)  # at most 2 in any theta
        F1, g1, H1 = objective(problem, theta[live] + step, weight[live])
        calmer = np.abs(g1 * free).max(-1) < np.abs(g[live] * free).max(-1)
        good = (F1 < F[live]) | ((F1 == F[live]) & calmer)
        won = live[good]
        theta[won] += step[good]
        F[won], g[won], H[won] = F1[good], g1[good], H1[good]
        damping[live] = np.where(good, np.maximum(damping[live] / 10, 1e-12), damping[live] * 10)
        slope = np.abs(g[live] * free).max(-1) / scale[live]
        live = live[(slope > 1e-13) & (damping[live] < 1e8)]
        if not len(live):
            break
    return theta, F, np.abs(g * free).max(-1) / scale


def paper_starts(problem):
    """The paper's 7 x 7 x 4 x 3 x 3 grid of starts -> theta (1764, 5)."""
    far, e, exponents = range(0, 31, 5), (-1, -0.5, 0.5, 1), (0, 0.5, 2.5)
    return problem.theta(np.array(list(product(far, far, e, exponents, exponents)), float))


def projected_starts(problem):
    """Given alpha and beta the law is linear in A, B, E: 12 x 12 least squares, theta (144, 5).

    Nearly all of these lead to the best optimum; most of the paper's starts do not.
    """
    grid = np.geomspace(0.05, 2.5, 12)
    alpha, beta = (g.ravel() for g in np.meshgrid(grid, grid))
    x, y = problem.design[0, :, 3], problem.design[1, :, 4]  # -ln N, -ln D, centred
    X = np.stack([alpha[:, None] * x, beta[:, None] * y, np.zeros((144, len(x)))], -1)
    X = np.exp(X - problem.target[:, None])  # (144, n, 3), relative: X @ (A, B, E) = 1
    normal = np.einsum("knt,knu->ktu", X, X)
    normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    linear = np.linalg.solve(normal, X.sum(1)[..., None])[..., 0]
    linear = np.maximum(linear, 1e-3 * np.exp(problem.target.min()))  # ln needs them positive
    return np.concatenate([np.log(linear), alpha[:, None], beta[:, None]], 1)


def screen(problem, starts, best):
    """The `best` starts by objective. Some 500 rows are enough to rank them."""
    thin = slice(None, None, max(1, len(problem.target) // 500))
    few = replace(problem, design=problem.design[:, thin], target=problem.target[thin])
    parts = np.array_split(starts, max(1, len(starts) // 256))
    score = [huber(residual(few, part)[1], problem.delta)[0].sum(-1) for part in parts]
    return starts[np.argsort(np.concatenate(score), kind="stable")[:best]]


def fit_law(runs, delta=1e-3):
    """Runs -> Fit: screen 1764 + 144 starts, polish the best 24, keep the lowest (App. C.1)."""
    problem = pose(runs, delta)
    grids = paper_starts(problem), projected_starts(problem)
    tried = np.concatenate([screen(problem, grid, 12) for grid in grids])
    theta, F, slope = newton(problem, tried)
    k = int(np.argmin(F))
    reached = int((F <= F[k] * (1 + 1e-9) + 1e-24 * len(runs.N)).sum())
    starts = (sum(map(len, grids)), len(tried), reached)
    p, r = residual(problem, theta[k : k + 1])
    condition, blind = conditioning(problem, p[:, 0])
    fit = Fit(problem.coef(theta[k]), float(F[k]), float(slope[k]), condition, starts, r[0])
    flags, loose = doubts(runs, fit, problem, p[:, 0], blind)
    return replace(fit, flags=flags, loose=loose)


# ---------------------------------------------------------------- can the data tell?


def conditioning(problem, p):
    """Shares p (T, n) -> scaled condition number of dr/dcoef, (5,) bool: coefficients it hides."""
    jac = np.einsum("tn,tnp->np", p, problem.design)
    jac[:, 3:] -= problem.centre * jac[:, :2]  # uncentred, as others report it
    norm = np.linalg.norm(jac, axis=0)
    _, s, vt = np.linalg.svd(jac / np.maximum(norm, 1e-300), full_matrices=False)
    hidden = np.abs(vt[s < s[0] * 1e-5]).max(0, initial=0) > 0.05
    return float(s[0] / max(s[-1], s[0] * 1e-17)), hidden | (norm < 1e-12 * norm.max())


def doubts(runs, fit, problem, p, blind):
    """-> (sentences, names of coefficients that are not identified)."""
    jac = np.einsum("tn,tnp->np", p, problem.design)
    spread = 1.4826 * np.median(np.abs(fit.residuals)) * np.sqrt(np.pi / 2)
    error = spread * np.sqrt(np.diag(np.linalg.pinv(jac.T @ jac, rcond=1e-14)).clip(0))
    flags, loose = [], {COEFFICIENTS[j] for j in np.flatnonzero(blind)}
    if np.ptp(np.log(runs.D)) < 0.01:
        loose |= {"B", "beta", "E"}
        flags.append("D is the same in all runs: B, beta and E cannot be told apart")
    elif fit.condition > 1e5:
        flags.append(f"condition number {fit.condition:.0e}: the points lie on one ridge")
    if "E" not in loose and (p[2].max() < 1e-3 or error[2] > 0.5):
        loose.add("E")
        flags.append("E is not identified: the runs stay too far above the irreducible loss")
    for term, other, name in ((0, "A", "alpha"), (1, "B", "beta")):
        value, se, known = fit.coef[3 + term], error[3 + term], name not in loose
        if p[term].max() < 1e-3:
            flags.append(f"{other} went to 0: {name} means nothing here")
        elif not 0 < value <= 2:
            flags.append(f"{name} = {value:.2f} is outside (0, 2]: the range is too short")
        elif se > 0.5 * value and known:
            flags.append(f"{name} is known to about +-{se:.2g} only")
        else:
            continue
        loose |= {name, other}
    return tuple(flags), tuple(c for c in COEFFICIENTS if c in loose)


def profile(runs, fit, delta):
    """95 % profile intervals {name: (lo, hi)} of E, alpha, beta: fix one, refit the others.

    None: the end lies beyond ten times the value. The rise of F is turned into a chi square
    by the robust likelihood ratio with scale mean(psi^2) / mean(|r| < delta).
    """
    problem, size, intervals = pose(runs, delta), np.abs(fit.residuals), {}
    scale = (np.minimum(size, delta) ** 2).mean() / max((size <= delta).mean(), 0.02)
    factors = np.linspace(-1, 1, 61) ** 3 * np.log(10)  # dense near the fit
    least = runs.L.min()
    middles = {"E": np.clip(np.exp(fit.coef[2]), 0.05 * least, 0.99 * least),
               "alpha": np.clip(fit.coef[3], 0.05, 2), "beta": np.clip(fit.coef[4], 0.05, 2)}
    for name, middle in middles.items():
        j, values = COEFFICIENTS.index(name), middle * np.exp(factors)
        theta = np.tile(problem.theta(fit.coef), (len(values), 1))
        theta[:, j] = np.log(values) if name == "E" else values
        _, F, _ = newton(problem, theta, free=np.arange(5) != j, steps=100)
        inside = np.flatnonzero(F - fit.objective < 1.92 * max(scale, 1e-10))
        lo, hi = (inside[0], inside[-1]) if len(inside) else (0, len(values) - 1)
        intervals[name] = (float(values[lo]) if lo > 0 else None,
                           float(values[hi]) if hi < len(values) - 1 else None)
    return intervals


def bootstrap(runs, fit, count, seed, delta=1e-3):
    """Refit `count` resamples of runs (or clusters) -> coef (count, 5), weights (count, n).

    Newton starts at the full fit. Under 40 rows a resample can have another best optimum, so
    three more starts join in.
    """
    labels, member = np.unique(runs.cluster, return_inverse=True)
    rng, chance = np.random.default_rng(seed), np.full(len(labels), 1 / len(labels))
    weight = rng.multinomial(len(labels), chance, size=count)[:, member].astype(float)
    problem = pose(runs, delta)
    starts = problem.theta(fit.coef)[None]
    if len(runs.N) < 40:
        starts = np.concatenate([starts, screen(problem, projected_starts(problem), 3)])
    S, draws = len(starts), [starts[:0]]
    chunk = max(1, 8192 // (len(runs.N) * S))  # fits the cache
    for w in (weight[i : i + chunk] for i in range(0, count, chunk)):
        many = np.tile(starts, (len(w), 1))  # (len(w) * S, P)
        theta, F, _ = newton(problem, many, np.repeat(w, S, axis=0), steps=100)
        best = F.reshape(len(w), S).argmin(1) + S * np.arange(len(w))
        draws.append(theta[best])
    return problem.coef(np.concatenate(draws)), weight


# ---------------------------------------------------------------- compute-optimal models


def predict(coef, N, D):
    """Loss of coefficients (.., 5) at N and D (broadcast against coef[..., 0])."""
    a, b, e, alpha, beta = np.moveaxis(coef, -1, 0)
    return np.exp(e) + np.exp(a - alpha * np.log(N)) + np.exp(b - beta * np.log(D))


def vision_line(N, D, Nv, Dv):
    """(rho, p, q): late fusion's D_v = rho D and the fitted line ln N_v = p + q ln N (C.2)."""
    q, p = np.polyfit(np.log(N), np.log(Nv), 1)
    return float(np.median(Dv / D)), float(p), float(q)


def encoder(N, vision):
    """N_v for decoders of N parameters, an array like N; zeros without an encoder."""
    return np.exp(vision[1]) * N ** vision[2] if vision else np.zeros_like(N)


def optimum(coef, C, vision=None):
    """Best model for C (Q,) FLOPs: coef (K, 5) -> N (K, Q), D, loss; NaN where there is none.

    C = 6 (N_v D_v + N D). At fixed C, raising ln N lowers ln D by s per unit, so the best N
    solves alpha A/N^alpha = s beta B/D^beta; bisection on ln N between very wide bounds.
    """
    coef, C = np.atleast_2d(coef), np.atleast_1d(np.asarray(C, float))
    a, b, _, alpha, beta = (coef[:, j, None] for j in range(5))
    rho, q = (vision[0], vision[2]) if vision else (0.0, 0.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        odds = b - a + np.log(beta) - np.log(alpha)  # NaN for exponents below 0

        def uphill(lnN):  # > 0 where still more parameters make it worse
            N = np.exp(lnN)
            extra = rho * encoder(N, vision)
            D = C / (6 * (N + extra))
            s = (N + q * extra) / (N + extra)
            return odds + np.log(s) - beta * np.log(D) + alpha * lnN, N, D

        middle = 0.5 * np.log(C / 6) + 0 * odds  # (K, Q)
        lo, hi = middle - 40, middle + 40
        inside = (uphill(lo)[0] < 0) & (uphill(hi)[0] > 0)
        for _ in range(60):
            middle = 0.5 * (lo + hi)
            up = uphill(middle)[0] > 0
            lo, hi = np.where(up, lo, middle), np.where(up, middle, hi)
        _, N, D = uphill(middle)
        N, D = np.where(inside, N, np.nan), np.where(inside, D, np.nan)
        return N, D, predict(coef[:, None], N, D)


def slope(x, y):
    """Least-squares slope of y on x along the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return (x * y).sum(-1) / (x * x).sum(-1)


def regression(coef, runs, total=False):
    """a, b, d as App. C.2: best N and D at 16 budgets in the runs' range, logs on logs.

    `total` counts N + N_v, as the paper's late row does (PAPER: a + b is then not 1).
    """
    C = np.geomspace(runs.C.min(), runs.C.max() * (1 + 1e-9), 16)
    N, D, _ = optimum(coef, C, runs.vision)
    lnN, lnD = np.log(N + encoder(N, runs.vision) if total else N), np.log(D)
    lnC = np.log(C)[None]
    return {"a": slope(lnC, lnN), "b": slope(lnC, lnD), "d": slope(lnN, lnD)}


def derive(coef, runs):
    """coef (K, 5) -> {name: (K,)}: the law, closed form (C = 6 N D), regressions (App. C.2)."""
    alpha, beta = coef[:, 3], coef[:, 4]
    with np.errstate(all="ignore"):
        values = dict(zip("ABE", np.exp(coef[:, :3].T)), alpha=alpha, beta=beta)
        values |= {"a": beta / (alpha + beta), "b": alpha / (alpha + beta), "d": alpha / beta}
        for suffix in ("regression", "total")[: 2 if runs.vision else 1]:
            found = regression(coef, runs, suffix == "total")
            values |= {f"{k}_{suffix}": found[k] for k in "abd"}
    return values


def hull(C, L):
    """Lower convex hull of the best runs, (h, 2) ln C and ln L from left to right (C.3).

    Interpolating the runs of each size first, as the paper does, adds only inner points.
    """
    order = np.lexsort((L, C))
    x, y = np.log(C[order]), np.log(L[order])
    record = np.r_[True, y[1:] < np.minimum.accumulate(y)[:-1]]
    points = []
    for q in zip(x[record], y[record]):
        while points and points[-1][0] == q[0]:
            points.pop()
        while len(points) > 1:
            (ox, oy), (px, py) = points[-2:]
            if (px - ox) * (q[1] - oy) > (py - oy) * (q[0] - ox):
                break  # bends to the left: convex
            points.pop()
        points.append(q)
    return np.array(points)


def envelope(runs, cut, keep=slice(None)):
    """L = K C^c along the hull from `cut` FLOPs on: -> c with C sampled linearly (the paper),
    c with C in equal ratios; the range decides c, so both. NaN with fewer than two points."""
    points = hull(runs.C[keep], runs.L[keep])
    first, last = max(np.log(cut), points[0, 0]), points[-1, 0]
    if last <= first + 1e-9:
        return np.nan, np.nan
    lnC = np.log(np.linspace(np.exp(first), np.exp(last), 200)), np.linspace(first, last, 200)
    return tuple(slope(x, np.interp(x, *points.T)) for x in lnC)


# ---------------------------------------------------------------- reading tables

ALIASES = {
    "N": ("params", "parameters", "n_params", "num_params", "model_size", "active_params"),
    "D": ("tokens", "n_tokens", "num_tokens", "train_tokens", "training_tokens"),
    "loss": ("val_loss", "validation_loss", "eval_loss", "test_loss", "final_loss"),
    "C": ("flops", "flop", "compute", "train_flops", "training_flop", "training_flops"),
}


def read_table(path):
    """Run folder, .jsonl, .csv, .tsv or .parquet -> ({column: list}, number of broken lines)."""
    path = Path(path)
    if path.is_dir():
        path = path / "results.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give a table, or a folder that train.py wrote")
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise SystemExit(f"{path}: parquet needs one more package: pip install pyarrow")
        return parquet.read_table(path).to_pydict(), 0
    if kind not in (".jsonl", ".csv", ".tsv"):
        raise SystemExit(f"{path}: give a run folder, .jsonl, .csv, .tsv or .parquet")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return read_jsonl(file) if kind == ".jsonl" else read_csv(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: not a UTF-8 {kind} table: {error}")


def read_jsonl(file):
    """One object a line. A run that was killed may leave half a line."""
    rows, broken = [], 0
    for line in filter(str.strip, file):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            broken += 1
    names = dict.fromkeys(k for row in rows for k in row)
    return {k: [row.get(k) for row in rows] for k in names}, broken


def read_csv(file):
    """Header, then rows of as many cells, separated by comma, semicolon or tab."""
    head = file.readline()
    comma = max(",;\t", key=head.count)
    names = [name.strip() for name in next(csv.reader([head], delimiter=comma), [])]
    rows = [row for row in csv.reader(file, delimiter=comma) if row]
    whole = [row for row in rows if len(row) == len(names)]
    cells = zip(*whole) if whole else ([] for _ in names)
    return {k: list(v) for k, v in zip(names, cells)}, len(rows) - len(whole)


def number(cell):
    """One cell -> float: 3.1, "2e9", "275M" (K M B T); NaN if it is none of these."""
    text = str(cell).strip()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1)
    try:
        return float(text[:-1]) * scale if scale > 1 else float(text)
    except ValueError:
        return np.nan


def column(columns, name, required=True):
    """The column `name` or an alias of it, (n,) objects; None, or an error naming the nearest."""
    plain = {re.sub(r"\W+", "_", k).lower(): k for k in columns}
    for alias in [name, *ALIASES.get(name, [])]:
        if alias.lower() in plain:
            return columns[plain[alias.lower()]]
    if required:
        near = difflib.get_close_matches(name, columns, 1)
        hint = f"did you mean {near[0]}?" if near else "columns: " + ", ".join(columns)
        raise SystemExit(f"no column {name!r} in the table; {hint}")
    return None


def usable(cells):
    """(n,) objects -> (n,) float64, NaN for all that is not a positive finite number."""
    try:
        x = cells.astype(float)
    except (TypeError, ValueError):
        x = np.array([number(c) for c in cells], float)
    return np.where(np.isfinite(x) & (x > 0), x, np.nan)


def where(columns, rule):
    """(n,) bool of a rule such as kept240=1, C<1e21 or fusion!=late."""
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=|!=|==?|<|>)\s*(.*?)\s*", rule)
    if not match:
        raise SystemExit(f"rule {rule!r}: write COLUMN=VALUE, or != < <= > >= for =")
    name, sign, value = match.groups()
    cells, limit = column(columns, name), number(value)
    if np.isnan(limit):
        if sign in ("<", "<=", ">", ">="):
            raise SystemExit(f"rule {rule!r}: {value!r} is not a number")
        cells, limit = np.array([str(c) for c in cells]), value
    else:
        cells = np.array([number(c) for c in cells])
    tests = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    return (tests | {"!=": np.not_equal}).get(sign, np.equal)(cells, limit)


class Table:
    """Rows of all input files, {column: (n,) object array}, and a note on each row left out."""

    def __init__(self, paths):
        parts = [read_table(p) for p in paths]
        sizes = [max(map(len, columns.values()), default=0) for columns, _ in parts]
        self.columns = {k: np.empty(sum(sizes), object) for columns, _ in parts for k in columns}
        for k, cells in self.columns.items():
            cells[:] = [c for (t, _), n in zip(parts, sizes) for c in t.get(k, [None] * n)]
        self.notes = [f"{sum(sizes)} rows read from {', '.join(map(str, paths))}"]
        broken = sum(b for _, b in parts)
        self.notes += [f"{broken} broken lines left out"] if broken else []
        if not sum(sizes):
            raise SystemExit(f"{paths[0]}: no rows in it")

    def keep(self, mask, why):
        """Leave out the rows where mask is False, and say so."""
        if not mask.all():
            self.notes.append(f"{int((~mask).sum())} rows left out: {why}")
            self.columns = {k: v[mask] for k, v in self.columns.items()}


def load(args):
    """Command line -> Table of usable rows (N and D are float columns), (n,) group names."""
    table = Table(args.path)
    for rule in args.where:
        table.keep(where(table.columns, rule), f"not {rule}")
    status = column(table.columns, "status", False)
    if status is not None:
        status = np.array([str(s or "ok") for s in status])
        table.keep(status == "ok", "status is " + ", ".join(sorted({*status} - {"ok"})))
    cells = [repr(row) for row in zip(*table.columns.values())]
    first = {cell: i for i, cell in reversed(list(enumerate(cells)))}
    table.keep(np.isin(np.arange(len(cells)), list(first.values())), "exact copies of another row")
    C = column(table.columns, "C", False)
    if column(table.columns, "D", False) is None and C is not None:
        table.columns["D"] = usable(C) / (6 * usable(column(table.columns, "N")))
        table.notes.append("no column of tokens: D = C / (6 N)")
    for name in ("N", "D"):
        table.columns[name] = usable(column(table.columns, name))
        table.keep(np.isfinite(table.columns[name]), f"{name} is not a positive number")
    by = [g for g in args.group_by.split(",") if g] if args.group_by is not None else \
        [f for f in FAMILY if f in table.columns
         and (f != "mixture" or len(set(map(str, table.columns[f]))) > 1)]
    keys = zip(*([str(v) for v in column(table.columns, name)] for name in by))
    names = [" ".join(v for v in key if v != "none") or "all" for key in keys] if by else []
    return table, np.array(names or ["all"] * len(table.columns["N"]))


def make_runs(table, chosen, name, loss, args):
    """Rows `chosen` (mask) with loss column `loss` -> Runs, their row numbers; adds notes."""
    notes, columns = table.notes, table.columns
    values = usable(column(columns, loss))
    rows, bad = np.flatnonzero(chosen & np.isfinite(values)), chosen & ~np.isfinite(values)
    if bad.any():
        notes.append(f"{name}: {bad.sum()} rows left out: {loss} is not a positive number "
                     f"(the first is {column(columns, loss)[bad][0]!r})")
    rows = repeated(rows, columns, values, name, args, notes)
    if len(rows) > MOST_ROWS:
        notes.append(f"{name}: {len(rows)} rows, fitted on a random {MOST_ROWS} of them")
        rows = np.sort(np.random.default_rng(args.seed).choice(rows, MOST_ROWS, replace=False))
    for other in ("n_experts", "top_k", "image_size", "patch_size", "context"):
        kinds = sorted({str(v) for v in columns[other][rows]}) if other in columns else []
        if len(kinds) > 1 and other not in (args.group_by or ""):
            notes.append(f"{name}: one law for {other} {', '.join(kinds)}; --group-by parts them")
    N, D = columns["N"][rows].astype(float), columns["D"][rows].astype(float)
    check_size(name, N)
    vision, C = accounting(columns, rows, N, D, name, notes)
    cluster = column(columns, args.cluster)[rows].astype(str) if args.cluster else rows
    if len(set(cluster)) < 2:
        raise SystemExit(f"{name}: --cluster {args.cluster} puts all rows into one cluster")
    floor = usable(columns.get(loss.replace("loss", "floor", 1), np.array([None] * len(values))))
    known = floor[rows][np.isfinite(floor[rows])]
    known = float(known.mean()) if len(known) and loss.startswith("loss") else None
    return Runs(name, N, D, values[rows], C, cluster, vision, known), rows


def repeated(rows, columns, values, name, args, notes):
    """Runs of one (N, D): keep all and tell their spread, or the best with --best-per-cell."""
    if not len(rows):
        return rows
    pairs = np.array([columns["N"][rows], columns["D"][rows]], float)
    cells = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
    repeats = len(rows) - cells.max() - 1
    if repeats and args.best_per_cell:
        order = np.lexsort((values[rows], cells))
        notes.append(f"{name}: {repeats} rows left out: another run of that (N, D) is better")
        return np.sort(rows[order[np.r_[True, np.diff(cells[order]) > 0]]])
    if repeats:
        y = np.log(values[rows])
        mean = np.bincount(cells, y) / np.bincount(cells)
        spread = np.sqrt(((y - mean[cells]) ** 2).sum() / repeats)
        notes.append(f"{name}: {repeats} rows repeat the (N, D) of another; all kept, ln L differs "
                     f"by {spread:.4f} (seeds); with several learning rates use --best-per-cell")
    return rows


def check_size(name, N):
    """Five coefficients need six rows and two sizes: SystemExit otherwise."""
    if len(N) < LEAST_ROWS:
        raise SystemExit(f"{name}: {len(N)} usable rows; a law of 5 coefficients needs at least "
                         f"{LEAST_ROWS}: run more sizes or token budgets")
    if np.ptp(np.log(N)) < 0.01:
        raise SystemExit(f"{name}: all rows have N = {N[0]:.4g}; run at least two sizes")


def accounting(columns, rows, N, D, name, notes):
    """-> (vision line or None, FLOPs (n,)): the column C where it is sound, else the paper's."""
    vision, C, rule = None, 6 * N * D, "6 N D"
    Nv, Dv = (usable(columns[k])[rows] if k in columns else np.array([np.nan])
              for k in ("N_vision", "D_vision"))
    if np.isfinite(Nv).all() and np.isfinite(Dv).all():
        vision, C, rule = vision_line(N, D, Nv, Dv), 6 * (Nv * Dv + N * D), "6 (N_v D_v + N D)"
    given = column(columns, "C", False)
    if given is None:
        return vision, C
    given = usable(given)[rows]
    bad, off = int((~np.isfinite(given)).sum()), np.abs(given / C - 1)
    if bad:
        notes.append(f"{name}: C is not a positive number in {bad} rows; C = {rule} in all")
        return vision, C
    if off.max() > 0.05:
        notes.append(f"{name}: the column C differs from {rule} by up to {off.max():.0%}; figures "
                     "and c use the column")
    return vision, given


# ---------------------------------------------------------------- all numbers of one group


@dataclass(frozen=True)
class Study:
    """Everything known about one group."""

    runs: Runs
    held: Runs | None  # rows kept out of the fit
    fit: Fit
    draws: np.ndarray  # (K, 5) bootstrap refits, as Fit.coef
    values: dict  # name -> number
    samples: dict  # name -> (K,) bootstrap values of it


def quality(coef, runs):
    """Errors of a law on runs: R2 of ln L, MSE of L, mean |error| and mean error in %."""
    r = np.log(predict(coef, runs.N, runs.D)) - np.log(runs.L)
    spread = ((np.log(runs.L) - np.log(runs.L).mean()) ** 2).sum()
    return {"r2": float(1 - (r**2).sum() / spread) if spread else np.nan,
            "mse": float(((runs.L * np.expm1(r)) ** 2).mean()),
            "mae_pct": float(100 * np.abs(np.expm1(r)).mean()),
            "bias_pct": float(100 * np.expm1(r).mean())}


def study(runs, held, args, stream):
    """Fit, bootstrap, and what follows from them -> Study. `stream` makes groups independent."""
    fit = fit_law(runs, args.delta)
    draws, weight = bootstrap(runs, fit, args.bootstrap, [args.seed, stream], args.delta)
    ends = np.log([runs.C.min(), runs.C.max()])
    cut = args.min_budget or float(np.exp(ends[0] + 0.25 * (ends[1] - ends[0])))
    values = {k: float(v[0]) for k, v in derive(fit.coef[None], runs).items()}
    values |= dict(zip(("c", "c_log_spaced"), map(float, envelope(runs, cut))), cut=cut)
    samples = derive(draws, runs)
    many = np.array([envelope(runs, cut, w > 0) for w in weight]).reshape(-1, 2)
    samples |= {"c": many[:, 0], "c_log_spaced": many[:, 1]}
    return Study(runs, held, fit, draws, values | quality(fit.coef, runs), samples)


def interval(samples):
    """(K,) -> [2.5 %, 97.5 %] of the finite ones; None where fewer than half are."""
    x = samples[np.isfinite(samples)]
    return np.percentile(x, [2.5, 97.5]).tolist() if 2 * len(x) > len(samples) else None


def at_budget(s, C):
    """Compute-optimal model for C FLOPs: -> its numbers, (K,) bootstrap losses."""
    one, many = (optimum(coef, C, s.runs.vision) for coef in (s.fit.coef, s.draws))
    found = {"C": C} | {k: float(v[0, 0]) for k, v in zip(("N", "D", "loss"), one)}
    found["ci"] = {k: interval(v[:, 0]) for k, v in zip(("N", "D", "loss"), many)}
    found["extrapolates"] = bool(not s.runs.C.min() <= C <= s.runs.C.max())
    return found, many[2][:, 0]


def record(s, args):
    """Study -> the JSON object of one group."""
    v, f, r = s.values, s.fit, s.runs
    out = {"name": r.name, "n": len(r.N), "objective": f.objective} | v
    out["ci"] = {k: interval(x) for k, x in s.samples.items()} if len(s.draws) else {}
    out |= {"floor": r.floor, "gradient": f.gradient, "condition": f.condition}
    out["starts"] = dict(zip(("screened", "polished", "reached_best"), f.starts))
    out |= {"flags": f.flags, "not_identified": f.loose}
    out["profile"] = profile(r, f, args.delta) if f.loose else None
    if f.loose and out["ci"] and f.condition > 1e5:  # resamples stop anywhere on the ridge
        out["ci"] |= {k: out["profile"].get(k, (None, None)) for k in (*f.loose, *"abd")}
    out |= {f"{k}_range": [getattr(r, k).min(), getattr(r, k).max()] for k in "NDC"}
    out["holdout"] = {"n": len(s.held.N)} | quality(f.coef, s.held) if s.held else None
    out["budgets"] = [at_budget(s, C)[0] for C in args.budget]
    return out


# ---------------------------------------------------------------- what is printed


def human(x):
    """2.75e8 -> 275M."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if 0.9995 * scale <= x < 999.5 * scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}"


def span(ends, form="{:.3f}"):
    """[lo, hi] as text; "?" for an end that was not found."""
    return "[" + ", ".join("?" if e is None else form.format(e) for e in ends or (None, None)) + "]"


def print_table(records):
    """The paper's Table 2, an interval under each number, "?" at what is not identified."""
    wide = max(len(g["name"]) for g in records + [{"name": "group"}]) + 2
    print("\n" + "group".ljust(wide) + "runs  " + "".join(k.ljust(17) for k in EXPONENTS)
          + "R2(ln L)  MSE       MAE %")
    for g in records:
        loose = set(g["not_identified"])
        loose |= {"a", "b", "d"} if loose & {"alpha", "beta"} else set()
        cells = [("-" if not np.isfinite(g[k]) else f"{g[k]:.4f}{'?' * (k in loose)}").ljust(17)
                 for k in EXPONENTS]
        print(g["name"].ljust(wide) + f"{g['n']:<6}" + "".join(cells)
              + f"{g['r2']:.5f}   {g['mse']:.2e}  {g['mae_pct']:.3f}")
        if g["ci"]:
            print(" " * (wide + 6) + "".join(span(g["ci"][k]).ljust(17) for k in EXPONENTS))


def print_details(s, g):
    """What a careful reader asks about one group."""
    say, v = (lambda text: print("  " + text)), s.values
    print(f"\n{g['name']}: {len(np.unique(s.runs.N))} sizes, "
          + ", ".join(f"{k} {human(lo)} to {human(hi)}" if k != "C" else f"C {lo:.1e} to {hi:.1e}"
                      for k, (lo, hi) in ((k, g[k + "_range"]) for k in "NDC")))
    say(f"E = {v['E']:.5g}, A = {v['A']:.5g}, B = {v['B']:.5g}")
    if s.runs.floor is not None:
        lo, hi = g["ci"].get("E") or (None, None)
        low, high = (-np.inf if lo is None else lo), (np.inf if hi is None else hi)
        place = "inside" if low <= s.runs.floor <= high else "outside"
        say(f"true floor {s.runs.floor:.4f}" + f", {place} the interval of E" * bool(g["ci"]))
    say("optimiser: {} screened starts, {} polished, {} of them reach ".format(*s.fit.starts)
        + f"F = {s.fit.objective:.8g}; |gradient| / (delta n) = {s.fit.gradient:.0e}; "
        f"condition {s.fit.condition:.1e}")
    for suffix, label in (("", "closed form, C = 6 N D"), ("_regression", "regression on budgets"),
                          ("_total", "regression of N + N_vision")):
        if "a" + suffix in v:
            say(f"{label:28}" + "  ".join(f"{k} {v[k + suffix]:.4f}" for k in "abd"))
    say(f"envelope from {v['cut']:.1e} FLOPs  c {v['c']:.4f} (C spaced evenly, as the paper), "
        f"{v['c_log_spaced']:.4f} (in equal ratios)")
    size = np.abs(s.fit.residuals)
    for count, what in (((s.runs.L < v["E"]).sum(), "below the fitted E"),
                        ((size > 8 * max(np.median(size), 1e-6)).sum(),
                         "more than 8 median residuals off the law")):
        if count:
            say(f"{count} rows lie {what}; they are in the fit")
    if g["holdout"]:
        say("held out {n} rows: R2(ln L) {r2:.4f}, MSE {mse:.2e}, MAE {mae_pct:.3f} %, mean error "
            "{bias_pct:+.3f} %".format(**g["holdout"]))
    for b in g["budgets"]:
        say(f"at C = {b['C']:.3g}: N {human(b['N'])}, D {human(b['D'])}, "
            f"D/N {b['D'] / b['N']:.3g}, loss {b['loss']:.4f} {span(b['ci']['loss'], '{:.4f}')}"
            + ", outside the runs' range of C" * b["extrapolates"])
    for flag in s.fit.flags:
        say(f"WARNING: {flag}")
    if g["profile"]:
        say(f"not identified: {', '.join(s.fit.loose)}; 95 % profile intervals: "
            + ", ".join(f"{k} {span(ends)}" for k, ends in g["profile"].items()))


def compare(studies, args):
    """Print and return the differences of two groups (first minus second) with intervals."""
    found = {s.runs.name: s for s in studies}
    for name in args.compare:
        if name not in found:
            raise SystemExit(f"--compare: no group {name!r}; groups: {', '.join(found)}")
    one, two = (found[name] for name in args.compare)
    out = {k: {"difference": one.values[k] - two.values[k],
               "ci": interval(one.samples[k] - two.samples[k])} for k in EXPONENTS}
    print(f"\n{one.runs.name} minus {two.runs.name}")
    for k, gap in out.items():
        print(f"  {k:6} {gap['difference']:+.4f} {span(gap['ci'], '{:+.4f}')}")
    for C in args.budget or [min(one.runs.C.max(), two.runs.C.max())]:
        (x, xs), (y, ys) = at_budget(one, C), at_budget(two, C)
        gap, ci = x["loss"] - y["loss"], interval(xs - ys)
        out[f"loss at {C:.6g}"] = {"difference": gap, "ci": ci}
        ends = sorted(np.sign(gap) * e for e in ci) if ci else None
        print(f"  {(one if gap < 0 else two).runs.name} is better by {abs(gap):.4f} "
              f"{span(ends, '{:.4f}')} at {C:.3g} FLOPs")
    return out


# ---------------------------------------------------------------- figures


def draw(studies, path):
    """One page, PNG and SVG: loss against FLOPs per group; prediction and residuals of all."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs one more package: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(len(studies), 4)
    down = -(-len(studies) // across)
    page = pyplot.figure(figsize=(12, 4.4 * down + 3), layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=[4.4 * down, 3])
    panels = top.subplots(down, across, squeeze=False, sharey=True).ravel()
    for ax, s in zip(panels, studies):
        draw_frontier(ax, s)
    for ax in panels[len(studies):]:
        ax.axis("off")
    draw_residuals(bottom.subplots(1, 4), studies)
    for suffix in (".png", ".svg"):
        part = path.with_name(path.stem + ".part" + suffix)
        page.savefig(part, dpi=150)
        os.replace(part, path.with_suffix(suffix))
    pyplot.close(page)


def draw_frontier(ax, s):
    """Runs, the law at fixed N, the compute-optimal frontier (dashed where it extrapolates)."""
    from matplotlib import colormaps

    r, sizes = s.runs, np.unique(s.runs.N)

    def colour(N):  # darker is larger, in grey too
        rank = np.log(N / sizes[0]) / np.log(sizes[-1] / sizes[0])
        return colormaps["viridis"](0.92 - 0.92 * rank)

    shown = sizes if len(sizes) <= 7 else np.geomspace(sizes[0], sizes[-1], 5)
    ax.scatter(r.C, r.L, c=colour(r.N), s=18, zorder=3, edgecolors="white", linewidths=0.4)
    tokens = np.geomspace(r.D.min() / 1.4, r.D.max() * 1.4, 60)
    for N in shown:
        rho = r.vision[0] if r.vision else 0
        C = 6 * tokens * (N + rho * encoder(N, r.vision))
        keep = (C > r.C.min() / 10) & (C < r.C.max() * 10)
        ax.plot(C[keep], predict(s.fit.coef, N, tokens[keep]), color=colour(N), lw=1,
                label=f"N = {human(N)}")
    lo, hi = r.C.min(), r.C.max()
    beyond = {"ls": "--", "lw": 1.3}
    for start, end, look in ((lo / 10, lo, beyond), (hi, hi * 10, beyond), (lo, hi, {
            "lw": 2.4, "label": "frontier (dashed: outside the runs)"})):
        C = np.geomspace(start, end, 40)
        ax.plot(C, optimum(s.fit.coef, C, r.vision)[2][0], color="black", zorder=4, **look)
    E = s.values["E"]
    ax.axhline(E, color="black", ls=":", lw=1.2, label=f"fitted E = {E:.3f}")
    if r.floor is not None:
        ax.axhline(r.floor, color="0.5", ls="-.", lw=1.2, label=f"true floor = {r.floor:.3f}")
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="validation loss (nats)",
           title=f"{r.name}: L = {E:.3f} + A/N$^{{{s.fit.coef[3]:.3f}}}$ "
                 f"+ B/D$^{{{s.fit.coef[4]:.3f}}}$")
    plain_ticks(ax.yaxis)
    ax.legend(fontsize=7, frameon=False)


def plain_ticks(axis):
    """Label a log axis of less than two decades 2, 3, 5 rather than with powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    lo, hi = axis.get_view_interval()
    if hi < 100 * lo:
        near = LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if hi < 12 * lo else (1, 3))
        axis.set_major_locator(near if hi > 1.8 * lo else MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda x, _: human(x)))
        axis.set_minor_formatter(NullFormatter())


def draw_residuals(axes, studies):
    """Predicted against observed, and residuals against N, D, C: no trend means a good law."""
    for k, s in enumerate(studies):
        r, look = s.runs, {"ls": "", "marker": "o^sDvPX*"[k % 8], "ms": 4.5, "mew": 0.9,
                           "mfc": "none", "color": ("0.1", "0.5", "0.3", "0.65")[k % 4]}
        axes[0].plot(r.L, predict(s.fit.coef, r.N, r.D), label=r.name, **look)
        for ax, x in zip(axes[1:], (r.N, r.D, r.C)):
            ax.plot(x, 100 * np.expm1(-s.fit.residuals), **look)
    ends = [f(f(s.runs.L) for s in studies) for f in (min, max)]
    axes[0].plot(ends, ends, color="black", lw=0.8)
    axes[0].set(xlabel="observed loss", ylabel="predicted loss")
    axes[0].legend(fontsize=7, frameon=False)
    axes[1].set_ylabel("observed above the law (%)")
    for ax, x in zip(axes[1:], ("parameters N", "tokens D", "training FLOPs C")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel=x)
        plain_ticks(ax.xaxis)
        ax.sharey(axes[1])


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag."""

    def error(self, message):
        raise SystemExit(f"fit_laws.py: {message}; see python fit_laws.py --help")

    def parse_args(self, argv=None):
        args, extra = self.parse_known_args(argv)
        if extra:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(extra[0].split("=")[0], flags, 1)
            self.error(f"unknown {extra[0]}" + (f", did you mean {near[0]}?" if near else ""))
        return args


def positive(text):
    """For argparse: a number above 0, also as 2.5B."""
    if not 0 < number(text) < np.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number(text)


def whole(text):
    """For argparse: 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def budgets(text):
    """For argparse: numbers with commas between."""
    return [positive(part) for part in text.split(",")]


def parse_args(argv=None):
    """Command line -> namespace."""
    p = Parser(prog="fit_laws.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("path", nargs="+", metavar="PATH", help="run folder, .jsonl, .csv, .tsv or .parquet with "
        "columns N, D, loss (or params, tokens, val_loss, ...; C or flops if you have it)")
    add("--where", action="append", default=[], metavar="RULE",
        help="use only rows with, for example, kept=1, C<1e21 or fusion!=late; repeatable")
    add("--group-by", metavar="COL,COL", help="a law for each value of these columns (default: "
        "fusion, moe, and mixture where there are several; '' for one law)")
    add("--loss", default="loss", metavar="COL", help="which loss to fit (default: loss)")
    add("--per-kind", action="store_true",
        help="also fit loss_caption, loss_interleaved and loss_text")
    add("--best-per-cell", action="store_true", help="of runs with equal N and D keep the best: "
        "the choice of a learning rate (default: keep all, as seeds)")
    add("--holdout", metavar="K|RULE", help="fit without the K largest sizes, or without rows "
        "such as 'N>1e9', and report the error of the law there")
    add("--budget", type=budgets, default=[], metavar="C,C",
        help="print the best N, D and the loss for these training FLOPs")
    add("--compare", nargs=2, metavar="GROUP", help="difference of two groups, each coefficient "
        "and the loss at --budget, with intervals")
    add("--bootstrap", type=whole, default=1000, metavar="K", help="resamples (default 1000)")
    add("--cluster", metavar="COL", help="resample whole widths, seeds or runs, not rows")
    add("--seed", type=whole, default=0, help="of the bootstrap (default 0)")
    add("--delta", type=positive, default=1e-3, help="of the Huber loss (default 1e-3)")
    add("--min-budget", type=positive, metavar="C", help="the envelope's L = K C^c starts here "
        "(paper 3e19; default: after the first quarter of the decades)")
    add("--out", type=Path, metavar="DIR",
        help="for laws.json, .png, .svg (default: the run folder, or here for a file)")
    add("--json", type=Path, metavar="FILE", help="the numbers go here instead")
    add("--no-plots", action="store_true", help="no figure")
    return p.parse_args(argv)


def write_json(path, content):
    """Whole or not at all; numbers that are not finite become null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not np.isfinite(x) else x

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            json.dump(clean(content), file, indent=1)
        os.replace(part, path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot write: {error.strerror}; choose another --out or --json")


def gather(args):
    """-> notes, Studies of every group and loss with enough rows; SystemExit if there is none."""
    table, names = load(args)
    losses = [f"loss_{k}" for k in ("caption", "interleaved", "text") if args.per_kind]
    losses = [args.loss] + [x for x in losses if x in table.columns and x != args.loss]
    held, studies, refused = None, [], ["no usable rows"]
    if args.holdout and not args.holdout.isdecimal():
        held = where(table.columns, args.holdout)
    column(table.columns, args.loss)
    for name, loss in product(dict.fromkeys(names), losses):
        label = name if loss == args.loss else f"{name} {loss.removeprefix('loss_')}"
        try:
            runs, rows = make_runs(table, names == name, label, loss, args)
            largest = np.unique(runs.N)[::-1][: int(args.holdout) if held is None else 0] \
                if args.holdout else []
            out = np.isin(runs.N, largest) if held is None else held[rows]
            check_size(label + " without the rows held out", runs.N[~out])
        except SystemExit as error:
            refused.append(str(error))
            continue
        rest = runs.rows(out) if out.any() else None
        studies.append(study(runs.rows(~out), rest, args, len(studies)))
    if not studies:
        raise SystemExit("; ".join([refused[-1], *table.notes[1:]]))
    return table.notes + refused[1:], studies


def main(argv=None):
    """Read, fit, print, write; returns what the JSON file holds."""
    args = parse_args(argv)
    notes, studies = gather(args)
    records = [record(s, args) for s in studies]
    print("\n".join(notes))
    print(f"\nL = E + A/N^alpha + B/D^beta, sum of Huber(delta = {args.delta:g}) on ln L; below, "
          f"95 % intervals: {args.bootstrap} resamples of {args.cluster or 'run'}s")
    print_table(records)
    for s, g in zip(studies, records):
        print_details(s, g)
    result = {"groups": records, "notes": notes, "delta": args.delta}
    if args.compare:
        result["compare"] = compare(studies, args)
    folder = Path(args.path[0]) if Path(args.path[0]).is_dir() else Path()
    out = args.out or folder
    write_json(args.json or out / "laws.json", result)
    if not args.no_plots:
        out.mkdir(parents=True, exist_ok=True)
        draw(studies, out / "laws.png")
    return result


if __name__ == "__main__":
    main()
