"""More that the same runs can tell: parabolas, other laws, and how far to trust the law.

    python -m tools.laws_more runs/demo                      the flags are those of fit_laws.py
    python -m tools.laws_more --plan --budget 24hx8xh100x0.4     the paper's own laws; no runs

For each group of runs it prints the three approaches to N ~ C^a side by side (envelope, parabolas
at equal FLOPs, the law), the law with alpha = beta, the law of sparsity (Table 12) where there are
three sparsities, how far the law moves when delta or the runs change, and profile intervals where
a coefficient is not identified. Groups that differ in their mixture only also get laws with one
alpha and beta (Table 3). It writes all of it, and what fit_laws.py finds, to laws_more.json.
"""

# Dimensions: n rows (runs), T terms, P coefficients, K starts or resamples, Q budgets, M groups.

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np

import fit_laws as fl

# ---------------------------------------------------------------- parabolas and the envelope


def isoflop_budgets(runs):
    """Rows that share a budget, a list of index arrays: equal C within 2 %, five sizes or more.

    Three such budgets that hold half of the rows, or none: an ordinary grid has no slices.
    """
    order = np.argsort(runs.C, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(np.log(runs.C[order])) > 0.01) + 1)
    good = [p for p in parts if runs.C[p[-1]] < 1.02 * runs.C[p[0]] and len({*runs.N[p]}) >= 5]
    return good if len(good) >= 3 and 2 * sum(map(len, good)) >= len(order) else []


def parabola(x, L, weight):
    """The minimum of a parabola of L on x -> x and L there; NaN where it has none in the range."""
    u = x - x.mean()
    if len({*u[weight > 0]}) < 4:
        return np.nan, np.nan
    c2, c1, c0 = np.polyfit(u, L, 2, w=np.sqrt(weight))
    at = -c1 / (2 * c2)
    inside = c2 > 0 and u.min() < at < u.max()
    return (at + x.mean(), c0 + at * c1 / 2) if inside else (np.nan, np.nan)


def isoflop(runs, budgets, weight):
    """Approach 2: a parabola of L on ln N and on ln D at each budget -> exponents of the minima.

    weight (n,) says how often a resample drew each run.
    """
    lnC, lnN, lnD, L = np.transpose([
        [np.log(np.median(runs.C[rows])),
         parabola(np.log(runs.N[rows]), runs.L[rows], weight[rows])[0],
         *parabola(np.log(runs.D[rows]), runs.L[rows], weight[rows])] for rows in budgets])
    return exponents("isoflop", lnC, lnN, lnD, np.log(L))


def line_through(x, y):
    """Least squares over the pairs that are numbers -> slope, intercept; NaN under two."""
    use = np.isfinite(x + y)
    return fl.fit_line(x[use], y[use]) if use.sum() > 1 else (np.nan, np.nan)


def exponents(suffix, lnC, lnN, lnD, lnL):
    """Lines through optima (Q,): N ~ C^a, D = D0 C^b, L = K C^c, D ~ N^d -> {a_suffix: ..}."""
    (a, _), (b, lnD0), (c, lnK) = (line_through(lnC, y) for y in (lnN, lnD, lnL))
    found = {"a": a, "b": b, "c": c, "d": line_through(lnN, lnD)[0],
             "D0": np.exp(lnD0), "K": np.exp(lnK)}
    return {f"{k}_{suffix}": float(v) for k, v in found.items()}


def envelope(runs, cut, drawn):
    """Approach 1: lines along the hull of the runs `drawn` (n,) bool, from `cut` FLOPs on.

    The values of C lie in equal ratios here, and in equal steps (as in the paper) in fit_laws.
    """
    table = np.log([x[drawn] for x in (runs.C, runs.N, runs.D, runs.L)])
    x, *rest = table[:, list(fl.hull(table[0], table[3]))]
    lnC = np.linspace(max(np.log(cut), x[0]), x[-1], 200)
    if lnC[-1] <= lnC[0] + 1e-9:
        lnC = np.full(200, np.nan)
    return exponents("envelope", lnC, *(np.interp(lnC, x, y) for y in rest))


