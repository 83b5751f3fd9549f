"""Figures of what follows from the laws that fit_laws.py fits.

    python -m tools.figures runs/demo --out results

laws_more.png shows the best N, D and D/N for C FLOPs with 95 % bands, the bootstrap refits, how far
the frontier of each group lies above that of the first, and IsoFLOP curves of budgets of equal C.
residuals.png shows the errors of each law. A trend in them means that the law is wrong.
The other flags choose rows and groups as in fit_laws.py; see python fit_laws.py --help.
"""

# Dimensions: K bootstrap refits, Q values of C.

import numpy as np

from fit_laws import RIDGE, check, gather, optimum, parse_args, predict
from tools import human, make_folder, need, panels, save, style
from tools.laws_more import isoflop_budgets, isoflop_minima


def plain_ticks(axis, values=()):
    """Label a log axis 500K, 1M, ... at the values if they are few, and else at 1, 3, 10, ..."""
    ticker = need("matplotlib.ticker", "matplotlib")
    low, high = axis.get_view_interval()
    if 1 < len(values) < 8:
        axis.set_major_locator(ticker.FixedLocator(values))
    elif high < 100 * low:
        digits = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 3)
        wide = high > 1.8 * low
        axis.set_major_locator(ticker.LogLocator(subs=digits) if wide else ticker.MaxNLocator(5))
    axis.set_major_formatter(human)
    axis.set_minor_formatter("")


def draw_band(ax, C, curve, many, k, s):
    """The curve (Q,) of study s, dashed beyond its runs, and 95 % of `many` (K, Q) as a band."""
    look, seen = style(k) | {"ls": "-", "lw": 1.8}, (C >= s.runs.C.min()) & (C <= s.runs.C.max())
    ax.plot(C, curve, **look | {"ls": "--", "marker": ""})
    ax.plot(C[seen], curve[seen], label=s.runs.name, markevery=9, **look)
    many = many[np.isfinite(many).all(1)]
    if len(many):
        low, high = np.percentile(many, [2.5, 97.5], axis=0)
        ax.fill_between(C, low, high, lw=0, alpha=0.15, color=look["color"])


def draw_optima(panels, studies):
    """Best N, D and D/N against C in three panels, and the loss above the first group in a fourth.

    Markers are the minima of IsoFLOP parabolas.
    """
    low, high = (end(end(s.runs.C) for s in studies) for end in (min, max))
    C, first = np.geomspace(low / 3, high * 3, 30), None
    for k, s in enumerate(studies):
        coefs = [s.fit.coef, *s.draws[:400]]
        found = np.array([optimum(coef, C, s.runs.vision) for coef in coefs])
        if s.fit.condition > RIDGE:
            found *= np.nan
        N, D, loss = np.moveaxis(found, 1, 0)
        first = loss if first is None else first
        above = 100 * (loss / first - 1)  # (K + 1, Q), because the fit comes before its refits
        for ax, curves in zip(panels, (N, D, D / N, above)):
            draw_band(ax, C, curves[0], curves[1:], k, s)
        budgets = isoflop_budgets(s.runs)
        at, *best = isoflop_minima(s.runs, budgets, np.ones(len(s.runs.N)))
        for ax, y in zip(panels, (best[0], best[1], best[1] / best[0]) if budgets else ()):
            ax.plot(at, y, label=f"{s.runs.name}, parabolas", **style(k, False))
    names = ("best N (parameters)", "best D (tokens)", "best D/N (tokens a parameter)",
             f"loss above {studies[0].runs.name} (%)")
    for ax, name, scale in zip(panels, names, ("log", "log", "log", "linear")):
        ax.set(xscale="log", yscale=scale, xlabel="training FLOPs", ylabel=name)
        if scale == "log":
            plain_ticks(ax.yaxis)


