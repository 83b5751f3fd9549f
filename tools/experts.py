"""Which experts take images and which take text, layer by layer (paper 4.4, Figs 12 and 13).

    python -m tools.experts runs/moe/RUN --out experts.png

Reads validation rows with a trained run of learned routing. The score of a layer is 1 where each
expert sees one modality only. Experts without any preference score the floor, which is above 0 as
soon as the documents hold more of one modality than of the other.

Dimensions: L layers, E experts.
"""
import numpy as np
import torch
from scipy.stats import entropy

from data import DataConfig, Loader, check
from tools import markdown, panels, save, style
from tools.sample import load_model, use_folder
from train import Parser


def specialization(counts):
    """How far the experts have divided the modalities among them (paper 4.4, E.2).

    counts (L,2,E): text and image tokens per layer and expert, summed over the batches to be judged
    (Output.expert_counts) -> two lists of L floats in 0..1. "score" is the mean over the experts of
    1 - H2(p_e), where p_e is the image share of expert e's tokens and H2 the binary entropy in
    bits. "floor" is 1 - H2(p) of all tokens, which experts without any preference would score,
    because p_e is not corrected for the mixture. An expert without tokens has no p_e, so we leave
    it out of the mean. (The paper does not say what it does with such an expert.)"""
    counts = np.asarray(counts, float)
    # the entropy of an expert without tokens is NaN, which nanmean leaves out
    score = np.nanmean(1 - entropy(counts, base=2, axis=1), axis=1)              # (L,)
    floor = 1 - entropy(counts.sum(2), base=2, axis=1)                           # (L,)
    return {"score": score.tolist(), "floor": floor.tolist()}


@torch.no_grad()
def count(model, loader):
    """-> {kind of document: (L,2,E) float64, text and image tokens at each expert}. Kinds without
    images are left out."""
    def counts(batch):
        batch = {name: tensor.to(model.rope.device) for name, tensor in batch.items()}
        return model(batch).expert_counts.double().cpu()  # float32 would count only to 2^24
    return {kind: sum(map(counts, loader.val_batches(kind, 8)))
            for kind in loader.val_kinds if kind != "text"}


def table(counts):
    """Yields rows of cells (str): for each layer the score and the floor of each kind. The floor is
    the same in all layers."""
    scores = {kind: specialization(tokens) for kind, tokens in counts.items()}
    yield ["layer", *(f"{kind} {what}" for kind in scores for what in ("score", "floor"))]
    for layer in range(len(next(iter(counts.values())))):
        yield [str(layer), *(f"{score[what][layer]:.3f}"
                             for score in scores.values() for what in ("score", "floor"))]


def draw(counts, out):
    """Left: the scores (Fig. 12). Right: each expert's share of the text and of the image tokens in
    the first, middle and last layer, of the last kind (Fig. 13, where it is interleaved data)."""
    last = list(counts)[-1]
    shares = (100 * counts[last] / counts[last].sum(2, keepdim=True)).numpy()  # (L,2,E)
    layers = sorted({0, len(shares) // 2, len(shares) - 1})
    page, (left, *right) = panels(1 + len(layers))
    for k, (kind, tokens) in enumerate(counts.items()):
        score = specialization(tokens)
        left.plot(score["score"], label=kind, **style(k) | {"ls": "-"})
        left.plot(score["floor"], ":", color=style(k)["color"])
    left.set(xlabel="layer", ylabel="specialisation (1: one modality)", ylim=(0, 1),
             xticks=range(0, len(shares), max(1, len(shares) // 8)))
    left.legend(fontsize=8, title="dotted: no preference", title_fontsize=8)
    for panel, layer in zip(right, layers):
        text, image = shares[layer]                                              # (E,) each
        order, at = (-image).argsort(), np.arange(len(image))
        panel.bar(at - 0.2, image[order], 0.4, label="image tokens", color="C1")
        panel.bar(at + 0.2, text[order], 0.4, label="text tokens", color="C0", hatch="//")
        panel.set(xlabel=f"expert of layer {layer}", ylabel=f"% of the tokens, {last}",
                  ylim=(0, 100))
        panel.set_xticks(at, order, fontsize=min(10, 80 / len(at)))
    right[0].legend(fontsize=8)
    save(page, out)


def main(argv=None):
    parser = Parser(prog="python -m tools.experts", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of one run of train.py, with ckpt.pt")
    parser.add_argument("--data", help="packed folder, if the run's has moved")
    parser.add_argument("--out", default="experts.png")
    args = parser.parse_args(argv)
    model, data = load_model(args.run, args.data)
    check(model.cfg.moe == "learned", f"{args.run} has no router (--moe {model.cfg.moe}): train "
          "with --moe learned")
    cfg = DataConfig(data["data"], data["mixture"], val_rows=32)
    if cfg.data != "procedural":
        use_folder(data, cfg.data)
    counts = count(model, Loader(cfg, 0, model.cfg))
    check({*cfg.shares} != {"text"} and counts, f"{args.run} was trained on text only: its router "
          "never had two modalities to tell apart")
    print(markdown(*table(counts)))
    print("score: 1 = each expert sees one modality; floor: what experts without a preference have")
    draw(counts, args.out)


if __name__ == "__main__":
    main()
