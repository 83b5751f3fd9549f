"""The paper's findings beside our runs: a table of verdicts that follow from rows by one rule.

    python -m tools.scoreboard results/experiments.jsonl
    python -m tools.scoreboard runs/pairs runs/moe --loss loss_text

A finding compares two settings in pairs of runs with the same seed, and so the same data in the
same order, and all else equal. A difference is in per cent of the loss, or in points of accuracy.
It is averaged over the pairs of a seed, and the 95 % t-interval is over seeds that have all pairs.
How a lead changes is the difference at the largest setting minus the difference at the smallest. If
this is positive, the lead of the first of the two became smaller.

  replicates      the interval leaves out 0, and the sign is the paper's
  does not        the interval leaves out 0, and the sign is not the paper's
  no effect       the interval holds 0 and lies within +-1.5 %
  inconclusive    otherwise, with about how many seeds would decide if they spread as these do

To add an experiment, add a line to FINDINGS. Its study is the folder that the sweep wrote to, or a
pattern that matches several such folders, each with pairs of its own.
"""
import re
from collections import namedtuple
from itertools import count

import numpy as np
from scipy import stats

from data import DataConfig, check
from model import ModelConfig
from tools import end_with_the_pipe, markdown
from tools.table import read
from train import Parser, TrainConfig

SMALL = 1.5  # per cent: what we call no effect
SETTINGS = ("fusion moe n_experts top_k granularity width depth vision_width mixture image_size"
            " context D patch_size tokens_per_step lr vision_lr warmup init init_vision scored"
            " seed study heads mlp_multiple vision_depth contents augment flip val_rows cooldown"
            " weight_decay grad_clip load_balancing_weight").split()
# Rows of older code do not name flags that are new since then, and were made at their defaults.
DEFAULTS = vars(ModelConfig()) | vars(DataConfig()) | vars(TrainConfig())
# Settings that follow from a field: if the field differs in a pair, they may differ, too.
FOLLOWS = {"fusion": "lr vision_lr vision_width init init_vision",
           "moe": "n_experts top_k granularity warmup init", "D": "warmup",
           "width": "lr vision_width", "interleaved_share": "mixture",
           "text_share": "mixture", "image_size": "context D tokens_per_step"}
EARLY, LATE = ({"fusion": fusion, "moe": "none"} for fusion in ("early", "late"))
FROZEN, SLOW, FULL = (LATE | {"vision_lr": rate} for rate in ("0.0", "0.01", "1.0"))
LESS, MORE = {"mixture": "81-9-10"}, {"mixture": "9-81-10"}  # interleaved documents
EXPERTS = EARLY | {"moe": "learned", "n_experts": "8", "top_k": "1", "granularity": "1"}
FINE = EXPERTS | {"n_experts": "16", "top_k": "2", "granularity": "2"}
TEXT, NATIVE = EARLY | {"init": ".+"}, EARLY | {"init": ""}  # from a text model, from nothing
BOTH = FROZEN | {"init": ".+"}  # as the paper found best (Table 7)
MATCHED = EARLY | {"width": ".+"}  # what tools.sizes --match found

# `sign` is the sign of one minus two in the paper, 0 if they were equal. `across` asks how this
# difference changes from the smallest to the largest value of a field. Values are patterns.
Finding = namedtuple("Finding", "section claim study one two sign metric across",
                     defaults=("loss", None))
FINDINGS = [Finding(*line) for line in (
    ("3.1", "early is lower than late (here of equal width)", "pairs", EARLY, LATE, -1),
    ("B.1", "this lead shrinks with width", "pairs", EARLY, LATE, 1, "loss", "width"),
    ("B.4", "early is lower at equal parameters", "match_params", MATCHED, LATE, -1),
    ("B.4", "early is lower at equal FLOPs", "match_flops", MATCHED, LATE, -1),
    ("B.5", "beside one encoder early is lower (here at equal parameters)", "fixed_.+", MATCHED,
     LATE, -1),
    ("B.5", "this lead shrinks with size", "fixed_.+", MATCHED, LATE, 1, "loss", "study"),
    ("B.2", "more captions lower their loss", "shares", LESS, MORE, -1, "loss_caption"),
    ("B.2", "more interleaved rows lower theirs", "shares", MORE, LESS, -1, "loss_interleaved"),
    ("B.2", "early's lead on interleaved documents grows with their share", "shares", EARLY, LATE,
     -1, "loss_interleaved", "interleaved_share"),
    ("B.2", "early's lead on text grows with text", "text_share", EARLY, LATE, -1, "loss_text",
     "text_share"),
    ("B.3", "early is lower at a higher resolution", "resolution", EARLY | {"image_size": "64"},
     LATE | {"image_size": "64"}, -1),
    ("B.3", "captions gain from resolution", "resolution", {"image_size": "64"},
     {"image_size": "32"}, -1, "loss_caption"),
    ("B.6", "context leaves early's lead as it is", "context", EARLY, LATE, 0, "loss", "context"),
    ("4.1", "8 experts are lower than dense", "moe", EXPERTS, EARLY, -1),
    ("4.2", "this lead grows with tokens (experts saturate later)", "moe_tokens", EXPERTS,
     EARLY, -1, "loss", "D"),
    ("4.3", "learned routing is lower than by modality", "moe", EXPERTS,
     EARLY | {"moe": "modality"}, -1),
    ("Table 13", "top-2 is better than top-1 (there in accuracy)", "moe",
     EXPERTS | {"top_k": "2"}, EXPERTS, -1),
    ("Table 13", "8 experts are better than 4", "moe", EXPERTS, EXPERTS | {"n_experts": "4"}, -1),
    ("Table 13", "16 experts of half the size are worse than 8", "moe", FINE, EXPERTS, 1),
    ("3.3", "a text model's lead shrinks with tokens", "native", TEXT, NATIVE, 1, "loss", "D"),
    ("B.7", "both initialised, encoder frozen, late leads on captions", "native", BOTH, TEXT, -1,
     "loss_caption"),
    ("Table 8", "from scratch an encoder is better at 0.01 of the rate (paper: than at 0.1)",
     "vision_lr", SLOW, FULL, -1),
    ("Table 7", "an initialised encoder is better frozen", "native", FROZEN, FULL, -1),
    ("5", "early gives more right answers than late", "sft", EARLY, LATE, 1, "accuracy"),
    ("5", "experts give more right answers than dense", "sft", EXPERTS, EARLY, 1, "accuracy"))]


