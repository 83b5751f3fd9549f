"""A trained model answers questions or captions pictures, and is scored (paper, section 7).

    python results/score.py runs/sft/RUN --data vqa.json --json scores.jsonl

--data: a json in LLaVA's layout (a record of one question may have "answers", several references,
as VQA has), a folder of data.py pack or the procedural world: there held-out questions if the run's
mixture has any, else held-out pictures. --json adds a row for results/table.py to a file.
"""

import json
import math
import re
import sys
from collections import Counter
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import (DataConfig, Document, Loader, Parser, encode, expand,
                  get_tokenizer, patchify, read_samples, read_source, square)
from model import generate, load_model
from results.table import lines_of

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
CONTRACTED = {word[:at.start()] + word[at.end():]: word  # one apostrophe left out: as it should be
              for end, starts in CONTRACTIONS.items() for word in (x + end for x in starts.split())
              for at in re.finditer("'", word)}


def vqa_normalise(text):
    """VQA v2's official normalisation. A mark is deleted if a space stands beside it anywhere, or a
    comma between digits; else it becomes a space. A full stop stays only before a digit."""
    text = cleaned = re.sub(r"[\n\t]", " ", text).strip()
    for mark in PUNCTUATION:
        delete = f" {mark}" in text or f"{mark} " in text or re.search(r"\d,\d", text)
        cleaned = cleaned.replace(mark, "" if delete else " ")
    words = re.sub(r"\.(?!\d)", "", cleaned).lower().split()
    words = [NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTED.get(word, word) for word in words)


def vqa_accuracy(answer, references):
    """VQA v2's, 0..1: min(references that equal the answer / 3, 1), the mean over leaving out each;
    with one reference, equality. (Its tool normalises only where the references differ.)"""
    same = [vqa_normalise(answer) == vqa_normalise(text) for text in references]
    rests = [sum(same) - one for one in same] if len(same) > 1 else [3 * sum(same)]
    return float(np.mean([min(rest / 3, 1) for rest in rests]))


def cider_d(candidates, references):
    """CIDEr-D (Vedantam et al. 2015), 0..10, of a text a picture against a list of texts a picture:
    cosines of tf-idf vectors of n-grams, counts clipped to the reference's, with a Gaussian penalty
    on the difference in length. idf is of these references: a single picture scores 0. The official
    tool has the Penn Treebank's tokenizer and we not, so the two are not to be compared."""
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
    asks = re.fullmatch(r"\d+-\d+-\d+-[1-9]\d*", data["mixture"])  # it was trained on questions
    loader = Loader(DataConfig(source, "0-0-0-100" if asks else "100-0-0", val_rows=n), 0,
                    model.cfg.context, model.cfg.image_size, model.cfg.patch_size)
    ours, theirs = get_tokenizer(data["tokenizer"]), loader.encoding
    if (ours._pat_str, ours._mergeable_ranks) != (theirs._pat_str, theirs._mergeable_ranks):
        raise SystemExit(f"{source}: packed with another tokenizer than the run's")
    for kind in loader.val_kinds() if asks else ["caption"]:
        rows = (loader.fill(kind, i, "val") for i in range(loader.val_rows(kind)))
        places = ((row, row.doc == i + 1) for row in rows for i in range(row.n_docs))
        for row, at in islice(places, n):
            if row.tokens[at][0] == loader.eot:  # else it is the rest of a document that was cut
                yield kind, row.tokens[at], row.patch[at], row.target[at], row.images, None


def conversations(path, cfg, encoding):
    """The same of a json, with its "answers", laid out as data.py does for training."""
    def raw():
        for _, record, _ in read_samples(Path(path)):
            yield json.loads(record) if isinstance(record, bytes) else record

    records = raw()  # read only where the reader below finds nothing wrong
    for key, parts in read_source(Path(path), "conversation"):
        ids, images, bad = encode(parts, encoding, cfg.image_size)
        if bad:
            raise SystemExit(f"{path}, record {key}: {bad[0]}")
        images = [square(image, cfg.image_size) for image in images]
        arrays = expand(Document(np.array(ids), images), encoding.eot_token, cfg.n_patches)
        answers = next(records).get("answers")  # texts, or as VQA has them
        answers = answers and [a["answer"] if isinstance(a, dict) else a for a in answers]
        yield "question", *arrays[:3], images, answers


def exchanges(documents, cfg, encoding):
    """(kind, prompt for generate(), references): an answer is what the model was to predict up to
    an end-of-text, the prompt all before it. So a caption is the answer to its picture."""
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


def main(argv=None):
    parser = Parser(prog="score.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of one run, with ckpt.pt")
    parser.add_argument("--data", help="FILE.json, procedural or a packed folder; default: its own")
    parser.add_argument("-n", type=int, help="documents of each kind; default: 64, of a json all")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", help="append the numbers to this file")
    args = parser.parse_args(argv)
    model, data = load_model(args.run)
    if args.data not in (None, "procedural") and not Path(args.data).exists():
        raise SystemExit(f"{args.data} does not exist: give a json in LLaVA's layout, a packed "
                         "folder or procedural")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    source, encoding, said = args.data or data["data"], get_tokenizer(data["tokenizer"]), []
    documents = islice(conversations(source, model.cfg, encoding), args.n) \
        if source.endswith((".json", ".jsonl")) else held_out(model, data, source, args.n or 64)
    for kind, prompt, references in tqdm(exchanges(documents, model.cfg, encoding), disable=None):
        ids = []
        with suppress(ValueError):  # a prompt that fills the context: "", a wrong answer
            ids = generate(model, prompt, args.max_new_tokens, stop=encoding.eot_token,
                           n_vocab=encoding.n_vocab)
        said.append((kind, encoding.decode(ids).strip(), references))
    if not said:
        raise SystemExit(f"{source}: nothing to answer")
    kinds, *texts = zip(*said)
    right = np.array([vqa_accuracy(*pair) for pair in zip(*texts)])
    row = {f"accuracy_{kind}": right[np.array(kinds) == kind].mean() for kind in sorted({*kinds})}
    row |= {"accuracy": right.mean(), "cider_d": cider_d(*texts), "n_scored": len(said)}
    for kind, text, references in said[:3]:
        print(f"true: {' | '.join(references)!r}\nsaid: {text!r}")
    print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if args.json:
        folder = Path(args.run).resolve()
        results = folder.parent / "results.jsonl"
        known = {line["run"]: line for line in lines_of(results)} if results.exists() else {}
        trained = known.get(folder.name, {"run": folder.name})
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(trained | row | {"scored": source}) + "\n")


if __name__ == "__main__":
    main()
