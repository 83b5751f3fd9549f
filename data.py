"""Documents (captions, interleaved, text, conversations), packed into rows of fixed length.

    python data.py pack --captions 'A/*.tar' --interleaved B --text 'C/*.jsonl.zst' --out data/real
    python data.py show procedural -n 4 --out page.png

In reading order: the procedural world, rows and batches; then real data: tokenizers, readers,
images, pack, Packed; then the page that `show` draws and the command lines.

Dimensions:  B rows in a batch   T context, positions in a row   P patches in an image
             I images in a batch   S image side in pixels   h, w stored height and width
             L tokens in a document   K targets in a batch   p patch side   n patches along a side
"""

import argparse
import base64
import bisect
import dataclasses
import difflib
import gzip
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import threading
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from glob import escape, glob
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm


KINDS = ("caption", "interleaved", "text", "conversation")  # the order of a mixture: C-I-T, and
PRETRAINING = KINDS[:3]  # for finetuning the last; the paper's loss is the mean over these three
QUESTIONS = ("colour", "count", "relation", "compare")  # the procedural world's conversations
IMAGE = -1  # stands for one whole image in Document.tokens; the row builder expands it to P patches
READ = -2   # READ - id: this token is only read, not predicted (a question)
MAX_PIXELS = 50_000_000   # a larger picture is skipped before it is decoded ("image bomb")
MAX_BYTES = 200_000_000   # nothing is read past this from a picture or a member of an archive
MIN_SIDE = 8              # smaller pictures are tracking pixels and rulers, not images
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Document:
    """tokens int32 (L,), IMAGE where an image stands, READ - id for an id that is no target;
    images: uint8 (S, S, 3) each, in order;
    nll float32 (L + 1,): the generator's own surprise in nats at each token and at the document's
    end, 0 where it had no choice; None where nobody knows (real data)."""

    tokens: np.ndarray
    images: list
    nll: np.ndarray | None = None


class Question(str):
    """A part of a document that is read and not predicted (supervised finetuning, section 7)."""


class Answer(str):
    """What a question asks for; the model has to predict it and the end-of-text after it."""


def turn(question, answer):
    """One exchange of a conversation, laid out the same in real and procedural data."""
    return Question(f"\nquestion: {question}\nanswer:"), Answer(f" {answer}")


# ---------------------------------------------------------------------------------------------
# The procedural world: infinite documents whose irreducible loss is known
# ---------------------------------------------------------------------------------------------

COLOURS = {
    "red": (250, 90, 90), "green": (90, 250, 90), "blue": (90, 90, 250), "white": (250, 250, 250),
    "yellow": (250, 250, 90), "pink": (250, 90, 250), "cyan": (90, 250, 250),
    "orange": (250, 170, 90),
}  # all brighter than the ground, so that one linear layer can see a shape whatever its colour
VERBS = ("eats", "fears", "likes", "makes")
COUNTS = ("none", "one", "two", "three", "four", "five")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GRID = 4  # a scene is GRID x GRID cells, so that with S / patch_size = 4 a patch sees a whole thing


class Writer:
    """Collects a document's text and what each choice cost.

    Every random choice that the *text* reveals goes through `choose`, which charges -log p of what
    was drawn to the next byte written. Choices that an image has already shown are not charged:
    the reader can see them. So the sum of the charges is -log p(text | images), exactly, provided
    that two different choices never give the same text, which holds for every sentence below."""

    def __init__(self, rng):
        self.rng, self.parts, self.images, self.pending = rng, [], [], 0.0

    def choose(self, probabilities):
        """Index drawn from a list of probabilities; charged."""
        u, i = self.rng.random(), 0
        while i < len(probabilities) - 1 and u >= probabilities[i]:
            u, i = u - probabilities[i], i + 1
        self.charge(probabilities[i])
        return i

    def charge(self, probability):
        self.pending -= float(np.log(probability))

    def say(self, text):
        self.parts.append((text, self.pending))
        self.pending = 0.0

    def show(self, image):
        self.images.append(image)
        self.parts.append((None, 0.0))

    def document(self):
        tokens, nll = [], []
        for text, cost in self.parts:
            ids = [IMAGE] if text is None else list(text.encode())
            tokens += [READ - i for i in ids] if isinstance(text, Question) else ids
            nll += [cost] + [0.0] * (len(ids) - 1)
        nll.append(self.pending)  # what it cost to stop here
        return Document(np.array(tokens, np.int32), self.images, np.array(nll, np.float32))