# ---------------------------------------------------------------- laws that share coefficients


def share_coefficients(problem, index, member):
    """p of group m (rows member == m) becomes column index[m, p] of a new Problem.

    -> it, its starts (K, P): the projected ones of every group, averaged where they share.
    """
    T, n, P = problem.design.shape
    design = np.zeros((T, n, index.max() + 1))
    for p in range(P):
        design[:, np.arange(n), index[member, p]] += problem.design[:, :, p]
    parts = [replace(problem, design=problem.design[:, member == m],
                     target=problem.target[member == m]) for m in range(len(index))]
    own = np.stack([fl.projected_starts(part) for part in parts], 1)  # (K, M, P)
    pick = np.zeros((index.size, index.max() + 1))
    pick[np.arange(index.size), index.ravel()] = 1
    starts = own.reshape(len(own), -1) @ (pick / pick.sum(0))  # (K, M * P) @
    return replace(problem, design=design), starts


def without_sizes(N):
    """(K, n) of 0 and 1: each row leaves out one size, or a twelfth of more than 12 sizes."""
    sizes = np.unique(N)
    parts = np.array_split(sizes, min(12, len(sizes)))
    return np.array([~np.isin(N, out) for out in parts], float)


def score_law(problem, starts, N):
    """Fit `problem` and weigh it against rivals on the same rows: its record, theta (P,).

    AIC is that of Laplace errors, to which Huber at 1e-3 comes near: 2 n ln(mean |r|) + 2 P.
    left_out_pct is the mean error of each size as predicted from the other sizes.
    """
    best, missed = fl.minimise(problem, fl.screen(problem, starts)), []
    for weight in without_sizes(N):
        other = fl.minimise(problem, [best.x], weight).x
        missed.extend(np.abs(fl.residual(other, problem)[0])[weight == 0])
    size, P = max(np.abs(fl.residual(best.x, problem)[0]).mean(), 1e-15), len(best.x)
    return {"coefficients": P, "objective": float(best.fun * problem.delta),
            "left_out_pct": float(100 * np.mean(missed)),
            "aic": float(2 * len(N) * np.log(size) + 2 * P)}, best.x


def coefficients(names, coef, draws):
    """{name: value, "ci": {name: interval}} of coef (P,) and K resamples; intercepts come as logs.
    """
    logs = [name in ("A", "B", "E", "C", "d") for name in names]
    one, many = (np.where(logs, np.exp(np.where(logs, x, 0)), x) for x in (coef, draws))
    return dict(zip(names, map(float, one))) | {
        "ci": {name: fl.interval(x) for name, x in zip(names, many.T)}}


def tied_law(runs, delta):
    """alpha = beta against both free: {"free": record, "tied": record with its E and exponent}."""
    problem, one = fl.build_problem(runs, delta), np.zeros(len(runs.N), int)
    free, _ = score_law(problem, fl.projected_starts(problem), runs.N)
    shared = share_coefficients(problem, np.array([[0, 1, 2, 3, 3]]), one)
    tied, theta = score_law(*shared, runs.N)
    tied |= {"E": float(np.exp(theta[2])), "exponent": float(theta[3])}
    return {"free": free, "tied": tied}


