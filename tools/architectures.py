"""Draw early and late fusion side by side, and the mixture of experts in the place of the FFN.

    python -m tools.architectures --out architectures.png
"""
import itertools

from tools import need, save
from train import Parser

# A box: centre, width and height, text, colour. What belongs to images only is orange.
BLUE, ORANGE, GREY, WHITE = "#cfe0f3", "#fbd9b0", "#e9e9e9", "#ffffff"
DECODER = "decoder: blocks 1 ... L\nimages both ways, text causal"
BOTH = {  # boxes of early fusion, which late fusion repeats 4 units to the right
    "image": (1.0, 0.5, 1.5, 0.7, "image patches\n(raw pixels)", ORANGE),
    "text": (2.8, 0.5, 1.5, 0.7, "text tokens", BLUE),
    "linear": (1.0, 1.8, 1.5, 0.6, "one linear layer", ORANGE),
    "embedding": (2.8, 1.8, 1.5, 0.6, "embedding", BLUE),
    "decoder": (1.9, 5.6, 3.3, 0.9, DECODER, GREY),
    "head": (1.9, 7.0, 3.3, 0.6, "norm, head: next text token", BLUE)}
BOXES = {
    **{f"early {name}": box for name, box in BOTH.items()},
    **{f"late {name}": (x + 4, *box) for name, (x, *box) in BOTH.items()},
    "late linear": (5.0, 1.8, 1.5, 0.6, "linear, positions", ORANGE),
    "late encoder": (5.0, 3.0, 1.5, 0.9, "vision encoder:\nits own blocks", ORANGE),
    "late connector": (5.0, 4.2, 1.5, 0.6, "connector", ORANGE),
    "in": (10.0, 0.5, 2.2, 0.6, "from the block before", WHITE),
    "attention": (10.0, 1.8, 2.2, 0.7, "norm, self-attention\n(QK-norm, RoPE)", GREY),
    "plus": (10.0, 2.8, 0.9, 0.4, "+ input", WHITE),
    "dense": (8.95, 4.6, 1.1, 1.1, "norm,\nFFN\n(SwiGLU)", GREY),
    "router": (11.0, 3.8, 2.0, 0.6, "norm, router: top-1", GREY),
    "expert 1": (10.4, 5.3, 0.8, 0.7, "expert\n1", GREY),
    "expert E": (11.6, 5.3, 0.8, 0.7, "expert\nE", GREY),
    "sum": (10.0, 6.4, 0.9, 0.4, "+ input", WHITE),
    "out": (10.0, 7.2, 2.2, 0.6, "to the next block", WHITE)}
ARROWS = """early image > early linear > early decoder > early head; early text > early embedding >
early decoder; late image > late linear > late encoder > late connector > late decoder > late head;
late text > late embedding > late decoder; in > attention > plus > dense > sum > out;
plus > router > expert 1 > sum; router > expert E > sum"""
TITLES = ((1.9, "early fusion"), (5.9, "late fusion"), (10.0, "a block: dense, or experts"))


def draw(out):
    page = need("matplotlib.figure", "matplotlib").Figure(figsize=(8.3, 5.2))
    patches = need("matplotlib.patches", "matplotlib")
    axes = page.add_axes((0, 0, 1, 1), xlim=(0, 12.3), ylim=(0, 8.2))
    axes.axis("off")
    for x, y, width, height, text, colour in BOXES.values():
        axes.add_patch(patches.FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, fc=colour, ec="0.3",
            boxstyle="round,pad=0,rounding_size=0.1"))
        axes.text(x, y, text, ha="center", va="center", fontsize=7.5)
    for chain in ARROWS.replace("\n", " ").split(";"):
        names = [name.strip() for name in chain.split(">")]
        for start, end in itertools.pairwise(names):
            (x, y, _, height, *_), (to_x, to_y, width, to_height, *_) = BOXES[start], BOXES[end]
            # an arrow goes straight up into a wide box, and to the middle of any other
            to_x = x if width > 3 else to_x
            axes.annotate("", (to_x, to_y - to_height / 2), (x, y + height / 2),
                          arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0,
                                      "shrinkB": 0})
    axes.text(9.96, 3.25, "or", fontsize=9, ha="center", style="italic")
    axes.text(11.0, 5.3, "...", fontsize=10, ha="center", va="center")
    for x, title in TITLES:
        axes.text(x, 7.85, title, ha="center", va="center", fontsize=11, weight="bold")
    save(page, out)


def main(argv=None):
    parser = Parser(prog="python -m tools.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="architectures.png", help="file of the drawing")
    draw(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
