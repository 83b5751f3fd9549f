"""Draw the learning curves of finished or running runs, one panel for each kind of document.

    python -m tools.curves runs/real --out results/real_curves.png

Reads OUT/*/log.jsonl, where train.py writes validation losses if it is given --eval-every.
"""
import json
from pathlib import Path

from data import check
from tools import need, save_figure
from train import Parser
from world import KINDS, QUESTIONS


def read(folder):
    """{run: (tokens, lines)} of all runs in a folder: the lines of the log that hold validation
    losses, and the tokens trained on at each."""
    curves = {}
    for path in sorted(Path(folder).glob("*/log.jsonl")):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        lines = [line for line in lines if "val_loss" in line]
        tokens = [(line["step"] + 1) * config["train"]["tokens_per_step"] for line in lines]
        if lines:
            curves[path.parent.name] = tokens, lines
    return curves


def draw(curves, out):
    need("matplotlib", "matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    measured = {name for _, lines in curves.values() for name in lines[0]}
    kinds = [kind for kind in KINDS + QUESTIONS if f"val_loss_{kind}" in measured]
    figure, panels = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.8), squeeze=False,
                                  constrained_layout=True)
    for panel, kind in zip(panels[0], kinds):
        for i, (run, (tokens, lines)) in enumerate(curves.items()):
            losses = [line.get(f"val_loss_{kind}") for line in lines]
            style = ("-", "--", "-.", ":")[i % 4]
            panel.plot([n / 1e6 for n in tokens], losses, style, label=run, linewidth=1.6)
        panel.set(title=kind, xlabel="training tokens (millions)")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation loss (nats a token)")
    panels[0][0].legend(fontsize=8)
    save_figure(figure, out, dpi=130)
    print(f"wrote {out}")


def main(argv=None):
    parser = Parser(prog="python -m tools.curves", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a study: the --out of train.py")
    parser.add_argument("--out", default="curves.png", help="file of the figure")
    args = parser.parse_args(argv)
    curves = read(args.folder)
    check(curves, f"{args.folder}: no validation losses in */log.jsonl; train with --eval-every")
    draw(curves, args.out)


if __name__ == "__main__":
    main()
