"""Other laws and approaches on the tables that fit_laws.py reads.

    python -m tools.laws_more table.csv --bootstrap 200 --json more.json
    python -m tools.laws_more --plan --budget 24hx8xh100x0.4

For each group it prints how much of the law's error comes from the seeds, IsoFLOP parabolas, one
exponent for N and D against two, the law of sparsity, how far the law moves if rows or delta
change, and profile intervals, which need no resamples, but can be too narrow for six runs. Groups
that differ only in their mixture also get a law with a common alpha and beta. --json FILE writes
all of this, beside what fit_laws.py finds. --plan prints what the paper's own coefficients say at
--budget. The other flags choose rows and groups as in fit_laws.py.
"""

# Dimensions: n rows (runs), T terms of a law, P coefficients, K resamples, Q budgets, M groups.

import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
from scipy.optimize import brentq

from fit_laws import (DELTA, NAMES, build_problem, check, derive, gather, interval, minimise,
                      number, optimum, parse_args, predict, projected_starts, residual, screen,
                      span, write_json)
from tools import end_with_the_pipe
from tools.sizes import in_flops

ISOFLOP = tuple(f"{name}_isoflop" for name in ("a", "b", "c", "d", "D0"))


def isoflop_budgets(runs):
    """Row numbers of each IsoFLOP budget, which has equal C within 2 % and at least five sizes.
    An ordinary grid of runs must not pass for IsoFLOP budgets, so we ask for at least three, which
    together hold at least half of the rows."""
    order = np.argsort(runs.C, kind="stable")
    steps = np.flatnonzero(np.diff(np.log(runs.C[order])) > 0.01) + 1
    good = [rows for rows in np.split(order, steps)
            if runs.C[rows[-1]] < 1.02 * runs.C[rows[0]] and len({*runs.N[rows]}) >= 5]
    return good if len(good) >= 3 and 2 * sum(map(len, good)) >= len(order) else []


def isoflop_minima(runs, budgets, weight):
    """-> C and best N, D and loss of each budget, (4, Q), of rows that count weight (n,) times.
    The best N and D are the minima of parabolas of L over ln N and ln D. They are NaN where a
    parabola has no minimum between the runs.
    """
    found = np.full((4, len(budgets)), np.nan)
    for q, rows in enumerate(budgets):
        found[0, q] = np.median(runs.C[rows])
        for i, x in ((1, np.log(runs.N[rows])), (2, np.log(runs.D[rows]))):
            u, w = x - x.mean(), np.sqrt(weight[rows])
            enough = len({*u[w > 0]}) > 2
            p = np.polyfit(u, runs.L[rows], 2, w=w) if enough else [-1, 0, 0]
            at = -p[1] / (2 * p[0])
            if p[0] > 0 and u.min() < at < u.max():
                found[i, q], found[3, q] = np.exp(at + x.mean()), np.polyval(p, at)
    return found


def isoflop(runs, budgets, weight):
    """Lines through the minima: N ~ C^a, D = D0 C^b, L ~ C^c, D ~ N^d -> {a_isoflop: value}."""
    minima = np.log(isoflop_minima(runs, budgets, weight))
    C, N, D, loss = minima[:, np.isfinite(minima).all(0)]
    if len(C) < 2:
        return dict.fromkeys(ISOFLOP, np.nan)
    b, lnD0 = np.polyfit(C, D, 1)
    a, c, d = (np.polyfit(x, y, 1)[0] for x, y in ((C, N), (C, loss), (N, D)))
    return dict(zip(ISOFLOP, (a, b, c, d, np.exp(lnD0))))


def noise(coef, runs):
    """Runs that differ only in the seed -> {name: value}: the standard deviation over seeds and the
    law's distance from the means over seeds, both in per cent of the loss, and R2 of these means.
    In the means most of the seeds' error has averaged out. Empty if some run has no second seed."""
    at = np.unique([runs.N, runs.D], axis=1)  # (2, settings)
    alike = [np.log(runs.L[(runs.N == N) & (runs.D == D)]) for N, D in at.T]
    if min(map(len, alike)) < 2:
        return {}
    means = np.array([x.mean() for x in alike])
    error = np.log(predict(coef, *at)) - means
    return {"seed_sd_pct": 100 * np.mean([x.var(ddof=1) for x in alike]) ** 0.5,
            "means_mae_pct": 100 * np.abs(error).mean(),
            "means_r2": 1 - (error ** 2).mean() / means.var()}


