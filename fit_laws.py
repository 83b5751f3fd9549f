"""fit_laws.py: from finished runs to scaling laws, with their uncertainty.

    python fit_laws.py runs/demo       a folder that train.py wrote (results.jsonl)
    python fit_laws.py table.csv       any table with columns N, D, loss
    python fit_laws.py runs/demo --compare early late --budget 1e14,1e15
    python fit_laws.py --plan --budget 24hx8xh100x0.4   the paper's own laws; needs no runs

fits  L = E + A/N^alpha + B/D^beta  (N parameters, D tokens, L loss in nats) to each group of
runs as the paper does (arXiv 2504.07951, App. C), prints its Table 2 with 95 % intervals, and
writes laws.json, laws.png/.svg and laws_more.png/.svg. E is the loss no model beats; N ~ C^a,
D ~ C^b and D ~ N^d describe the best models for C FLOPs; L ~ C^c is their frontier.
"""

# Reading order: the fit (one lecture), doubts and intervals, other laws on the same runs,
# compute-optimal models, tables, the numbers of one group, printing, figures, main.
# Dimensions: n rows (runs), T terms of a law, P coefficients (T intercepts, then slopes), K
# problems solved at once (starts of one fit, resamples of a bootstrap), Q budgets, M groups.

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
    active: np.ndarray  # MoE: 1 - sparsity = experts used / experts; 1 without experts
    cluster: np.ndarray  # (n,) labels: rows that the bootstrap draws together
    vision: tuple | None = None  # late fusion: (rho, p, q), D_v = rho D, N_v = exp(p) N^q (C.2)
    floor: float | None = None  # the true irreducible loss, where the data know it
    family: str = ""  # groups of one family differ in their mixture only

    def rows(self, keep):
        """The same group with the rows of the mask `keep`."""
        arrays = ("N", "D", "L", "C", "active", "cluster")
        return replace(self, **{k: getattr(self, k)[keep] for k in arrays})


@dataclass(frozen=True)
class Law:
    """Terms exp(intercept - slope * ln variable - ...), summed."""

    names: tuple  # of the P coefficients: the intercepts (fitted as logs), then the slopes
    slopes: tuple  # for each slope its (term, variable of Runs)


