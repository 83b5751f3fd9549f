"""One number that a user can act on: how much compute one family of models saves over another.

    python -m tools.multiplier results/laptop_study.jsonl --compare "early learned" early

At each of three budgets C (or those of --budget) it asks which loss the first group's best model
reaches, and how many FLOPs the second group's best model needs for the same loss. These FLOPs over
C are the compute multiplier: 2 means that the second group has to spend twice as much. Both
laws are fitted with E held at the true floor, which only the procedural world knows, because a free
E decides the answer where the frontier flattens. The other flags are those of fit_laws.py.
"""
# Dimensions: n rows (runs), K resamples.
from argparse import Namespace

import numpy as np
from scipy.optimize import brentq

from fit_laws import (RIDGE, build_problem, check, draw_weights, gather, interval, minimise,
                      optimum, parse_args, projected_starts, screen, span)
from tools import end_with_the_pipe


def fit_above_floor(runs, weights):
    """Runs, resamples (K,n) -> coef (5,) and (K,5) of laws whose E is the true floor."""
    check(runs.floor > 0, f"{runs.name}: no true floor in the table; only the procedural world "
          "knows it")
    problem = build_problem(runs)
    bounds = [(None, None)] * 5
    bounds[2] = (np.log(runs.floor),) * 2
    starts = projected_starts(problem)
    starts[:, 2] = bounds[2][0]
    best = minimise(problem, screen(problem, starts), bounds=bounds).x
    draws = [minimise(problem, [best], weight, bounds).x for weight in weights]
    return best @ problem.centring, np.reshape(draws, (-1, 5)) @ problem.centring


def multiplier(one, two, C, visions):
    """coef (5,) of two laws -> the FLOPs, over C, that the frontier of the second law needs for the
    loss that the first law's frontier reaches at C; NaN if no such FLOPs are found."""
    goal = optimum(one, C, visions[0])[2]

    def gap(log_ratio):
        return optimum(two, C * np.exp(log_ratio), visions[1])[2] - goal
    if not np.isfinite(goal) or not gap(-12) > 0 > gap(12):
        return np.nan
    return np.exp(brentq(gap, -12, 12))


def print_multipliers(studies, args):
    """A line for each budget, with its 95 % interval over resamples of the trunks. It says where a
    budget lies outside the runs of one of the two groups."""
    found = {s.runs.name: s for s in studies}
    pair = [found[name] for name in args.compare]
    check(max(s.fit.condition for s in pair) <= RIDGE,
          "a group lies on a ridge: it has no best model")
    visions = [s.runs.vision for s in pair]
    laws = [fit_above_floor(s.runs, draw_weights(s.runs, args.bootstrap, [1, i]))
            for i, s in enumerate(pair)]
    least, high = max(s.runs.C.min() for s in pair), min(s.runs.C.max() for s in pair)
    low = max(s.runs.C.min() ** 0.5 * s.runs.C.max() ** 0.5 for s in pair)
    one, two = args.compare
    print(f"\ncompute that {two} needs to reach the loss of {one}, over that of {one}")
    for C in args.budget or np.geomspace(low, high, 3):
        value = multiplier(laws[0][0], laws[1][0], C, visions)
        draws = [multiplier(a, b, C, visions) for a, b in zip(laws[0][1], laws[1][1])]
        print(f"  at {C:.2g} FLOPs: {value:.2f} {span(interval(np.array(draws)), '.2f')}"
              + ", outside the range" * (not least <= C <= high * (1 + 1e-9)))


def main(argv=None):
    args = parse_args(argv, __doc__)
    check(args.compare, "name two groups with --compare")
    check(not args.json, "--json belongs to fit_laws.py")
    notes, studies = gather(Namespace(**vars(args) | {"bootstrap": 0}))  # its refits have a free E
    print("\n".join(notes))
    print_multipliers(studies, args)


if __name__ == "__main__":
    end_with_the_pipe()
    main()