class World:
    """A world of THINGS, each with a name, a sprite and facts; ours (the paper uses web data).

    Things are met with Zipfian frequency, so that there is always a rarer name, sprite or fact left
    to learn: that is what makes the loss fall as a power law in both N and D rather than drop to
    its floor (Hutter 2021, Michaud et al. 2023). The world itself never changes with the run's
    seed: the seed only picks which documents about it are read."""

    THINGS, VALUES, ZIPF, HEAD = 4096, 64, 1.5, 4

    def __init__(self, image_size=32):
        if image_size % GRID or image_size < 8 * GRID:  # smaller, two sprites could look alike
            raise SystemExit(f"--image-size {image_size}: the procedural world needs a multiple of "
                             f"{GRID}, at least {8 * GRID}")
        rng = np.random.default_rng(2504_07951)
        words = make_words(rng, self.THINGS + self.VALUES)
        self.values, self.names = words[:self.VALUES], words[self.VALUES:]
        self.facts = rng.integers(self.VALUES, size=(self.THINGS, len(VERBS)))
        sprites = rng.random((self.THINGS, 8, 8)) < 0.5  # ~32 bits apart: noise can't confuse two
        cell = image_size // GRID
        near = np.arange(cell) * 8 // cell  # nearest neighbour
        self.sprites = sprites[:, near][:, :, near]  # (THINGS, cell, cell)
        p = (np.arange(self.THINGS) + self.HEAD) ** -self.ZIPF
        self.p = p / p.sum()
        self.friend = rng.choice(self.THINGS, size=self.THINGS, p=self.p)
        self.cumulative = np.cumsum(self.p).tolist()
        grey = rng.integers(12, 40, size=(64, 1, 1, 1))
        noise = rng.integers(-12, 13, size=(64, image_size, image_size, 3))
        self.backgrounds = (grey + noise).astype(np.uint8)
        self.cell = cell

    # -- scenes ----------------------------------------------------------------------------------

    def thing(self, rng):
        return min(bisect.bisect(self.cumulative, rng.random()), self.THINGS - 1)

    def scene(self, rng, split):
        """{cell: (thing, colour)} with one to three things."""
        while True:
            scene, last = {}, None
            cells = rng.sample(range(GRID * GRID), rng.randint(1, 3))
            for cell in sorted(cells):
                friend = last is not None and rng.random() < 0.5
                last = int(self.friend[last]) if friend else self.thing(rng)
                scene[cell] = (last, rng.randrange(len(COLOURS)))
            if self.belongs(scene, split):
                return scene

    def belongs(self, scene, split):
        """A scene belongs to one split by its hash, so no picture of the validation set is ever
        trained on; as a text's probability given its pictures does not depend on this, the floor
        stays exact."""
        return held_out(sorted(scene.items())) == (split == "val")

    def draw(self, scene, rng):
        """uint8 (S, S, 3)."""
        canvas, c = self.backgrounds[rng.randrange(64)].copy(), self.cell
        rgb = list(COLOURS.values())
        for cell, (thing, colour) in scene.items():
            y, x = cell // GRID * c, cell % GRID * c
            canvas[y:y + c, x:x + c][self.sprites[thing]] = rgb[colour]
        return canvas

    # -- documents -------------------------------------------------------------------------------

    def document(self, kind, rng, split="train"):
        writer = Writer(rng)
        getattr(self, kind)(writer, split)
        return writer.document()

    def caption(self, w, split):
        """One picture and what it shows in reading order, perhaps with a fact about one thing."""
        scene = self.scene(w.rng, split)
        w.show(self.draw(scene, w.rng))
        self.describe(w, scene)
        return scene

    def interleaved(self, w, split):
        """A captioned picture, then the same scene with one change, once or twice: what changed
        can only be told by comparing the last two pictures. It starts as a caption does, and where
        it differs comes an image, which is no target: so a reader who does not know the kind
        of the document loses nothing, and the floor is the same for any mixture."""
        scene = self.caption(w, split)
        for _ in range(w.rng.randint(1, 2)):
            scene, what = self.change(scene, w.rng, split)
            w.show(self.draw(scene, w.rng))
            w.say(f" {what} now {COUNTS[len(scene)]}.")

    def text(self, w, split):
        """A walk from thing to thing, telling facts. Held out by its own words."""
        while True:
            start = Writer(w.rng)
            self.story(start)
            if held_out([text for text, _ in start.parts]) == (split == "val"):
                w.parts, w.pending = start.parts, start.pending
                return

    def conversation(self, w, split):
        """A question whose answer follows from the pictures: its floor is 0."""
        getattr(self, w.rng.choice(QUESTIONS))(w, split)

    def ask(self, w, scenes, question, answer):
        for scene in scenes:
            w.show(self.draw(scene, w.rng))
        for part in turn(question, answer):
            w.say(part)

    def colour(self, w, split):
        scene = self.scene(w.rng, split)
        while len({thing for thing, _ in scene.values()}) < len(scene):  # "the" would be unclear
            scene = self.scene(w.rng, split)
        thing, colour = scene[w.rng.choice(sorted(scene))]
        self.ask(w, [scene], f"what colour is the {self.names[thing]}?", list(COLOURS)[colour])

    def count(self, w, split):
        scene = self.scene(w.rng, split)
        self.ask(w, [scene], "how many things?", COUNTS[len(scene)])

    def relation(self, w, split):
        scene = {}
        while len({thing for thing, _ in scene.values()}) < max(2, len(scene)):
            scene = self.scene(w.rng, split)
        here, there = w.rng.sample(sorted(scene), 2)
        down, right = (a - b for a, b in zip(divmod(here, GRID), divmod(there, GRID)))
        vertical = abs(down) > abs(right) or abs(down) == abs(right) and w.rng.random() < 0.5
        names = [self.names[scene[cell][0]] for cell in (here, there)]
        above_or_left = (down if vertical else right) < 0
        question = f"is the {names[0]} {'above' if vertical else 'left of'} the {names[1]}?"
        self.ask(w, [scene], question, "yes" if above_or_left else "no")

    def compare(self, w, split):
        act, said, after = w.rng.choice(("left", "came", "turned", "moved")), "", {}
        while act not in said or not self.belongs(after, split):  # both anew: all acts as likely
            before = self.scene(w.rng, split)
            after, what = self.any_change(dict(before), w.rng)
            said = re.search(r"(left|came|moved|turned \w+),$", what)[1]
        self.ask(w, [before, after], "what changed?", f"one {said}")

    def story(self, w):
        thing = self.thing(w.rng)
        w.charge(self.p[thing])
        w.say(f"the {self.names[thing]}")
        for _ in range(7):
            self.say_fact(w, thing)
            act = w.choose([0.1, 0.65, 0.25])
            if act == 0:
                return
            if act == 1:
                w.say(" it")
                continue
            known, other = int(self.friend[thing]), None
            other = known if w.rng.random() < 0.5 else self.thing(w.rng)
            w.charge(0.5 * (other == known) + 0.5 * self.p[other])  # both ways lead to a friend
            w.say(f" it met the {self.names[other]}")
            w.say(". it")
            thing = other
        self.say_fact(w, thing)

    # -- sentences -------------------------------------------------------------------------------

    def noun(self, scene_item):
        thing, colour = scene_item
        return f"{list(COLOURS)[colour]} {self.names[thing]}"

    def describe(self, w, scene):
        """"a red mivo, a gold pelu; the pelu eats sodi." The mark says whether a fact follows, so
        that the end of a caption is no choice (see `interleaved`)."""
        with_places = w.choose([0.7, 0.3])
        for i, cell in enumerate(sorted(scene)):
            row, column = cell // GRID >= GRID // 2, cell % GRID >= GRID // 2
            place = f" {PLACES[2 * row + column]}" if with_places else ""
            w.say(f"{', ' if i else ''}a {self.noun(scene[cell])}{place}")
        if w.choose([0.5, 0.5]):
            return w.say(".")
        things = sorted({thing for thing, _ in scene.values()})
        w.say("; the")
        thing = things[w.choose([1 / len(things)] * len(things))]
        w.say(f" {self.names[thing]}")
        self.say_fact(w, thing)

    def say_fact(self, w, thing):
        verb = w.choose([1 / len(VERBS)] * len(VERBS))
        w.say(f" {VERBS[verb]}")
        w.say(f" {self.values[self.facts[thing, verb]]}.")

    def change(self, scene, rng, split):
        """(new scene of the same split, what a viewer of both pictures would say)."""
        while True:
            changed, what = self.any_change(dict(scene), rng)
            if self.belongs(changed, split):
                return changed, what

    def any_change(self, scene, rng):
        free = rng.choice([c for c in range(GRID * GRID) if c not in scene])
        act = rng.choice(("left", "came", "turned", "moved")) if scene else "came"
        cell = rng.choice(sorted(scene)) if scene else free
        noun = self.noun(scene[cell]) if scene else ""
        if act == "left":
            del scene[cell]
            return scene, f"the {noun} left,"
        if act == "came":
            scene[free] = (self.thing(rng), rng.randrange(len(COLOURS)))
            return scene, f"a {self.noun(scene[free])} came,"
        if act == "moved":
            scene[free] = scene.pop(cell)
            return scene, f"the {noun} moved,"
        thing, old = scene[cell]
        scene[cell] = (thing, (old + rng.randrange(1, len(COLOURS))) % len(COLOURS))
        return scene, f"the {noun} turned {list(COLOURS)[scene[cell][1]]},"


