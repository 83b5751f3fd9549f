"""The paper's sizes, what a budget buys, and sizes that match.

    python -m tools.sizes                                   a table of all presets
    python -m tools.sizes --budget 24hx8xh100x0.4           and the tokens that this buys
    python train.py $(python -m tools.sizes --match params --width 96) --tokens 1M
    python train.py $(python -m tools.sizes --equal-text --image-size 48 --tokens 1M)

--match prints the flags of the early-fusion model that equals late fusion of the given width (or
several widths with commas between) or preset (B.4). --equal-text prints the context and the
tokens at which images of a given size come with as much text as at the default size (B.3).
Both take the flags of train.py too.
"""
import bisect
from dataclasses import replace

from data import Loader, check
from model import PRESETS, ModelConfig, on_meta, training_memory
from tools import end_with_the_pipe, plan
from tools.sweep import parse_grid
from train import SIZES, Parser

IMAGE_SHARE = 0.544  # of the tokens of the paper's 45-45-10 mixture (D_v / D, App. C.2)


def in_flops(text):
    """"1e21,24hx8xh100x0.4" -> list of FLOPs: numbers, or hours, GPUs, their type and their MFU."""
    try:
        budgets = []
        for budget in text.split(","):
            hours, unit, gpus = budget.partition("hx")
            cards = plan.cards_of(gpus) if unit else None
            rate = 3600 * cards.ranks * cards.peak * cards.mfu if cards else 1
            budgets.append(float(hours) * rate)
        if not all(0 < C < float("inf") for C in budgets):
            raise ValueError
    except ValueError:
        raise SystemExit(f"--budget {text}: need FLOPs, or hours, GPUs, their type and their MFU, "
                         "as 24hx8xh100x0.4") from None
    return budgets


def print_sizes(budgets):
    """A line for each of PRESETS, and for the early ones with 8 experts."""
    print("name  fusion    width   img      N    N_v N_total  GFLOP    DDP FSDP/8   row"
          + "".join(f"{C:9.2g}" for C in budgets))
    for moe in ("none", "learned"):
        for name, sizes in PRESETS.items():
            if moe == "learned" and sizes["fusion"] == "late":
                continue
            cfg = ModelConfig(**{k: v for k, v in sizes.items() if k != "lr"}, moe=moe)
            model = on_meta(cfg)
            n, flops = model.num_params(), model.flops(1, IMAGE_SHARE)
            (whole, row), (divided, _) = training_memory(cfg, 8), training_memory(cfg, 8, True)
            numbers = (n["N"], n["N_vision"], n["N_total"], flops, whole, divided, row,
                       *(budget / flops for budget in budgets))
            kind = cfg.fusion + " moe" * (moe != "none")
            line = "{:6}{:10}{:5}{:6}{:7.3f}{:7.3f}{:8.3f}{:7.3f}{:7.1f}{:7.1f}{:6.2f}"
            print((line + len(budgets) * "{:9.1f}").format(name, kind, cfg.width, cfg.vision_width,
                                                *(x / 1e9 for x in numbers)))
    print("N, N_v, N_total: billions of parameters (N without encoder, of experts the active);\n"
          "GFLOP to train on a token; DDP, FSDP/8: GB a GPU of 8 without activations; row: GB for\n"
          "each row of 1024 tokens; the last columns: billions of tokens for so many FLOPs")


def positions(run, model):
    """(text, image) positions of a row of this run if it had this model."""
    return plan.positions(replace(run, model=model), Loader(run.data, 0, model))


def matched_width(run, rule):
    """The width at which early fusion is nearest to late fusion of the run's width: in the
    parameters of decoder and encoder ("params"), in those of the decoder ("text"), or in training
    FLOPs (paper C.2: an encoder counts by the share of positions that are images)."""
    def count(fusion, width):
        return on_meta(replace(run.model, fusion=fusion, width=width)).num_params()

    shape, encoder = run.model, {"params": 1, "text": 0}.get(rule)
    if encoder is None:
        text, image = positions(run, shape)
        encoder = image / (text + image)
    late, step = count("late", shape.width), 4 if shape.width < 512 else 16
    widths = [w for w in range(step, 4 * (shape.width + shape.encoder_width), step)
              if not w % (2 * (shape.heads or 1))]
    goal = late["N"] + encoder * late["N_vision"]
    above = bisect.bisect(widths, goal, key=lambda width: count("early", width)["N"])
    near = widths[max(0, above - 1):above + 1]
    return min(near, key=lambda width: abs(count("early", width)["N"] - goal))


def equal_text(runs):
    """The flags at which a row holds as much text as with images of the default size. Larger images
    need a longer row, and with the row grow the tokens of a step and of the run."""
    run = runs[0]
    sizes = vars(ModelConfig()) | SIZES[run.train.preset]
    base = replace(run.model, image_size=sizes["image_size"], patch_size=sizes["patch_size"])
    goal, _ = positions(run, base)
    context = base.context + run.model.n_patches
    for _ in range(4):  # text grows about as the row does, so each round comes nearer
        text, _ = positions(run, replace(run.model, context=context))
        context = round(context * goal / text)
    step = run.train.tokens_per_step // base.context * context
    return (f"--image-size {run.model.image_size} --patch-size {run.model.patch_size} --context "
            f"{context} --tokens-per-step {step} --tokens "
            + ",".join(str(run.steps * step) for run in runs))


def main(argv=None):
    parser = Parser(prog="python -m tools.sizes", description=__doc__)
    parser.add_argument("--match", choices=("params", "text", "flops"))
    parser.add_argument("--equal-text", action="store_true")
    parser.add_argument("--budget", default="1e20,1e21,1e22", help="FLOPs, or as 24hx8xh100x0.4")
    args, flags = parser.parse_known_args(argv)
    if args.match:
        jobs = parse_grid([*flags, "--fusion", "late"])
        widths = sorted(matched_width(runs[0], args.match) for _, runs in jobs)
        print("--fusion early --width", ",".join(map(str, widths)))
    elif args.equal_text:
        (_, runs), *more = parse_grid([*flags, "--seed", "0"])
        check(not more, "sizes: --equal-text takes one image size at a time")
        print(equal_text(runs))
    else:
        check(not flags, f"sizes: {' '.join(flags)} needs --match or --equal-text")
        print_sizes(in_flops(args.budget))


if __name__ == "__main__":
    end_with_the_pipe()
    main()
