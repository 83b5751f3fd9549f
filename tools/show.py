"""Draw packed rows as a person reads them: images and text in their order, targets in blue.

    python -m tools.show -n 4 --out page.png          rows of the procedural world
    python -m tools.show FOLDER --split val           rows of a folder that tools.pack wrote
    python -m tools.show -n 1 --mask mask.png         also who looks at whom in the first row

Under the words of the procedural world stands what each choice costs at least, in nats.

Dimensions:  I images in a batch   S image side   p patch side   g patches along a side (S / p)
             B rows   T positions of a row
"""
import itertools
import re
import textwrap

import torch

from data import DataConfig, Packed, Procedural, check, collate, read_meta
from model import ModelConfig, attention_mask
from tools import need, save
from train import Parser, config_of

WIDTH = 118  # of a page, in letters
INK = {"target": "#0b3d91", "context": "#999999", "nats": "#b34700"}
END = "<|endoftext|>"
STYLE = {"family": "monospace", "fontsize": 7, "va": "top", "parse_math": False}


def row_segments(batch, b):
    """Row b as (document, kind, payload, nats): kind "image" (its index), "target" or "context"
    (ids). A target is a token that some position has to predict. A new segment begins at a target
    that costs even the best model some nats, which only the procedural world knows."""
    tokens, doc, targets = (batch[k][b].tolist() for k in ("tokens", "doc", "targets"))
    nats = torch.zeros(batch["targets"].numel())
    nats[batch["target_index"]] = batch["nll"]
    nats = nats.view_as(batch["targets"])[b].tolist()
    image = (batch["patch_index"][b] // batch["images"].shape[1]).tolist()  # (T,), -1 = no image
    entries = []
    for t, number in enumerate(doc):
        predicted = t > 0 and doc[t - 1] == number and targets[t - 1] >= 0
        kind = "image" if image[t] >= 0 else "target" if predicted else "context"
        paid = nats[t - 1] if predicted else 0.0
        entries += [(number, kind, image[t], paid, tokens[t])] if number else []  # 0 is padding
        if targets[t] >= 0 and number not in doc[t + 1:t + 2]:  # predicted, but not an input
            entries.append((number, "target", -1, nats[t], targets[t]))
    begun = itertools.accumulate(entry[3] > 0 for entry in entries)
    for _, run in itertools.groupby(zip(entries, begun), key=lambda e: (*e[0][:3], e[1])):
        run = [entry for entry, _ in run]
        number, kind, i, paid, _ = run[0]
        yield number, kind, i if kind == "image" else [token for *_, token in run], paid


def draw_rows(batch, decode, out_path, patch_size, image_size, kinds):
    """Draw every row of a batch (as collate makes it) to a PNG. Every document has a bar, with
    "(cut)" if the row cuts the document. decode: list of ids -> str. kinds: each row's kind (str).
    SystemExit if the page cannot be written."""
    axes, images = new_page(), picture(batch["images"], patch_size, image_size)
    axes.text(7, 0, "blue: targets, which the model has to predict", STYLE, color=INK["target"])
    axes.text(56, 0, "grey: context, only read, as all images are", STYLE, color=INK["context"])
    gap = 1.9 if (batch["nll"] > 0).any() else 1  # room for the nats under a line
    if gap > 1:
        axes.text(7, 1, "small: nats that a choice costs even the best model", STYLE,
                  color=INK["nats"])
    y = 1.5
    for b, targets in enumerate(batch["targets"]):
        patches, padding = (batch["patch_index"][b] >= 0).sum(), (batch["doc"][b] == 0).sum()
        axes.text(0, y + 1, f"row {b}, {kinds[b]}: {len(targets)} positions, {patches} of them "
                  f"image patches, {padding} padding; {(targets >= 0).sum()} targets", STYLE,
                  weight="bold")
        y += 2
        for number, found in itertools.groupby(row_segments(batch, b), key=lambda s: s[0]):
            top, colour, segments = y, f"C{(number - 1) % 10}", list(found)
            ends = segments[0], segments[-1]
            whole = all(kind != "image" and END in decode(ids) for _, kind, ids, _ in ends)
            y = draw_document(axes, y, segments, images, decode, gap)
            axes.plot([6.4, 6.4], [top, y - 0.2], colour, linewidth=3, solid_capstyle="butt")
            axes.text(0, top, f"doc {number}" + "\n(cut)" * (not whole), STYLE, color=colour)
    save_page(axes, y, out_path)


def new_page():
    return need("matplotlib.figure", "matplotlib").Figure().add_axes((0, 0, 1, 1))


def picture(patches, p, size):
    """uint8 (I, P, 3 p^2) patches -> (I, S, S, 3)."""
    g = size // p
    images = patches.cpu().reshape(-1, g, g, p, p, 3).transpose(2, 3)           # (I, g, p, g, p, 3)
    return images.reshape(-1, size, size, 3).numpy()


def draw_document(axes, y, segments, images, decode, gap):
    """Text stands to the right of the images before it. Returns the y of the line below."""
    top, bottom, left, x = y, y, 7, 7
    for _, kind, payload, nats in segments:
        if kind == "image":
            if y > top or x > 60:  # not beside this text but below everything
                x, y = 5, max(y + gap, bottom)
            axes.imshow(images[payload], extent=(x + 2, x + 15, y + 5.8, y), aspect="auto")
            top, bottom, left, x = y, y + 6, x + 16, x + 16
            continue
        text = decode(payload).replace(END, "⟨end⟩")
        for k, paragraph in enumerate(re.split(r"\n\s*", text)):
            x, y = (left, y + gap) if k else (x, y)
            indent = " " * (x - left)  # after what is on this line already
            lines = textwrap.wrap(paragraph, WIDTH - left, initial_indent=indent) or [indent]
            for n, line in enumerate(lines):
                axes.text(left, y + gap * n, line, STYLE, color=INK[kind])
            if nats and not k:  # under the first word, which may not have fitted on this line
                moved = not lines[0].strip() and len(lines) > 1
                at = left if moved else x + len(text) - len(text.lstrip())
                axes.text(at, y + gap * moved + 0.95, f"{nats:.1f}",
                          STYLE | {"fontsize": 6}, color=INK["nats"])
            x, y = left + len(lines[-1]), y + gap * (len(lines) - 1)
    return max(y + gap, bottom)


def draw_mask(batch, out_path):
    """Draw attention_mask of the first row: blue is what a position sees of the past, orange what a
    patch sees of its own image, and white what is not seen."""
    colors, axes = (need(f"matplotlib.{name}", "matplotlib") for name in ("colors", "figure"))
    axes = axes.Figure(figsize=(8.3, 8.6), layout="constrained").subplots()
    doc, image = batch["doc"][:1], batch["patch_index"][:1] // batch["images"].shape[1]  # (1, T)
    mask = attention_mask(doc, image)[0, 0]                                     # (T, T)
    own = mask & (image[0][:, None] == image[0]) & (image[0] >= 0)
    values = mask.int() + own.int()
    inks = colors.ListedColormap(["white", "#7aa6d8", "#e08214"])
    axes.imshow(values.numpy(), cmap=inks, vmin=0, vmax=2)
    parts = [(*key, [t for t, _ in run]) for key, run in itertools.groupby(
        enumerate(zip(doc[0].tolist(), image[0].tolist())), key=lambda entry: entry[1])]
    named = [(d, i, at) for d, i, at in parts if len(at) > 4]
    ticks = [(at[0] + at[-1]) / 2 for *_, at in named]
    words = ["padding" if d == 0 else f"image, doc {d}" if i >= 0 else f"text, doc {d}"
             for d, i, _ in named]
    axes.set_xticks(ticks, words, rotation=40, ha="right", fontsize=9)
    axes.set_yticks(ticks, words, fontsize=9)
    for (d, _, _), (_, _, at) in itertools.pairwise(parts):
        if d != doc[0, at[0]]:  # the next document begins
            axes.axhline(at[0] - 0.5, color="0.5", lw=0.6)
            axes.axvline(at[0] - 0.5, color="0.5", lw=0.6)
    axes.set(xlabel="... may look at this position", ylabel="this position ...")
    axes.set_title("blue: itself and the past of its document; orange: within its image",
                   fontsize=10)
    save(axes.figure, out_path)


def save_page(axes, y, out_path):
    width, height = 0.06 * (WIDTH + 2), 0.135 * (y + 1)  # inches
    axes.figure.set_size_inches(width, height)
    axes.set(xlim=(-1, WIDTH + 1), ylim=(y + 0.5, -0.5))
    axes.axis("off")
    save(axes.figure, out_path)


def main(argv=None):
    parser = Parser(prog="python -m tools.show", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="?", default="procedural", help="procedural, or a packed folder")
    add("-n", type=int, default=4, help="rows")
    add("--out", default="page.png")
    add("--mask", metavar="FILE", help="draw the attention mask of the first row, too")
    add("--split", choices=("train", "val"), default="train")
    add("--context", type=int, default=0, help="positions in a row; 0: 1024, 128 for procedural")
    add("--image-size", type=int, default=0, help="0: as packed; 32 for procedural")
    add("--patch-size", type=int, default=0, help="0: 1/16 of the image; 1/4 for procedural")
    add("--mixture", help="as for training; kinds of share 0 are left out (default: the "
        "paper's three, or what the folder has)")
    args = parser.parse_args(argv)
    real = args.data != "procedural"
    size = args.image_size or (read_meta(args.data)["image_size"] if real else 32)
    patch = args.patch_size or max(1, size // (16 if real else 4))
    context = args.context or (1024 if real else 128)
    shape = config_of(ModelConfig, dict(context=context, image_size=size, patch_size=patch))
    cfg = DataConfig(args.data, args.mixture or DataConfig.mixture, val_rows=max(64, args.n))
    source = (Packed if real else Procedural)(cfg, 0, shape)
    used = list(cfg.shares if args.mixture or not real else source.kinds[args.split])
    for kind in used:
        check(kind in source.kinds[args.split], f"--mixture {args.mixture}: {args.data} has no "
              f"{kind} documents in its split {args.split}")
    check(args.n > 0, f"-n {args.n}: need at least one row")
    kinds = [(used[i % len(used)], i // len(used)) for i in range(args.n)]  # in turn
    if args.split == "val":  # a small validation set is shown again from its start
        rows = [source.val_row(kind, n % source.n_rows(kind, "val")) for kind, n in kinds]
    else:
        rows = [source.row(kind, n) for kind, n in kinds]
    batch = collate(rows, patch)
    draw_rows(batch, source.encoding.decode, args.out, patch, size, [kind for kind, _ in kinds])
    if args.mask:
        draw_mask(batch, args.mask)
    print(f"{args.n} rows of --context {context} --image-size {size} --patch-size {patch}: "
          f"{', '.join(kind for kind, _ in kinds)}")


if __name__ == "__main__":
    main()
