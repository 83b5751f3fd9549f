"""A study as a markdown table: one line for each configuration, its seeds pooled.

    python -m tools.table runs/moe --by moe,experts,top_k --against moe=none
    python -m tools.table runs/shares --by fusion --plot caption_share --out shares.png
    python -m tools.table runs/demo --by width,moe --against moe=none --plot tokens_per_parameter
    python -m tools.table runs/before runs/after --by study,width --against study=before

Reads OUT/results.jsonl of train.py, or any file of such rows, as tools.score writes. ± is the
standard deviation over seeds. The last column is the difference from another line with its 95 %
t-interval, for losses in per cent of the other line. Runs are paired by seed, because two runs of a
seed may share noise (in ours they share little). If no seed is shared, the interval is Welch's.
With --against, --plot draws these differences of pairs in per cent of the other line.
"""
import re
from difflib import get_close_matches
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from scipy import stats

from data import DataConfig, check
from fit_laws import json_row, select
from tools import end_with_the_pipe, human, markdown, panels, save, style
from train import Parser
from world import KINDS

MEASURED = re.compile(r"(loss|floor|accuracy|cider|facts|peak|wall|tok_per|mfu)\w*|N(_\w+)?|C"
                      r"|D_vision|padding|tokens_per_parameter|\w+_share|n_scored|run|seed|device"
                      r"|world_size|torch|git|status")


def read(paths):
    """The rows of all files. Each has a study, which the row itself names, or else the folder of
    its file. If a file has a run twice in one study, the last row counts."""
    rows = {}
    for path in map(Path, paths):
        path = path / "results.jsonl" if path.is_dir() else path
        check(path.is_file(), f"{path} does not exist: name folders that train.py wrote to (--out)")
        for row in map(json_row, path.read_text("utf-8", "replace").splitlines()):
            if "run" in row:  # a line without it is broken, as when a disk was full
                study = row.setdefault("study", path.resolve().parent.name)
                rows[path, study, row["run"], row.get("scored")] = row
    check(rows, f"{', '.join(paths)}: no run has ended yet")
    for row in rows.values():
        if "mixture" in row:
            shares = DataConfig(mixture=row["mixture"]).shares
            row |= {f"{kind}_share": shares.get(kind, 0) for kind in KINDS}
        row["experts"] = row.get("n_experts")  # as the flag is called
        if "steps" in row:  # the D of a diverged run is where it ended
            row["D"] = row["steps"] * row["tokens_per_step"]
        if row.get("N") and row.get("D"):
            row["tokens_per_parameter"] = float(f"{row['D'] / row['N']:.3g}")
    return list(rows.values())


def varying(rows, given=()):
    """The given fields and all others that tell the rows apart. If the fields before it determine a
    field, as the width determines the learning rate, we leave it out, because it would add a column
    but no line. Fields that rows of older code lack come last."""
    fields = list(given)
    known = dict.fromkeys(chain(*rows))
    for field in sorted(known, key=lambda field: not all(field in row for row in rows)):
        lines, more = (len({tuple(row.get(f) for f in some) for row in rows})
                       for some in (fields, [*fields, field]))
        if more > lines and not MEASURED.fullmatch(field):
            fields.append(field)
    return fields


def group(rows, fields):
    """{values of the fields: {seed: row}}; words as they first appear, then numbers in order."""
    lines = {}
    for row in rows:
        seeds = lines.setdefault(tuple(row.get(field) for field in fields), {})
        seeds.setdefault(row.get("seed"), []).append(row)
    twins = [same for seeds in lines.values() for same in seeds.values() if len(same) > 1]
    if twins:  # they would pass for several seeds
        more = dict.fromkeys(chain(*map(varying, twins)))
        remedy = f"give --by {','.join([*fields, *more])}" if more else "remove one of them"
        raise SystemExit(f"{twins[0][0]['run']} and {twins[0][1]['run']} would be one line and "
                         f"one seed: {remedy}")
    groups = {key: {seed: row for seed, (row,) in seeds.items()} for key, seeds in lines.items()}
    places = [*enumerate(chain(*groups))]
    first = {value: place for place, value in reversed(places)}
    return dict(sorted(groups.items(), key=lambda item: [
        (True, value) if isinstance(value, (int, float)) else (False, first[value])
        for value in item[0]]))  # never a word at the place of a number, which would split a line


