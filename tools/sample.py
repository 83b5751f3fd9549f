"""Continues images and text with a trained model: captions, answers, or plain text.

    python -m tools.sample runs/demo/RUN --prompt "the "
    python -m tools.sample runs/real/RUN --image cat.png --prompt "a photo of"
    python -m tools.sample runs/demo/RUN --out sample.png    held-out pictures with its answers

Dimensions: S pixels of a side.
"""
import math
import sys
from itertools import islice
from pathlib import Path

import torch

from data import check, get_tokenizer, patchify, read_meta, square
from model import Model, ModelConfig, generate, read_checkpoint
from train import Parser, code_version


def load_model(run_dir, data_now=None):
    """A run's directory -> its Model, on a GPU if there is one and in eval mode, and its data
    settings (dict). A note on stderr tells if the code was edited. data_now: the packed folder to
    use instead of the run's own, which may have moved, or hold other data by now."""
    def build(ckpt):
        if ckpt["config"].get("made") != {"code": code_version()}:
            print(f"note: other code has trained {run_dir}; today's runs its weights",
                  file=sys.stderr)
        model = Model(ModelConfig(**ckpt["config"]["model"]))
        model.load_state_dict(ckpt["model"])
        return model.eval(), ckpt["config"]["data"]
    model, data = read_checkpoint(run_dir, build)
    data_now = data_now or data["tokenizer"].endswith(".tiktoken") and data["data"]
    if data_now:
        data = use_folder(data, data_now)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), data


def use_folder(data, folder):
    """A run's data settings -> the same for this packed folder. SystemExit if its tokenizer is
    another one, because the model would read wrong ids without a word."""
    meta = read_meta(folder)
    check(data["tokenizer"] == meta["tokenizer"] == "bytes"  # the world has no hash
          or data.get("tokenizer_hash") == meta["tokenizer_hash"],
          f"{folder}: packed with another tokenizer than the run's")
    return {**data, "data": folder, "tokenizer": meta["tokenizer"]}


def read_image(path, size):
    """Any image file -> uint8 (S,S,3): its centre square, resized, as in validation. SystemExit,
    one line, for a file that cannot be read."""
    from tools.pack import Skip, load_image, store_size  # here, because only images need pillow
    try:
        image = load_image(Path(path).read_bytes(), store_size(size))
    except OSError as error:
        image = Skip(error.strerror)
    check(not isinstance(image, Skip), f"cannot read the image {path}: {image}")
    return square(image, size)


def draw_held_out(model, data, tokenizer, out, n=3):
    """A page of n held-out pictures, what the data say of each, and what the model says."""
    from tools.score import exchanges, held_out  # here, because they and the page need pillow
    from tools.show import draw_document, new_page, picture, save_page
    cfg, axes, y = model.cfg, new_page(), 0.0
    documents = held_out(model, data, data["data"], n)
    for _, prompt, truths in islice(exchanges(documents, cfg, tokenizer), n):
        said = generate(model, prompt, 64, stop=tokenizer.eot_token, n_vocab=tokenizer.n_vocab)
        images = [part for part in prompt if isinstance(part, torch.Tensor)]
        read = [i for part in prompt if isinstance(part, list) for i in part]
        asked = tokenizer.decode([i for i in read if i != tokenizer.eot_token]).strip()
        texts = (("context", asked + "\n" if asked else ""),
                 ("target", f"the data say:   {truths[0]}\n"),
                 ("nats", f"the model says: {tokenizer.decode(said).strip()}"))
        segments = [*((0, "image", i, 0) for i in range(len(images))),
                    *((0, kind, text, 0) for kind, text in texts if text)]
        pictures = picture(torch.stack(images), cfg.patch_size, cfg.image_size) if images else ()
        y = draw_document(axes, y, segments, pictures, str, 1.5) + 0.5
    save_page(axes, y, out)


def sampler(temperature, top_k, seed):
    """-> a function from logits (V,) to an id. It draws on the CPU, where a seed means the same on
    every machine, among the top_k likeliest ids (0: all). Temperature 0 takes the likeliest id."""
    generator = torch.Generator().manual_seed(seed)

    def draw(logits):
        least = logits.sort().values[-min(top_k, len(logits))]  # the least of all if top_k is 0
        logits = logits.masked_fill(logits < least, -math.inf)
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
    return draw if temperature else torch.argmax


def main(argv=None):
    parser = Parser(prog="python -m tools.sample", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="directory of one run of train.py, with ckpt.pt")
    parser.add_argument("--image", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt", default="", help="text after the images")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among so many tokens; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="packed folder, if the run's has moved")
    parser.add_argument("--out", help="draw three held-out pictures and their captions here")
    args = parser.parse_args(argv)
    check(args.temperature >= 0 and args.top_k >= 0,
          f"--temperature {args.temperature} --top-k {args.top_k}: need 0 or more")
    model, data = load_model(args.run_dir, args.data)
    tokenizer, cfg = get_tokenizer(data["tokenizer"]), model.cfg
    if args.out:
        check(not args.image and not args.prompt, "--out draws held-out pictures: leave out "
              "--image and --prompt")
        return draw_held_out(model, data, tokenizer, args.out)
    if args.image and data["data"] == "procedural":
        print("note: this model knows the procedural world only; for photos, train on photos",
              file=sys.stderr)
    images = [patchify(read_image(path, cfg.image_size), cfg.patch_size) for path in args.image]
    # a caption document in its order: end-of-text as BOS, the images, the text
    parts = [[tokenizer.eot_token], *map(torch.from_numpy, images),
             tokenizer.encode_ordinary(args.prompt)]
    try:
        ids = generate(model, parts, args.max_new_tokens, tokenizer.eot_token, tokenizer.n_vocab,
                       sampler(args.temperature, args.top_k, args.seed))
    except ValueError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(args.prompt + tokenizer.decode(ids))


if __name__ == "__main__":
    main()
