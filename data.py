"""Documents of three kinds (captions, interleaved, text), packed into rows of fixed length.

    python data.py pack --captions 'A/*.tar' --interleaved 'B/*' --text 'C/*.jsonl.zst' --out data/real
    python data.py show procedural -n 4 --out page.png

Dimensions:  B rows in a batch   T context, positions in a row   P patches in an image
             I images in a batch   S image side in pixels   L tokens in a document   K targets in a batch
"""

import argparse
import bisect
import dataclasses
import difflib
import inspect
import json
import random
import re
import signal
import zlib
from pathlib import Path

import numpy as np
import torch

KINDS = ("caption", "interleaved", "text")  # the order of the paper's C-I-T mixtures (section 2.2)
IMAGE = -1  # stands for one whole image in Document.tokens; the row builder expands it to P patches


@dataclasses.dataclass(frozen=True)
class Document:
    """tokens int32 (L,), with IMAGE where an image stands; images: uint8 (S, S, 3) each, in order;
    nll float32 (L + 1,): the generator's own surprise in nats at each token and at the document's
    end, 0 where it had no choice; None where nobody knows (real data)."""

    tokens: np.ndarray
    images: list
    nll: np.ndarray | None = None


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
            tokens += ids
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
    mixture: str = "45-45-10"  # captions-interleaved-text, per cent of the rows (paper, Table 5)
    augment: bool = False  # RandomResizedCrop of real images (paper, App. A)
    flip: bool = False  # mirror half of them, except where the text says left or right
    val_rows: int = 64  # validation rows for each kind
    workers: int = 0  # processes that prepare batches; 0 = inside the training process

    def __post_init__(self):
        parts = self.mixture.split("-")
        if not (len(parts) == 3 and all(p.isdigit() for p in parts)
                and sum(map(int, parts)) == 100):
            raise SystemExit(f"--mixture {self.mixture}: need three whole percentages "
                             "captions-interleaved-text that add up to 100, as 45-45-10")
        if self.val_rows < 1 or self.workers < 0:
            raise SystemExit(f"--val-rows {self.val_rows} --workers {self.workers}: need at least "
                             "1 and 0")


def expand(document, eot, n_patches):
    """A document as positions, each (L',): ids, patch (number within the document or -1), target
    (-1 = none) and nll of the target. One end-of-text goes before it, so that its first token has
    something to be predicted from; end-of-text is also what its last token predicts."""
    ids = np.concatenate([[eot], document.tokens])
    following = np.concatenate([document.tokens, [eot]])  # IMAGE == -1 == no target
    is_image = ids == IMAGE
    size = np.where(is_image, n_patches, 1)
    last = np.cumsum(size) - 1  # an image predicts from its last patch
    source = np.repeat(np.arange(len(ids)), size)
    patch = np.where(is_image[source], np.cumsum(is_image[source]) - 1, -1)
    target = np.full(len(source), -1)
    target[last] = following
    nll = np.zeros(len(source), np.float32)
    if document.nll is not None:
        nll[last] = document.nll
    return np.where(is_image, 0, ids)[source], patch, target, nll


class Row:
    """One row of `context` positions under construction; `add` pieces of documents until full."""

    def __init__(self, context, n_patches, eot):
        self.n_patches, self.eot, self.context, self.used, self.n_docs = n_patches, eot, context, 0, 0
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
        n_images = (patch[piece].max(initial=-1) + 1) // self.n_patches - first if b > a else 0
        shift = (len(self.images) - first) * self.n_patches
        self.patch[a:b] = np.where(patch[piece] >= 0, patch[piece] + shift, -1)
        self.images += document.images[first:first + max(n_images, 0)]
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
    goes on in another row. pieces int64 (n, 3): document, first and last + 1 position."""

    def __init__(self, packed, kind, context, n_patches):
        text, images = packed.sizes(kind).T
        lengths = 1 + text + images * n_patches  # with the end-of-text before it
        long = np.flatnonzero(lengths > context)
        cut = [(i, start, stop) for i in long.tolist()
               for start, stop in cut_document(packed.tokens(kind, i), context, n_patches)]
        short = np.flatnonzero(lengths <= context)
        whole = np.stack([short, np.zeros_like(short), lengths[short]], 1)  # (n, 3)
        pieces = np.concatenate([whole, np.array(cut, np.int64).reshape(-1, 3)])
        self.pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
        ends, first = np.cumsum(self.pieces[:, 2] - self.pieces[:, 1]), [0]
        while first[-1] < len(ends):  # the row that starts at this piece holds all that fit
            used = ends[first[-1] - 1] if first[-1] else 0
            first.append(int(np.searchsorted(ends, used + context, side="right")))
        self.first, self.n_rows = np.array(first), len(first) - 1

    def row(self, n):
        return self.pieces[self.first[n]:self.first[n + 1]].tolist()


def cut_document(tokens, context, n_patches):
    """(start, stop) of the pieces of one document, in positions, each at most `context` long."""
    images = np.flatnonzero(tokens == IMAGE)
    starts = 1 + images + np.arange(len(images)) * (n_patches - 1)  # position of each first patch
    length, start = 1 + len(tokens) + len(images) * (n_patches - 1), 0
    while start < length:
        stop = min(start + context, length)
        inside = starts[(starts < stop) & (stop < starts + n_patches)]
        stop = int(inside[0]) if len(inside) else stop
        yield start, stop
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
        self.encoding = get_tokenizer(self.tokenizer)
        self.eot = self.encoding.eot_token
        self.knows_floor = self.world is not None
        self.plans, self.orders, self.val = {}, {}, {}
        missing = [kind for kind, percent in zip(KINDS, self.percent)
                   if percent and self.packed and kind not in self.packed["train"].kinds]
        if missing:
            raise SystemExit(f"--mixture {cfg.mixture}: {cfg.data} holds no {missing[0]} documents")

    def kind_of(self, g):
        """(kind, how many rows of that kind came before row g). Every 100 rows hold the mixture's
        percentages exactly, in an order shuffled by the seed: no sampling noise in the shares."""
        block, place = divmod(g, 100)
        order = np.random.default_rng((self.seed, 1, block)).permutation(100)
        kinds = np.repeat(np.arange(3), self.percent)[order]
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
        for i, start, stop in plan.row(place):
            row.add(self.packed[split].document(kind, i, self.image_size, rng,
                                                training and self.cfg.augment,
                                                training and self.cfg.flip), start, stop)
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
            self.plans[kind, split] = Plan(self.packed[split], kind, self.context, self.n_patches)
        return self.plans[kind, split]

    def order(self, kind, epoch):
        """The order of a kind's rows in one epoch; only the last one asked for is kept."""
        if self.orders.get(kind, (None,))[0] != epoch:
            rng = np.random.default_rng((self.seed, 3, KINDS.index(kind), epoch))
            self.orders[kind] = epoch, rng.permutation(self.plan(kind, "train").n_rows)
        return self.orders[kind][1]

    def val_kinds(self):
        return KINDS if self.world else self.packed["val"].kinds

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
# Command line
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, except that an unknown flag is answered with the nearest known one."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1, 0.0)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
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
            convert = one_bool
            parser.add_argument(flag, nargs="?", const=[True], type=listed(convert), help=text)
            parser.add_argument(flag.replace("--", "--no-", 1), dest=field.name, action="store_const",
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
    name = "bytes" if data == "procedural" else Packed(data, "train").meta["tokenizer"]
    return -(-get_tokenizer(name).n_vocab // 8) * 8


def get_tokenizer(name):
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
class Packed: pass