def make_words(rng, n):
    """n distinct pseudo-words, the frequent ones first and shorter."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = {}
    while len(words) < n:
        size = 2 + (len(words) > 800)
        words["".join(rng.choice(syllables, size))] = None
    return list(words)


def held_out(content):
    """One in sixteen by a hash that is the same on every machine (unlike Python's own)."""
    return zlib.crc32(repr(content).encode()) % 16 == 0


# ---------------------------------------------------------------------------------------------
# From documents to rows, from rows to batches
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read. Shapes (context, image and patch size) belong to the model's config."""

    data: str = "procedural"  # the embedded world, or a folder that `data.py pack` wrote
    mixture: str = "45-45-10"  # captions-interleaved-text[-conversations], % of rows (Table 5)
    augment: bool = False  # RandomResizedCrop of real images (paper, App. A)
    flip: bool = False  # mirror half of them, except where the text says left or right
    val_rows: int = 64  # validation rows for each kind
    workers: int = 0  # processes that prepare batches; 0 = inside the training process

    def __post_init__(self):
        parts = self.mixture.split("-")
        if not (len(parts) in (3, 4) and all(p.isdigit() for p in parts)
                and sum(map(int, parts)) == 100):
            raise SystemExit(f"--mixture {self.mixture}: need whole percentages captions-"
                             "interleaved-text, as 45-45-10, or with conversations, as 0-0-0-100, "
                             "that add up to 100")
        if self.val_rows < 1 or self.workers < 0:
            raise SystemExit(f"--val-rows {self.val_rows} --workers {self.workers}: need at least "
                             "1 and 0")


def ids_of(tokens):
    """The ids of tokens, whether predicted or only read; IMAGE stays."""
    return np.where(tokens <= READ, READ - tokens, tokens)


def expand(document, eot, n_patches):
    """A document as positions, each (L',): ids, patch (number within the document or -1), target
    (-1 = none) and nll of the target. One end-of-text goes before it, so that its first token has
    something to be predicted from; end-of-text is also what its last token predicts."""
    framed = np.full(len(document.tokens) + 2, eot, np.int64)
    framed[1:-1] = document.tokens
    ids, following = framed[:-1], framed[1:]
    is_image = ids == IMAGE
    ids = ids_of(ids) * ~is_image
    size = np.where(is_image, n_patches, 1)
    last = size.cumsum() - 1  # an image predicts from its last patch
    is_patch = is_image.repeat(size)
    patch = np.where(is_patch, is_patch.cumsum() - 1, -1)
    target = np.full(len(patch), -1)
    target[last] = np.maximum(following, -1)  # no target: an image (-1), a token only read (< -1)
    nll = np.zeros(len(patch), np.float32)
    if document.nll is not None:
        nll[last] = document.nll
    return ids.repeat(size), patch, target, nll


class Row:
    """One row of `context` positions under construction; `add` pieces of documents until full."""

    def __init__(self, context, n_patches, eot):
        self.context, self.n_patches, self.eot = context, n_patches, eot
        self.used = self.n_docs = 0
        self.tokens, self.doc = np.zeros(context, np.int64), np.zeros(context, np.int64)
        self.patch = np.full(context, -1)
        self.target, self.nll = np.full(context, -1), np.zeros(context, np.float32)
        self.images = []

    def add(self, document, start=0, stop=None, whole=False):
        """Places positions start..stop of an expanded document, as many as fit; never a part of an
        image. With `whole`, places all or nothing. Returns the number of positions placed."""
        ids, patch, target, nll = expand(document, self.eot, self.n_patches)
        stop = min(len(ids) if stop is None else stop, start + self.context - self.used)
        if whole and stop < len(ids):
            return 0
        while stop > start and patch[stop - 1] >= 0 and (patch[stop - 1] + 1) % self.n_patches:
            stop -= 1  # the image does not fit: stop before it
        if not (target[start:stop] >= 0).any():
            return 0
        a, b, piece = self.used, self.used + stop - start, slice(start, stop)
        self.tokens[a:b], self.target[a:b], self.nll[a:b] = ids[piece], target[piece], nll[piece]
        first = (patch[:start].max(initial=-1) + 1) // self.n_patches  # images before this piece
        last = (patch[:stop].max(initial=-1) + 1) // self.n_patches  # and with it
        shift = (len(self.images) - first) * self.n_patches
        self.patch[a:b] = np.where(patch[piece] >= 0, patch[piece] + shift, -1)
        self.images += document.images[first:last]
        self.n_docs += 1
        self.doc[a:b] = self.n_docs
        self.used = b
        return b - a


def patchify(image, patch_size):
    """uint8 (S, S, 3) -> (P, 3 * patch_size**2), patches in reading order."""
    g = image.shape[0] // patch_size
    x = image.reshape(g, patch_size, g, patch_size, 3).transpose(0, 2, 1, 3, 4)  # (g, g, p, p, 3)
    return x.reshape(g * g, -1)


def collate(rows, patch_size):
    """Rows -> the batch a model reads: a dict of tensors.

    tokens, doc, targets int64 (B, T): text ids, number of the document in its row (0 = padding),
    and what to predict (-1 = nothing). patch_index int64 (B, T): i * P + p at patch p of image i
    of the batch, else -1. images uint8 (I, P, 3 * patch_size**2), at least one, so that every
    parameter gets a gradient even in a batch without images (DDP waits for all of them).
    target_index int64 (K,): the flat positions with a target, so that no GPU has to stop and count
    them. nll float32 (K,): the generator's own surprise there, 0 for real data."""
    images, patch_index = [], []
    for row in rows:
        shift = len(images) * row.n_patches
        patch_index.append(np.where(row.patch >= 0, row.patch + shift, -1))
        images += [patchify(image, patch_size) for image in row.images]
    if not images:
        images = [np.zeros((rows[0].n_patches, 3 * patch_size**2), np.uint8)]
    targets = np.stack([row.target for row in rows])
    index = np.flatnonzero(targets >= 0)
    arrays = {
        "tokens": np.stack([row.tokens for row in rows]), "targets": targets,
        "doc": np.stack([row.doc for row in rows]), "patch_index": np.stack(patch_index),
        "images": np.stack(images), "target_index": index,
        "nll": np.stack([row.nll for row in rows]).reshape(-1)[index],
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Plan:
    """Which documents share a row: next-fit in the order of the files, made once for a packed kind.

    Documents longer than a row are cut into pieces, never through an image, and what is cut off
    goes on in another row. pieces int32 (n, 5): document, its positions from .. to, its images
    from .. to."""

    def __init__(self, packed, kind, context, n_patches):
        text, images = packed.sizes(kind).T
        lengths = 1 + text + images * n_patches  # with the end-of-text before it
        hard = (lengths > context) & (images > 0)  # only their tokens say where to cut
        cut = [(i, *piece) for i in np.flatnonzero(hard).tolist()
               for piece in cut_document(packed.tokens(kind, i), context, n_patches)]
        n = np.where(hard, 0, -(-lengths // context))  # pieces of all others, at once: fast
        doc = np.repeat(np.arange(len(n)), n)
        start = (np.arange(len(doc)) - np.repeat(np.cumsum(n) - n, n)) * context
        stop = np.minimum(start + context, lengths[doc])
        easy = np.stack([doc, start, stop, np.zeros_like(doc), images[doc]], 1)  # (n, 5)
        pieces = np.concatenate([easy, np.array(cut, np.int64).reshape(-1, 5)]).astype(np.int32)
        self.pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
        sizes = self.pieces[:, 2] - self.pieces[:, 1]
        ends, first = np.cumsum(sizes), [0]
        following = np.searchsorted(ends, ends - sizes + context, side="right")
        while first[-1] < len(ends):  # the row that starts at this piece holds all that fit
            first.append(int(following[first[-1]]))
        self.first, self.n_rows = np.array(first), len(first) - 1

    def row(self, n):
        return self.pieces[self.first[n]:self.first[n + 1]].tolist()


def part_of(document, start, stop, first, last, n_patches):
    """One piece of a plan as arguments of Row.add: what it needs of the document, and its positions
    there. Else each of the hundreds of rows that hold a book would expand all of it."""
    a, b = (at - images * (n_patches - 1) for at, images in ((start, first), (stop, last)))
    tokens = document.tokens[max(a - 1, 0):b]  # up to what the last position predicts
    return Document(tokens, document.images[first:last]), min(a, 1), min(a, 1) + stop - start


def cut_document(tokens, context, n_patches):
    """The pieces of one document: positions from .. to, at most `context`, images from .. to."""
    images = np.flatnonzero(tokens == IMAGE)
    starts = 1 + images + np.arange(len(images)) * (n_patches - 1)  # position of each first patch
    length, start = 1 + len(tokens) + len(images) * (n_patches - 1), 0
    while start < length:
        stop = min(start + context, length)
        inside = starts[(starts < stop) & (stop < starts + n_patches)]
        stop = int(inside[0]) if len(inside) else stop
        yield start, stop, *np.searchsorted(starts, (start, stop)).tolist()
        start = stop


class Loader:
    """Batches as a pure function of (seed, step, rank, world size).

    Row g of the run depends on (seed, g) alone, and step s reads rows s * R .. s * R + R - 1, dealt
    out to ranks and micro-batches. So a run resumes at any step without any saved state, and the
    global batch is the same for any number of ranks and any accumulation."""

    def __init__(self, cfg, seed, context, image_size, patch_size):
        self.cfg, self.seed, self.context = cfg, seed, context
        self.image_size, self.patch_size = image_size, patch_size
        self.n_patches = (image_size // patch_size) ** 2
        self.percent = [int(p) for p in cfg.mixture.split("-")]
        self.world = World(image_size) if cfg.data == "procedural" else None
        self.packed = {} if self.world else {s: Packed(cfg.data, s) for s in ("train", "val")}
        self.tokenizer = "bytes" if self.world else self.packed["train"].meta["tokenizer"]
        self.encoding = get_tokenizer() if self.world else self.packed["train"].encoding
        self.eot = self.encoding.eot_token
        self.knows_floor = self.world is not None
        self.plans, self.orders, self.val, self.kinds = {}, {}, {}, (None, None)
        missing = [kind for kind, percent in zip(KINDS, self.percent)
                   if percent and self.packed and kind not in self.packed["train"].kinds]
        if missing:
            there = self.packed["train"].kinds
            kinds = KINDS if there[0] == KINDS[3] else PRETRAINING
            example = "-".join("100" if kind == there[0] else "0" for kind in kinds)
            raise SystemExit(f"--mixture {cfg.mixture}: {cfg.data} has no {missing[0]} documents, "
                             f"only {', '.join(there)}; give what is missing 0, as in {example}")
        self.check_validation()

    def check_validation(self):
        """Now, not after days of training: there must be something to validate on."""
        kinds = self.val_kinds()
        if not kinds or self.packed and not {*kinds} <= {*self.packed["val"].kinds}:
            wanted = ", ".join(kinds) or "caption, interleaved or text"
            raise SystemExit(f"{self.cfg.data} has no {wanted} documents in its split val: pack "
                             "some with --split val, or with a larger --val-fraction")

    def kind_of(self, g):
        """(kind, how many rows of that kind came before row g). Every 100 rows hold the mixture's
        percentages exactly, in an order shuffled by the seed: no sampling noise in the shares."""
        block, place = divmod(g, 100)
        if self.kinds[0] != block:  # only the last one asked for is kept
            order = np.random.default_rng((self.seed, 1, block)).permutation(100)
            self.kinds = block, np.repeat(np.arange(len(self.percent)), self.percent)[order]
        kinds = self.kinds[1]
        kind = kinds[place]
        return KINDS[kind], block * self.percent[kind] + int((kinds[:place] == kind).sum())

    def row(self, g):
        """Training row g."""
        return self.fill(*self.kind_of(g), "train")

    def fill(self, kind, n, split):
        """Row n of one kind and split."""
        if self.world and split == "val":
            return self.world_val_rows(kind)[n]
        row = Row(self.context, self.n_patches, self.eot)
        if self.world:
            rng = random.Random(f"{self.seed}/{kind}/{n}")
            while row.add(self.world.document(kind, rng)):
                pass
            return row
        plan, training = self.plan(kind, split), split == "train"
        epoch, place = divmod(n, plan.n_rows)
        place = self.order(kind, epoch)[place] if training else \
            place * plan.n_rows // self.val_rows(kind)  # from all over the validation set
        rng = np.random.default_rng((self.seed, 2, KINDS.index(kind), n))
        for i, start, stop, first, last in plan.row(place):
            document = self.packed[split].document(
                kind, i, self.image_size, rng, training and self.cfg.augment,
                training and self.cfg.flip, first, last)
            row.add(*part_of(document, start, stop, first, last, self.n_patches))
        return row

    def world_val_rows(self, kind):
        """The world's validation rows: always the same documents, each whole, so that the floor is
        exact. One that does not fit opens the next row, or short ones would be favoured; only one
        that fits no row is left out (below a context of 256 there are some)."""
        if kind in self.val:
            return self.val[kind]
        rng, rows, tries = random.Random(f"val/{kind}"), [], 0
        while len(rows) <= self.cfg.val_rows:
            document, tries = self.world.document(kind, rng, "val"), tries + 1
            if rows and rows[-1].add(document, whole=True):
                continue
            row = Row(self.context, self.n_patches, self.eot)
            if row.add(document, whole=True):
                rows.append(row)
            elif tries > 100 and not rows:
                raise SystemExit(f"--context {self.context}: no {kind} document of the procedural "
                                 "world fits; 256 holds them all")
        self.val[kind] = rows[:-1]  # the last one is not full
        return self.val[kind]

    def plan(self, kind, split):
        if (kind, split) not in self.plans:
            if kind not in self.packed[split].kinds:
                raise SystemExit(f"{self.cfg.data} has no {kind} documents in its split {split}")
            self.plans[kind, split] = Plan(self.packed[split], kind, self.context, self.n_patches)
        return self.plans[kind, split]

    def order(self, kind, epoch):
        """The order of a kind's rows in one epoch; only the last one asked for is kept."""
        if self.orders.get(kind, (None,))[0] != epoch:
            rng = np.random.default_rng((self.seed, 3, KINDS.index(kind), epoch))
            self.orders[kind] = epoch, rng.permutation(self.plan(kind, "train").n_rows)
        return self.orders[kind][1]

    def val_kinds(self):
        """The paper's three, whatever the mixture; when it has conversations, only these."""
        if self.percent[3:] > [0]:
            return QUESTIONS if self.world else KINDS[3:]
        return [kind for kind in PRETRAINING if self.world or kind in self.packed["val"].kinds]

    def positions(self):
        """(text, image) positions of a row, the mean of the first 100 rows of training."""
        rows = [self.row(g) for g in range(100)]
        images = sum(int((row.patch >= 0).sum()) for row in rows) / 100
        return sum(row.used for row in rows) / 100 - images, images

    def val_rows(self, kind):
        """Validation rows there are, at most cfg.val_rows."""
        return self.cfg.val_rows if self.world else \
            min(self.cfg.val_rows, self.plan(kind, "val").n_rows)

    def batch(self, rows):
        return collate(rows, self.patch_size)

    def train_batches(self, first_step, last_step, rows_per_step, micro_rows, rank=0, world=1,
                      pin=False):
        """Iterator over the micro-batches of steps first_step .. last_step - 1 for this rank."""
        micro = Batches(self, first_step, last_step, rows_per_step, micro_rows, rank, world)
        if not self.cfg.workers:
            return iter(torch.utils.data.DataLoader(micro, batch_size=None, pin_memory=pin))
        # spawn, not fork: a forked worker would hold the run's lock after its parent was killed
        return iter(torch.utils.data.DataLoader(
            micro, batch_size=None, pin_memory=pin, num_workers=self.cfg.workers,
            prefetch_factor=4, multiprocessing_context="spawn", worker_init_fn=ignore_signals))

    def val_batches(self, kind, micro_rows, rank=0, world=1):
        """This rank's share of the fixed validation rows of one kind."""
        mine = range(rank, self.val_rows(kind), world)
        for a in range(0, len(mine), micro_rows):
            yield self.batch([self.fill(kind, n, "val") for n in mine[a:a + micro_rows]])


class Batches(torch.utils.data.Dataset):
    """Lets torch's DataLoader prepare micro-batches, in worker processes too, in order."""

    def __init__(self, loader, first_step, last_step, rows_per_step, micro_rows, rank, world):
        self.loader, self.first_step, self.last_step = loader, first_step, last_step
        self.rows_per_step, self.micro_rows, self.rank, self.world = (
            rows_per_step, micro_rows, rank, world)
        self.accumulation = rows_per_step // (micro_rows * world)

    def __len__(self):
        return (self.last_step - self.first_step) * self.accumulation

    def __getitem__(self, i):
        step, micro = divmod(i, self.accumulation)
        first = ((self.first_step + step) * self.rows_per_step
                 + (micro * self.world + self.rank) * self.micro_rows)
        return self.loader.batch([self.loader.row(first + j) for j in range(self.micro_rows)])


def ignore_signals(worker):
    """Ctrl-C reaches all processes of a terminal; the training process ends its workers itself,
    after it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------
# Tokenizers: everything is a tiktoken.Encoding
# ---------------------------------------------------------------------------------------------


def get_tokenizer(name="bytes"):
    """"bytes" (256 bytes + end-of-text, offline), a tiktoken name, or a path to a .tiktoken file.

    Encode data with `encode_ordinary`: "<|endoftext|>" inside data is then text, not control.
    The end-of-text id is `.eot_token`. SystemExit: unknown name, no network, damaged file."""
    path, pattern = Path(name), GPT2
    try:
        if name == "bytes":     # the pattern only cuts into pieces, for speed: nothing to merge
            pattern, ranks = r"(?s:.{1,64})", {bytes([i]): i for i in range(256)}
        elif path.suffix == ".tiktoken":    # tiktoken's loader caches by path, retrained or not
            lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            if path.with_suffix(".pat.txt").is_file():
                pattern = path.with_suffix(".pat.txt").read_text(encoding="utf-8").strip("\n")
        else:
            return tiktoken.get_encoding(name)
        if len({*ranks.values()}) < len(ranks) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("one of the 256 bytes is missing, or a rank is there twice")
        return tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": max(ranks.values()) + 1})
    except (OSError, ValueError) as error:      # a failed download is an OSError, too
        reason = str(error).partition("\n")[0][:99]
        raise SystemExit(f"tokenizer {name} cannot be used ({reason}): give bytes, a path to a "
                         ".tiktoken file (lines of base64 token, space, rank), or one of "
                         f"{', '.join(tiktoken.list_encoding_names())} that is in "
                         "TIKTOKEN_CACHE_DIR or can be downloaded") from None


# ---------------------------------------------------------------------------------------------
# Readers: file -> samples (key, record, members) -> parts: str, image file's bytes, Skip
# ---------------------------------------------------------------------------------------------


class Skip(str):
    """Why an image, or a whole document, cannot be used; counted, never fatal."""


def need(module, package):
    """Import from an optional package or end in one line that says how to install it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise SystemExit(f"this needs the package {package}: pip install {package}") from None


def read_samples(path):
    """(key, record, members): a json's bytes or a dict; in a tar also {name: content}."""
    if path.suffix == ".tar":
        return tar_samples(path)
    if path.suffix == ".parquet":       # without pre_buffer only a few rows' images are in memory
        file = need("pyarrow.parquet", "pyarrow").ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20)
        batches = file.iter_batches(64, columns=["texts", "images"], use_threads=False)
        records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    elif path.suffix == ".txt":         # documents of about 64 kB: memory must not grow with it
        file = open(path, encoding="utf-8-sig")
        pieces = iter(lambda: file.readlines(1 << 16), [])
        records = ({"text": "".join(lines)} for lines in pieces)
    elif path.suffix == ".zst":
        records = zstd_lines(path)
    elif path.suffix == ".json":        # one list of all
        records = json.loads(path.read_bytes())
    else:
        records = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    records = (record for record in records if record not in (b"", b"\n", b"\r\n"))
    return ((str(i), record, {}) for i, record in enumerate(records))


def tar_samples(path):
    """Neighbours with one key, the path up to the name's first dot, as in WebDataset. Nothing is
    written to disk, whatever the members are called."""
    with open(path, "rb") as file, tarfile.open(None, "r:", file, errors="replace") as tar:
        files = (x for x in tar if x.isfile() and not os.path.basename(x.name).startswith("."))
        for key, group in itertools.groupby(files, lambda x: re.sub(r"\.[^/]*$", "", x.name)):
            members = {os.path.basename(x.name): tar.extractfile(x).read(MAX_BYTES) for x in group}
            yield key, members.get(os.path.basename(key) + ".json"), members
            tar.members = []            # tarfile remembers every member otherwise
        file.seek(tar.offset)
        end = file.read(1 << 16)
    if not end or end.strip(b"\0"):     # tarfile stops silently at a cut and at a damaged header
        raise EOFError(f"the tar is cut or damaged at byte {tar.offset}")


def zstd_lines(path):
    """The lines of all frames; EOFError where the file was cut.
    (zstandard's stream_reader ends silently at a cut, its decompress() after the first frame.)"""
    zstandard, frame, data, line = need("zstandard", "zstandard"), None, b"", []
    with open(path, "rb") as file:
        while data := data or file.read(1 << 16):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *ends, start = frame.decompress(data).split(b"\n")
            for end in ends:
                yield b"".join([*line, end])
                line = []
            line.append(start)
            data, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("the zstd stream is cut")
    yield b"".join(line)


def caption_parts(record, members, folder):
    """img2dataset: KEY.jpg (or .png, .webp), and KEY.txt or else the "caption" of KEY.json."""
    images = [members[x] for x in members if x.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))]
    texts = [members[x].decode("utf-8-sig") for x in members if x.endswith(".txt")]
    caption = texts[0] if texts else (record or {}).get("caption") or ""
    return [images[0] if images else Skip("missing image"), caption.strip()]


def interleaved_parts(record, members, folder):
    """OBELICS: lists "images" and "texts", at each place one of them is None. MMC4, OpenFlamingo:
    sentences, each after the images that it is matched with."""
    if "text_list" in record:
        images = [(info["matched_text_index"], info) for info in record["image_info"]]
        texts, separator = record["text_list"], " "
    else:
        images, texts, separator = [*enumerate(record["images"])], record["texts"], "\n\n"
        if len(images) != len(texts):
            return [Skip("image count does not match")]
    places = [(i, False, find_image(image, members, folder)) for i, image in images if image]
    places += [(i, True, text) for i, text in enumerate(texts) if text]
    places.sort(key=lambda place: place[:2])
    parts = []
    for is_text, run in itertools.groupby(places, key=lambda place: place[1]):
        values = [value for _, _, value in run]
        parts += [separator.join(values)] if is_text else values
    return parts


def conversation_parts(record, members, folder):
    """LLaVA: "image", a name or a list of names, and "conversations", turns of {"from": "human",
    "value": "<image>\\nWhat ...?"} and {"from": "gpt", "value": "..."}."""
    names = record.get("image") or []
    images = [find_image(name, members, folder)
              for name in (names if isinstance(names, list) else [names])]
    turns, parts = record["conversations"], []
    if sum(turn["value"].count("<image>") for turn in turns[::2]) > len(images):
        return [Skip("missing image")]
    for human, gpt in zip(turns[::2], turns[1::2]):
        if (human["from"], gpt["from"]) != ("human", "gpt"):
            return [Skip("turns are not human, gpt, human, gpt, ...")]
        text = human["value"]
        parts += [images.pop(0) for _ in range(min(text.count("<image>"), len(images)))]
        parts += turn(text.replace("<image>", "").strip(), gpt["value"].strip())
    return [*images, *parts]  # images that no turn names stand before all


def find_image(value, members, folder):
    """Bytes of the image that a record names: in itself, in its tar or in a file beside it."""
    if isinstance(value, dict):         # OpenFlamingo's or MMC4's image_info, or parquet's image
        value = (base64.b64decode(value.get("image_base64") or "") or value.get("bytes")
                 or value.get("path") or value.get("image_name") or "")
    if isinstance(value, bytes):
        return value
    if os.path.basename(value) in members:
        return members[os.path.basename(value)]
    if value.startswith(("http://", "https://")):
        return Skip("image is a URL (download it first)")
    inside = not os.path.isabs(value) and ".." not in Path(value).parts    # read no other files
    for path in (folder / value, folder / "images" / value):
        if inside and os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read(MAX_BYTES)
    return Skip("missing image")


LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LAYOUTS = {"caption": (caption_parts, (".tar",)),
           "interleaved": (interleaved_parts, (".tar", ".parquet", *LINES)),
           "text": (lambda record, members, folder: [record["text"]], (".txt", *LINES)),
           "conversation": (conversation_parts, (".json", *LINES))}


def read_source(path, kind):
    """(key, parts) of one file; a file that is cut or damaged ends in a last Skip."""
    try:
        for key, record, members in read_samples(path):
            try:
                record = json.loads(record) if isinstance(record, bytes) else record
                parts = LAYOUTS[kind][0](record, members, path.parent)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError,
                    OSError) as error:  # the last: an image beside it that may not be read
                parts = [Skip(f"broken record ({type(error).__name__})")]
            yield key, parts
    except Exception as error:          # on hostile files the libraries raise nearly every type
        reason = str(error).partition("\n")[0][:80]
        yield f"({reason})", [Skip("truncated or damaged file")]


def find_sources(kind, patterns):
    """Files of this kind that globs, files and folders (with all below them) name."""
    found, endings = {}, LAYOUTS[kind][1]
    for pattern in patterns:
        name = escape(pattern) if os.path.exists(pattern) else pattern
        paths = glob(name, recursive=True) + glob(os.path.join(name, "**"), recursive=True)
        paths = [path for path in paths if path.endswith(endings) and os.path.isfile(path)]
        if not paths:
            raise SystemExit(f"{pattern!r}, seen from {os.getcwd()}, names no {kind} file "
                             f"({' '.join(endings)})")
        found.update({os.path.realpath(path): Path(path) for path in paths})
    return [found[real] for real in sorted(found)]


# ---------------------------------------------------------------------------------------------
# Images: bytes -> uint8 (h, w, 3) that still has room for a random crop
# ---------------------------------------------------------------------------------------------


def load_image(data, store_size):
    """First frame, upright, alpha over white, 8 bit, centre-cropped to at most 2:1; the short side
    is reduced to store_size (small pictures are kept as they are). uint8 (h, w, 3), or Skip."""
    Image, ImageOps = need("PIL.Image", "pillow"), need("PIL.ImageOps", "pillow")
    Image.MAX_IMAGE_PIXELS = None       # Pillow would warn, or raise what we count ourselves
    safe = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")    # EPS would start ghostscript
    try:
        image = Image.open(io.BytesIO(data), formats=safe)
        w, h = image.size
        if w * h > MAX_PIXELS:
            return Skip("image too large")
        if min(w, h) < MIN_SIDE:
            return Skip("image too small")
        shrink = min(1.0, 2 * store_size / min(w, h))
        image.draft(None, (int(w * shrink) + 1, int(h * shrink) + 1))   # a JPEG decodes less
        image = to_rgb(Image, ImageOps.exif_transpose(image))
    except Exception:                   # on hostile bytes the decoders raise nearly every type
        return Skip("corrupt image")
    w, h = image.size
    scale = min(1.0, store_size / min(w, h))
    size = [round(scale * side) for side in (min(w, 2 * h), min(h, 2 * w))]
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))     # (h, w, 3)