def measured(seeds, metric):
    """{seed: value}, without the runs that diverged."""
    return {seed: row[metric] for seed, row in seeds.items() if row.get(metric) is not None}


def mean_sd(values):
    return np.mean(values), np.std(values, ddof=min(len(values) - 1, 1))


def pooled(values):
    """Numbers, one a seed -> a cell of the table."""
    if len(values) > 1:
        return "{:.4f} ± {:.4f}".format(*mean_sd(values))
    return f"{values[0]:.4f}" if values else "—"


def difference(these, those, percent):
    """{seed: value} of a line and of its reference -> what the last column says, in per cent of the
    reference or as it is."""
    shared = sorted(these.keys() & those.keys())
    if len(shared) == 1 and len(these) + len(those) > 2:
        shared = []  # a single pair would stand beside means of other runs
    a, b = (np.array([values[seed] for seed in shared or values]) for values in (these, those))
    if min(len(a), len(b)) < 2 and not len(a) == len(b) == 1:
        return "—"
    form = "+.1f" if percent else "+.4f"
    unit = 100 / (b if shared else b.mean()) if percent else 1
    a, b = a * unit, b * unit
    if len(a) == 1:
        return f"{a[0] - b[0]:{form}} [—]"
    test = stats.ttest_rel(a, b) if shared else stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(0.95)
    welch = "" if shared else " Welch"
    return f"{a.mean() - b.mean():{form}} [{low:{form}}, {high:{form}}]{welch}"


def most_like(groups, key, lines):
    """The line that has most in common with this one, if possible one of the same budget."""
    def likeness(other):
        budgets = {next(iter(groups[line].values())).get("D") for line in (key, other)}
        return len(budgets) == 1, sum(a == b for a, b in zip(other, key))
    return max(lines, key=likeness)


def drawn(groups, key, metric, against):
    """The numbers to draw for a line, one for each seed: the metric, or its difference in per cent
    from the line most like this one, for the seeds that both have."""
    values = measured(groups[key], metric)
    if not against:
        return [*values.values()]
    others = measured(groups[most_like(groups, key, against)], metric)
    return [100 * (values[seed] / others[seed] - 1) for seed in values.keys() & others.keys()
            if others[seed]]


def table(groups, fields, metrics, against):
    """Rows of cells. Each line is compared with the one of the lines `against` most like it."""
    rows = [row for seeds in groups.values() for row in seeds.values()]
    sizes = ["N", "N_vision", "D"] if any(row.get("N_vision") for row in rows) else ["N", "D"]
    shown = [field for field in fields if field != "D"]  # D is among the sizes
    percent = metrics[0].startswith("loss")
    yield [*shown, "n", *sizes, *metrics, "tokens/s", f"Δ {metrics[0]}" + ", %" * percent]
    for key, seeds in groups.items():
        row, losses = next(iter(seeds.values())), measured(seeds, metrics[0])
        bad = sum(row.get("status", "ok") != "ok" for row in seeds.values())
        speed = [row["tok_per_s"] for row in seeds.values() if row.get("tok_per_s")]
        like = most_like(groups, key, against)
        yield [*(str(row.get(field, "—")) for field in shown),
               f"{len(seeds) - bad}" + (f" (+ {bad} diverged)" if bad else ""),
               *(f"{row.get(size, 0):,}" for size in sizes),
               *(pooled([*measured(seeds, metric).values()]) for metric in metrics),
               f"{np.mean(speed or 0):,.0f}",  # 0 after a single step, as of a run that diverged
               "reference" if like == key else
               difference(losses, measured(groups[like], metrics[0]), percent)]