def share_coefficients(problem, index, member):
    """Let groups share coefficients: p of group m (rows member == m) is column index[m, p].
    -> Problem, and its starts. Every group starts where one law for all rows would start.
    """
    T, n, P = problem.design.shape
    design, owner = np.zeros((T, n, index.max() + 1)), np.zeros(index.max() + 1, int)
    for p in range(P):
        design[:, np.arange(n), index[member, p]] += problem.design[:, :, p]
        owner[index[:, p]] = p
    return replace(problem, design=design), projected_starts(problem)[:, owner]


def sizes_left_out(N):
    """(K, n) of 0 and 1: each row leaves out one size, or a twelfth of more than 12 sizes."""
    parts = np.array_split(np.unique(N), min(12, len({*N})))
    return np.array([~np.isin(N, part) for part in parts], float)


def refit(problem, theta, weights):
    """Refit each resample of weights (K, n) from theta (P,) -> (K, P)."""
    return np.reshape([minimise(problem, [theta], w).x for w in weights], (-1, len(theta)))


def score_law(problem, starts, N):
    """Fit a law, and weigh it against rivals on the same rows -> record, theta (P,).
    AIC is that of Laplace errors, which Huber's loss at 1e-3 resembles: 2 n ln(mean |r|) + 2 P.
    left_out_pct is the mean error of each size when it is predicted from the other sizes.
    """
    best = minimise(problem, screen(problem, starts))
    weights, missed = sizes_left_out(N), []
    for theta, weight in zip(refit(problem, best.x, weights), weights):
        missed.extend(np.abs(residual(theta, problem)[0])[weight == 0])
    size = max(np.abs(residual(best.x, problem)[0]).mean(), 1e-15)
    return {"coefficients": len(best.x), "objective": best.fun * problem.delta,
            "left_out_pct": 100 * np.mean(missed),
            "aic": 2 * len(N) * np.log(size) + 2 * len(best.x)}, best.x


def name_coefficients(names, terms, coef, draws):
    """coef (P,), draws (K, P) -> {name: value, "ci": {name: interval}}; the terms were logs."""
    one, many = ([*np.exp(x[:terms]), *x[terms:]] for x in (coef, draws.T))
    return dict(zip(names, one)) | {"ci": {k: interval(x) for k, x in zip(names, many)}}


def tied_law(runs):
    """alpha = beta against both free -> {"free": record, "tied": record with E and exponent}."""
    problem = build_problem(runs)
    free, _ = score_law(problem, projected_starts(problem), runs.N)
    shared = share_coefficients(problem, np.array([[0, 1, 2, 3, 3]]), 0)
    tied, theta = score_law(*shared, runs.N)
    return {"free": free, "tied": tied | {"E": np.exp(theta[2]), "exponent": theta[3]}}


def joint_law(studies):
    """Groups with their own A, B and E but one alpha and beta, against separate laws."""
    N, D, L = (np.concatenate([getattr(s.runs, k) for s in studies]) for k in "NDL")
    M = len(studies)
    member = np.repeat(np.arange(M), [len(s.runs.N) for s in studies])
    problem = build_problem(SimpleNamespace(N=N, D=D, L=L))
    index = np.c_[np.arange(3 * M).reshape(M, 3), np.tile([3 * M, 3 * M + 1], (M, 1))]
    joint, starts = share_coefficients(problem, index, member)
    record, theta = score_law(joint, starts, N)
    apart = share_coefficients(problem, np.arange(5 * M).reshape(M, 5), member)
    draws = refit(joint, theta, np.concatenate([s.weight for s in studies], axis=1))
    laws = [name_coefficients(NAMES, 3, theta[own] @ problem.centring,
                              draws[:, own] @ problem.centring) for own in index]
    return {"groups": {s.runs.name: law for s, law in zip(studies, laws)},
            "rivals": {"joint": record, "separate": score_law(*apart, N)[0]}}


def families(studies):
    """-> {name: studies} of two or more groups that differ in their mixture only."""
    found = {}
    for s in studies:
        mixture = s.runs.table[0].get("mixture")
        name = f" {s.runs.name} ".replace(f" {mixture} ", " ").strip() or "all"
        found.setdefault(name, []).append(s)
    return {name: groups for name, groups in found.items() if len(groups) > 1}


# L = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma), active = 1 - S
SPARSE = ((0, "N"), (1, "D"), (3, "active"), (4, "active"), (4, "N"))  # term, variable
SPARSE_NAMES = ("A", "B", "E", "C", "d", "alpha", "beta", "lambda", "delta", "gamma")