def to_rgb(Image, image):
    if image.mode[0] in "IF":           # 16 bit or float, which convert("RGB") would clip
        grey = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0).clip(0)  # (h, w)
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        white = next((x for x in ranges if grey.max() <= x), grey.max())
        image = Image.fromarray((grey * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------
# Pack: one input file -> one shard, side by side in worker processes
# ---------------------------------------------------------------------------------------------
# A shard is a folder of `data`, the documents one after the other: tokens int32 with IMAGE, (h, w)
# int32 of each image, their pixels; of train.docs and val.docs, int64 (documents, 3): a document's
# first byte in `data`, tokens, images; and of shard.json.
def pack_file(source, kind, folder, tokenizer, made_from):
    """Pack one input file into `folder`. Runs in a worker process."""
    enc, tmp = get_tokenizer(tokenizer), folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)      # left by a run that was killed
    tmp.mkdir(parents=True)
    warnings.filterwarnings("ignore", module="PIL")     # odd EXIF and the like
    tables, skipped, counts = {}, {}, {}
    with open(tmp / "data", "wb") as file:
        for key, parts in read_source(source, kind):
            ids, images, reasons = encode(parts, enc, made_from["store_size"])
            for reason in reasons:
                skipped.setdefault(reason, [0, f"{source.name}: {key}"])[0] += 1
            if len(ids) == len(images) or kind == "caption" and not images:
                continue                # no text, or a caption without its image
            if kind == "conversation" and reasons:
                continue                # about a picture that is not there
            unit = os.fsencode(f"{source.name}/{key}")      # always in the same split
            if kind == "conversation":  # with all other questions about its picture
                unit = next((part for part in parts if isinstance(part, bytes)), unit)
            chance = zlib.crc32(unit) / 2**32
            split = "val" if chance < made_from["val_share"] else "train"
            tables.setdefault(split, []).append((file.tell(), len(ids), len(images)))
            sizes = [side for image in images for side in image.shape[:2]]
            for array in (np.array(ids + sizes, np.int32), *images):
                file.write(array.tobytes())
    for split, table in tables.items():
        table = np.array(table, np.int64)                                   # (documents, 3)
        table.tofile(tmp / f"{split}.docs")
        tokens, images = table.sum(0)[1:].tolist()
        counts[split] = {"docs": len(table), "tokens": tokens - images, "images": images}
    shard = {"made_from": made_from, "skipped": skipped, "splits": counts}
    (tmp / "shard.json").write_text(json.dumps(shard), encoding="utf-8")
    for path in tmp.iterdir():          # else a power cut could leave the name without the content
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)   # made from another version of the file
    os.replace(tmp, folder)             # in one step: a shard is complete or absent


