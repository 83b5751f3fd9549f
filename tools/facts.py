"""How many bits about the facts of the world a trained model holds, in all and a parameter.

    python -m tools.facts runs/moe/*-s5 --json facts.jsonl
    python -m tools.table facts.jsonl --by moe --metric facts_bits

Every fact, "the NAME VERB VALUE.", is one of 64 values, which are equally likely, so it has 6 bits.
A model whose loss on the true value is x bits knows the other 6 - x bits of the fact (Allen-Zhu and
Li 2024, "Physics of Language Models 3.3"). Facts are averaged in bands of things that are met about
as often. A band with a mean below 0, because the model guesses with too much confidence, counts as
0. --json appends a row for tools.table to a file, with what the run's own row says and the bits.
"""
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import check, get_tokenizer
from tools import human, markdown
from tools.sample import load_model
from tools.score import append_scores
from train import Parser
from world import VERBS, World

BANDS = (0, 4, 16, 64, 256, 1024, 4096)  # the things of ranks 0 to 3 are a band, and so on


@torch.no_grad()
def known(model, world):
    """-> (things, verbs) float64: bits of each fact that the model knows, below 0 if it is misled.
    A fact is asked as the beginning of a story."""
    encoding, device = get_tokenizer(), model.rope.device
    values = world.values
    texts = [f"the {name} {verb} {values[fact]}" for name, facts in zip(world.names, world.facts)
             for verb, fact in zip(VERBS, facts)]
    ids = torch.tensor([[encoding.eot_token, *encoding.encode(text)] for text in texts])  # (N,T)
    n, bits = len(values[0]), []  # all words of the world have as many letters
    for tokens in ids.to(device).split(512):
        batch = {"tokens": tokens, "patch_index": torch.full_like(tokens, -1),
                 "doc": torch.ones_like(tokens)}
        x, _ = model.decode(batch)                                               # (512,T,W)
        logits = model.head(x[:, -n - 1:-1]).float().transpose(1, 2)             # (512,V,n)
        loss = F.cross_entropy(logits, tokens[:, -n:], reduction="none").sum(1)  # (512,) nats
        bits.append((math.log(len(values)) - loss.double().cpu()) / math.log(2))
    return torch.cat(bits).view(len(world.names), len(VERBS)).numpy()


def in_bands(bits):
    """(things, verbs) -> the mean bits of a fact in each of BANDS, and the bits of all facts."""
    means = [max(0.0, bits[low:high].mean()) for low, high in pairwise(BANDS)]
    return means, float(np.dot(means, np.diff(BANDS)) * bits.shape[1])


def main(argv=None):
    parser = Parser(prog="python -m tools.facts", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a ckpt.pt")
    parser.add_argument("--json", help="append a row for each run to this file")
    args = parser.parse_args(argv)
    world, rows = World(), []
    for run in args.runs:
        model, data = load_model(run)
        check(data["data"] == "procedural", f"{run}: trained on {data['data']}, whose facts nobody "
              "has counted; name a run of the procedural world")
        means, total = in_bands(known(model, world))
        n = model.num_params()
        rows.append([Path(run).name, human(total), f"{total / n['N']:.4f}",
                     f"{total / n['N_total']:.4f}", *(f"{mean:.1f}" for mean in means)])
        if args.json:
            append_scores(args.json, run, {"facts_bits": total, "facts_bits_n": total / n["N"]})
    print(markdown(["run", "bits", "bits / N", "bits / N_total",
                    *(f"things {low + 1} to {high}" for low, high in pairwise(BANDS))], *rows))
    print("things A to B, counted from the one met most: bits of one of their facts, of 6")


if __name__ == "__main__":
    main()
