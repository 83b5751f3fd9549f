"""Trained models answer questions or caption pictures, and are scored (paper, section 5).

    python -m tools.score runs/sft/* --json runs/sft/scores.jsonl
    python -m tools.score runs/sft/RUN --data vqa.json

--data is a json in LLaVA's layout (where a record of one question may have several "answers", as in
VQA), a folder of tools.pack or the procedural world. On a folder or the world, a run whose mixture
has conversations answers held-out questions, and any other run captions held-out pictures. --json
appends a row for tools.table to a file, with what the run's own row says and the scores.

Dimensions:  S image side in pixels   P patches in an image
"""
import json
import math
import re
from collections import Counter
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (DataConfig, Packed, Procedural, check, encode, expand, get_tokenizer, patchify,
                  square)
from model import generate
from tools.pack import LAYOUTS, Skip, load_image, read_source, store_size
from tools.sample import load_model
from train import Parser, finished

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe, the colon and the full stop
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = {  # those that the official evaluation knows, by their ending
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
           "wo would", "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'d": "he how it someone something there they where who you", "'re": "there they what why you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock 'ow's'at 'twas y'all"}
CONTRACTED = {  # {the word with one of its apostrophes left out: the word as it should be}
    word[:at.start()] + word[at.end():]: word
    for ending, starts in CONTRACTIONS.items() for word in (x + ending for x in starts.split())
    for at in re.finditer("'", word)}


def vqa_normalise(text):
    """VQA v2's official normalisation. A mark is deleted if a space stands beside it somewhere in
    the text, or if there is a comma between digits; otherwise it becomes a space. A full stop stays
    only before a digit."""
    text = cleaned = re.sub(r"[\n\t]", " ", text).strip()
    for mark in PUNCTUATION:
        delete = f" {mark}" in text or f"{mark} " in text or re.search(r"\d,\d", text)
        cleaned = cleaned.replace(mark, "" if delete else " ")
    words = re.sub(r"\.(?!\d)", "", cleaned).lower().split()
    words = [NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTED.get(word, word) for word in words)


def vqa_accuracy(answer, references):
    """VQA v2's accuracy, 0..1: min(references that equal the answer / 3, 1), averaged over leaving
    out each reference in turn. With a single reference it is equality. (The official tool
    normalises only where the references differ.)"""
    same = [vqa_normalise(answer) == vqa_normalise(text) for text in references]
    rests = [sum(same) - one for one in same] if len(same) > 1 else [3 * sum(same)]
    return float(np.mean([min(rest / 3, 1) for rest in rests]))


def cider_d(candidates, references):
    """CIDEr-D (Vedantam et al. 2015), 0..10, of a text for each picture against a list of texts for
    each: cosines of tf-idf vectors of n-grams, counts clipped to the reference's, with a Gaussian
    penalty on the difference in length. The idf is of these references, so a single picture scores
    0. The official tool has another tokenizer, the Penn Treebank's, so do not compare scores."""
    def ngrams(text):
        words = re.findall(r"[\w']+", text.lower())
        return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]
    references = [[ngrams(text) for text in texts] for texts in references]
    pictures = Counter(chain(*({*chain(*chain(*texts))} for texts in references)))  # with a gram

    def similarity(a, b):
        total = 0.0
        for counts in zip(a, b):
            x, y = ({gram: n * math.log(len(references) / max(pictures[gram], 1))
                     for gram, n in count.items()} for count in counts)
            size = math.hypot(*x.values()) * math.hypot(*y.values())
            total += sum(min(x[gram], y[gram]) * y[gram] for gram in x.keys() & y) / (size or 1)
        return 10 * total / 4 * math.exp(-(a[0].total() - b[0].total()) ** 2 / (2 * 6 ** 2))
    return float(np.mean([np.mean([similarity(ngrams(said), text) for text in texts])
                          for said, texts in zip(candidates, references)]))


def held_out(model, data, source, n):
    """Validation documents as (kind, tokens, patch, target, images, None), n of each kind."""
    shares = DataConfig(mixture=data["mixture"]).shares
    asked = "conversation" if "conversation" in shares else "caption"
    kind_of_source = Procedural if source == "procedural" else Packed
    found = kind_of_source(DataConfig(source, val_rows=n), 0, model.cfg)
    ours, theirs = get_tokenizer(data["tokenizer"]), found.encoding
    check((ours._pat_str, ours._mergeable_ranks) == (theirs._pat_str, theirs._mergeable_ranks),
          f"{source}: packed with another tokenizer than the run's")
    for kind in found.validated_as.get(asked, [asked]):
        rows = [found.val_row(kind, i) for i in range(found.n_rows(kind, "val"))]
        places = [(row, row.doc == i + 1) for row in rows for i in range(row.n_docs)]
        # what does not start with end-of-text is the rest of a document that was cut
        places = [(row, at) for row, at in places if row.tokens[at][0] == row.eot]
        # the world's documents are all alike, but of packed ones we take some from all over the set
        step = 1 if source == "procedural" else max(1, len(places) / n)
        for row, at in (places[int(i * step)] for i in range(min(n, len(places)))):
            yield kind, row.tokens[at], row.patch[at], row.target[at], row.images, None


