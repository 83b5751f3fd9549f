"""More figures of fitted laws: residuals, best models with their bands, resamples, parabolas.

    python -m tools.figures runs/demo --out FOLDER     the flags are those of fit_laws.py

writes laws_more.png. No trend in the residuals means a good law.
"""

import numpy as np

import fit_laws as fl
from tools import need
from tools.laws_more import isoflop_budgets


def style(k, line=True):
    """Grey and line or marker of the k-th group, which tell groups apart without colour."""
    return {"color": ("0.1", "0.55", "0.3", "0.7")[k % 4], "mfc": "none", "ms": 4.5,
            "ls": ("-", "--", "-.", ":")[k % 4] if line else "",
            "marker": "" if line else "o^sDvPX*"[k % 8]}


def draw_residuals(axes, studies):
    """Predicted against observed loss; residuals against N, D and C, with the spread of seeds."""
    for k, s in enumerate(studies):
        r, law = s.runs, fl.predict(s.fit.coef, s.runs.N, s.runs.D)
        axes[0].plot(r.L, law, label=r.name, **style(k, False))
        axes[0].plot(r.L, r.L, color="black", lw=0.5)
        for ax, x in zip(axes[1:], (r.N, r.D, r.C)):
            ax.plot(x, 100 * (r.L / law - 1), **style(k, False))
        _, cells = np.unique([r.N, r.D], axis=1, return_inverse=True)
        mean = np.bincount(cells.ravel(), np.log(r.L)) / np.bincount(cells.ravel())
        repeats = len(r.L) - len(mean)
        if repeats:
            noise = np.sqrt(((np.log(r.L) - mean[cells.ravel()]) ** 2).sum() / repeats)
            axes[1].axhspan(-100 * noise, 100 * noise, alpha=0.1, color=style(k)["color"])
    axes[0].set(xlabel="observed loss", ylabel="predicted loss")
    for ax, x in zip(axes[1:], ("parameters N", "tokens D", "training FLOPs C")):
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", xlabel=x, ylabel="observed above the law (%)")


def draw_optima(axes, studies):
    """Best N, D and D/N against C with 95 % bands; loss above the first group; resamples."""
    ends = [f(f(s.runs.C) for s in studies) for f in (min, max)]
    C, losses = np.geomspace(ends[0] / 3, ends[1] * 3, 30), []
    for k, s in enumerate(studies):
        laws = [s.fit.coef, *s.draws[:400]]
        N, D, loss = np.moveaxis([fl.optimum(coef, C, s.runs.vision) for coef in laws], 1, 0)
        losses.append(loss)  # (1 + K, Q), the fit first
        rows = min(len(loss), len(losses[0]))
        above = 100 * (loss[:rows] / losses[0][:rows] - 1)
        for ax, y in zip(axes, (N, D, D / N, above)):
            ax.plot(C, y[0], label=s.runs.name, **style(k))
            ax.fill_between(C, *np.nanpercentile(y, [2.5, 97.5], axis=0), lw=0, alpha=0.2,
                            color=style(k)["color"])
        axes[4].plot(*s.draws[:400, 3:].T, **style(k, False) | {"ms": 2.5, "alpha": 0.5})
        axes[4].plot(*s.fit.coef[3:], **style(k, False) | {"ms": 9, "label": s.runs.name})
    names = ("best N", "best D", "best D/N", f"frontier loss above {studies[0].runs.name} (%)")
    for k, (ax, name) in enumerate(zip(axes, names)):
        ax.set(xscale="log", yscale="log" if k < 3 else "linear", xlabel="training FLOPs C",
               ylabel=name)
    axes[4].set(xlabel=r"$\alpha$", ylabel=r"$\beta$", title="resamples")


def draw_parabolas(ax, s):
    """The runs of each budget, their parabola over ln D, and its minimum."""
    for rows in isoflop_budgets(s.runs):
        x, L = np.log(s.runs.D[rows]), s.runs.L[rows]
        p, fine = np.polyfit(x, L, 2), np.linspace(x.min(), x.max(), 50)
        dots, = ax.plot(np.exp(x), L, "o", ms=3, label=f"C = {np.median(s.runs.C[rows]):.1e}")
        ax.plot(np.exp(fine), np.polyval(p, fine), lw=1, color=dots.get_color())
        ax.plot(np.exp(-p[1] / (2 * p[0])), np.polyval(p, -p[1] / (2 * p[0])), "kx", ms=6)
    ax.set(xscale="log", xlabel="tokens D", ylabel="loss", title=f"{s.runs.name}: equal FLOPs")


def main(argv=None):
    """Fit the groups and draw laws_more.png."""
    figure = need("matplotlib.figure", "matplotlib")
    args = fl.parse_args(argv, __doc__)
    _, studies = fl.gather(args)
    sliced = [s for s in studies if isoflop_budgets(s.runs)]
    rows = -(-(9 + len(sliced)) // 4)
    page = figure.Figure(figsize=(16, 3.8 * rows), layout="constrained")
    axes = page.subplots(rows, 4).ravel()
    draw_residuals(axes[:4], studies)
    draw_optima(axes[4:9], studies)
    for ax, s in zip(axes[9:], sliced):
        draw_parabolas(ax, s)
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, frameon=False)
        if not ax.has_data():
            ax.axis("off")
    args.out.mkdir(parents=True, exist_ok=True)
    page.savefig(args.out / "laws_more.png", dpi=100)


if __name__ == "__main__":
    main()