def encode_text(part, enc):
    """The ids of a text: of a Question as only read, of an Answer with its end-of-text."""
    ids = enc.encode_ordinary(re.sub(r"(\s{9999})\s+", r"\1", part))  # on 1 MB it overflows
    if isinstance(part, Question):
        return [READ - i for i in ids]
    if isinstance(part, Answer):
        return [*ids, enc.eot_token]
    return ids if part.strip() else []


def encode(parts, enc, store_size):
    """ids (IMAGE for an image), the decoded images, and reasons why something was left out."""
    ids, images, reasons = [], [], []
    for part in parts:
        part = load_image(part, store_size) if isinstance(part, bytes) else part
        if isinstance(part, Skip):
            reasons.append(part)
        elif isinstance(part, str):
            ids += encode_text(part, enc)
        else:
            images.append(part)
            ids.append(IMAGE)
    if ids and ids[-1] == enc.eot_token:    # what ends the document is added by `expand`
        ids.pop()
    return ids, images, reasons if reasons or len(ids) > len(images) else ["no text"]


def pack(sources, out, tokenizer="bytes", image_size=224, split="train", val_fraction=0.01,
         workers=0):
    """Pack {kind: [globs, files or folders]} into OUT and return data.json's content.

    Safe to interrupt and start again, and to call again with more files (`split="val"`).
    SystemExit: nothing matches, OUT was packed with other settings or cannot be written, no
    document survives."""
    out, enc, jobs = Path(out), get_tokenizer(tokenizer), []
    config = {"tokenizer_hash": zlib.crc32(repr((enc._pat_str, enc._mergeable_ranks)).encode()),
              "vocab_size": enc.n_vocab, "eot": enc.eot_token,
              "image_size": image_size, "store_size": round(image_size * 8 / 7)}
    for kind, path in [(k, p) for k in KINDS for p in find_sources(k, sources.get(k) or ())]:
        stat, real = path.stat(), Path(os.path.realpath(path))
        made_from = {**config, "path": str(real), "size": stat.st_size, "mtime": stat.st_mtime_ns,
                     "val_share": 1.0 if split == "val" else val_fraction}
        # The hash keeps files of one name in two folders apart.
        name = f"{real.name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
        jobs.append((path, kind, out / kind / name, str(tokenizer), made_from))
    if not jobs:
        raise SystemExit("nothing to pack: give --captions, --interleaved, --text or "
                         "--conversations files")
    done = {folder: shard["made_from"] for folder, shard in read_shards(out)}
    for path, _, folder, _, made_from in jobs:
        if done.get(folder, made_from)["val_share"] != made_from["val_share"]:
            print(f"note: {path} was packed with another --split or --val-fraction; it is packed "
                  "again, as nothing may be in both train and val")
    if any(config[x] != old[x] for old in done.values() for x in config):
        raise SystemExit(f"{out} was packed with another tokenizer than {tokenizer} or another "
                         f"image size than {image_size}: choose another --out")
    todo = [job for job in jobs if done.get(job[2]) != job[4]]
    hint = f" (to pack one again, as when images were missing, delete its folder in {out})"
    print(f"{len(jobs)} files, {len(jobs) - len(todo)} of them packed before"
          + (hint if len(todo) < len(jobs) else ""))
    try:
        run_jobs(todo, min(workers or usable_cores(), len(todo)))
        return write_index(out, config, tokenizer)
    except (KeyboardInterrupt, BrokenProcessPool):
        raise SystemExit("interrupted, or a worker died (out of memory? try fewer --workers): "
                         "finished files are kept, the same command goes on") from None
    except OSError as error:            # a full disk, no permission, OUT is a file
        raise SystemExit(f"cannot pack into {out} ({error}): make room, or choose another --out; "
                         "finished files are kept, the same command goes on") from None


