"""Draw packed rows as a person reads them: images and text in their order, targets in blue.

    python -m tools.show -n 4 --out page.png          rows of the procedural world
    python -m tools.show FOLDER --split val           rows of a folder that tools.pack wrote

Dimensions:  I images in a batch   S image side   p patch side   g patches along a side (S / p)
"""
import itertools
import re
import textwrap
import warnings

from data import DataConfig, Loader, check, collate, read_meta
from tools import need, save_figure
from train import Parser
from world import KINDS

WIDTH = 118  # of a page, in letters
INK = {"target": "#0b3d91", "context": "#999999"}
STYLE = {"family": "monospace", "fontsize": 7, "va": "top", "parse_math": False}


def row_segments(batch, b):
    """Row b as (document, kind, payload): kind "image" (its index), "target" or "context" (ids).
    A target is a token that some position has to predict."""
    tokens, doc, targets = (batch[k][b].tolist() for k in ("tokens", "doc", "targets"))
    image = (batch["patch_index"][b] // batch["images"].shape[1]).tolist()  # (T,), -1 = no image
    entries = []
    for t, number in enumerate(doc):
        predicted = t > 0 and doc[t - 1] == number and targets[t - 1] >= 0
        kind = "image" if image[t] >= 0 else "target" if predicted else "context"
        entries += [(number, kind, image[t], tokens[t])] if number else []  # 0 is padding
        if targets[t] >= 0 and number not in doc[t + 1:t + 2]:
            entries.append((number, "target", -1, targets[t]))  # predicted, but not an input
    for (number, kind, i), run in itertools.groupby(entries, key=lambda entry: entry[:3]):
        yield number, kind, i if kind == "image" else [token for *_, token in run]


def draw_rows(batch, decode, out_path, patch_size, image_size):
    """Draw every row of a batch (as collate makes it) to a PNG, a bar for each document. decode:
    list of ids -> str. SystemExit: the page cannot be written there."""
    axes = need("matplotlib.figure", "matplotlib").Figure().add_axes((0, 0, 1, 1))
    g = image_size // patch_size
    images = batch["images"].reshape(-1, g, g, patch_size, patch_size, 3)       # (I, g, g, p, p, 3)
    images = images.transpose(2, 3).reshape(-1, image_size, image_size, 3)      # (I, S, S, 3)
    axes.text(7, 0, "blue: targets, which the model has to predict", STYLE, color=INK["target"])
    axes.text(60, 0, "grey: context, only read, as all images are", STYLE, color=INK["context"])
    y = 1
    for b, targets in enumerate(batch["targets"]):
        patches, padding = (batch["patch_index"][b] >= 0).sum(), (batch["doc"][b] == 0).sum()
        axes.text(0, y + 1, f"row {b}: {len(targets)} positions, {patches} of them image patches, "
                  f"{padding} padding; {(targets >= 0).sum()} targets", STYLE, weight="bold")
        y += 2
        for number, segments in itertools.groupby(row_segments(batch, b), key=lambda s: s[0]):
            top, colour = y, f"C{(number - 1) % 10}"
            y = draw_document(axes, y, segments, images.numpy(), decode)
            axes.plot([6.4, 6.4], [top, y - 0.2], colour, linewidth=3, solid_capstyle="butt")
            axes.text(0, top, f"doc {number}", STYLE, color=colour)
    save_page(axes, y, out_path)


def draw_document(axes, y, segments, images, decode):
    """Text stands to the right of the images before it. Returns the y of the line below."""
    top, bottom, left, x = y, y, 7, 7
    for _, kind, payload in segments:
        if kind == "image":
            if y > top or x > 60:  # not beside this text but below everything
                x, y = 6, max(y + 1, bottom)
            axes.imshow(images[payload], extent=(x + 1, x + 14, y + 5.8, y), aspect="auto")
            top, bottom, left, x = y, y + 6, x + 15, x + 15
            continue
        text = decode(payload).replace("<|endoftext|>", "⟨end⟩")
        for k, paragraph in enumerate(re.split(r"\n\s*", text)):
            x, y = (left, y + 1) if k else (x, y)
            indent = " " * (x - left)  # after what is on this line already
            lines = textwrap.wrap(paragraph, WIDTH - left, initial_indent=indent) or [indent]
            for n, line in enumerate(lines):
                axes.text(left, y + n, line, STYLE, color=INK[kind])
            x, y = left + len(lines[-1]), y + len(lines) - 1
    return max(y + 1, bottom)


def save_page(axes, y, out_path):
    width, height = 0.06 * (WIDTH + 2), 0.135 * (y + 1)  # inches
    axes.figure.set_size_inches(width, height)
    axes.set(xlim=(-1, WIDTH + 1), ylim=(y + 0.5, -0.5))
    axes.axis("off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that no font has is drawn as a box
        save_figure(axes.figure, out_path, dpi=min(150, 30000 / height))  # PNG: at most 2^15 lines


def main(argv=None):
    parser = Parser(prog="python -m tools.show", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="?", default="procedural", help="procedural, or a packed folder")
    add("-n", type=int, default=4, help="rows")
    add("--out", default="page.png")
    add("--split", choices=("train", "val"), default="train")
    add("--context", type=int, default=0, help="positions in a row; 0: 1024, 256 for procedural")
    add("--image-size", type=int, default=0, help="0: as packed; 32 for procedural")
    add("--patch-size", type=int, default=0, help="0: 1/16 of the image; 1/4 for procedural")
    add("--mixture", help="as for training; kinds of share 0 are left out (default: all kinds)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    real = args.data != "procedural"
    size = args.image_size or (read_meta(args.data)["image_size"] if real else 32)
    patch = args.patch_size or max(1, size // (16 if real else 4))
    context = args.context or (1024 if real else 256)
    check(min(size, patch, args.n) > 0 and size % patch == 0 and context > (size // patch)**2 + 1,
          f"show: {args.n} rows of --context {context} with images of --image-size {size} in "
          f"patches of --patch-size {patch} are not possible")
    splits = read_meta(args.data)["splits"] if real else {}
    there = list(splits.get(args.split, KINDS[:3]))
    equal = [100 // len(there) * (kind in there) for kind in KINDS]
    equal[KINDS.index(there[0])] += 100 - sum(equal)
    mixture = args.mixture or "-".join(map(str, equal))
    cfg = DataConfig(args.data, mixture, val_rows=max(64, args.n))
    loader = Loader(cfg, args.seed, context, size, patch)
    used = list(loader.shares)
    kinds = [(used[i % len(used)], i // len(used)) for i in range(args.n)]  # in turn
    source = loader.source
    if args.split == "val":  # a small validation set is shown again from its start
        rows = [source.val_row(kind, n % source.n_val(kind)) for kind, n in kinds]
    else:
        rows = [source.row(kind, n) for kind, n in kinds]
    draw_rows(collate(rows, patch), loader.encoding.decode, args.out, patch, size)
    print(f"wrote {args.out}: {args.n} rows ({', '.join(kind for kind, _ in kinds)})")


if __name__ == "__main__":
    main()