DENSE = Law(("A", "B", "E", "alpha", "beta"), ((0, "N"), (1, "D")))
SPARSE = Law(("A", "B", "E", "C", "d", "alpha", "beta", "lambda", "delta", "gamma"),  # Table 12
             ((0, "N"), (1, "D"), (3, "active"), (4, "active"), (4, "N")))


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
    """What one fit minimises. theta (.., P) is centred, coef (.., P) is the paper's own."""

    design: np.ndarray  # (T, n, P)
    target: np.ndarray  # (n,) ln L
    shift: np.ndarray  # (P, P) undoes the centring: ln A and alpha would correlate at 0.999
    delta: float

    def coef(self, theta):
        return theta @ self.shift

    def theta(self, coef):
        return coef @ (2 * np.eye(len(self.shift)) - self.shift)

    def rows(self, keep):
        return replace(self, design=self.design[:, keep], target=self.target[keep])

    def few(self):
        """Some 120 rows: enough to find and rank starts."""
        return self.rows(slice(None, None, max(1, len(self.target) // 120)))


def pose(runs, delta, law=DENSE):
    """Runs -> Problem."""
    P, T = len(law.names), len(law.names) - len(law.slopes)
    design, shift = np.zeros((T, len(runs.N), P)), np.eye(P)
    design[range(T), :, range(T)] = 1
    for j, (term, variable) in enumerate(law.slopes, T):
        x = np.log(getattr(runs, variable))
        shift[j, term] = x.mean()
        if np.ptp(x) > 0.01:  # a constant column has noise, but no slope
            design[term, :, j] = x.mean() - x
    return Problem(design, np.log(runs.L), shift, delta)


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


def projected_starts(problem, *grids):
    """Given its slopes a law is linear in the rest: least squares on a grid of slopes, (K, P).

    Nearly all of these lead to the best optimum; most of the paper's starts do not.
    """
    problem, T = problem.few(), len(problem.design)
    slopes = np.array(list(product(*(grids or [np.geomspace(0.05, 2.5, 12)] * 2))))
    X = slopes @ problem.design[:, :, T:].transpose(0, 2, 1)  # (T, K, n)
    X = np.exp(X - problem.target).transpose(1, 2, 0)  # (K, n, T), relative: X @ (A, B, E) = 1
    normal = X.transpose(0, 2, 1) @ X
    normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(T)
    linear = np.linalg.solve(normal, X.sum(1)[..., None])[..., 0]
    linear = np.maximum(linear, 1e-3 * np.exp(problem.target.min()))  # ln needs them positive
    return np.concatenate([np.log(linear), slopes], 1)


def screen(problem, starts, best):
    """The `best` starts by objective."""
    few, parts = problem.few(), np.array_split(starts, max(1, len(starts) // 256))
    score = [huber(residual(few, part)[1], problem.delta)[0].sum(-1) for part in parts]
    return starts[np.argsort(np.concatenate(score), kind="stable")[:best]]


def solve(problem, *grids):
    """Screen each grid of starts (K, P), polish its best 12, keep the lowest of all.

    -> theta (P,), F, gradient, (screened, polished, polished ones that reach this F).
    """
    tried = np.concatenate([screen(problem, grid, 12) for grid in grids])
    theta, F, _ = newton(problem, tried, steps=24 * tried.shape[1])
    (theta,), (best,), (slope,) = newton(problem, theta[[F.argmin()]], steps=1000)
    nothing = 1e-9 * problem.delta**2 * len(problem.target)  # an exact table has F = 0
    reached = int((F <= best * (1 + 1e-9) + nothing).sum())
    return theta, float(best), float(slope), (sum(map(len, grids)), len(tried), reached)


def fit_law(runs, delta=1e-3):
    """Runs -> Fit of the law of N and D from 1764 + 144 starts (App. C.1)."""
    problem = pose(runs, delta)
    theta, *found = solve(problem, paper_starts(problem), projected_starts(problem))
    p, r = residual(problem, theta[None])
    condition, blind = conditioning(problem, p[:, 0])
    fit = Fit(problem.coef(theta), *found[:2], condition, found[2], r[0])
    flags, loose = doubts(runs, fit, problem, p[:, 0], blind)
    return replace(fit, flags=flags, loose=loose)


# ---------------------------------------------------------------- doubts and intervals


def conditioning(problem, p):
    """Shares p (T, n) -> scaled condition number of dr/dcoef, (P,) bool: coefficients it hides."""
    jac = np.einsum("tn,tnp->np", p, problem.design)
    jac = jac @ (2 * np.eye(len(problem.shift)) - problem.shift).T  # uncentred, as others print it
    norm = np.linalg.norm(jac, axis=0)
    _, s, vt = np.linalg.svd(jac / np.maximum(norm, 1e-300), full_matrices=False)
    hidden = np.abs(vt[s < s[0] * 1e-5]).max(0, initial=0) > 0.05
    return float(s[0] / max(s[-1], s[0] * 1e-17)), hidden | (norm < 1e-12 * norm.max())


def standard_errors(problem, p, residuals):
    """Of theta (P,), by the curvature and the median |residual|: rough, but quick."""
    jac = np.einsum("tn,tnp->np", p, problem.design)
    spread = 1.4826 * np.median(np.abs(residuals)) * np.sqrt(np.pi / 2)
    return spread * np.sqrt(np.diag(np.linalg.pinv(jac.T @ jac, rcond=1e-14)).clip(0))


def doubts(runs, fit, problem, p, blind):
    """-> (sentences, names of coefficients that are not identified)."""
    error = standard_errors(problem, p, fit.residuals)
    flags, loose = [], {DENSE.names[j] for j in np.flatnonzero(blind)}
    if fit.gradient > 1e-5:
        flags.append(f"no minimum: |gradient| / (delta n) = {fit.gradient:.0e}; raise --delta")
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
    return tuple(flags), tuple(c for c in DENSE.names if c in loose)


def profile(runs, fit, delta):
    """95 % profile intervals {name: (lo, hi)} of E, alpha, beta: fix one, refit the others.

    None: the end lies beyond ten times the value. The rise of F is turned into a chi square
    by the robust likelihood ratio with scale mean(psi^2) / mean(|r| < delta).
    """
    problem, size, intervals = pose(runs, delta), np.abs(fit.residuals), {}
    scale = (np.minimum(size, delta) ** 2).mean() / max((size <= delta).mean(), 0.02)
    least, factors = runs.L.min(), np.linspace(-1, 1, 61) ** 3 * np.log(10)  # dense near the fit
    middles = (np.clip(np.exp(fit.coef[2]), 0.05 * least, 0.99 * least),
               *np.clip(fit.coef[3:], 0.05, 2))
    for j, middle in enumerate(middles, 2):
        values = middle * np.exp(factors)
        theta = np.tile(problem.theta(fit.coef), (len(values), 1))
        theta[:, j] = np.log(values) if j == 2 else values
        _, F, _ = newton(problem, theta, free=np.arange(5) != j, steps=100)
        inside = np.flatnonzero(F - fit.objective < 1.92 * max(scale, 1e-10))
        lo, hi = (inside[0], inside[-1]) if len(inside) else (0, 60)
        intervals[DENSE.names[j]] = (float(values[lo]) if lo > 0 else None,
                                     float(values[hi]) if hi < 60 else None)
    return intervals


def draw_weights(cluster, count, seed):
    """Draw as many clusters as there are, with replacement: how often each row, (count, n)."""
    labels, member = np.unique(cluster, return_inverse=True)
    chance = np.full(len(labels), 1 / len(labels))
    drawn = np.random.default_rng(seed).multinomial(len(labels), chance, size=count)
    return drawn[:, member].astype(float)


def resample(problem, starts, weight):
    """Refit under each row of weight (K, n) from every start (S, P), keep the best: (K, P)."""
    S, found, steps = len(starts), [starts[:0]], 4 * starts.shape[1] ** 2
    chunk = max(1, 8192 // (len(problem.target) * S))  # fits the cache
    for w in (weight[i : i + chunk] for i in range(0, len(weight), chunk)):
        many = np.tile(starts, (len(w), 1))  # (len(w) * S, P)
        theta, F, _ = newton(problem, many, np.repeat(w, S, axis=0), steps=steps)
        found.append(theta[F.reshape(len(w), S).argmin(1) + S * np.arange(len(w))])
    return np.concatenate(found)


def bootstrap(runs, fit, weight, delta=1e-3):
    """Refit the resamples weight (K, n) of runs or clusters -> coef (K, 5).

    Newton starts at the full fit. Under 40 rows a resample can have another best optimum, so
    three more starts join in.
    """
    problem = pose(runs, delta)
    starts = problem.theta(fit.coef)[None]
    if len(runs.N) < 40:
        starts = np.concatenate([starts, screen(problem, projected_starts(problem), 3)])
    return problem.coef(resample(problem, starts, weight))


def interval(samples):
    """(K,) bootstrap values -> [2.5 %, 97.5 %] of the finite ones; None where half are not."""
    x = samples[np.isfinite(samples)]
    return np.percentile(x, [2.5, 97.5]).tolist() if 2 * len(x) > len(samples) else None


# ---------------------------------------------------------------- other laws, same runs


def tie(problem, index, member):
    """Share coefficients: p of group m (rows member == m) becomes column index[m, p].

    -> Problem, its starts: the projected ones of every group, averaged where they share.
    """
    T, n, P = problem.design.shape
    design = np.zeros((T, n, index.max() + 1))
    for p in range(P):
        design[:, np.arange(n), index[member, p]] += problem.design[:, :, p]
    own = [projected_starts(problem.rows(member == m)) for m in range(len(index))]
    pick = np.zeros((index.size, index.max() + 1))
    pick[np.arange(index.size), index.ravel()] = 1
    starts = np.stack(own, 1).reshape(len(own[0]), -1) @ (pick / pick.sum(0))  # (144, M * 5) @
    return replace(problem, design=design), starts


def without_sizes(N):
    """(K, n) of 0 and 1: each row leaves out one size, or a twelfth of more than 12 sizes."""
    sizes = np.unique(N)
    return np.array([~np.isin(N, out) for out in np.array_split(sizes, min(12, len(sizes)))], float)


def judge(problem, starts, N):
    """Fit `problem` and weigh it against rivals on the same rows: its record, theta (P,).

    AIC is that of Laplace errors, to which Huber at 1e-3 comes near: 2 n ln(mean |r|) + 2 P.
    left_out_pct: the mean error of each size as predicted from the other sizes.
    """
    theta, F, *_ = solve(problem, starts)
    weight = without_sizes(N)
    others = newton(problem, np.tile(theta, (len(weight), 1)), weight, steps=100)[0]
    missed = np.abs(residual(problem, others)[1])[weight == 0]
    size = max(np.abs(residual(problem, theta[None])[1]).mean(), 1e-15)
    return {"coefficients": len(theta), "objective": F, "left_out_pct": float(100 * missed.mean()),
            "aic": float(2 * len(N) * np.log(size) + 2 * len(theta))}, theta


def coefficients(law, coef, draws):
    """{name: value, "ci": {name: interval}} of coef (P,) and its resamples (K, P)."""
    logs = len(law.names) - len(law.slopes)
    one, many = (np.concatenate([np.exp(x[..., :logs]), x[..., logs:]], -1) for x in (coef, draws))
    return dict(zip(law.names, map(float, one))) | {
        "ci": {k: interval(many[:, j]) for j, k in enumerate(law.names)}}


def tied_law(runs, delta):
    """alpha = beta against both free: {"free": record, "tied": record with its E and exponent}."""
    problem, one = pose(runs, delta), np.zeros(len(runs.N), int)
    free, _ = judge(problem, projected_starts(problem), runs.N)
    tied, theta = judge(*tie(problem, np.array([[0, 1, 2, 3, 3]]), one), runs.N)
    tied |= {"E": float(np.exp(theta[2])), "exponent": float(theta[3])}
    return {"free": free, "tied": tied}


def joint_law(groups, args):
    """Groups with their own A, B, E and one alpha and beta (Table 3), against separate laws."""
    arrays = {k: np.concatenate([getattr(r, k) for r in groups]) for k in ("N", "D", "L", "C")}
    M, member = len(groups), np.repeat(np.arange(len(groups)), [len(r.N) for r in groups])
    cluster = np.array([f"{m} {c}" for m, r in enumerate(groups) for c in r.cluster])
    problem = pose(Runs("joint", **arrays, active=arrays["N"], cluster=cluster), args.delta)
    shared = np.c_[np.arange(3 * M).reshape(M, 3), np.tile([3 * M, 3 * M + 1], (M, 1))]
    tied, starts = tie(problem, shared, member)
    record, theta = judge(tied, starts, arrays["N"])
    apart = tie(problem, np.arange(5 * M).reshape(M, 5), member)
    rivals = {"joint": record, "separate": judge(*apart, arrays["N"])[0]}
    draws = resample(tied, theta[None], draw_weights(cluster, args.bootstrap, 0))
    laws = [coefficients(DENSE, problem.coef(theta[i]), problem.coef(draws[:, i])) for i in shared]
    return {"groups": {r.name: law for r, law in zip(groups, laws)}, "rivals": rivals}


def sparse_law(runs, weight, delta):
    """L(N, D, S) of Table 12 against a law without S and one for each S; None under three S."""
    levels, member = np.unique(runs.active.round(6), return_inverse=True)
    if len(levels) < 3:
        return None
    problem, plain = pose(runs, delta, SPARSE), pose(runs, delta)
    grids = [(-0.4, -0.1, 0.1, 0.4) if v == "active" else np.geomspace(0.1, 1.2, 4)
             for _, v in SPARSE.slopes]
    record, theta = judge(problem, projected_starts(problem, *grids), runs.N)
    rivals = {"with S": record, "without": judge(plain, projected_starts(plain), runs.N)[0]}
    if np.bincount(member).min() >= LEAST_ROWS:
        apart = np.arange(5 * len(levels)).reshape(-1, 5)
        rivals["separate"] = judge(*tie(plain, apart, member), runs.N)[0]
    p, r = residual(problem, theta[None])
    condition, blind = conditioning(problem, p[:, 0])
    size = np.r_[np.ones(5), np.abs(theta[5:])]  # half of a slope, or 0.5 in a logarithm
    blind |= standard_errors(problem, p[:, 0], r[0]) > 0.5 * size
    draws = problem.coef(resample(problem, theta[None], weight[:200]))  # each takes long
    return coefficients(SPARSE, problem.coef(theta), draws) | {
        "sparsities": (1 - levels[::-1]).tolist(), "rivals": rivals, "condition": condition,
        "not_identified": [SPARSE.names[j] for j in np.flatnonzero(blind)]}


def sensitivity(runs, fit, delta):
    """How far the law moves: {change: {name: [lowest, highest]}} over deltas, sizes, worst rows."""
    problem, worst = pose(runs, delta), np.ones((1, len(runs.N)))
    worst[0, np.argsort(np.abs(fit.residuals))[-max(1, len(runs.N) // 50):]] = 0
    theta, sizes = problem.theta(fit.coef)[None], without_sizes(runs.N)
    found = {f"delta {d:g}": newton(replace(problem, delta=d), theta)[0]
             for d in (delta / 10, delta * 10)}
    found["one size left out"] = newton(problem, theta.repeat(len(sizes), 0), sizes)[0]
    found[f"worst {int((worst == 0).sum())} left out"] = newton(problem, theta, worst)[0]
    law = {change: derive(problem.coef(many)) for change, many in found.items()}
    return {change: {k: [float(v[k].min()), float(v[k].max())] for k in ("E", "alpha", "beta", "a")}
            for change, v in law.items()}


# ---------------------------------------------------------------- compute-optimal models


def predict(coef, N, D):
    """Loss of coefficients (.., 5) at N and D (broadcast against coef[..., 0])."""
    a, b, e, alpha, beta = np.moveaxis(coef, -1, 0)
    return np.exp(e) + np.exp(a - alpha * np.log(N)) + np.exp(b - beta * np.log(D))


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


def line(x, y):
    """Least squares y = intercept + slope x along the last axis, pairs with a NaN left out."""
    use = np.isfinite(x + y)
    x, y, n = np.where(use, x, 0), np.where(use, y, 0), use.sum(-1)
    with np.errstate(all="ignore"):  # no pairs: NaN
        mean_x, mean_y = x.sum(-1) / n, y.sum(-1) / n
        u = np.where(use, x - mean_x[..., None], 0)
        slope = (u * y).sum(-1) / (u * u).sum(-1)
        return slope, mean_y - slope * mean_x


def exponents(suffix, lnC, lnN, lnD, lnL):
    """Lines through optima (.., Q): N ~ C^a, D = D0 C^b, L = K C^c, D ~ N^d -> {a_suffix: (..)}."""
    (a, _), (b, lnD0), (c, lnK) = (line(lnC, y) for y in (lnN, lnD, lnL))
    found = {"a": a, "b": b, "c": c, "d": line(lnN, lnD)[0], "D0": np.exp(lnD0), "K": np.exp(lnK)}
    return {f"{k}_{suffix}": v for k, v in found.items()}


def derive(coef, runs=None):
    """coef (K, 5) -> {name: (K,)}: the law, a, b, d by the closed form (C = 6 N D).

    With runs also by App. C.2: regression of the best N, D at 16 budgets in their range of C.
    Late fusion has a second one for N + N_v, the paper's late row: there a + b is not 1.
    """
    alpha, beta = coef[:, 3], coef[:, 4]
    with np.errstate(all="ignore"):
        values = dict(zip("ABE", np.exp(coef[:, :3].T)), alpha=alpha, beta=beta)
        values |= {"a": beta / (alpha + beta), "b": alpha / (alpha + beta), "d": alpha / beta}
    if runs is None:
        return values
    C = np.geomspace(runs.C.min(), runs.C.max() * (1 + 1e-9), 16)
    N, D, loss = optimum(coef, C, runs.vision)
    sums = {"regression": N} | ({"total": N + encoder(N, runs.vision)} if runs.vision else {})
    for suffix, n in sums.items():
        values |= exponents(suffix, np.log(C)[None], np.log(n), np.log(D), np.log(loss))
    return values


def hull(C, L):
    """Rows on the falling lower convex hull of ln L against ln C, from left to right (C.3).

    Interpolating the runs of each size first, as the paper does, adds only inner points.
    """
    order, kept = np.lexsort((L, C)), []
    x, y = np.log(C[order]), np.log(L[order])
    for q in range(len(x)):
        while len(kept) > 1:
            o, p = kept[-2:]
            if (x[p] - x[o]) * (y[q] - y[o]) > (y[p] - y[o]) * (x[q] - x[o]):
                break  # bends to the left: convex
            kept.pop()
        kept.append(q)
    return order[kept[: np.argmin(y[kept]) + 1]]


def envelope(runs, cut, weight):
    """Approach 1: straight lines along the hull of each resample (K, n), from `cut` FLOPs on.

    c is L = K C^c with C sampled linearly (the paper), c_log_spaced with C in equal ratios: the
    range and the spacing decide c. a, b from the N and D of the hull. NaN under two points.
    """
    table = np.log([runs.C, runs.N, runs.D, runs.L])  # (4, n)
    found = np.full((len(weight), 2, 4, 200), np.nan)  # resample, spacing, quantity, sample
    for k, drawn in enumerate(weight > 0):
        x, *rest = table[:, drawn][:, hull(runs.C[drawn], runs.L[drawn])]
        first = max(np.log(cut), x[0])
        if x[-1] <= first + 1e-9:
            continue
        for i, lnC in enumerate((np.log(np.linspace(np.exp(first), np.exp(x[-1]), 200)),
                                 np.linspace(first, x[-1], 200))):
            found[k, i] = [lnC, *(np.interp(lnC, x, y) for y in rest)]
    even, log = (exponents("envelope", *found[:, i].transpose(1, 0, 2)) for i in (0, 1))
    return {"c": even["c_envelope"], "K": even["K_envelope"], "c_log_spaced": log["c_envelope"],
            **{k: log[k] for k in ("a_envelope", "b_envelope", "d_envelope")}}


def isoflop_budgets(runs):
    """Rows that share a budget, a list of index arrays: equal C within 2 %, five sizes or more.

    Three such budgets that hold half of the rows, or none: an ordinary grid has no slices.
    """
    order = np.argsort(runs.C, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(np.log(runs.C[order])) > 0.01) + 1)
    good = [p for p in parts if runs.C[p[-1]] < 1.02 * runs.C[p[0]] and len({*runs.N[p]}) >= 5]
    return good if len(good) >= 3 and 2 * sum(map(len, good)) >= len(order) else []


def isoflop(runs, budgets, weight):
    """Approach 2: at each budget a parabola of L on ln N and on ln D, for resamples (K, n).

    -> (4, K, Q) of ln C, ln N, ln D, ln L at the minima; NaN where a parabola does not open
    upwards or its minimum lies outside the runs.
    """
    best = np.full((4, len(weight), len(budgets)), np.nan)
    for q, rows in enumerate(budgets):
        best[0, :, q] = np.log(np.median(runs.C[rows]))
        for i, x in enumerate((np.log(runs.N[rows]), np.log(runs.D[rows])), 1):
            u = x - x.mean()
            X, w = np.stack([np.ones_like(u), u, u * u], 1), weight[:, rows]  # (m, 3), (K, m)
            normal = np.einsum("km,mi,mj->kij", w, X, X) + 1e-12 * np.eye(3)
            p = np.linalg.solve(normal, (w @ (X * runs.L[rows, None]))[..., None])[..., 0]
            with np.errstate(all="ignore"):
                at = -p[:, 1] / (2 * p[:, 2])
                good = (p[:, 2] > 0) & (at > u.min()) & (at < u.max())
                best[i, :, q] = np.where(good, at + x.mean(), np.nan)
                best[3, :, q] = np.where(good, np.log(p[:, 0] + at * p[:, 1] / 2), np.nan)
    return best


# ---------------------------------------------------------------- reading tables

ALIASES = {
    "N": ("params", "parameters", "n_params", "num_params", "model_size", "active_params"),
    "D": ("tokens", "n_tokens", "num_tokens", "train_tokens", "training_tokens"),
    "loss": ("val_loss", "validation_loss", "eval_loss", "test_loss", "final_loss"),
    "C": ("flops", "flop", "compute", "train_flops", "training_flop", "training_flops"),
}


def read_rows(path):
    """Run folder, .jsonl, .csv, .tsv or .parquet -> rows as dicts; None for a broken line."""
    path = Path(path) / "results.jsonl" if Path(path).is_dir() else Path(path)
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".jsonl", ".csv", ".tsv", ".parquet"):
        raise SystemExit(f"{path}: no such table (run folder, .jsonl, .csv, .tsv or .parquet)")
    try:
        if kind == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(filter(str.strip, file))
        if kind == ".jsonl":
            return [json_row(line) for line in lines]
        comma = max(",;\t", key=lines[0].count) if lines else ","
        names = [name.strip() for line in csv.reader(lines[:1], delimiter=comma) for name in line]
        rows = csv.DictReader(lines[1:], names, delimiter=comma)
        return [None if None in row or None in row.values() else row for row in rows]
    except ImportError:
        raise SystemExit(f"{path}: parquet needs one more package: pip install pyarrow")
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise SystemExit(f"{path}: not a UTF-8 {kind} table: {str(error).splitlines()[0]}")


def json_row(line):
    """One object; None for the half line that a killed run may leave."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


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
    limit, read = (value, str) if np.isnan(number(value)) else (number(value), number)
    if read is str and sign in ("<", "<=", ">", ">="):
        raise SystemExit(f"rule {rule!r}: {value!r} is not a number")
    cells = np.array([read(c) for c in column(columns, name)])
    tests = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}
    return (tests | {"!=": np.not_equal}).get(sign, np.equal)(cells, limit)


def load(args):
    """Command line -> {column: (n,) objects} of usable rows, notes on the others, group columns."""
    parts = [read_rows(path) for path in args.path]
    rows = [row for part in parts for row in part if row]
    notes, broken = [f"{len(rows)} rows read from {', '.join(args.path)}"], sum(map(len, parts))
    if broken > len(rows):
        notes.append(f"{broken - len(rows)} broken lines left out")
    if not rows:
        raise SystemExit(f"{args.path[0]}: no rows in it")
    columns = {k: np.fromiter((row.get(k) for row in rows), object, len(rows))
               for k in dict.fromkeys(k for row in rows for k in row)}

    def keep(mask, why):
        if not mask.all():
            notes.append(f"{(~mask).sum()} rows left out: {why}")
            columns.update({k: v[mask] for k, v in columns.items()})

    for rule in args.where:
        keep(where(columns, rule), f"not {rule}")
    if "status" in columns:
        status = np.array([str(s or "ok") for s in columns["status"]])
        keep(status == "ok", "status is " + ", ".join(sorted({*status} - {"ok"})))
    cells, seen = [repr(row) for row in zip(*columns.values())], set()
    keep(np.array([not (c in seen or seen.add(c)) for c in cells]), "exact copies of another row")
    C = column(columns, "C", False)
    if column(columns, "D", False) is None and C is not None:
        columns["D"] = usable(C) / (6 * usable(column(columns, "N")))
        notes.append("no column of tokens: D = C / (6 N)")
    for name in ("N", "D"):
        columns[name] = usable(column(columns, name))
        keep(np.isfinite(columns[name]), f"{name} is not a positive number")
    by = args.group_by.split(",") if args.group_by is not None else \
        [f for f in FAMILY if f in columns and (f != "mixture" or len({*map(str, columns[f])}) > 1)]
    return columns, notes, [name for name in by if name]


def labels(columns, by):
    """(n,) names of groups: the values of the columns `by`, without "none"; "all" if empty."""
    keys = zip(*([str(v) for v in column(columns, name)] for name in by))
    names = [" ".join(v for v in key if v != "none") or "all" for key in keys]
    return np.array(names or ["all"] * len(columns["N"]))


def make_runs(columns, notes, chosen, name, loss, args):
    """Rows `chosen` (mask) with loss column `loss` -> Runs, their row numbers; adds notes."""
    cells, note = column(columns, loss), lambda text: notes.append(f"{name}: {text}")
    values = usable(cells)
    rows, bad = np.flatnonzero(chosen & np.isfinite(values)), chosen & ~np.isfinite(values)
    if bad.any():
        note(f"{bad.sum()} rows left out: {loss} is not a positive number "
             f"(the first is {cells[bad][0]!r})")
    for other in ("n_experts", "top_k", "image_size", "patch_size", "context"):
        kinds = sorted({str(v) for v in columns[other][rows]}) if other in columns else []
        if len(kinds) > 1 and other not in (args.group_by or ""):
            note(f"one law for {other} {', '.join(kinds)}; --group-by parts them")
    N, D = columns["N"][rows].astype(float), columns["D"][rows].astype(float)
    check_size(name, N)
    for unit, x in (("N", N), ("D", D)):
        if not 1e3 <= np.median(x) <= 1e16:
            note(f"{unit} is about {np.median(x):.0e}, not single parameters or tokens? E, alpha, "
                 "beta stand; A, B, C and budgets are in these units")
    vision, C, active = accounting(columns, rows, N, D, note)
    cluster = column(columns, args.cluster)[rows].astype(str) if args.cluster else rows
    if len(set(cluster)) < 2:
        raise SystemExit(f"{name}: --cluster {args.cluster} puts all rows into one cluster")
    floor = usable(columns.get(loss.replace("loss", "floor", 1), np.full(len(values), None)))[rows]
    floor = float(np.nanmean(floor)) if np.isfinite(floor).any() else None
    runs = Runs(name, N, D, values[rows], C, active, cluster, vision, floor)
    keep = repeated(runs, args.best_per_cell, note)
    if len(keep) > MOST_ROWS:
        note(f"{len(keep)} rows, fitted on a random {MOST_ROWS} of them")
        keep = np.sort(np.random.default_rng(0).choice(keep, MOST_ROWS, replace=False))
    return runs.rows(keep), rows[keep]


def seed_noise(runs):
    """Equal N, D and S are seeds: cell of each row (n,), number of repeats, their sd of ln L."""
    same, y = np.array([runs.N, runs.D, runs.active]), np.log(runs.L)
    cells = np.unique(same, axis=1, return_inverse=True)[1].ravel()
    repeats, mean = len(y) - cells.max() - 1, np.bincount(cells, y) / np.bincount(cells)
    return cells, repeats, np.sqrt(((y - mean[cells]) ** 2).sum() / max(repeats, 1))


def repeated(runs, best, note):
    """Row numbers: all, telling the spread of repeated runs, or the best run of each cell."""
    cells, repeats, spread = seed_noise(runs)
    if repeats and best:
        order = np.lexsort((runs.L, cells))
        note(f"{repeats} rows left out: another run of that (N, D) is better")
        return np.sort(order[np.r_[True, np.diff(cells[order]) > 0]])
    if repeats:
        note(f"{repeats} rows repeat the (N, D) of another; all kept, ln L differs by "
             f"{spread:.4f} (seeds); with several learning rates use --best-per-cell")
    return np.arange(len(cells))


def check_size(name, N):
    """Five coefficients need six rows and two sizes: SystemExit otherwise."""
    if len(N) < LEAST_ROWS:
        raise SystemExit(f"{name}: {len(N)} usable rows; a law of 5 coefficients needs at least "
                         f"{LEAST_ROWS}: run more sizes or token budgets")
    if np.ptp(np.log(N)) < 0.01:
        raise SystemExit(f"{name}: all rows have N = {N[0]:.4g}; run at least two sizes")


def accounting(columns, rows, N, D, note):
    """-> late fusion's vision line or None, FLOPs (n,), active share of experts (n,).

    FLOPs are the column C where it is sound, else the paper's.
    """
    def cells(name):
        return usable(columns[name])[rows] if name in columns else np.full(len(rows), np.nan)

    sparsity = 1 - np.array([number(c) for c in columns.get("sparsity", [])])
    active = sparsity[rows] if len(sparsity) else cells("top_k") / cells("n_experts")
    active = active if (active > 0).all() else np.ones(len(rows))
    vision, C, rule, Nv, Dv = None, 6 * N * D, "6 N D", cells("N_vision"), cells("D_vision")
    if np.isfinite(Nv * Dv).all():
        q, p = np.polyfit(np.log(N), np.log(Nv), 1)
        vision = float(np.median(Dv / D)), float(p), float(q)
        C, rule = 6 * (Nv * Dv + N * D), "6 (N_v D_v + N D)"
    given = column(columns, "C", False)
    if given is None:
        return vision, C, active
    given = usable(given)[rows]
    bad, off = int((~np.isfinite(given)).sum()), np.abs(given / C - 1)
    if bad:
        note(f"C is not a positive number in {bad} rows; C = {rule} in all")
    elif off.max() > 0.05:
        note(f"column C differs from {rule} by up to {off.max():.0%}; figures and c use the column")
    return vision, C if bad else given, active


# ---------------------------------------------------------------- all numbers of one group


@dataclass(frozen=True)
class Study:
    """Everything known about one group."""

    runs: Runs
    fit: Fit
    draws: np.ndarray  # (K, 5) bootstrap refits, as Fit.coef
    samples: dict  # name -> (K,) bootstrap values of it
    record: dict  # all numbers, as in laws.json


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
    weight = draw_weights(runs.cluster, args.bootstrap, [0, stream])
    draws, budgets = bootstrap(runs, fit, weight, args.delta), isoflop_budgets(runs)
    cut = args.min_budget or float(runs.C.min() ** 0.75 * runs.C.max() ** 0.25)

    def numbers(coef, weight):
        slices = exponents("isoflop", *isoflop(runs, budgets, weight)) if budgets else {}
        return derive(coef, runs) | envelope(runs, cut, weight) | slices

    one, samples = numbers(fit.coef[None], np.ones((1, len(runs.N)))), numbers(draws, weight)
    values = {k: float(v[0]) for k, v in one.items()}
    ci = {k: interval(x) for k, x in samples.items()} if len(draws) else {}
    limits = profile(runs, fit, args.delta) if fit.loose else None
    if fit.loose and ci and fit.condition > 1e5:  # resamples stop anywhere on the ridge
        ci |= {k: limits.get(k, (None, None)) for k in (*fit.loose, *"abd")}
    record = {"name": runs.name, "n": len(runs.N), "sizes": len(np.unique(runs.N)), **values,
              **quality(fit.coef, runs), "ci": ci, "cut": cut, "floor": runs.floor,
              "covariance": np.cov(draws.T).tolist() if len(draws) > 1 else None,  # of Fit.coef
              "objective": fit.objective, "gradient": fit.gradient, "condition": fit.condition,
              "starts": dict(zip(("screened", "polished", "reached_best"), fit.starts)),
              "flags": fit.flags, "not_identified": fit.loose, "profile": limits,
              **{f"{k}_range": [getattr(runs, k).min(), getattr(runs, k).max()] for k in "NDC"},
              "holdout": {"n": len(held.N)} | quality(fit.coef, held) if held else None,
              "isoflop_budgets": len(budgets), "sensitivity": sensitivity(runs, fit, args.delta),
              "tied": tied_law(runs, args.delta), "sparse": sparse_law(runs, weight, args.delta)}
    s = Study(runs, fit, draws, samples, record)
    record["budgets"] = [at_budget(s, C)[0] for C in args.budget]
    return s


def at_budget(s, C):
    """Compute-optimal model for C FLOPs: -> its numbers, (K,) bootstrap losses."""
    one, many = (optimum(coef, C, s.runs.vision) for coef in (s.fit.coef, s.draws))
    found = {"C": C} | {k: float(v[0, 0]) for k, v in zip(("N", "D", "loss"), one)}
    found["ci"] = {k: interval(v[:, 0]) for k, v in zip(("N", "D", "loss"), many)}
    found["extrapolates"] = bool(not s.runs.C.min() <= C <= s.runs.C.max())
    return found, many[2][:, 0]


# Table 2, and L = K C^c of Figs 5, 9, 26 and 27. A and B are printed for the sparse row only.
PAPER = {  # A, B, E, alpha, beta; a, b, K, c
    "early AVG": (None, None, 1.904, 0.301, 0.335, 0.5262, 0.473, 29.574, -0.0492),
    "early text": (None, None, 2.222, 0.3084, 0.3375, 0.5246, 0.4774, 22.709, -0.042),
    "early image-caption": (None, None, 1.569, 0.3111, 0.3386, 0.5203, 0.4785, 47.97, -0.061),
    "early interleaved": (None, None, 1.966, 0.2971, 0.338, 0.5315, 0.468, 25.114, -0.0458),
    "late AVG": (None, None, 1.891, 0.2903, 0.3383, 0.6358, 0.4619, 29.923, -0.0494),
    "sparse early AVG": (381773, 4659, 2.158, 0.71, 0.372, 0.361, 0.656, 27.086, -0.048),
}


def paper_plan(budgets):
    """What the paper's own coefficients say at each budget, printed and returned."""
    print("\nthe paper's coefficients (Table 2). Dense A and B were not published: the frontier "
          "L = K C^c\ngives the loss there, and N and D are known in their growth only")
    out = {}
    for (name, (A, B, E, alpha, beta, a, b, K, c)), C in product(PAPER.items(), budgets):
        row = {"C": C, "frontier_loss": K * C**c, "N": None, "D": None, "loss": None}
        text = f"N ~ C^{a:.3f}, D ~ C^{b:.3f}; E {E:.3f}"
        if A:
            found = optimum([*np.log([A, B, E]), alpha, beta], C)
            row |= {k: float(x[0, 0]) for k, x in zip(("N", "D", "loss"), found)}
            text = "N {N:.3g}, D {D:.3g}, loss by the law {loss:.4f}".format(**row)
        print(f"  {name:20} at {C:.3g}: frontier loss {K * C**c:.3f}; {text}")
        out.setdefault(name, []).append(row)
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


def cells(texts, width):
    """Texts in columns of one width."""
    return "".join(text.ljust(width) for text in texts)


def print_table(records):
    """The paper's Table 2, an interval under each number, "?" at what is not identified."""
    wide = max(len(g["name"]) for g in records + [{"name": "group"}]) + 2
    print(f"\n{'group':{wide}}runs  {cells(EXPONENTS, 17)}R2(ln L)  MSE       MAE %")
    for g in records:
        loose = {*g["not_identified"]}
        loose |= {"a", "b", "d"} if loose & {"alpha", "beta"} else set()
        values = [f"{g[k]:.4f}{'?' * (k in loose)}".replace("nan", "-") for k in EXPONENTS]
        print(f"{g['name']:{wide}}{g['n']:<6}{cells(values, 17)}"
              + "{r2:.5f}   {mse:.2e}  {mae_pct:.3f}".format(**g))
        if g["ci"]:
            print(" " * (wide + 6) + cells((span(g["ci"][k]) for k in EXPONENTS), 17))


def print_details(s, g):
    """What a careful reader asks about one group."""
    say, size = (lambda text: print("  " + text)), np.abs(s.fit.residuals)
    print("\n{name}: {sizes} sizes".format(**g) + "".join(
        f", {k} {human(lo)} to {human(hi)}" for k in "NDC" for lo, hi in [g[k + "_range"]]))
    floor = "" if g["floor"] is None else f"; true floor {g['floor']:.4f}"
    if floor and None not in (g["ci"].get("E") or [None]):
        lo, hi = g["ci"]["E"]
        floor += f", {'inside' if lo <= g['floor'] <= hi else 'outside'} the interval of E"
    say("E = {E:.5g}, A = {A:.5g}, B = {B:.5g}".format(**g) + floor)
    say("optimiser: {screened} screened starts, {polished} polished, {reached_best} of them reach "
        .format(**g["starts"]) + "F = {objective:.8g}; |gradient| / (delta n) = {gradient:.0e}; "
        "condition {condition:.1e}".format(**g))
    print_approaches(say, g)
    print_rivals(say, g)
    if g["holdout"]:
        say("held out {n} rows: R2(ln L) {r2:.4f}, MSE {mse:.2e}, MAE {mae_pct:.3f} %, mean error "
            "{bias_pct:+.3f} %".format(**g["holdout"]))
    for b in g["budgets"]:
        say(f"at C = {b['C']:.3g}: N {human(b['N'])}, D {human(b['D'])}, "
            f"D/N {b['D'] / b['N']:.3g}, loss {b['loss']:.4f} {span(b['ci']['loss'], '{:.4f}')}"
            + ", outside the runs' range of C" * b["extrapolates"])
    for count, what in (((s.runs.L < g["E"]).sum(), "below the fitted E"),
                        ((size > 8 * max(np.median(size), 1e-6)).sum(),
                         "more than 8 median residuals off the law")):
        if count:
            say(f"{count} rows lie {what}; they are in the fit")
    for flag in g["flags"]:
        say(f"WARNING: {flag}")
    if g["profile"]:
        say(f"not identified: {', '.join(g['not_identified'])}; 95 % profile intervals: "
            + ", ".join(f"{k} {span(ends)}" for k, ends in g["profile"].items()))


def print_approaches(say, g):
    """The three approaches side by side."""
    say("approach".ljust(32) + cells(("N ~ C^a", "D ~ C^b", "L ~ C^c"), 24))
    label = f"2 parabolas, D = {g.get('D0_isoflop', 0):.3g} C^b"
    for how, keys in ((f"1 envelope from {g['cut']:.1e} FLOPs", ("a_envelope", "b_envelope", "c")),
                      (label, ("a_isoflop", "b_isoflop", "c_isoflop")),
                      ("3 closed form, C = 6 N D", ("a", "b")),
                      ("3 regression on budgets", ("a_regression", "b_regression", "c_regression")),
                      ("3 regression of N + N_vision", ("a_total", "b_total"))):
        if keys[0] in g:
            found = (f"{g[k]:.4f} {span(g['ci'].get(k))}" for k in keys)
            say(how.ljust(32) + cells(found, 24))
    say(f"envelope's c with C in equal ratios: {g['c_log_spaced']:.4f}; budgets with five sizes: "
        f"{g['isoflop_budgets'] or 'fewer than three, so no parabolas'}")


def print_rivals(say, g):
    """Other laws on the same rows, and how far the fit moves."""
    tied = g["tied"]["tied"]
    say(f"alpha = beta = {tied['exponent']:.4f} with E {tied['E']:.4f}: {against(g['tied'])}")
    if g["sparse"]:
        law = g["sparse"]
        say("L(N, D, S) = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma);\n"
            "  of the intervals trust those of B, alpha and beta, the others come out too narrow:")
        texts = [f"{k} {law[k]:.4g}{'?' * (k in law['not_identified'])} "
                 f"{span(law['ci'][k], '{:.3g}')}" for k in SPARSE.names]
        say(", ".join(texts[:5]) + "\n  " + ", ".join(texts[5:]) + "\n  " + against(law["rivals"]))
    say("refitted with".ljust(32) + cells(("E", "alpha", "beta", "a"), 16))
    for change, moved in g["sensitivity"].items():
        ends = (f"{lo:.3f}" + f" to {hi:.3f}" * (hi > lo) for lo, hi in moved.values())
        say(change.ljust(32) + cells(ends, 16))


def against(rivals):
    """Rivals of one set of rows as text: AIC above the lowest, error on sizes left out."""
    least = min(v["aic"] for v in rivals.values())
    return "; ".join(f"{k}: {v['coefficients']} coefficients, AIC +{v['aic'] - least:.1f}, "
                     f"sizes left out {v['left_out_pct']:.3f} % off" for k, v in rivals.items())


def joint(studies, args):
    """Groups that differ in their mixture only: print and return the laws that they share."""
    out, families = {}, {}
    for s in studies:
        families.setdefault(s.runs.family, []).append(s.runs)
    for name in (k for k, groups in families.items() if k and len(groups) > 1):
        out[name] = joint_law(families[name], args)
        print(f"\n{name}: one alpha and beta for all mixtures")
        for group, law in out[name]["groups"].items():
            print(f"  {group}: " + ", ".join(f"{k} {law[k]:.4g} {span(law['ci'][k], '{:.4g}')}"
                                             for k in ("E", "A", "B", "alpha", "beta")))
        print("  " + against(out[name]["rivals"]))
    return out


def compare(studies, args):
    """Print and return the differences of two groups (first minus second) with intervals."""
    found, out = {s.runs.name: s for s in studies}, {}
    for name in args.compare:
        if name not in found:
            raise SystemExit(f"--compare: no group {name!r}; groups: {', '.join(found)}")
    one, two = (found[name] for name in args.compare)
    print(f"\n{one.runs.name} minus {two.runs.name}")
    for k in EXPONENTS:
        gap, ci = one.record[k] - two.record[k], interval(one.samples[k] - two.samples[k])
        out[k] = {"difference": gap, "ci": ci}
        print(f"  {k:6} {gap:+.4f} {span(ci, '{:+.4f}')}")
    for C in args.budget or [min(one.runs.C.max(), two.runs.C.max())]:
        (x, xs), (y, ys) = at_budget(one, C), at_budget(two, C)
        gap, ci = x["loss"] - y["loss"], interval(xs - ys)
        out[f"loss at {C:.6g}"] = {"difference": gap, "ci": ci}
        ends = sorted(np.sign(gap) * e for e in ci) if ci else None
        print(f"  {(one if gap < 0 else two).runs.name} is better by {abs(gap):.4f} "
              f"{span(ends, '{:.4f}')} at {C:.3g} FLOPs")
    return out


# ---------------------------------------------------------------- figures


def draw(studies, folder):
    """laws: loss against FLOPs per group, prediction, residuals; laws_more: what follows."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs one more package: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    across, sliced = min(len(studies), 4), [s for s in studies if s.record["isoflop_budgets"]]
    down = -(-len(studies) // across)
    page = pyplot.figure(figsize=(12, 4.4 * down + 3), layout="constrained")
    top, bottom = page.subfigures(2, 1, height_ratios=[4.4 * down, 3])
    panels = top.subplots(down, across, squeeze=False, sharey=True).ravel()
    for ax, s in zip(panels, studies):
        draw_frontier(ax, s)
    draw_residuals(bottom.subplots(1, 4), studies)
    plain = 4 + (len(studies) > 1)
    rows = -(-(plain + len(sliced)) // 3)
    more = pyplot.figure(figsize=(12, 3.8 * rows), layout="constrained")
    others = more.subplots(rows, 3).ravel()
    draw_optima(others[:plain], studies)
    for ax, s in zip(others[plain:], sliced):
        draw_slices(ax, s)
    for ax in [*panels[len(studies):], *others[plain + len(sliced):]]:
        ax.axis("off")
    for figure, name in ((page, "laws"), (more, "laws_more")):
        for suffix in ("png", "svg"):  # whole or not at all
            part = folder / f"{name}.part.{suffix}"
            figure.savefig(part, dpi=150)
            os.replace(part, folder / f"{name}.{suffix}")
    pyplot.close("all")


def look(k, line=True):
    """Line or marker and grey of the k-th group: tells groups apart without colour."""
    return {"color": ("0.1", "0.55", "0.3", "0.7")[k % 4], "mfc": "none", "ms": 4.5, "mew": 0.9,
            "ls": ("-", "--", "-.", ":")[k % 4] if line else "",
            "marker": "" if line else "o^sDvPX*"[k % 8]}


def shade(rank):
    """0 to 1 -> a colour that is darker the larger, in grey too."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 - 0.92 * rank)


def draw_frontier(ax, s):
    """Runs, the law at fixed N, the compute-optimal frontier (dashed where it extrapolates)."""
    r, coef, (small, large) = s.runs, s.fit.coef, s.record["N_range"]
    sizes, tokens = np.unique(r.N), np.geomspace(r.D.min() / 1.4, r.D.max() * 1.4, 60)

    def rank(N):
        return np.log(N / small) / np.log(large / small)

    ax.scatter(r.C, r.L, c=shade(rank(r.N)), s=18, zorder=3, edgecolors="white", linewidths=0.4)
    _, repeats, noise = seed_noise(r)
    if repeats:
        ax.errorbar(r.C, r.L, noise * r.L, fmt="none", ecolor="0.4", elinewidth=0.8, capsize=2,
                    label=f"seed noise, $\\pm$ {100 * noise:.2g} %")
    for N in sizes if len(sizes) <= 7 else np.geomspace(small, large, 5):
        C = 6 * tokens * (N + (r.vision[0] if r.vision else 0) * encoder(N, r.vision))
        keep = (C > r.C.min() / 10) & (C < r.C.max() * 10)
        ax.plot(C[keep], predict(coef, N, tokens[keep]), color=shade(rank(N)), lw=1,
                label=f"N = {human(N)}")
    lo, hi = r.C.min(), r.C.max()
    C = np.geomspace(lo / 10, hi * 10, 120)
    inside, loss = (C >= lo) & (C <= hi), optimum(coef, C, r.vision)[2][0]
    ax.plot(C, loss, color="black", zorder=4, ls="--", lw=1.3)
    ax.plot(C[inside], loss[inside], color="black", zorder=4, lw=2.4,
            label="frontier (dashed: outside the runs)")
    E = np.exp(coef[2])
    ax.axhline(E, color="black", ls=":", lw=1.2, label=f"fitted E = {E:.3f}")
    if r.floor is not None:
        ax.axhline(r.floor, color="0.5", ls="-.", lw=1.2, label=f"true floor = {r.floor:.3f}")
    ax.set(xscale="log", yscale="log", xlabel="training FLOPs C", ylabel="validation loss (nats)")
    ax.set_title(f"{r.name}: L = {E:.3f} + A/N$^{{{coef[3]:.3f}}}$ + B/D$^{{{coef[4]:.3f}}}$",
                 fontsize=10)
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
    ends = [f(f(s.runs.L) for s in studies) for f in (min, max)]
    axes[0].plot(ends, ends, color="black", lw=0.8)
    for k, s in enumerate(studies):
        r, dots = s.runs, look(k, False)
        axes[0].plot(r.L, predict(s.fit.coef, r.N, r.D), label=r.name, **dots)
        for ax, x in zip(axes[1:], (r.N, r.D, r.C)):
            ax.plot(x, 100 * np.expm1(-s.fit.residuals), **dots)
    axes[0].set(xlabel="observed loss", ylabel="predicted loss")
    axes[0].legend(fontsize=7, frameon=False)
    axes[1].set_ylabel("observed above the law (%)")
    for ax, x in zip(axes[1:], ("parameters N", "tokens D", "training FLOPs C")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel=x)
        plain_ticks(ax.xaxis)
        ax.sharey(axes[1])


def draw_optima(panels, studies):
    """Best N, D and D/N against C with 95 % bands, bootstrap clouds, loss above the first group."""
    ends = [f(f(s.runs.C) for s in studies) for f in (min, max)]
    C, best = np.geomspace(ends[0] / 3, ends[1] * 3, 30), []
    for k, s in enumerate(studies):
        one, many = (optimum(c, C, s.runs.vision) for c in (s.fit.coef, s.draws[:400]))
        best.append((one[2], many[2]))
        curves = [(one[0], many[0]), (one[1], many[1]), (one[1] / one[0], many[1] / many[0]), None,
                  [100 * (x / y - 1) for x, y in zip(best[-1], best[0])]]
        for ax, curve in zip(panels, curves):
            if curve:
                ax.plot(C, curve[0][0], label=s.runs.name, **look(k))
                draws = curve[1] if len(s.draws) else curve[0]
                ax.fill_between(C, *np.nanpercentile(draws, [2.5, 97.5], axis=0), lw=0, alpha=0.2,
                                color=look(k)["color"])
        cloud = look(k, False)
        panels[3].plot(*s.draws[:400, 3:].T, **cloud | {"ms": 2.5, "alpha": 0.5})
        panels[3].plot(*s.fit.coef[3:], **cloud | {"ms": 9, "mew": 2, "label": s.runs.name})
        if s.record["isoflop_budgets"]:
            weight = np.ones((1, len(s.runs.N)))
            at, N, D, _ = np.exp(isoflop(s.runs, isoflop_budgets(s.runs), weight))[:, 0]
            for ax, y in zip(panels, (N, D, D / N)):
                ax.plot(at, y, label=f"{s.runs.name}, parabolas", **cloud)
    names = ("best N", "best D", "best D/N (tokens per parameter)", "",
             f"frontier loss above {studies[0].runs.name} (%)")
    for k, (ax, name) in enumerate(zip(panels, names)):
        if k != 3:
            ax.set(xscale="log", yscale="log" if k < 3 else "linear", xlabel="training FLOPs C",
                   ylabel=name)
        ax.legend(fontsize=7, frameon=False)
    panels[3].set(xlabel=r"$\alpha$", ylabel=r"$\beta$", title="bootstrap refits")


def draw_slices(ax, s):
    """IsoFLOP curves: runs of each budget, their parabola over ln D, its minimum."""
    budgets = isoflop_budgets(s.runs)
    for q, rows in enumerate(budgets):
        x, L, colour = np.log(s.runs.D[rows]), s.runs.L[rows], shade(q / len(budgets))
        p, fine = np.polyfit(x, L, 2), np.linspace(x.min(), x.max(), 50)
        ax.plot(np.exp(x), L, "o", ms=3, color=colour)
        ax.plot(np.exp(fine), np.polyval(p, fine), lw=1, color=colour,
                label=f"C = {np.median(s.runs.C[rows]):.1e}")
        ax.plot(np.exp(-p[1] / (2 * p[0])), np.polyval(p, -p[1] / (2 * p[0])), "kx", ms=6)
    ax.set(xscale="log", xlabel="tokens D", ylabel="loss", title=f"{s.runs.name}: equal FLOPs")
    ax.legend(fontsize=6, frameon=False, ncols=2)


# ---------------------------------------------------------------- command line


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


def flops(text):
    """For argparse: numbers with commas between; 24hx8xh100x0.4 = hours, GPUs, peak, MFU."""
    peak = {"a100": 312e12, "h100": 989e12, "h200": 989e12}  # dense bf16 FLOP/s

    def factor(part):
        return 3600 * positive(part[:-1]) if part[-1:] == "h" else peak.get(part) or positive(part)

    return [float(np.prod([factor(p) for p in part.split("x")])) for part in text.split(",")]


def fail(message):
    """A mistake on the command line, in one line."""
    raise SystemExit(f"fit_laws.py: {message}; see python fit_laws.py --help")


def parse_args(argv=None):
    """Command line -> namespace; a mistake ends in one line with the nearest flag."""
    p = argparse.ArgumentParser(prog="fit_laws.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, help, **more):
        p.add_argument(flag, help=help, **more)

    p.error = fail  # instead of two lines of usage
    add("path", "run folder, .jsonl, .csv, .tsv or .parquet with columns N, D, loss (or params, "
        "tokens, val_loss, ...; C or flops if you have it)", nargs="*", metavar="PATH")
    add("--where", "only rows with, for example, kept=1, C<1e21 or fusion!=late; repeatable",
        action="append", default=[], metavar="RULE")
    add("--group-by", "a law for each value of these columns (default fusion,moe,mixture as far as "
        "they differ; '' for one law)", metavar="COL,COL")
    add("--loss", "losses to fit (default loss; or loss,loss_text)", default="loss", metavar="COL")
    add("--best-per-cell", "of runs with equal N and D keep the best, as a choice of learning rate "
        "(default: all, as seeds)", action="store_true")
    add("--holdout", "fit without the K largest sizes, or rows such as 'N>1e9', and report the "
        "error there", metavar="K|RULE")
    add("--budget", "print the best N, D and the loss for these FLOPs; 24hx8xh100x0.4 stands for "
        "hours, GPUs, their peak and MFU", type=flops, default=[], metavar="C,C")
    add("--plan", "also what the paper's coefficients say at --budget", action="store_true")
    add("--compare", "differences of two groups with intervals", nargs=2, metavar="GROUP")
    add("--bootstrap", "resamples (default 1000)", type=whole, default=1000, metavar="K")
    add("--cluster", "resample whole widths, seeds or runs, not rows", metavar="COL")
    add("--delta", "of the Huber loss (default 1e-3)", type=positive, default=1e-3)
    add("--min-budget", "L = K C^c starts here (paper 3e19; default: after the first quarter of "
        "the decades)", type=positive, metavar="C")
    add("--out", "folder for laws.json and figures (default: the run folder, or here)", type=Path)
    add("--json", "file for the numbers (default: laws.json in --out)", type=Path)
    add("--no-plots", "no figure", action="store_true")
    args, extra = p.parse_known_args(argv)
    if extra:
        near = difflib.get_close_matches(extra[0].split("=")[0], p._option_string_actions, 1)
        fail(f"unknown {extra[0]}" + (f", did you mean {near[0]}?" if near else ""))
    if not args.path and not args.plan or args.plan and not args.budget:
        fail("--plan needs --budget" if args.plan else "give a run folder or a table")
    return args


def write_json(path, content):
    """Whole or not at all; numbers that are not finite become null."""
    content, part = json.loads(json.dumps(content), parse_constant=lambda _: None), f"{path}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(part, path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot write: {error.strerror}; choose another --out")


def gather(args):
    """-> notes, Studies of every group and loss with enough rows; SystemExit if there is none."""
    columns, notes, by = load(args)
    names, families = (labels(columns, part) for part in (by, [k for k in by if k != "mixture"]))
    largest = args.holdout and args.holdout.isdecimal()
    held = where(columns, args.holdout) if args.holdout and not largest else names == ""
    studies, refused = [], ["no usable rows"]
    for name, loss in product(dict.fromkeys(names), args.loss.split(",")):
        kind = "" if loss == "loss" else " " + loss.removeprefix("loss_")
        try:
            runs, rows = make_runs(columns, notes, names == name, name + kind, loss, args)
            out = held[rows]
            if largest:
                out = np.isin(runs.N, np.unique(runs.N)[::-1][: int(args.holdout)])
            check_size(name + kind + " without the rows held out", runs.N[~out])
        except SystemExit as error:
            refused.append(str(error))
            continue
        family = families[names == name][0] + kind if "mixture" in by else ""
        kept = replace(runs.rows(~out), family=family)
        studies.append(study(kept, runs.rows(out) if out.any() else None, args, len(studies)))
    if not studies:
        raise SystemExit("; ".join([refused[-1], *notes[1:]]))
    return notes + refused[1:], studies


def main(argv=None):
    """Read, fit, print, write; returns what the JSON file holds."""
    args = parse_args(argv)
    paper = paper_plan(args.budget) if args.plan else None
    if not args.path:
        return {"paper": paper}
    notes, studies = gather(args)
    records = [s.record for s in studies]
    print("\n".join(notes))
    print(f"\nL = E + A/N^alpha + B/D^beta, sum of Huber(delta = {args.delta:g}) on ln L; below, "
          f"95 % intervals: {args.bootstrap} resamples of {args.cluster or 'run'}s")
    print_table(records)
    for s in studies:
        print_details(s, s.record)
    result = {"groups": records, "notes": notes, "delta": args.delta, "paper": paper}
    result["joint"] = joint(studies, args)
    if args.compare:
        result["compare"] = compare(studies, args)
    out = args.out or (Path(args.path[0]) if Path(args.path[0]).is_dir() else Path())
    write_json(args.json or out / "laws.json", result)
    if not args.no_plots:
        draw(studies, out)
    return result


if __name__ == "__main__":
    main()