def read_shards(out):
    """[(folder, content of its shard.json)] of the finished shards."""
    return [(path.parent, json.loads(path.read_text(encoding="utf-8")))
            for path in sorted(out.glob("*/*/shard.json")) if path.parent.suffix != ".tmp"]


def run_jobs(jobs, workers):
    if workers <= 1:
        for job in tqdm(jobs, "pack", unit="file"):
            pack_file(*job)
        return
    context = multiprocessing.get_context("spawn")      # tiktoken's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        futures = [pool.submit(pack_file, *job) for job in jobs]
        for done in tqdm(as_completed(futures), "pack", len(jobs), unit="file"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a worker without a traceback
    parent = multiprocessing.parent_process()           # and so must the parent's death
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_index(out, config, tokenizer):
    """Write data.json, the list of all shards in OUT; print its totals and return it."""
    if str(tokenizer).endswith(".tiktoken"):            # copied, so that the data can move
        for source in map(Path(tokenizer).with_suffix, (".tiktoken", ".pat.txt")):
            if source.is_file():
                copy = out / source.name.replace(Path(tokenizer).stem, "tokenizer", 1)
                copy.write_bytes(source.read_bytes())
        tokenizer = "tokenizer.tiktoken"
    splits, skipped = {}, {}
    for folder, shard in read_shards(out):
        for split, counts in shard["splits"].items():
            kinds = splits.setdefault(split, {})
            total = kinds.setdefault(folder.parent.name, {**dict.fromkeys(counts, 0), "shards": []})
            total.update({x: total[x] + n for x, n in counts.items()})
            total["shards"].append({"name": folder.name, **counts})
        for reason, (count, example) in shard["skipped"].items():
            skipped.setdefault(reason, [0, example])[0] += count
    for split, kind in ((split, kind) for split in splits for kind in splits[split]):
        counts = [f"{n:14,} {x}" for x, n in splits[split][kind].items() if x != "shards"]
        print(f"{split:5} {kind:11}", *counts)
    for reason, (count, example) in skipped.items():
        print(f"skipped {count:,}: {reason} (first: {example})")
    if len(splits) == 1 and splits.keys() != {"val"}:
        print("note: nothing is in the split val; training needs it: give other files with --split "
              "val, or a larger --val-fraction and another --out")
    if not splits:
        raise SystemExit(f"no document could be packed into {out}: see the reasons above")
    meta = {"tokenizer": str(tokenizer), **config, "splits": splits, "skipped": skipped}
    text = json.dumps(meta, indent=1)
    write_whole(out / "data.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return meta


# ---------------------------------------------------------------------------------------------
# Packed: the shards as documents
# ---------------------------------------------------------------------------------------------


def read_meta(root):
    """What data.json in a packed folder says, its tokenizer as get_tokenizer wants it."""
    path = Path(root) / "data.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: make it with `python data.py pack ... --out "
                         f"{root}`")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["tokenizer"].endswith(".tiktoken"):
            meta["tokenizer"] = str(Path(root) / meta["tokenizer"])
        return meta
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SystemExit(f"{path} is damaged: the same `pack` command writes it again") from None


class Packed:
    """One split of a packed folder: holds its tables of documents, reads the rest when asked.

    SystemExit: no data.json in `root`, no such split in it, a shard's file is missing or cut."""

    def __init__(self, root, split="train"):
        root, self.meta = Path(root), read_meta(root)
        if split not in self.meta["splits"]:
            raise SystemExit(f"{root} has no split {split!r}: add it with `python data.py pack ... "
                             f"--split {split} --out {root}`")
        kinds, self.encoding = self.meta["splits"][split], get_tokenizer(self.meta["tokenizer"])
        self.kinds = tuple(k for k in KINDS if k in kinds)
        self._data, self._docs, self._maps = {}, {}, {}
        for kind in self.kinds:
            folders = [root / kind / shard["name"] for shard in kinds[kind]["shards"]]
            counts = [shard["docs"] for shard in kinds[kind]["shards"]]
            tables = [self._read(folder / f"{split}.docs", np.int64, 0, 3 * n)
                      for folder, n in zip(folders, counts)]
            table = np.concatenate(tables).reshape(-1, 3)                   # (n_docs, 3)
            number = np.repeat(np.arange(len(folders)), counts)[:, None]    # (n_docs, 1)
            self._docs[kind] = np.hstack([number, table])                   # (n_docs, 4)
            self._data[kind] = [folder / "data" for folder in folders]

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files for itself

    def _read(self, path, dtype, start, count):
        """`count` numbers of a file from byte `start` on: a view of its memory map."""
        if path not in self._maps:
            if len(self._maps) >= 1024:  # systems bound the number of mappings
                self._maps.clear()
            size = path.stat().st_size if path.is_file() else 0
            self._maps[path] = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        stop = start + count * np.dtype(dtype).itemsize
        found = self._maps[path][start:stop]
        if len(found) < stop - start:
            raise SystemExit(f"{path}, listed in data.json, is missing or cut: delete its "
                             "folder and pack again")
        return found.view(dtype)

    def n_docs(self, kind):
        """Number of documents of one kind."""
        return len(self._docs.get(kind, ()))

    def sizes(self, kind):
        """int64 (n_docs, 2): text tokens and images of every document."""
        docs = self._docs.get(kind, np.zeros((0, 4), np.int64))
        return np.stack([docs[:, 2] - docs[:, 3], docs[:, 3]], axis=1)      # (n_docs, 2)

    def tokens(self, kind, i):
        """int32 (L,), IMAGE where an image stands."""
        number, start, length, _ = self._docs[kind][i].tolist()
        return self._read(self._data[kind][number], np.int32, start, length)

    def image(self, kind, i, j):
        """Image j of document i as stored, uint8 (h, w, 3)."""
        number, start, length, n_images = self._docs[kind][i].tolist()
        if not 0 <= j < n_images:
            raise IndexError(f"document {i} has {n_images} images, not {j + 1}")
        path, start = self._data[kind][number], start + 4 * length
        sizes = self._read(path, np.int32, start, 2 * n_images).reshape(-1, 2)    # (images, 2)
        start += sizes.nbytes + 3 * int(sizes[:j].prod(axis=1).sum())
        return self._read(path, np.uint8, start, 3 * sizes[j].prod()).reshape(*sizes[j], 3)

    def document(self, kind, i, image_size, rng=None, augment=False, flip=False, first_image=0,
                 last_image=None):
        """Document i, its images uint8 (S, S, 3); those outside [first_image, last_image) are None
        (nothing is read for them, and the others keep their numbers).

        Plain: the centre square. augment: RandomResizedCrop, scale 0.4-1, ratio 3/4-4/3 (paper
        4.2). flip: mirror with p = 0.5, unless the text speaks of left or right. Both draw from
        `rng`, a numpy Generator, and from nothing else."""
        tokens = self.tokens(kind, i)
        images = [None] * int((tokens == IMAGE).sum())
        if flip and images[first_image:last_image]:
            text = self.encoding.decode(ids_of(tokens)[tokens != IMAGE].tolist())
            flip = not re.search(r"\b(left|right)", text, re.IGNORECASE)
        for j in range(len(images))[first_image:last_image]:
            pixels = self.image(kind, i, j)
            image = square(pixels, image_size, rng if augment else None)            # (S, S, 3)
            mirror = flip and rng.random() < 0.5
            images[j] = np.ascontiguousarray(image[:, ::-1]) if mirror else image
        return Document(tokens, images)


def square(pixels, size, rng=None):
    """uint8 (h, w, 3) -> (size, size, 3): its centre square, or with rng a random crop."""
    top, left, h, w = crop_box(*pixels.shape[:2], rng)
    crop = np.array(pixels[top:top + h, left:left + w])  # a copy: a memory map is read-only
    x = torch.from_numpy(crop).permute(2, 0, 1)[None]                       # (1, 3, h, w)
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)      # (1, 3, S, S)
    return x[0].permute(1, 2, 0).contiguous().numpy()                       # (S, S, 3)


