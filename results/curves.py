"""Learning curves of finished or running runs, one panel a kind.

    python results/curves.py runs/real --out results/real_curves.png

Reads OUT/*/log.jsonl; validation losses are there when train.py was given --eval-every.
"""

import argparse
import json
from pathlib import Path

KINDS = ("caption", "interleaved", "text")


def read(folder):
    """{run: {kind: ([tokens], [loss])}} of all runs in a folder."""
    curves = {}
    for path in sorted(Path(folder).glob("*/log.jsonl")):
        config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        measured = [line for line in lines if "val_loss" in line]
        tokens = [(line["step"] + 1) * config["train"]["tokens_per_step"] for line in measured]
        curves[path.parent.name] = {
            kind: (tokens, [line[f"val_loss_{kind}"] for line in measured])
            for kind in KINDS if measured and f"val_loss_{kind}" in measured[0]}
    return {run: kinds for run, kinds in curves.items() if kinds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    curves = read(args.folder)
    if not curves:
        raise SystemExit(f"{args.folder}: no validation losses in */log.jsonl; train with "
                         "--eval-every")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    for panel, kind in zip(panels, KINDS):
        styles = ("-", "--", "-.", ":")
        for i, (run, kinds) in enumerate(curves.items()):
            if kind in kinds:
                tokens, loss = kinds[kind]
                panel.plot([n / 1e6 for n in tokens], loss, styles[i % 4], label=run, linewidth=1.6)
        panel.set(title=kind, xlabel="training tokens (millions)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats a token)")
    panels[0].legend(fontsize=8)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
