"""Which experts take images and which take text, layer by layer (paper 4.4, Figs 12 and 13).

    python results/experts.py runs/moe/RUN --out experts.png

Reads validation rows with a trained run of learned routing. A layer's score is 1 where each expert
sees one modality only. Experts without any preference score the floor, which is above 0 as soon as
the documents hold more of one modality than of the other.

Dimensions: L layers, E experts.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import DataConfig, Loader, Parser, need
from model import load_model
from moe import specialization


def held_out(model, data, rows):
    """A Loader of the run's own data, with this many validation rows of each kind."""
    cfg = DataConfig(data["data"], data["mixture"], val_rows=rows)
    return Loader(cfg, 0, model.cfg.context, model.cfg.image_size, model.cfg.patch_size)


@torch.no_grad()
def count(model, loader):
    """{kind: (L,2,E) float64, text and image tokens at each expert}."""
    device = model.rope.device
    def counts(batch):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return model(batch).expert_counts.double().cpu()  # float32 counts only to 2^24
    return {kind: sum(map(counts, loader.val_batches(kind, 8)))
            for kind in loader.val_kinds() if kind != "text"}


def table(counts):
    """Rows of cells: per layer the score of each source, and its floor (the same in all layers)."""
    scores = {kind: specialization(tokens) for kind, tokens in counts.items()}
    yield ["layer", *(f"{kind} {what}" for kind in scores for what in ("score", "floor"))]
    for layer in range(len(next(iter(counts.values())))):
        yield [str(layer), *(f"{score[what][layer]:.3f}"
                             for score in scores.values() for what in ("score", "floor"))]


def draw(counts, out):
    """Left: the scores (Fig. 12). Right: each expert's share of the text and of the image tokens,
    in the first, middle and last layer (Fig. 13, there of interleaved data)."""
    need("matplotlib", "matplotlib").use("Agg")
    from matplotlib import pyplot as plt
    source = list(counts)[-1]
    shares = (100 * counts[source] / counts[source].sum(2, keepdim=True)).numpy()  # (L,2,E)
    layers = sorted({0, len(shares) // 2, len(shares) - 1})
    figure, (left, *right) = plt.subplots(1, 1 + len(layers), figsize=(4 + 3 * len(layers), 3.6),
                                          constrained_layout=True)
    for kind, tokens in counts.items():
        score = specialization(tokens)
        line, = left.plot(score["score"], marker="o", markersize=4, label=kind)
        left.plot(score["floor"], "--", color=line.get_color(), label="no preference")
    left.set(title="specialisation", xlabel="layer", ylim=(0, 1))
    left.legend(fontsize=8)
    for panel, layer in zip(right, layers):
        text, image = shares[layer]                                              # (E,) each
        order, at = (-image).argsort(), np.arange(len(image))
        panel.bar(at - 0.2, image[order], 0.4, label="image tokens")
        panel.bar(at + 0.2, text[order], 0.4, label="text tokens")
        panel.set(title=f"layer {layer}, {source}", xlabel="expert", ylim=(0, 100))
        panel.set_xticks(at, order)
    right[0].set_ylabel("share of the modality's tokens (%)")
    right[0].legend(fontsize=8)
    figure.savefig(out, dpi=130)
    print(f"wrote {out}")


def main(argv=None):
    parser = Parser(prog="experts.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of one run, with ckpt.pt")
    parser.add_argument("--rows", type=int, default=32, help="validation rows of each kind")
    parser.add_argument("--out", default="experts.png")
    args = parser.parse_args(argv)
    model, data = load_model(args.run)
    if model.cfg.moe != "learned":
        raise SystemExit(f"{args.run} has no router (--moe {model.cfg.moe}): train with "
                         "--moe learned")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    counts = count(model, held_out(model, data, args.rows))
    if data["mixture"] == "0-0-100" or not counts:
        raise SystemExit(f"{args.run} was trained on text only: its router never had two "
                         "modalities to tell apart")
    for i, cells in enumerate(table(counts)):
        print("|", " | ".join(cells), "|" + f"\n{'| --- ' * len(cells)}|" * (i == 0))
    print("score: 1 = each expert sees one modality; floor: what experts without a preference have")
    draw(counts, args.out)


if __name__ == "__main__":
    main()