def conversations(path, cfg, encoding):
    """Such documents from a json, laid out as in training, with the "answers" of its records."""
    for key, parts, record in read_source(path, "conversation"):
        parts = [load_image(x, store_size(cfg.image_size)) if isinstance(x, bytes) else x
                 for x in parts]
        for part in parts:
            check(not isinstance(part, Skip), f"{path}, record {key}: {part}")
        document = encode([square(part, cfg.image_size) if isinstance(part, np.ndarray) else part
                           for part in parts], encoding)
        ids, patch, target, _ = expand(document, encoding.eot_token, cfg.n_patches)
        answers = record.get("answers") or ()
        answers = [str(answer["answer"] if isinstance(answer, dict) else answer)  # as VQA has them
                   for answer in ([answers] if isinstance(answers, str) else answers)]
        yield "question", ids, patch, target, document.images, answers


def exchanges(documents, cfg, encoding):
    """(kind, prompt for generate(), references). An answer is what the model was to predict up to
    an end-of-text, and the prompt is all before it. So a caption is the answer to its picture."""
    for kind, tokens, patch, target, images, answers in documents:
        keep = (patch < 0) | (patch % cfg.n_patches == 0)  # an image once, not once a patch
        images = [torch.from_numpy(patchify(image, cfg.patch_size)) for image in images]
        parts = [[int(token)] if at < 0 else images[at // cfg.n_patches]
                 for token, at in zip(tokens[keep], patch[keep])]
        asked = np.flatnonzero(target >= 0)
        ends = np.flatnonzero(target[asked] == encoding.eot_token)
        for first, end in zip([0, *ends + 1], ends):
            truth = encoding.decode(target[asked[first:end]].tolist()).strip()
            yield (kind, parts[:keep[:asked[first] + 1].sum()],
                   answers if answers and len(ends) == 1 else [truth])


def answer_all(run, source, n, max_new_tokens):
    """The folder of a run -> the source that was asked, and a list of (kind, what the model says,
    references)."""
    packed = source not in (None, "procedural") and Path(source).is_dir()
    model, data = load_model(run, source if packed else None)
    source, encoding, said = source or data["data"], get_tokenizer(data["tokenizer"]), []
    documents = islice(conversations(Path(source), model.cfg, encoding), n) \
        if source.endswith(LAYOUTS["conversation"][2]) else held_out(model, data, source, n or 64)
    for kind, prompt, references in tqdm(exchanges(documents, model.cfg, encoding), disable=None):
        ids = []
        with suppress(ValueError):  # a prompt that fills the context gets the answer ""
            ids = generate(model, prompt, max_new_tokens, stop=encoding.eot_token,
                           n_vocab=encoding.n_vocab)
        said.append((kind, encoding.decode(ids).strip(), references))
    check(said, f"{source}: nothing to answer")
    return source, said


def scores(said):
    """{accuracy_KIND, ..., accuracy, cider_d, n_scored} of (kind, answer, references)."""
    right = {}
    for kind, answer, references in said:
        right.setdefault(kind, []).append(vqa_accuracy(answer, references))
    row = {f"accuracy_{kind}": float(np.mean(right[kind])) for kind in sorted(right)}
    _, answers, references = zip(*said)
    return {**row, "accuracy": float(np.mean([*chain(*right.values())])),
            "cider_d": cider_d(answers, references), "n_scored": len(said)}


def append_scores(path, run, scores):
    """Adds a row for tools.table to a file: what the run's own row says, and its scores."""
    folder = Path(run).resolve()
    trained = finished(folder.parent).get(folder.name)
    if not trained:
        return print(f"note: {run} gets no row in {path}, because {folder.parent}/results.jsonl "
                     "has none: it has not ended")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"study": folder.parent.name, **trained, **scores}) + "\n")


def main(argv=None):
    parser = Parser(prog="python -m tools.score", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs, each with a ckpt.pt")
    parser.add_argument("--data", help="FILE.json, procedural or a packed folder; default: its own")
    parser.add_argument("-n", type=int, help="documents of each kind; default: 64, of a json all")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", help="append a row for each run to this file")
    args = parser.parse_args(argv)
    check(args.data in (None, "procedural") or Path(args.data).exists(), f"{args.data} does not "
          "exist: give a json in LLaVA's layout, a packed folder or procedural")
    check(args.n is None or args.n > 0, f"-n {args.n}: need at least 1")
    check(not args.json or not Path(args.json).is_dir(), f"--json {args.json} is a folder: name a "
          "file")  # or the answers would be lost
    runs = [run for run in args.runs if Path(run, "ckpt.pt").is_file()] or args.runs[:1]
    for run in args.runs:
        if run not in runs:
            print(f"{run} is skipped: it has no ckpt.pt")
            continue
        source, said = answer_all(run, args.data, args.n, args.max_new_tokens)
        row = scores(said)
        for _, answer, references in said[:3]:
            print(f"true: {' | '.join(references)!r}\nsaid: {answer!r}")
        print(f"{Path(run).name}: " + ", ".join(f"{name} {x:.4g}" for name, x in row.items()))
        if args.json:
            append_scores(args.json, run, {**row, "scored": source})


if __name__ == "__main__":
    main()