def joint_law(groups, clusters, args):
    """Groups with their own A, B, E and one alpha and beta (Table 3), against separate laws.

    groups: M Runs; clusters: their labels. The intervals come from at most 200 resamples.
    """
    all_runs = {k: np.concatenate([getattr(r, k) for r in groups]) for k in ("N", "D", "L")}
    M, member = len(groups), np.repeat(np.arange(len(groups)), [len(r.N) for r in groups])
    problem = fl.build_problem(SimpleNamespace(**all_runs), args.delta)
    shared = np.c_[np.arange(3 * M).reshape(M, 3), np.tile([3 * M, 3 * M + 1], (M, 1))]
    tied, starts = share_coefficients(problem, shared, member)
    record, theta = score_law(tied, starts, all_runs["N"])
    apart = share_coefficients(problem, np.arange(5 * M).reshape(M, 5), member)
    rivals = {"joint": record, "separate": score_law(*apart, all_runs["N"])[0]}
    cluster = np.array([f"{m} {c}" for m, own in enumerate(clusters) for c in own])
    weight = fl.draw_weights(cluster, min(args.bootstrap, 200), 0)
    draws = np.reshape([fl.minimise(tied, [theta], w).x for w in weight], (-1, len(theta)))
    laws = [coefficients(fl.NAMES, theta[i] @ problem.centring, draws[:, i] @ problem.centring)
            for i in shared]
    return {"groups": {r.name: law for r, law in zip(groups, laws)}, "rivals": rivals}


# ---------------------------------------------------------------- the law of sparsity (Table 12)

SPARSE = ("A", "B", "E", "C", "d", "alpha", "beta", "lambda", "delta", "gamma")
SLOPES = ((0, "N"), (1, "D"), (3, "active"), (4, "active"), (4, "N"))  # of their terms


def active_share(runs):
    """(n,) experts used / experts = 1 - sparsity; 1 without experts."""
    sparsity = np.array([fl.number(row.get("sparsity")) for row in runs.table])
    used = fl.positive(runs.table, "top_k") / fl.positive(runs.table, "n_experts")
    active = np.where(np.isfinite(sparsity), 1 - sparsity, used)
    return active if (active > 0).all() else np.ones(len(active))


def sparse_law(runs, active, weight, delta):
    """L(N, D, S) of Table 12 against a law without S and one for each S; None under three S.

    active (n,) = 1 - S; weight (K, n): at most 200 resamples are refitted, since each takes long.
    """
    levels, member = np.unique(active.round(6), return_inverse=True)
    if len(levels) < 3:
        return None
    plain = fl.build_problem(runs, delta)
    with_s = SimpleNamespace(N=runs.N, D=runs.D, L=runs.L, active=active)
    problem = fl.build_problem(with_s, delta, SLOPES, 5)
    grids = [(-0.4, -0.1, 0.1, 0.4) if v == "active" else np.geomspace(0.1, 1.2, 4)
             for _, v in SLOPES]
    record, theta = score_law(problem, fl.projected_starts(problem, *grids), runs.N)
    rivals = {"with S": record, "without": score_law(plain, fl.projected_starts(plain), runs.N)[0]}
    if np.bincount(member).min() >= 6:
        apart = np.arange(5 * len(levels)).reshape(-1, 5)
        rivals["separate"] = score_law(*share_coefficients(plain, apart, member), runs.N)[0]
    draws = np.reshape([fl.minimise(problem, [theta], w).x for w in weight[:200]], (-1, 10))
    error, condition = fl.precision(problem, theta)
    weak = error > 0.5 * np.r_[np.ones(5), np.abs(theta[5:])]  # half a slope; 0.5 in a logarithm
    return coefficients(SPARSE, theta @ problem.centring, draws @ problem.centring) | {
        "sparsities": (1 - levels[::-1]).tolist(), "rivals": rivals, "condition": condition,
        "not_identified": [name for name, w in zip(SPARSE, weak) if w]}


# ---------------------------------------------------------------- how far to trust the law