def alike(value):
    """Without the last digits, in which the same rate can differ between machines."""
    return float(f"{value:.9g}") if isinstance(value, float) else value


def chosen(rows, setting, shared, metric):
    """{what a pair shares: metric} of the runs that have a setting and did not diverge."""
    found = {}
    for row in rows:
        fits = all(re.fullmatch(v, str(row.get(k))) for k, v in setting.items())
        if fits and row.get(metric) is not None:
            key = tuple((k, alike(row.get(k, DEFAULTS.get(k)))) for k in shared)
            twin = found.setdefault(key, row)
            check(twin is row, f"{twin['run']} and {row['run']} of study {row['study']} differ in "
                  f"none of {', '.join(shared)}: remove one of them")
    return {key: row[metric] for key, row in found.items()}


def differences(rows, finding):
    """{what a pair shares: how much `one` lies above `two`}."""
    apart = {field for field in finding.one | finding.two
             if finding.one.get(field) != finding.two.get(field)} | {finding.across}
    apart |= {*" ".join(FOLLOWS.get(field, "") for field in apart).split()}
    shared = [field for field in SETTINGS if field not in apart]

    def pairs(rows):
        x, y = (chosen(rows, side, shared, finding.metric) for side in (finding.one, finding.two))
        return {key: 100 * (x[key] - y[key]) / (1 if finding.metric == "accuracy" else y[key])
                for key in x if key in y}
    if not finding.across:
        return pairs(rows)
    ends = sorted({row[finding.across] for row in rows}, key=in_order)
    if len(ends) < 2:
        return {}
    low, high = (pairs([row for row in rows if row[finding.across] == end])
                 for end in (ends[0], ends[-1]))
    low, high = map(whatever_rate, (low, high))
    return {key: high[key] - low[key] for key in low if key in high}


def in_order(end):
    """The key for sorting settings: the numbers in a value, which may be the name of a study."""
    return [float(number) for number in re.findall(r"[\d.]*\d", str(end))]


def whatever_rate(pairs):
    """The means of pairs over learning rates, because each end may have a rate of its own."""
    found = {}
    for key, x in pairs.items():
        found.setdefault(tuple(item for item in key if item[0] != "lr"), []).append(x)
    return {key: np.mean(x) for key, x in found.items()}


def by_seed(pairs):
    """The mean difference of each seed that has all pairs, (n,). If no seed has, all are those that
    the fullest seed has, and of several such the pairs that most seeds have."""
    seeds = {}
    for key, difference in pairs.items():
        rest = tuple(item for item in key if item[0] != "seed")
        seeds.setdefault(dict(key)["seed"], {})[rest] = difference
    sets = [frozenset(x) for x in seeds.values()]
    most = max(sets, key=lambda some: (len(some), sets.count(some)), default=None)
    return np.array([np.mean([*x.values()]) for x in seeds.values() if x.keys() == most])


def judge(x, sign):
    """Differences (n,) of n seeds, the paper's sign -> mean with its interval, verdict."""
    mean, sd = x.mean(), x.std(ddof=1)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * sd / n ** 0.5
    low, high = mean - half(len(x)), mean + half(len(x))
    goal = max(abs(mean), SMALL - abs(mean))  # the half-width of an interval that decides
    if low > 0 or high < 0:
        verdict = "**replicates**" if np.sign(mean) == sign else "**does not**"
    elif max(-low, high) <= SMALL:
        verdict = f"**no effect** larger than {max(-low, high):.1f} %"
    else:
        seeds = next(n for n in count(len(x)) if half(n) <= goal)
        verdict = f"inconclusive: about {seeds} seeds would decide"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", verdict


def main(argv=None):
    parser = Parser(prog="python -m tools.scoreboard", description=__doc__)
    parser.add_argument("paths", nargs="+", help="rows with their study, or folders of studies")
    parser.add_argument("--loss", default="loss", help="the loss of one kind, such as loss_text, "
                        "for the findings that are about the mean over kinds")
    args = parser.parse_args(argv)
    rows, lines, missing = read(args.paths), [], []
    check(any(args.loss in row for row in rows), f"--loss {args.loss}: no row has that")
    for finding in FINDINGS:
        if finding.metric == "loss":
            finding = finding._replace(metric=args.loss)
        study = [row for row in rows if re.fullmatch(finding.study, row["study"])]
        x = by_seed(differences(study, finding))
        if len(x) < 2:
            missing.append(f"{finding.claim} ({finding.section})")
            continue
        measured, verdict = judge(x, finding.sign)
        lines.append([finding.section, finding.claim, measured, str(len(x)), verdict])
    print(markdown(["section", "the paper found", "difference, %", "seeds", "verdict"], *lines))
    if missing:
        print(f"\nNot measured, for want of two seeds in the study that a finding names: "
              f"{'; '.join(missing)}.")


if __name__ == "__main__":
    end_with_the_pipe()
    main()
