"""Continues images and text with a trained model: captions, answers, or plain text.

    python -m tools.sample runs/laptop/RUN --image cat.png --prompt "a photo of"

Dimensions: S pixels of a side.
"""
from pathlib import Path

import torch

from data import check, get_tokenizer, patchify, square
from model import generate, load_model
from train import Parser


def read_image(path, size):
    """Any image file -> uint8 (S,S,3): its centre square, resized, as in validation. SystemExit,
    one line, for a file that cannot be read."""
    from tools.pack import Skip, load_image  # here, because only images need the package pillow
    try:
        image = load_image(Path(path).read_bytes(), size)
    except OSError as error:
        raise SystemExit(f"cannot read the image {path}: {error.strerror}") from None
    if isinstance(image, Skip):
        raise SystemExit(f"cannot read the image {path}: {image}")
    return square(image, size)


def main(argv=None):
    parser = Parser(prog="python -m tools.sample", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", help="directory of one run of train.py, with ckpt.pt")
    parser.add_argument("--image", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompt", default="", help="text after the images")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw among this many, 0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check(args.temperature >= 0 and args.top_k >= 0,
          f"--temperature {args.temperature} --top-k {args.top_k}: need 0 or more")
    model, data = load_model(args.run_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, cfg = get_tokenizer(data["tokenizer"]), model.cfg
    images = [patchify(read_image(path, cfg.image_size), cfg.patch_size) for path in args.image]
    # a caption document in its order: end-of-text as BOS, the images, the text
    parts = [[tokenizer.eot_token], *map(torch.from_numpy, images),
             tokenizer.encode_ordinary(args.prompt)]
    try:
        ids = generate(model, parts, args.max_new_tokens, args.temperature, args.top_k, args.seed,
                       stop=tokenizer.eot_token, n_vocab=tokenizer.n_vocab)
    except ValueError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(args.prompt + tokenizer.decode(ids))


if __name__ == "__main__":
    main()
