"""Draw the learning curves of finished or running runs, one panel for each kind of document.

    python -m tools.curves runs/real runs/moe/RUN --over flops --out curves.png

Takes any number of studies and of runs. Reads their log.jsonl, where train.py writes validation
losses if it is given --eval-every. FLOPs and seconds a token come from a run's row in results.jsonl
(C / D and 1 / tok_per_s), so a run that has not ended is only drawn over tokens.
"""
import functools
import json
from pathlib import Path

from data import check
from fit_laws import json_row
from tools import human, panels, save, style
from tools.table import varying, words
from train import HOW, Parser, finished
from world import KINDS, QUESTIONS

AXES = {"tokens": "training tokens", "flops": "training FLOPs (1B = 1e9)",
        "seconds": "seconds of training"}


def read(folders, over="tokens"):
    """-> {run in words: (spent, lines)}: the lines of its log that hold validation losses, and the
    tokens, FLOPs or seconds spent at each line. Also -> the unit of losses, "byte" or "token"."""
    curves, settings, rows_of = [], [], functools.cache(finished)  # read once for each study
    for log in (log for folder in map(Path, folders)
                for log in sorted([*folder.glob("log.jsonl"), *folder.glob("*/log.jsonl")])):
        config = json.loads((log.parent / "config.json").read_text(encoding="utf-8"))
        lines = map(json_row, log.read_text("utf-8", "replace").splitlines())
        lines = [line for line in lines if "val_loss" in line]
        row = rows_of(log.parent.parent).get(log.parent.name)
        if over != "tokens" and not (row and row["tok_per_s"]):  # 0 after a single step
            print(f"{log.parent} is left out: it has not ended, so its {over} are not known")
        elif lines:
            cost = {"tokens": lambda row: 1, "flops": lambda row: row["C"] / row["D"],
                    "seconds": lambda row: 1 / row["tok_per_s"]}[over](row)
            step = cost * config["train"]["tokens_per_step"]
            curves.append(([(line["step"] + 1) * step for line in lines], lines))
            known = [item for part in config.values() for item in part.items()]
            settings.append(dict(sorted(known, key=lambda item: item[0] in HOW)))
    unit = "byte" if all(row["tokenizer"] == "bytes" for row in settings) else "token"
    return dict(zip(names(settings), curves)), unit


def names(settings):
    """What tells each run from the others, in words."""
    several = ["seed"] * (len({row["seed"] for row in settings}) > 1)
    told = varying(settings, ["fusion", "moe", "width", *several])
    return [words({field: row.get(field) for field in told}) for row in settings]


def draw(curves, over, unit, out):
    measured = {name for _, lines in curves.values() for name in lines[0]}
    kinds = [kind for kind in KINDS + QUESTIONS if f"val_loss_{kind}" in measured]
    page, axes = panels(len(kinds))
    for panel, kind in zip(axes, kinds):
        for k, (run, (spent, lines)) in enumerate(curves.items()):
            losses = [line.get(f"val_loss_{kind}") for line in lines]
            panel.plot(spent, losses, label=run, markevery=len(spent) // 4 + 1, **style(k))
        panel.set_title(kind, fontsize=10)
        panel.set_xlabel(AXES[over])
        panel.xaxis.set_major_formatter(human)
        panel.locator_params(axis="x", nbins=4)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"loss (nats a {unit})")
    page.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8,
                ncols=2)
    save(page, out)


def main(argv=None):
    parser = Parser(prog="python -m tools.curves", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="studies (the --out of train.py) or runs")
    parser.add_argument("--over", choices=AXES, default="tokens")
    parser.add_argument("--out", default="curves.png", help="file of the figure")
    args = parser.parse_args(argv)
    curves, unit = read(args.folders, args.over)
    check(curves, f"{', '.join(args.folders)}: no validation losses in log.jsonl; train with "
          "--eval-every")
    draw(curves, args.over, unit, args.out)


if __name__ == "__main__":
    main()