def plot(groups, fields, metrics, against, label, out):
    """Draw mean and standard deviation over seeds against the last field: a panel for each metric,
    a line for each value of the other fields. The lines of --against are not drawn."""
    page, axes = panels(len(metrics))
    shown, values = [key for key in groups if key not in against], {key[-1] for key in groups}
    tells = [i for i in range(len(fields) - 1) if len({key[i] for key in shown}) > 1]
    for panel, metric in zip(axes, metrics):
        lines = groupby(shown, lambda key: key[:-1])
        for k, (line, keys) in enumerate(lines):
            points = [(key[-1], drawn(groups, key, metric, against)) for key in keys]
            points = [(x, *mean_sd(values)) for x, values in points if values]
            panel.errorbar(*np.reshape(points, (-1, 3)).T, capsize=3, **style(k),
                           label=words({fields[i]: line[i] for i in tells}))
        panel.set_title(f"{metric} (± over seeds)".replace("_", " "), fontsize=10)
        panel.set_xlabel(fields[-1].replace("_share", " (% of the rows)").replace("_", " "))
        panel.set_ylabel(label if against or metric.startswith("loss") else "")
        if against:
            panel.axhline(0, color="black", lw=0.8)
        if 0 < min(values) <= max(values) / 8:
            panel.set_xscale("log")
        if len(values) < 9:
            panel.set_xticks(sorted(values))
        panel.xaxis.set_major_formatter(human)
        panel.xaxis.set_minor_formatter("")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(page, out)


def words(known):
    """A line's name in the legend, "early fusion, 8 experts" rather than the names of flags."""
    text = {"fusion": "{} fusion", "experts": "{} experts", "moe": "{} mixture of experts"}
    if known.get("moe") == "none":
        text |= {"moe": "dense", "experts": "", "n_experts": "", "top_k": "", "granularity": ""}
    found = [text.get(f, f.replace("_", " ") + " {}").format(v) for f, v in known.items()]
    return ", ".join(filter(None, found)) or "all runs"


def main(argv=None):
    parser = Parser(prog="python -m tools.table", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="folders with a results.jsonl, or such files")
    parser.add_argument("--by", help="fields that tell lines apart (default: all that vary)")
    parser.add_argument("--where", action="append", default=[], metavar="RULE",
                        help="only rows with, say, width>=16, or fusion!=late (repeatable)")
    parser.add_argument("--against", help="FIELD=VALUE,... to compare with (default: first line)")
    parser.add_argument("--metric", help="default: loss, loss_*, accuracy*, cider*")
    parser.add_argument("--plot", metavar="FIELD", help="draw the metrics against this number")
    parser.add_argument("--out", default="table.png", help="file of the plot")
    args = parser.parse_args(argv)
    rows = read(args.paths)
    for rule in args.where:
        try:
            rows = [row for row, holds in zip(rows, select(rows, rule)) if holds]
        except SystemExit as error:
            raise SystemExit(f"--where {str(error).removeprefix('fit_laws.py: ')}") from None
        check(rows, f"--where {rule}: no row has that")
    known = sorted(dict.fromkeys(chain(*rows)), key="loss".__ne__)  # loss first
    by, across, metrics, against = (text.split(",") if text else [] for text in (
        args.by, args.plot, args.metric, args.against))
    metrics = metrics or [name for name in known if re.match("loss|accuracy|cider", name)]
    for name in chain(by, across, metrics):
        near = get_close_matches(name, known, 1, 0.0)[0]
        check(name in known, f"no row has the field {name!r}; did you mean {near}? There are "
              f"{', '.join(known)}")
    values = [row[name] for name in metrics for row in rows if row.get(name) is not None]
    check(values and all(isinstance(value, (int, float)) for value in values),
          f"--metric {args.metric or 'loss'}: need a field that holds numbers")
    fields = [field for field in by or varying(rows, across) if field not in across] + across
    groups = group(rows, fields)
    check(not across or all(isinstance(key[-1], (int, float)) for key in groups),
          f"--plot {args.plot}: not a number in every row")
    lines = [key for key in groups if {*against} <= {f"{f}={v}" for f, v in zip(fields, key)}]
    check(lines, f"--against {args.against}: no line has that among {', '.join(fields)}")
    print(markdown(*table(groups, fields, metrics, lines if against else lines[:1])))
    if diverged := [row["run"] for row in rows if row.get("status", "ok") != "ok"]:
        print(f"\nleft out of the means, as they diverged: {', '.join(diverged)}")
    if across:
        unit = "byte" if all(row.get("data") == "procedural" for row in rows) else "token"
        other = words(dict(rule.partition("=")[::2] for rule in against))
        label = f"above {other} (%)" if against else f"nats a {unit}"
        plot(groups, fields, metrics, lines if against else [], label, args.out)


if __name__ == "__main__":
    end_with_the_pipe()
    main()
