"""Converts weights of open_lm or DCLM, so that train.py can start from them (paper 3.3).

    python -m tools.convert dclm_1b.pt --out dclm_1b_ours.pt
    python train.py --init dclm_1b_ours.pt ...

Reads a state dict of mlfoundations/open_lm with DCLM's choices: norms without bias, QK-norm,
SwiGLU, positions "rotary". It may lie under "state_dict", and its names may begin with "module." or
"model.". Writes {"config": {"model": sizes}, "model": weights}, which train.py --init reads.

Dimensions: Hd head dim.
"""
import re
from pathlib import Path

import torch

from data import check
from model import ModelConfig, ffn_hidden, on_meta
from train import Parser, config_of, write_whole

# open_lm's modules -> ours. One matrix of open_lm can hold several of ours, one after another.
OPEN_LM = {"tok_embeddings": "embedding", "in_proj": "q k v", "out_proj": "out",
           "w12": "w_gate w_up", "w3": "w_down", "output": "head", "q_norm": "q_norm",
           "k_norm": "k_norm", "norm": "norm", "attention_norm": "attention_norm",
           "ffn_norm": "ffn_norm"}


def convert(state, heads=0):
    """State dict of open_lm -> the fields of ModelConfig that it decides (dict), and the weights
    (our parameter name -> tensor). `heads` counts only if the file has no inv_freq, from which the
    number of heads follows. SystemExit if our decoder has no place for something in the file."""
    state = {re.sub(r"^((module|model)\.)+", "", name): tensor
             for name, tensor in state.get("state_dict", state).items()}
    fields = sizes(state, heads)
    weights = {}
    for name, tensor in state.items():
        path, module, kind = f"..{name}".rsplit(".", 2)
        if kind == "inv_freq" or kind == "bias" and not tensor.any():
            continue
        check(kind == "weight" and module in OPEN_LM, f"this decoder has no place for its {name}")
        path = path.replace("layers", "blocks").replace("feed_forward", "ffn").lstrip(".")
        parts = OPEN_LM[module].split()
        for part, piece in zip(parts, tensor.chunk(len(parts))):
            if part in ("q", "k", "q_norm", "k_norm"):
                piece = reorder_rotary(piece, fields["heads"])
            weights[f"{path}.{part}.weight".lstrip(".")] = piece.clone()  # not all of a fused one
    return fields, weights


def sizes(state, heads):
    """The fields of ModelConfig that the shapes decide."""
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w3.weight"):
        check(name in state, f"it has no {name}")
    vocab_size, width = state["tok_embeddings.weight"].shape
    hidden = state["layers.0.feed_forward.w3.weight"].shape[1]
    multiple = next((m for m in (256, 16) if ffn_hidden(width, m) == hidden), 0)
    check(multiple, f"its ffn hidden size {hidden} is not 8/3 of its width {width}, rounded up to "
                    "256 or 16")
    rates = state.get("layers.0.attention.pos_embed.inv_freq", ())               # (Hd/2,)
    heads = width // (2 * len(rates)) if len(rates) else heads
    check(heads and width % (2 * heads) == 0, f"{heads} heads for width {width}: give --heads")
    depth = sum("in_proj" in name for name in state)
    return dict(width=width, depth=depth, heads=heads, vocab_size=vocab_size,
                mlp_multiple=multiple)


def reorder_rotary(rows, heads):
    """The rows of a query or key weight in the order of our RoPE. Within a head, open_lm's RoPE
    turns row j together with row j + Hd/2, and ours turns row 2j together with row 2j + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def main(argv=None):
    parser = Parser(prog="python -m tools.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the .pt file of open_lm / DCLM")
    parser.add_argument("--heads", type=int, default=0, help="attention heads, if no inv_freq "
                                                             "in the file tells them")
    parser.add_argument("--out", required=True, help="the file to write, for train.py --init")
    args = parser.parse_args(argv)
    try:  # weights_only, because a file from elsewhere must not run code
        state = torch.load(args.source, map_location="cpu", weights_only=True)
        fields, weights = convert(state, args.heads)
    except (Exception, SystemExit) as error:  # a file of another format can raise nearly anything
        reason = " ".join(str(error).split())[:120]
        raise SystemExit(f"{args.source} cannot be read as weights of open_lm: {reason}") from None
    missing = on_meta(config_of(ModelConfig, fields)).state_dict().keys() - weights.keys()
    missing = sorted(name for name in missing if not name.startswith("vision."))
    check(not missing, f"{args.source} has nothing for {', '.join(missing[:2])}: only models of "
          "open_lm with QK-norm and untied weights convert")
    checkpoint = {"config": {"model": fields}, "model": weights}
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.out), lambda path: torch.save(checkpoint, path))
    except OSError as error:
        raise SystemExit(f"cannot write {args.out}: {str(error).splitlines()[0]}") from None
    print(f"wrote {args.out}: " + ", ".join(f"{name} {value}" for name, value in fields.items()))


if __name__ == "__main__":
    main()