def active_share(runs):
    """1 - S, the experts used of all experts, (n,); ones if a row does not say."""
    S, k, n = (np.array([number(row.get(name)) for row in runs.table])
               for name in ("sparsity", "top_k", "n_experts"))
    active = k / n if np.isnan(S).all() else 1 - S
    return active if (active > 0).all() else np.ones(len(S))


def sparse_law(runs, weights):
    """L(N, D, S) against a law without S and a law for each S; None for less than 3 sparsities.
    A coefficient is not identified if its interval is wider than twice its value.
    """
    active = active_share(runs)
    levels, member = np.unique(active.round(6), return_inverse=True)
    if len(levels) < 3:
        return None
    problem = build_problem(SimpleNamespace(**vars(runs), active=active), slopes=SPARSE, terms=5)
    plain = build_problem(runs)
    grids = [(-0.4, -0.1, 0.1, 0.4) if variable == "active" else np.geomspace(0.1, 1.2, 4)
             for _, variable in SPARSE]
    record, theta = score_law(problem, projected_starts(problem, *grids), runs.N)
    rivals = {"with S": record, "without": score_law(plain, projected_starts(plain), runs.N)[0]}
    if np.bincount(member).min() >= 6:
        apart = np.arange(5 * len(levels)).reshape(-1, 5)
        rivals["separate"] = score_law(*share_coefficients(plain, apart, member), runs.N)[0]
    draws = refit(problem, theta, weights[:200])  # because each of these refits is slow
    law = name_coefficients(SPARSE_NAMES, 5, theta @ problem.centring, draws @ problem.centring)
    weak = [k for k, ends in law["ci"].items() if not ends or np.ptp(ends) > 2 * abs(law[k])]
    return law | {"sparsities": [*1 - levels[::-1]], "rivals": rivals, "not_identified": weak}