def crop_box(h, w, rng=None):
    """(top, left, height, width) of the centre square, or with rng of RandomResizedCrop: area
    0.4-1 of the image, width / height 3/4-4/3 (log-uniform)."""
    for _ in range(10 if rng else 0):
        area = h * w * rng.uniform(0.4, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_w, box_h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < box_w <= w and 0 < box_h <= h:
            top, left = int(rng.integers(h - box_h + 1)), int(rng.integers(w - box_w + 1))
            return top, left, box_h, box_w
    side = min(h, w)
    return (h - side) // 2, (w - side) // 2, side, side


# ---------------------------------------------------------------------------------------------
# Show: packed rows as a person reads them
# ---------------------------------------------------------------------------------------------


WIDTH = 118                 # of a page, in letters
INK = {"target": "#0b3d91", "context": "#999999"}
STYLE = {"family": "monospace", "fontsize": 7, "va": "top", "parse_math": False}


def row_segments(batch, b):
    """Row b as (document, kind, payload): kind "image" (its index), "target" or "context" (ids).
    A target is a token that some position has to predict."""
    tokens, doc, targets = (batch[k][b].tolist() for k in ("tokens", "doc", "targets"))
    image = (batch["patch_index"][b] // batch["images"].shape[1]).tolist()  # (T,), -1 = no image
    entries = []
    for t, number in enumerate(doc):
        predicted = t > 0 and doc[t - 1] == number and targets[t - 1] >= 0
        kind = "image" if image[t] >= 0 else "target" if predicted else "context"
        entries += [(number, kind, image[t], tokens[t])] if number else []      # 0: padding
        if targets[t] >= 0 and number not in doc[t + 1:t + 2]:
            entries.append((number, "target", -1, targets[t]))      # predicted, but not an input
    for (number, kind, i), run in itertools.groupby(entries, key=lambda entry: entry[:3]):
        yield number, kind, i if kind == "image" else [token for *_, token in run]


def draw_rows(batch, decode, out_path, patch_size, image_size):
    """Draw every row of a batch (the loader's dict) to a PNG: images and text in their order, a
    bar for each document, targets in blue. decode: list of ids -> str."""
    axes = need("matplotlib.figure", "matplotlib").Figure().add_axes((0, 0, 1, 1))
    n = image_size // patch_size
    images = batch["images"].reshape(-1, n, n, patch_size, patch_size, 3)       # (I, n, n, p, p, 3)
    images = images.transpose(2, 3).reshape(-1, image_size, image_size, 3)      # (I, S, S, 3)
    axes.text(7, 0, "blue: targets, which the model has to predict", STYLE, color=INK["target"])
    axes.text(60, 0, "grey: context, only read, as all images are", STYLE, color=INK["context"])
    y = 1
    for b, targets in enumerate(batch["targets"]):
        patches, padding = (batch["patch_index"][b] >= 0).sum(), (batch["doc"][b] == 0).sum()
        axes.text(0, y + 1, f"row {b}: {len(targets)} positions, {patches} of them image patches, "
                  f"{padding} padding; {(targets >= 0).sum()} targets", STYLE, weight="bold")
        y += 2
        for number, segments in itertools.groupby(row_segments(batch, b), key=lambda s: s[0]):
            top, colour = y, f"C{(number - 1) % 10}"
            y = draw_document(axes, y, segments, images.numpy(), decode)
            axes.plot([6.4, 6.4], [top, y - 0.2], colour, linewidth=3, solid_capstyle="butt")
            axes.text(0, top, f"doc {number}", STYLE, color=colour)
    width, height = 0.06 * (WIDTH + 2), 0.135 * (y + 1)     # inches
    axes.figure.set_size_inches(width, height)
    axes.set(xlim=(-1, WIDTH + 1), ylim=(y + 0.5, -0.5))
    axes.axis("off")
    dpi = min(150, 30000 / height)          # PNG: 2^15 lines at most
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # a glyph that no font has is drawn as a box
            axes.figure.savefig(out_path, dpi=dpi)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise SystemExit(f"cannot write the page {out_path}: {error}") from None


def draw_document(axes, y, segments, images, decode):
    """Text stands to the right of the images before it; returns the y of the line below."""
    top, bottom, left, x = y, y, 7, 7
    for _, kind, payload in segments:
        if kind == "image":
            if y > top or x > 60:           # not beside this text: below everything
                x, y = 6, max(y + 1, bottom)
            axes.imshow(images[payload], extent=(x + 1, x + 14, y + 5.8, y), aspect="auto")
            top, bottom, left, x = y, y + 6, x + 15, x + 15
            continue
        text = decode(payload).replace("<|endoftext|>", "⟨end⟩")
        for k, paragraph in enumerate(re.split(r"\n\s*", text)):
            x, y = (left, y + 1) if k else (x, y)
            indent = " " * (x - left)       # after what is on this line already
            lines = textwrap.wrap(paragraph, WIDTH - left, initial_indent=indent) or [indent]
            for n, line in enumerate(lines):
                axes.text(left, y + n, line, STYLE, color=INK[kind])
            x, y = left + len(lines[-1]), y + len(lines) - 1
    return max(y + 1, bottom)


# ---------------------------------------------------------------------------------------------
# Files, cores and the command line
# ---------------------------------------------------------------------------------------------


def write_whole(path, write):
    """write(temporary path), then rename: a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def usable_cores():
    """Cores that this process may use, which on a shared machine can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """argparse, except that an unknown flag is answered with the nearest known one."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message} (--help lists all flags)")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return known


def add_flags(parser, kind, skip=()):
    """One flag for each field of a dataclass, each a list of comma-separated values; the comment
    behind the field is the help. Flags that are not given come out as None."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        flag, text = f"--{field.name.replace('_', '-')}", comments.get(field.name, "")
        text = text.replace("%", "%%") + f" (default: {field.default})"
        if field.type in (bool, "bool"):
            parser.add_argument(flag, nargs="?", const=[True], type=listed(one_bool), help=text)
            parser.add_argument(f"--no-{flag[2:]}", dest=field.name, action="store_const",
                                const=[False], help=argparse.SUPPRESS)
            continue
        convert = {"int": parse_count, "float": float, "str": str}[
            field.type if isinstance(field.type, str) else field.type.__name__]
        parser.add_argument(flag, type=listed(convert), metavar=field.name.upper(), help=text)


def listed(convert):
    """A converter of comma-separated values to a list; argparse names it in its errors."""
    def values(text):
        return [convert(value) for value in text.split(",")]
    values.__name__ = getattr(convert, "__name__", "value").replace("parse_", "")
    return values


def one_bool(text):
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def parse_count(text):
    """"2M" -> 2000000; K, M, B and plain numbers, 1e6 too."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(str(text)[-1:].upper(), 1)
    value = float(str(text)[:-1] if scale > 1 else text) * scale
    if not abs(value) < 2**63:
        raise ValueError(f"{text} is not a count")
    return round(value)


def vocab_size(data):
    """Ids a model needs for a data set: its tokenizer's, rounded up to a multiple of 8 (odd sizes
    are slow on GPUs)."""
    ids = get_tokenizer().n_vocab if data == "procedural" else read_meta(data)["vocab_size"]
    return -(-ids // 8) * 8


def pack_command(argv=None):
    """Run `python data.py pack` with these flags."""
    parser = Parser(prog="data.py pack", description="Pack files of real data for training.")
    add = parser.add_argument
    for flag in ("--captions", "--interleaved", "--text", "--conversations"):
        add(flag, nargs="+", default=[], metavar="GLOB", help="files, folders or quoted globs")
    add("--out", required=True, help="folder for the packed data")
    add("--tokenizer", default="bytes", help="bytes, a tiktoken name or a path to a .tiktoken file")
    add("--image-size", type=int, default=224, help="pixels, as in training")
    add("--split", choices=("train", "val"), default="train")
    add("--val-fraction", type=float, default=0.01, help="share of train that becomes val")
    add("--workers", type=int, default=0, help="processes; 0 = one per core")
    args = parser.parse_args(argv)
    if not 0 <= args.val_fraction < 1 or args.image_size < 1:
        raise SystemExit("--val-fraction must be in [0, 1) and --image-size at least 1")
    sources = dict(zip(KINDS, (args.captions, args.interleaved, args.text, args.conversations)))
    pack(sources, args.out, args.tokenizer, args.image_size, args.split, args.val_fraction,
         args.workers)


def show_command(argv=None):
    """Run `python data.py show` with these flags."""
    parser = Parser(prog="data.py show", description="Draw packed rows as a person reads them.")
    add = parser.add_argument
    add("data", nargs="?", default="procedural", help="procedural, or a packed folder")
    add("-n", type=int, default=4, help="rows")
    add("--out", default="page.png")
    add("--split", choices=("train", "val"), default="train")
    add("--context", type=int, default=0, help="positions in a row; 0: 1024, 256 for procedural")
    add("--image-size", type=int, default=0, help="0: as packed; 32 for procedural")
    add("--patch-size", type=int, default=0, help="0: 1/16 of the image; 1/4 for procedural")
    add("--mixture", default="45-45-10", help="captions-interleaved-text[-conversations], per cent")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    real = args.data != "procedural"
    size = args.image_size or (read_meta(args.data)["image_size"] if real else 32)
    patch = args.patch_size or max(1, size // (16 if real else 4))
    context = args.context or (1024 if real else 256)
    if min(size, patch, args.n) < 1 or size % patch or context < (size // patch) ** 2 + 2:
        raise SystemExit(f"show: {args.n} rows of --context {context} with images of "
                         f"--image-size {size} in patches of --patch-size {patch} are not possible")
    cfg = DataConfig(data=args.data, mixture=args.mixture, val_rows=max(64, args.n))
    loader = Loader(cfg, args.seed, context, size, patch)
    used = [kind for kind, percent in zip(KINDS, loader.percent) if percent]
    kinds = [(used[i % len(used)], i // len(used)) for i in range(args.n)]  # in turn
    batch = loader.batch([loader.fill(kind, n, args.split) for kind, n in kinds])
    draw_rows(batch, loader.encoding.decode, args.out, patch, size)
    print(f"wrote {args.out}: {args.n} rows ({', '.join(kind for kind, _ in kinds)})")


def main(argv):
    commands = {"pack": pack_command, "show": show_command}
    if not argv or argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, 1) if argv else []
        print(__doc__.split("\n\nIn reading")[0])
        if argv[:1] in (["-h"], ["--help"]):
            return print("\npython data.py pack --help, or show --help, lists its flags")
        raise SystemExit(f"data.py: need a command, {' or '.join(commands)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