def sensitivity(runs, fit, delta):
    """How far the law moves: {change: {name: [lowest, highest]}} over deltas, sizes, worst rows."""
    problem = fl.build_problem(runs, delta)
    theta, worst = problem.theta(fit.coef), np.ones(len(runs.N))
    size = np.abs(fl.residual(theta, problem)[0])
    worst[np.argsort(size)[-max(1, len(worst) // 50):]] = 0

    def refit(weight, delta):
        return fl.minimise(replace(problem, delta=delta), [theta], weight).x

    found = {f"delta {d:g}": [refit(1.0, d)] for d in (delta / 10, delta * 10)}
    found["one size left out"] = [refit(weight, delta) for weight in without_sizes(runs.N)]
    found[f"worst {int((worst == 0).sum())} left out"] = [refit(worst, delta)]
    moved = {}
    for change, thetas in found.items():
        laws = [fl.derive(theta @ problem.centring) for theta in thetas]
        ends = {k: [law[k] for law in laws] for k in ("E", "alpha", "beta", "a")}
        moved[change] = {k: [float(min(v)), float(max(v))] for k, v in ends.items()}
    return moved


def profile(runs, fit, delta):
    """95 % profile intervals {name: (lo, hi)} of E, alpha, beta: fix one, refit the others.

    None: the end lies beyond ten times the value. The rise of F is turned into a chi square
    by the robust likelihood ratio with scale mean(psi^2) / mean(|r| < delta).
    """
    problem, intervals = fl.build_problem(runs, delta), {}
    theta = problem.theta(fit.coef)
    size = np.abs(fl.residual(theta, problem)[0])
    scale = (np.minimum(size, delta) ** 2).mean() / max((size <= delta).mean(), 0.02)
    least, factors = runs.L.min(), np.linspace(-1, 1, 61) ** 3 * np.log(10)  # dense near the fit
    middles = (np.clip(np.exp(theta[2]), 0.05 * least, 0.99 * least), *np.clip(theta[3:], 0.05, 2))
    for j, middle in enumerate(middles, 2):
        values, inside = middle * np.exp(factors), []
        for k, value in enumerate(values):
            start, bounds = theta.copy(), [(None, None)] * 5
            start[j] = np.log(value) if j == 2 else value
            bounds[j] = start[j], start[j]
            F = fl.minimise(problem, [start], bounds=bounds).fun * delta
            if F - fit.objective < 1.92 * max(scale, 1e-10):
                inside.append(k)
        lo, hi = (inside[0], inside[-1]) if inside else (0, 60)
        intervals[fl.NAMES[j]] = (float(values[lo]) if lo > 0 else None,
                                  float(values[hi]) if hi < 60 else None)
    return intervals


# ---------------------------------------------------------------- the paper's plan

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
            found = fl.optimum([*np.log([A, B, E]), alpha, beta], C)
            row |= {k: float(x) for k, x in zip(("N", "D", "loss"), found)}
            text = "N {N:.3g}, D {D:.3g}, loss by the law {loss:.4f}".format(**row)
        print(f"  {name:20} at {C:.3g}: frontier loss {K * C**c:.3f}; {text}")
        out.setdefault(name, []).append(row)
    return out


# ---------------------------------------------------------------- all of it for one group


def more(s, args):
    """What the tool adds to the record of a group of fit_laws.gather."""
    runs, fit, budgets = s.runs, s.fit, isoflop_budgets(s.runs)
    cut, one = s.record["cut"], np.ones(len(runs.N))

    def numbers(weight):
        found = envelope(runs, cut, weight > 0)
        return found | (isoflop(runs, budgets, weight) if budgets else {})

    values, many = numbers(one), [numbers(weight) for weight in s.weight]
    ci = {k: fl.interval(np.array([x[k] for x in many])) for k in values} if many else {}
    return values | {
        "ci": s.record["ci"] | ci, "isoflop_budgets": len(budgets),
        "sensitivity": sensitivity(runs, fit, args.delta), "tied": tied_law(runs, args.delta),
        "profile": profile(runs, fit, args.delta) if fit.unidentified else None,
        "sparse": sparse_law(runs, active_share(runs), s.weight, args.delta)}


def print_more(g):
    """The three approaches side by side, other laws on the same rows, how far the fit moves."""
    print(f"\n{g['name']}\n  {'approach':32}" + cells(("N ~ C^a", "D ~ C^b", "L ~ C^c"), 25))
    parabolas = f"2 parabolas, D = {g.get('D0_isoflop', 0):.3g} C^b"
    for how, suffix in ((f"1 envelope from {g['cut']:.1e} FLOPs", "_envelope"),
                        (parabolas, "_isoflop"), ("3 closed form, C = 6 N D", ""),
                        ("3 regression on budgets", "_regression"),
                        ("3 regression of N + N_vision", "_total")):
        keys = [k + suffix for k in ("abc" if suffix else "ab") if k + suffix in g]
        texts = [f"{g[k]:.4f} {fl.span(g['ci'].get(k))}" for k in keys]
        if texts:
            print("  " + how.ljust(32) + cells(texts, 25))
    print("  budgets with five sizes:", g["isoflop_budgets"] or "fewer than three, no parabolas")
    tied, sparse = g["tied"]["tied"], g["sparse"]
    print(f"  alpha = beta = {tied['exponent']:.4f} with E {tied['E']:.4f}: {against(g['tied'])}")
    if sparse:
        print("  L(N, D, S) = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma);"
              "\n  only the intervals of B, alpha and beta are reliable, the rest is too narrow:")
        texts = [f"{k} {sparse[k]:.4g}{'?' * (k in sparse['not_identified'])} "
                 f"{fl.span(sparse['ci'][k], '.3g')}" for k in SPARSE]
        print("  " + ", ".join(texts[:5]) + "\n  " + ", ".join(texts[5:]))
        print("  " + against(sparse["rivals"]))
    print("  " + "refitted with".ljust(32) + cells(("E", "alpha", "beta", "a"), 16))
    for change, moved in g["sensitivity"].items():
        ends = (f"{lo:.3f}" + f" to {hi:.3f}" * (hi > lo) for lo, hi in moved.values())
        print("  " + change.ljust(32) + cells(ends, 16))
    for name, ends in (g["profile"] or {}).items():
        lo, hi = ("?" if end is None else f"{end:.3f}" for end in ends)
        print(f"  95 % profile interval of {name}: [{lo}, {hi}]")


def cells(texts, width):
    """Texts in columns of one width."""
    return "".join(text.ljust(width) for text in texts)


def against(rivals):
    """Rivals of one set of rows as text: AIC above the lowest, error on sizes left out."""
    least = min(v["aic"] for v in rivals.values())
    return "; ".join(f"{k}: {v['coefficients']} coefficients, AIC +{v['aic'] - least:.1f}, "
                     f"sizes left out {v['left_out_pct']:.3f} % off" for k, v in rivals.items())


def joint(studies, args):
    """Groups that differ in their mixture only: print and return the laws that they share."""
    out, families = {}, {}
    for s in studies:
        mixture = str(s.runs.table[0].get("mixture"))
        family = " ".join(word for word in s.runs.name.split() if word != mixture) or "all"
        if mixture in s.runs.name.split():
            families.setdefault(family, []).append(s)
    for name, group in families.items():
        if len(group) < 2:
            continue
        out[name] = joint_law([s.runs for s in group], [s.cluster for s in group], args)
        print(f"\n{name}: one alpha and beta for all mixtures")
        for mixture, law in out[name]["groups"].items():
            print(f"  {mixture}: " + ", ".join(f"{k} {law[k]:.4g} {fl.span(law['ci'][k], '.4g')}"
                                               for k in ("E", "A", "B", "alpha", "beta")))
        print("  " + against(out[name]["rivals"]))
    return out


def main(argv=None):
    """Read, fit, print, write; returns what the JSON file holds."""
    args = fl.parse_args(argv, __doc__, ["--plan"])
    fl.check(args.path or args.plan, "give a run folder or a table, or --plan")
    fl.check(args.budget or not args.plan, "--plan needs --budget")
    result = {"paper": paper_plan(args.budget) if args.plan else None}
    if not args.path:
        return result
    notes, studies = fl.gather(args)
    result |= {"groups": [s.record | more(s, args) for s in studies], "notes": notes}
    print("\n".join(notes))
    for group in result["groups"]:
        print_more(group)
    result["joint"] = joint(studies, args)
    fl.write_json(args.json or args.out / "laws_more.json", result)
    return result


if __name__ == "__main__":
    main()
