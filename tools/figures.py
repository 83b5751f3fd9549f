"""Figures of what follows from the laws that fit_laws.py fits.

    python -m tools.figures runs/demo --out results

laws_more.png shows the best N, D and D/N for C FLOPs with 95 % bands, the bootstrap refits, the
frontier of each group above the first, and IsoFLOP curves where there are budgets of equal C.
residuals.png shows the errors of each law. A trend in them means that the law is wrong.
The other flags choose rows and groups as in fit_laws.py; see python fit_laws.py --help.
"""

# Dimensions: K bootstrap refits, Q values of C.

import numpy as np

from fit_laws import check, gather, optimum, parse_args, predict
from tools import need, save_figure
from tools.laws_more import isoflop_budgets, isoflop_minima
from train import make_folder


def human(x, _=None):
    """2.75e8 -> 275M, also as matplotlib's formatter of ticks."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if 0.9995 * scale <= x < 999.5 * scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}"


def plain_ticks(axis):
    """Label a log axis of less than two decades 2, 3, 5 rather than with powers of ten."""
    ticker = need("matplotlib.ticker", "matplotlib")
    low, high = axis.get_view_interval()
    if high < 100 * low:
        digits = (1, 1.5, 2, 3, 5, 7) if high < 12 * low else (1, 3)
        wide = high > 1.8 * low
        axis.set_major_locator(ticker.LogLocator(subs=digits) if wide else ticker.MaxNLocator(5))
        axis.set_major_formatter(human)
        axis.set_minor_formatter(ticker.NullFormatter())


def style(k, line=True):
    """Grey and line or marker of group k, so that groups differ without colour."""
    return {"color": ("0.1", "0.55", "0.3", "0.7")[k % 4], "mfc": "none", "ms": 4.5, "mew": 0.9,
            "ls": ("-", "--", "-.", ":")[k % 4] if line else "",
            "marker": "" if line else "o^sDvPX*"[k % 8]}


def draw_band(ax, C, curve, many, k, label):
    """The curve (Q,) of group k with the band that holds 95 % of many (K, Q)."""
    ax.plot(C, curve, label=label, **style(k))
    many = many[np.isfinite(many).all(1)]
    if len(many):
        low, high = np.percentile(many, [2.5, 97.5], axis=0)
        ax.fill_between(C, low, high, lw=0, alpha=0.2, color=style(k)["color"])


def draw_optima(panels, studies):
    """Best N, D and D/N against C in three panels, and the loss above the first group in a fourth.

    Markers are the minima of IsoFLOP parabolas.
    """
    low, high = (end(end(s.runs.C) for s in studies) for end in (min, max))
    C, first = np.geomspace(low / 3, high * 3, 30), None
    for k, s in enumerate(studies):
        coefs, name = [s.fit.coef, *s.draws[:400]], s.runs.name
        N, D, loss = np.moveaxis([optimum(coef, C, s.runs.vision) for coef in coefs], 1, 0)
        first = loss if first is None else first
        above = 100 * (loss / first - 1)  # (K + 1, Q), because the fit comes before its refits
        for ax, curves in zip(panels, (N, D, D / N, above)):
            draw_band(ax, C, curves[0], curves[1:], k, name)
        budgets = isoflop_budgets(s.runs)
        at, *best = isoflop_minima(s.runs, budgets, np.ones(len(s.runs.N)))
        for ax, y in zip(panels, (best[0], best[1], best[1] / best[0]) if budgets else ()):
            ax.plot(at, y, label=f"{name}, parabolas", **style(k, False))
    names = ("best N (parameters)", "best D (tokens)", "best D/N (tokens a parameter)",
             f"frontier above {studies[0].runs.name} (% of the loss)")
    for ax, name, scale in zip(panels, names, ("log", "log", "log", "linear")):
        ax.set(xscale="log", yscale=scale, xlabel="training FLOPs C", ylabel=name)
        if scale == "log":
            plain_ticks(ax.yaxis)


def draw_refits(ax, studies):
    """Bootstrap refits of alpha and beta as a cloud, and the fit itself as a large marker."""
    for k, s in enumerate(studies):
        small, large = {"ms": 2.5, "alpha": 0.5}, {"ms": 10, "mew": 2.5, "label": s.runs.name}
        ax.plot(*s.draws[:400, 3:].T, **style(k, False) | small)
        ax.plot(*s.fit.coef[3:], **style(k, False) | large)
    ax.set(xlabel=r"exponent $\alpha$ of N", ylabel=r"exponent $\beta$ of D",
           title="the fit (large) and its bootstrap refits")


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
    ax.set(xscale="log", xlabel="tokens D", ylabel="loss (nats)", title=f"{runs.name}: equal C")


def draw_laws(page, studies):
    """Everything of laws_more.png, in rows of at most three panels."""
    sliced = [(s.runs, isoflop_budgets(s.runs)) for s in studies]
    sliced = [(runs, budgets) for runs, budgets in sliced if budgets]
    several = len(studies) > 1
    parts = np.array_split(range(4 + several + len(sliced)), -(-(4 + several + len(sliced)) // 3))
    page.set_size_inches(13, 4 * len(parts))
    rows = page.subfigures(len(parts), 1, squeeze=False).ravel()
    panels = [ax for row, part in zip(rows, parts)
              for ax in row.subplots(1, len(part), squeeze=False).ravel()]
    draw_optima(panels[:3] + panels[4:4 + several], studies)
    draw_refits(panels[3], studies)
    for ax, (runs, budgets) in zip(panels[4 + several:], sliced):
        draw_slices(ax, runs, budgets)
    for ax in panels:
        ax.legend(fontsize=8, frameon=False)


def draw_residuals(page, studies):
    """Predicted against observed loss, and the errors against N, D and C."""
    page.set_size_inches(15, 4)
    panels = page.subplots(1, 4)
    low, high = (end(end(s.runs.L) for s in studies) for end in (min, max))
    panels[0].plot([low, high], [low, high], color="black", lw=0.8)
    for k, s in enumerate(studies):
        runs, dots = s.runs, style(k, False)
        predicted = predict(s.fit.coef, runs.N, runs.D)
        panels[0].plot(runs.L, predicted, label=runs.name, **dots)
        for ax, x in zip(panels[1:], (runs.N, runs.D, runs.C)):
            ax.plot(x, 100 * (runs.L / predicted - 1), **dots)
    panels[0].set(xlabel="observed loss (nats)", ylabel="predicted loss (nats)")
    panels[0].legend(fontsize=8, frameon=False)
    panels[1].set_ylabel("observed above the law (%)")
    for ax, name in zip(panels[1:], ("parameters N", "tokens D", "training FLOPs C")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel=name)
        plain_ticks(ax.xaxis)
        ax.sharey(panels[1])


def main(argv=None):
    """Fit, draw both figures, say where they are."""
    args = parse_args(argv, __doc__)
    check(not args.compare and not args.json, "--compare and --json belong to fit_laws.py")
    check(args.out, "name a folder for the figures with --out")
    figure = need("matplotlib.figure", "matplotlib")  # before the fit, which takes longer
    notes, studies = gather(args)
    print("\n".join(notes))
    make_folder(args.out)
    for name, draw in (("laws_more", draw_laws), ("residuals", draw_residuals)):
        page = figure.Figure(layout="constrained")
        page.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        draw(page, studies)
        save_figure(page, args.out / f"{name}.png", dpi=150)
        print(f"wrote {args.out / name}.png")


if __name__ == "__main__":
    main()
