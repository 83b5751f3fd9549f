"""Which words of the procedural world a model's loss comes from, and in which its seeds differ.

    python -m tools.words runs/demo/early-w16-d4-4M-s*

The loss of a kind of documents is the sum of what its colours, names, verbs, values, acts and all
other letters contribute, in nats a byte of the kind. Words after a second picture count separately.
For several runs it prints the mean, and the standard deviation in per cent of the kind's loss. The
runs need the same --context, because documents that do not fit the context are left out.
"""
import random
import re

import numpy as np
import torch

from data import PRETRAINING, DataConfig, Procedural, check, collate, encode
from tools import end_with_the_pipe, markdown
from tools.sample import load_model
from train import Parser
from world import ACTS, COLOURS, VERBS


def vocabulary(world):
    """{word: what it is}; no word is two things."""
    known = {"colour": COLOURS, "verb": VERBS, "act": ACTS, "value": world.values,
             "name": world.names}
    return {word: what for what, words in known.items() for word in words}


def words_of(parts, known):
    """The parts of a document -> for each byte, what the word is to which the byte belongs."""
    found, pictures = [], 0
    for part in parts:
        if not isinstance(part, str):
            pictures += 1
            continue
        for word in re.findall(r"[a-z]+|[^a-z]", part):
            what = known.get(word, "other")
            found += [f"change: {what}" if pictures > 1 else what] * len(word)
    return [*found, "other"]  # the end-of-text


@torch.no_grad()
def contributions(model, source, kind, documents):
    """{word: nats a byte of this kind} over the source's first validation documents."""
    rng, rows, words = random.Random(f"val/{kind}"), [], []
    known = vocabulary(source.world)
    for _ in range(documents):
        parts, _ = source.world.document(kind, rng, "val")
        row = source.new_row()
        if row.add(encode(parts, source.encoding), whole=True):
            rows.append(row)
            words += words_of(parts, known)
    if not rows:  # no document of this kind fits the context
        return {"nothing fits": np.nan}
    losses = []
    for i in range(0, len(rows), 64):
        batch = collate(rows[i:i + 64], model.cfg.patch_size)
        losses.append(model({k: v.to(model.rope.device) for k, v in batch.items()}).token_loss)
    losses, words = torch.cat(losses).cpu().numpy(), np.array(words)
    return {word: losses[words == word].sum() / len(losses) for word in {*words}}


def main(argv=None):
    parser = Parser(prog="python -m tools.words", description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a ckpt.pt")
    parser.add_argument("--documents", type=int, default=400, help="of each kind (default: 400)")
    args = parser.parse_args(argv)
    check(args.documents > 0, f"--documents {args.documents}: need at least 1")
    found = {kind: [] for kind in PRETRAINING}
    for run in args.runs:
        model, data = load_model(run)
        check(data["data"] == "procedural", f"{run}: trained on {data['data']}; name a run of the "
              "procedural world, which alone tells what a word is")
        source = Procedural(DataConfig(), 0, model.cfg)
        for kind, sums in found.items():
            sums.append(contributions(model, source, kind, args.documents))
    rows = []
    for kind, sums in found.items():
        words = sorted(set().union(*sums))
        table = np.array([[*(each.get(word, 0) for word in words), sum(each.values())]
                          for each in sums])                                     # (runs, words + 1)
        spread = table.std(0, ddof=min(1, len(sums) - 1))  # 0 for a single run
        total = table[:, -1].mean()
        rows += [[kind, word, f"{mean:.3f}", f"{100 * mean / total:.0f} %",
                  f"{100 * sd / total:.1f} %"]
                 for word, mean, sd in zip([*words, "all"], table.mean(0), spread)]
    head = ["kind", "words", "nats a byte", "of the loss", f"deviation of {len(args.runs)}"]
    print(markdown(head, *rows))


if __name__ == "__main__":
    end_with_the_pipe()
    main()