def sensitivity(runs, fit):
    """How far changes move the law -> {change: {name: [lowest, highest]}}."""
    problem, kept = build_problem(runs), np.ones((1, len(runs.N)))
    theta, worst = problem.theta(fit.coef), max(1, len(runs.N) // 50)
    kept[0, np.argsort(np.abs(residual(theta, problem)[0]))[-worst:]] = 0
    changes = {f"delta {d:g}": (replace(problem, delta=d), [1.0])
               for d in (DELTA / 10, DELTA * 10)}
    changes["one size left out"] = problem, sizes_left_out(runs.N)
    changes[f"worst {worst} left out"] = problem, kept
    moved = {}
    for change, (changed, weights) in changes.items():
        values = derive(refit(changed, theta, weights) @ problem.centring)
        moved[change] = {k: [values[k].min(), values[k].max()] for k in ("E", "alpha", "beta", "a")}
    return moved


def profile(runs, fit):
    """95 % profile intervals {name: [lo, hi]} of E, alpha and beta: fix one, refit the others.
    An end is NaN if it lies beyond ten times the value. The rise of F becomes a chi square by
    the robust likelihood ratio, whose scale is mean(psi^2) / mean(|r| < delta).
    """
    problem, ends = build_problem(runs), {}
    theta, least = problem.theta(fit.coef), runs.L.min()
    size = np.abs(residual(theta, problem)[0])
    scale = (np.minimum(size, DELTA) ** 2).mean() / max((size <= DELTA).mean(), 0.02)
    limit = (fit.objective + 1.92 * max(scale, 1e-10)) / DELTA
    middles = np.clip([np.exp(theta[2]), *theta[3:]], [0.05 * least, 0.05, 0.05],
                      [0.99 * least, 2, 2])

    def rise(value, j):
        start, bounds = theta.copy(), [(None, None)] * 5
        start[j] = np.log(value) if j == 2 else value
        bounds[j] = (start[j], start[j])
        return minimise(problem, [start], bounds=bounds).fun - limit

    for (j, middle), factor in product(enumerate(middles, 2), (0.1, 10)):
        crosses = rise(middle, j) < 0 < rise(middle * factor, j)
        end = brentq(rise, middle, middle * factor, (j,), rtol=1e-4) if crosses else np.nan
        ends.setdefault(NAMES[j], []).append(end)
    return ends


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
    """Print and return what the paper's own coefficients say at each budget."""
    print("The paper's coefficients (Table 2). It does not publish A and B of its dense models.")
    found = {}
    for (name, (A, B, E, alpha, beta, a, b, K, c)), C in product(PAPER.items(), budgets):
        row = {"C": C, "frontier_loss": K * C**c} | dict.fromkeys(("N", "D", "loss"))
        text = f"N ~ C^{a:.3f}, D ~ C^{b:.3f}, E {E:.3f}"
        if A:
            row |= zip(("N", "D", "loss"), optimum([*np.log([A, B, E]), alpha, beta], C))
            text = "N {N:.3g}, D {D:.3g}, loss by the law {loss:.4f}".format(**row)
        print(f"  {name:20} at {C:.3g}: frontier loss {K * C**c:.3f}, {text}")
        found.setdefault(name, []).append(row)
    return found


def report(s):
    """A study of fit_laws.py -> its record with all that this file finds, which it also prints."""
    record, budgets = s.record, isoflop_budgets(s.runs)
    if budgets:  # the intervals are those of the same quantities on every resample
        many = [isoflop(s.runs, budgets, weight) for weight in s.weight]
        record |= isoflop(s.runs, budgets, np.ones(len(s.runs.N)))
        record["ci"] |= {k: interval(np.array([v[k] for v in many])) for k in ISOFLOP}
    record |= {"isoflop_budgets": len(budgets), "seeds": noise(s.fit.coef, s.runs),
               "tied": tied_law(s.runs), "sparse": sparse_law(s.runs, s.weight),
               "sensitivity": sensitivity(s.runs, s.fit), "profile": profile(s.runs, s.fit)}
    print_more(record)
    return record


def print_law(title, law, names):
    """Coefficients of a law with their intervals, "?" at what is not identified."""
    weak = law.get("not_identified", ())
    print(f"  {title:20}" + ", ".join(
        f"{k} {law[k]:.4g}{'?' * (k in weak)} {span(law['ci'][k], '.4g')}" for k in names))


def print_rivals(rivals):
    """AIC above the lowest, and the error on sizes left out, of laws on the same rows."""
    least = min(law["aic"] for law in rivals.values())
    for name, law in rivals.items():
        print("    {:18}{coefficients} coefficients, AIC +{:.1f}, sizes left out {left_out_pct:.3f}"
              " % off".format(name, law["aic"] - least, **law))


def print_ends(title, ends):
    """{name: [lowest, highest]} in one line, or one number where both are the same."""
    texts = [f"{name} {lo:.4f}" if lo == hi else f"{name} {span([lo, hi], '.4f')}"
             for name, (lo, hi) in ends.items()]
    print(f"  {title:20}" + ", ".join(texts).replace("nan", "?"))


def print_more(g):
    """All about one group that fit_laws.py does not print."""
    print("\n{name}: {n} runs, E {E:.4f}, alpha {alpha:.4f}, beta {beta:.4f}".format(**g))
    if g["seeds"]:
        print("  seeds               deviation {seed_sd_pct:.2f} % of the loss; the law misses "
              "their means by {means_mae_pct:.2f} %, R2 {means_r2:.4f}".format(**g["seeds"]))
    if g["isoflop_budgets"]:
        print_law(f"{g['isoflop_budgets']} parabolas", g, ISOFLOP)
    print("  alpha = beta        {exponent:.4f} with E {E:.4f}".format(**g["tied"]["tied"]))
    print_rivals(g["tied"])
    if g["sparse"]:
        print_law("sparse", g["sparse"], SPARSE_NAMES)
        print("    Only the intervals of B, alpha and beta are reliable, the others too narrow.")
        print_rivals(g["sparse"]["rivals"])
    for change, ends in g["sensitivity"].items():
        print_ends(change, ends)
    print_ends("profile intervals", g["profile"])


def main(argv=None):
    """Read, fit, print, write; returns what the JSON file holds."""
    argv = sys.argv[1:] if argv is None else argv
    argv = [",".join(map(repr, in_flops(word))) if flag == "--budget" else word
            for flag, word in zip(["", *argv], argv)]
    args = parse_args(argv, __doc__, ["--plan"])
    check(args.budget if args.plan else args.path, "give a table, or --plan and --budget")
    check(not args.compare, "--compare belongs to fit_laws.py")
    result = {"paper": paper_plan(args.budget)} if args.plan else {}
    if args.path:
        notes, studies = gather(args)
        print("\n".join(notes))
        result |= {"groups": [report(s) for s in studies], "joint": {},
                   "notes": notes, "delta": DELTA}
        for name, groups in families(studies).items():
            law = result["joint"][name] = joint_law(groups)
            print(f"\n{name}: one alpha and beta for all mixtures")
            for group, one in law["groups"].items():
                print_law(group, one, NAMES)
            print_rivals(law["rivals"])
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    end_with_the_pipe()
    main()