def draw_refits(ax, studies):
    """Bootstrap refits of alpha and beta as a cloud, and the fit itself as a large marker."""
    for k, s in enumerate(studies):
        small, large = {"ms": 2.5, "alpha": 0.5}, {"ms": 12, "mec": "white", "zorder": 3}
        look = style(k, False)
        ax.plot(*s.draws[:400, 3:].T, **look | small)
        ax.plot(*s.fit.coef[3:], **look | large | {"mfc": look["color"]})
    ax.set(xlabel=r"exponent $\alpha$ of N (large: the fit; small: its refits)",
           ylabel=r"exponent $\beta$ of D")


def draw_slices(ax, runs, budgets):
    """IsoFLOP curves: the runs of each budget, their parabola over ln D, and its minimum."""
    colours = need("matplotlib", "matplotlib").colormaps["viridis"]
    minima = isoflop_minima(runs, budgets, np.ones(len(runs.N)))
    for rows, C, colour in zip(budgets, minima[0], colours(np.linspace(0, 0.9, len(budgets)))):
        x, L = np.log(runs.D[rows]), runs.L[rows]
        fine = np.linspace(x.min(), x.max(), 50)
        parabola = np.polyval(np.polyfit(x, L, 2), fine)
        ax.plot(np.exp(x), L, "o", ms=3, color=colour)
        ax.plot(np.exp(fine), parabola, lw=1, color=colour, label=f"C = {C:.1e}")
    ax.plot(minima[2], minima[3], "kx", ms=6, label="minimum")
    ax.set(xscale="log", xlabel="tokens D", ylabel=f"loss ({runs.unit})")
    ax.set_title(f"{runs.name}: equal C", fontsize=10)
    plain_ticks(ax.xaxis)


def draw_laws(studies):
    """Everything of laws_more.png, in rows of at most three panels."""
    sliced = [(s.runs, isoflop_budgets(s.runs)) for s in studies]
    sliced = [(runs, budgets) for runs, budgets in sliced if budgets]
    several = len(studies) > 1
    page, axes = panels(4 + several + len(sliced))
    draw_optima(axes[:3] + axes[4:4 + several], studies)
    draw_refits(axes[3], studies)
    for ax, (runs, budgets) in zip(axes[4 + several:], sliced):
        draw_slices(ax, runs, budgets)
        ax.legend(fontsize=8)
    axes[4 if several else 1].legend(fontsize=8, title="band: 95 % of refits\ndashed: no runs",
                                     title_fontsize=8)
    return page


def draw_residuals(studies):
    """Predicted against observed loss, and the errors against N, D and C."""
    page, axes = panels(4)
    low, high = (end(end(s.runs.L) for s in studies) for end in (min, max))
    axes[0].plot([low, high], [low, high], color="black", lw=0.8)
    for k, s in enumerate(studies):
        runs, dots = s.runs, style(k, False)
        predicted = predict(s.fit.coef, runs.N, runs.D)
        axes[0].plot(runs.L, predicted, label=s.runs.name, **dots)
        for ax, x in zip(axes[1:], (runs.N, runs.D, runs.C)):
            ax.plot(x, 100 * (runs.L / predicted - 1), **dots)
    unit = studies[0].runs.unit
    axes[0].set(xlabel=f"observed loss ({unit})", ylabel=f"predicted loss ({unit})")
    axes[0].legend(fontsize=8)
    axes[1].set_ylabel("observed above the law (%)")
    for ax, key, name in zip(axes[1:], "NDC", ("parameters N", "tokens D", "training FLOPs C")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel=name)
        ax.sharey(axes[1])
        if key != "C":
            values = np.unique(np.concatenate([getattr(s.runs, key) for s in studies]))
            plain_ticks(ax.xaxis, values)
    return page


def main(argv=None):
    """Fit, draw both figures, say where they are."""
    args = parse_args(argv, __doc__)
    check(not args.compare and not args.json, "--compare and --json belong to fit_laws.py")
    check(args.out, "name a folder for the figures with --out")
    need("matplotlib", "matplotlib")  # before the fit, which takes longer
    notes, studies = gather(args)
    print("\n".join(notes))
    make_folder(args.out)
    for name, draw in (("laws_more", draw_laws), ("residuals", draw_residuals)):
        save(draw(studies), args.out / f"{name}.png")


if __name__ == "__main__":
    main()
