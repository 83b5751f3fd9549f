"""Documents become rows, rows become batches: tokenizer, packing and the loader.

A document is a caption, an interleaved document, a text or a conversation. It comes from the
procedural world (world.py) or from a folder that `python -m tools.pack` wrote. Rows have a fixed
length and hold as many documents as fit.

Dimensions:  B rows in a batch   T context, positions in a row   P patches in an image
             I images in a batch   S image side in pixels   h, w stored height and width
             L tokens in a document   K targets in a batch   p patch side   g patches along a side
"""
import base64
import json
import random
import re
import signal
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

from world import KINDS, QUESTIONS, Answer, Question, World

PRETRAINING = KINDS[:3]  # the paper's three kinds; its loss is the mean over them (Table 1)
IMAGE = -1  # stands for one whole image in Document.tokens; a row expands it to P patches
READ = -2   # READ - id stands for a token that is only read and never predicted (a question)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def check(condition, message):
    """A user's mistake ends the program with one line that names the thing and the remedy."""
    if not condition:
        raise SystemExit(message)


@dataclass(frozen=True)
class DataConfig:
    """What to read. Shapes (context, image and patch size) belong to the model's config."""

    data: str = "procedural"  # the world of world.py, or a folder that tools.pack wrote
    mixture: str = "45-45-10"  # captions-interleaved-text[-conversations], % of rows (Table 5)
    augment: bool = False  # RandomResizedCrop of real images (App. A); presets turn it on
    flip: bool = False  # mirror half the images, unless text says left or right; presets turn it on
    val_rows: int = 256  # validation rows for each kind
    workers: int = -1  # processes that prepare batches; -1 = 4 for a folder on CUDA, else 0

    def __post_init__(self):
        parts = self.mixture.split("-")
        check(3 <= len(parts) <= len(KINDS) and all(map(str.isdecimal, parts))
              and sum(map(int, parts)) == 100,
              f"--mixture {self.mixture}: need whole percentages that add up to 100, "
              f"{'-'.join(KINDS)}, as 45-45-10 or 0-0-0-100")

    @property
    def shares(self):
        """{kind: whole percent of the rows} of the kinds that the mixture has."""
        given = map(int, self.mixture.split("-"))
        return {kind: share for kind, share in zip(KINDS, given) if share}


# ---- From parts to a document --------------------------------------------------------------------

def get_tokenizer(name="bytes"):
    """-> tiktoken.Encoding of "bytes" (256 bytes and end-of-text; needs no network), of a tiktoken
    name, or of the path of a .tiktoken file. (We read the file ourselves, because tiktoken's reader
    caches it under its path and would miss that a tokenizer was trained again.) Data are encoded
    with `encode_ordinary`, because "<|endoftext|>" inside them is text, not control."""
    path = Path(name)
    try:
        if name == "bytes":  # the pattern cuts text into pieces, for speed; no bytes are merged
            ranks, pattern = {bytes([i]): i for i in range(256)}, r"(?s:.{1,64})"
        elif path.suffix == ".tiktoken":
            lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            pattern = path.with_suffix(".pat.txt")
            pattern = pattern.read_text("utf-8").strip("\n") if pattern.is_file() else GPT2
        else:
            return tiktoken.get_encoding(name)
        if len({*ranks.values()}) < len(ranks) or any(bytes([i]) not in ranks for i in range(256)):
            raise ValueError("one of the 256 bytes is missing, or a rank is there twice")
        return tiktoken.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": max(ranks.values()) + 1})
    except (OSError, ValueError, OverflowError) as error:  # OSError: a failed download, too
        reason = str(error).partition("\n")[0][:99]
        raise SystemExit(f"tokenizer {name} cannot be used ({reason}): give bytes, a path to a "
                         ".tiktoken file (lines of base64 token, space, rank), or one of "
                         f"{', '.join(tiktoken.list_encoding_names())} that is in "
                         "TIKTOKEN_CACHE_DIR or can be downloaded") from None


@dataclass(frozen=True)
class Document:
    """tokens int32 (L,): ids, IMAGE where an image stands, READ - id for an id that is no target.
    images: uint8 (S, S, 3) each, in order. nll float32 (L + 1,), of whole documents: the
    generator's own surprise in nats at each token and at the end; 0 for real data. ends: whether
    the document's start and its end are in this piece. Where a long document is cut, there is no
    end-of-text, and the next piece only reads its first token, because it was predicted before."""

    tokens: np.ndarray
    images: list
    nll: np.ndarray | float = 0.0
    ends: tuple = (True, True)


def encode(parts, encoding, costs=None):
    """The parts of a document, from the world or from a reader of files -> Document.

    parts: texts, some of them a Question or an Answer, and uint8 (h, w, 3) images. costs: the nats
    of each part and of the document's end; the first token of a part bears all of them."""
    tokens, images, starts = [], [], []
    for part in parts:
        starts.append(len(tokens))
        if isinstance(part, str):
            tokens += encode_text(part, encoding)
        else:
            tokens.append(IMAGE)
            images.append(part)
    if tokens and tokens[-1] == encoding.eot_token:  # `expand` adds the last end-of-text
        tokens.pop()
    nll = np.bincount([*starts, len(tokens)], costs).astype(np.float32) if costs else 0.0
    return Document(np.array(tokens, np.int32), images, nll)


def encode_text(text, encoding):
    """-> list of ids. A Question gives READ - id (only read); an Answer also gets end-of-text."""
    long = len(text) > 9999  # a megabyte of white space would overflow tiktoken's stack
    short = re.sub(r"(?<!\s)(\s{9999})\s+", r"\1", text) if long else text
    ids = encoding.encode_ordinary(short)
    if isinstance(text, Question):
        return [READ - i for i in ids]
    if isinstance(text, Answer):
        return [*ids, encoding.eot_token]
    return ids if text.strip() else []


# ---- From documents to rows, from rows to batches ------------------------------------------------

def ids_of(tokens):
    """The ids of tokens, whether predicted or only read. IMAGE stays."""
    return np.where(tokens <= READ, READ - tokens, tokens)


def expand(document, eot, n_patches):
    """A document of L' positions -> ids, patch (number within the document or -1), target (-1 =
    none), nll of the target, (L',) each. An end-of-text goes before the document, because otherwise
    nothing could predict its first token; its last token predicts an end-of-text, too."""
    before, after = document.ends
    framed = np.full(before + len(document.tokens) + after, eot)
    framed[before:len(framed) - after] = document.tokens
    ids, following = framed[:-1], framed[1:]
    is_image = ids == IMAGE
    ids = ids_of(ids) * ~is_image
    size = np.where(is_image, n_patches, 1)
    last = size.cumsum() - 1  # the last patch of an image predicts what follows
    is_patch = is_image.repeat(size)
    patch = np.where(is_patch, is_patch.cumsum() - 1, -1)
    target = np.full(len(patch), -1)
    target[last] = np.maximum(following, -1)  # an image (-1) and a token only read are no targets
    nll = np.zeros(len(patch), np.float32)
    nll[last] = document.nll
    return ids.repeat(size), patch, target, nll


class Row:
    """One row of `context` positions under construction. `add` documents until it is full."""

    def __init__(self, context, n_patches, eot):
        self.context, self.n_patches, self.eot = context, n_patches, eot
        self.used = self.n_docs = 0
        self.tokens = np.zeros(context, np.int64)
        self.doc = np.zeros(context, np.int64)
        self.patch = np.full(context, -1, np.int64)
        self.target = np.full(context, -1, np.int64)
        self.nll, self.images = np.zeros(context, np.float32), []

    def add(self, document, whole=False):
        """Places as many positions of a document as fit, or with `whole` all or none. It places no
        part of an image, and nothing without a target. Returns whether it placed any."""
        ids, patch, target, nll = expand(document, self.eot, self.n_patches)
        n = min(len(ids), self.context - self.used)
        if whole and n < len(ids):
            return False
        n -= int(patch[n - 1] + 1) % self.n_patches  # without the patches of an unfinished image
        if not (target[:n] >= 0).any():
            return False
        piece = slice(self.used, self.used + n)
        self.tokens[piece] = ids[:n]
        self.target[piece] = target[:n]
        shift = len(self.images) * self.n_patches
        self.patch[piece] = patch[:n] + shift * (patch[:n] >= 0)
        self.images += document.images[:(patch[:n].max() + 1) // self.n_patches]
        self.n_docs += 1
        self.doc[piece] = self.n_docs
        self.nll[piece] = nll[:n]
        self.used += n
        return True


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
    tokens, doc, patch, targets, nll = (
        np.stack([getattr(row, name) for row in rows])                      # (B, T)
        for name in ("tokens", "doc", "patch", "target", "nll"))
    patch[patch >= 0] = np.arange((patch >= 0).sum())  # images are whole, and in order
    images = [patchify(image, patch_size) for row in rows for image in row.images]
    images = images or [np.zeros((rows[0].n_patches, 3 * patch_size**2), np.uint8)]
    index = np.flatnonzero(targets >= 0)
    arrays = {"tokens": tokens, "targets": targets, "doc": doc, "patch_index": patch,
              "images": np.stack(images), "target_index": index, "nll": nll.flatten()[index]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---- Where rows come from ---------------------------------------------------------------------
# Procedural and Packed share one interface: kinds[split], n_rows(kind, split), row(kind, n) for
# training and val_row(kind, n). With the same seed and settings they return the same rows.

class Procedural:
    """Rows of the procedural world. There is no end to them, so no epoch is ever repeated."""

    def __init__(self, cfg, seed, shape):
        self.cfg, self.seed = cfg, seed
        self.knows_floor, self.known_by = True, {"tokenizer": "bytes"}
        self.world, self.stored_size = World(shape.image_size), shape.image_size
        self.kinds = {s: [k for k in KINDS if hasattr(World, k)] for s in ("train", "val")}
        self.validated_as = {"conversation": QUESTIONS}  # a loss for each kind of question
        self.encoding = get_tokenizer()
        self.new_row = partial(Row, shape.context, shape.n_patches, self.encoding.eot_token)

    def document(self, kind, rng, split="train"):
        parts, costs = self.world.document(kind, rng, split)
        return encode(parts, self.encoding, costs)

    def row(self, kind, n):
        row, rng = self.new_row(), random.Random(f"{self.seed}/{kind}/{n}")
        while row.add(self.document(kind, rng)):
            pass
        return row

    def n_rows(self, kind, split):
        return float("inf") if split == "train" else self.cfg.val_rows

    def val_row(self, kind, n):
        return self.val_rows(kind)[n]

    @lru_cache(maxsize=16)
    def val_rows(self, kind):
        """The documents are always the same, and whole, so that the floor is exact. A document that
        does not fit opens the next row, because skipping it would favour short documents. Only a
        document longer than a row is left out (below a context of 128 some are)."""
        rng, rows, tries = random.Random(f"val/{kind}"), [self.new_row()], 0
        while len(rows) <= self.cfg.val_rows:
            document, tries = self.document(kind, rng, "val"), tries + 1
            row = self.new_row()
            if not rows[-1].add(document, whole=True) and row.add(document, whole=True):
                rows.append(row)
            check(rows[0].used or tries <= 100, f"--context {row.context}: no {kind} document of "
                  "the procedural world fits; 128 holds them all")
        return rows[:-1]  # the last one is not full


class Packed:
    """Rows of a folder that tools.pack wrote: whole epochs, each in an order of its own."""

    def __init__(self, cfg, seed, shape):
        self.cfg, self.seed, self.shape = cfg, seed, shape
        self.knows_floor, self.validated_as = False, {}
        self.shards = {split: Shards(cfg.data, split) for split in ("train", "val")}
        self.kinds = {split: shards.kinds for split, shards in self.shards.items()}
        self.encoding = self.shards["train"].encoding
        self.new_row = partial(Row, shape.context, shape.n_patches, self.encoding.eot_token)
        meta = self.shards["train"].meta
        self.stored_size = meta["image_size"]
        self.known_by = {x: meta.get(x) for x in ("tokenizer", "tokenizer_hash", "contents")}
        self.plans = {}  # of (kind, split); workers of the loader get those made before

    def row(self, kind, n):
        epoch, place = divmod(n, self.plan(kind, "train").n_rows)
        rng = np.random.default_rng((self.seed, 2, KINDS.index(kind), n))
        return self.fill(kind, "train", self.order(kind, epoch)[place], rng=rng,
                         augment=self.cfg.augment, flip=self.cfg.flip)

    def n_rows(self, kind, split):
        n = self.plan(kind, split).n_rows
        return n if split == "train" else min(self.cfg.val_rows, n)

    @lru_cache(maxsize=4)  # one order a kind, because for real data an order can take gigabytes
    def order(self, kind, epoch):
        """The order of a kind's rows in one epoch."""
        rng = np.random.default_rng((self.seed, 3, KINDS.index(kind), epoch))
        return rng.permutation(self.plan(kind, "train").n_rows)

    def val_row(self, kind, n):
        """Validation rows are spread evenly over the set, and their images are not augmented."""
        place = n * self.plan(kind, "val").n_rows // self.n_rows(kind, "val")
        return self.fill(kind, "val", place)

    def fill(self, kind, split, place, **crops):
        """Row `place` of a plan."""
        row = self.new_row()
        shards, size = self.shards[split], self.shape.image_size
        for i, start, stop in self.plan(kind, split).row(place):
            row.add(shards.document(kind, i, size, start, stop, **crops))
        return row

    def plan(self, kind, split):
        if (kind, split) not in self.plans:
            shards, shape = self.shards[split], self.shape
            self.plans[kind, split] = Plan(shards, kind, shape.context, shape.n_patches)
        return self.plans[kind, split]


class Plan:
    """Decides which documents share a row, by next-fit in the order of the files, for one kind.

    A document longer than a row is cut into pieces, never through an image, and the next piece goes
    to another row. pieces int32 (n, 4): document, first token, end (exclusive), and the number of
    positions. Token 0 is the end-of-text before the document. The last token of a piece takes no
    position in it, because it is only predicted; the next piece starts with this token."""

    def __init__(self, shards, kind, context, n_patches):
        tokens, images = np.asarray(shards.docs[kind])[:, -2:].T
        lengths = 1 + tokens + images * (n_patches - 1)  # with the end-of-text before it
        hard = (lengths > context) & ((images > 0) | (kind == "conversation"))  # cut by tokens
        n = np.where(hard, 0, -(-lengths // context))  # pieces of all others, without a loop
        doc = np.repeat(np.arange(len(n)), n)
        start = (np.arange(len(doc)) - np.searchsorted(doc, doc)) * context
        size = np.minimum(lengths[doc] - start, context)
        stop = start + size - images[doc] * (n_patches - 1) + 1
        pieces = [np.stack([doc, start, stop, size], 1)]
        hard = np.flatnonzero(hard)
        for docs in np.split(hard, range(100, len(hard), 100)):  # one by one takes 3 times as long
            # the end-of-text of a document, a word like any other, stands before the next one, too
            texts = [np.append(shards.tokens(kind, i), 0) for i in docs.tolist()]
            ids = np.concatenate([[0], *texts])
            ends = np.append(0, np.where(ids == IMAGE, n_patches, 1).cumsum())
            words = (ids >= 0).cumsum()
            last = np.cumsum([*map(len, texts)], dtype=int)
            start = first = np.append(0, last)[:-1]
            while len(docs):  # cuts the next piece from each document that goes on
                stop = np.minimum(np.searchsorted(ends, ends[start] + context, "right") - 1, last)
                size = ends[stop] - ends[start]
                piece = np.stack([docs, start - first, stop - first + 1, size], axis=1)
                # one of images without a word (a gallery) has no target, and would only pad a row
                pieces.append(piece[words[stop] > words[start]])
                docs, first, last, start = (x[stop < last] for x in (docs, first, last, stop))
        pieces = np.concatenate(pieces).astype(np.int32)                        # (n, 4)
        pieces = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))]
        ends, first = pieces[:, 3].cumsum(), [0]
        following = np.searchsorted(ends, ends - pieces[:, 3] + context, side="right")
        while first[-1] < len(ends):  # the next row starts where this one has no more room
            first.append(int(following[first[-1]]))
        self.n_rows = len(first) - 1
        # tensors, because all workers share them, while each would get its own copy of an array
        self.pieces, self.first = torch.from_numpy(pieces), torch.from_numpy(np.array(first))

    def row(self, n):
        """The pieces in row n, a list of [document, first token, end (exclusive)]."""
        return self.pieces[self.first[n]:self.first[n + 1], :3].tolist()


# ---- A packed folder: memory-mapped shards -------------------------------------------------------
# A shard is a folder with shard.json and, of one document after another, `tokens` (int32, IMAGE for
# an image) and `images` (int32 (h, w) of each of its images, then their pixels). They are apart,
# because a Plan reads tokens, and reading ahead would fetch the pixels between them. train.docs,
# val.docs: int64 (documents, 4), first byte in `tokens` and in `images`, and how many of each.

def read_meta(root):
    """data.json of a packed folder, its tokenizer as get_tokenizer wants it, and its checksum."""
    path = Path(root) / "data.json"
    check(path.is_file(), f"{path} does not exist: name another --data, or make it with "
          f"`python -m tools.pack ... --out {root}`")
    try:
        text = path.read_bytes()
        meta = json.loads(text.decode("utf-8")) | {"contents": zlib.crc32(text)}
        meta["splits"], meta["vocab_size"] + 1, meta["image_size"] + 1  # these raise if damaged
        if meta["tokenizer"].endswith(".tiktoken"):
            meta["tokenizer"] = str(Path(root) / meta["tokenizer"])
        return meta
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SystemExit(f"{path} is damaged: run the same `tools.pack` again") from None


class Shards:
    """One split of a packed folder. Its tables are in memory; the rest is read when asked for."""

    def __init__(self, root, split="train"):
        root, self.meta = Path(root), read_meta(root)
        check(split in self.meta["splits"], f"{root} has no split {split!r}: pack other files with "
              f"`python -m tools.pack ... --split {split} --out {root}`")
        kinds = self.meta["splits"][split]
        self.encoding = get_tokenizer(self.meta["tokenizer"])
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self.folders, self.docs = {}, {}
        for kind in self.kinds:
            names, n_docs = zip(*((x["name"], x["docs"]) for x in kinds[kind]["shards"]))
            self.folders[kind] = [f"{root / kind / name}" for name in names]
            docs = np.repeat(np.arange(len(n_docs)), n_docs)[:, None].repeat(5, axis=1)
            for folder, part in zip(self.folders[kind], np.split(docs, np.cumsum(n_docs))):
                # a copy, because views of the tables of thousands of shards would keep all open
                part[:, 1:].flat = self.read(f"{folder}/{split}.docs", np.int64, 0, 4 * len(part))
            self.docs[kind] = torch.from_numpy(docs)  # (n_docs, 5), the number of the shard first

    def read(self, path, dtype, start, count):
        """`count` numbers of a file from byte `start` on: a view of its memory map."""
        stop = start + count * np.dtype(dtype).itemsize
        found = self.map(path)[start:stop]
        check(len(found) == stop - start, f"{path}, listed in data.json, is missing or cut: delete "
              "its folder and pack again")
        return found.view(dtype)

    @lru_cache(maxsize=128)  # each keeps a file open, and systems allow only 256 to 1024
    def map(self, path):
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        return np.asarray(np.memmap(path, np.uint8, "r")) if size else np.zeros(0, np.uint8)

    def tokens(self, kind, i):
        """int32 (L,), IMAGE where an image stands."""
        number, start, _, length, _ = self.docs[kind][i].tolist()
        return self.read(f"{self.folders[kind][number]}/tokens", np.int32, start, length)

    def image(self, kind, i, j):
        """Image j of document i as stored, uint8 (h, w, 3)."""
        number, _, start, _, n_images = self.docs[kind][i].tolist()
        path = f"{self.folders[kind][number]}/images"
        sizes = self.read(path, np.int32, start, 2 * n_images).reshape(-1, 2)    # (images, 2)
        start += sizes.nbytes + 3 * int(sizes[:j].prod(axis=1).sum())
        return self.read(path, np.uint8, start, 3 * sizes[j].prod()).reshape(*sizes[j], 3)

    def document(self, kind, i, image_size, start=0, stop=None, rng=None, augment=False,
                 flip=False):
        """Document i, or its piece from token `start` to `stop` (see Plan), with images uint8
        (S, S, 3). Only what the piece needs is read, because a book fills many rows.

        An image is cut to its centre square, with augment to a random crop. flip mirrors it with
        p = 0.5, unless the text says left or right. Both draw from `rng`, a numpy Generator."""
        tokens, images = self.tokens(kind, i), []
        end = len(tokens) + 2  # with an end-of-text on both sides
        stop, skipped = stop or end, max(start - 1, 0)
        is_image = tokens == IMAGE
        numbers = range(is_image[:skipped].sum(), is_image[:stop - 2].sum())
        if flip and numbers:
            text = self.encoding.decode(ids_of(tokens)[~is_image].tolist())
            flip = not re.search(r"\b(left|right)", text, re.IGNORECASE)
        for j in numbers:
            image = square(self.image(kind, i, j), image_size, rng if augment else None)
            mirror = flip and rng.random() < 0.5
            images.append(np.ascontiguousarray(image[:, ::-1]) if mirror else image)
        return Document(tokens[skipped:stop - 1], images, ends=(start == 0, stop == end))


def square(pixels, size, rng=None):
    """uint8 (h, w, 3) -> (size, size, 3): its centre square, or with rng a random crop."""
    top, left, h, w = crop_box(*pixels.shape[:2], rng)
    crop = np.array(pixels[top:top + h, left:left + w])  # a copy: a memory map is read-only
    x = torch.from_numpy(crop).permute(2, 0, 1)[None]                       # (1, 3, h, w)
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)      # (1, 3, S, S)
    return x[0].permute(1, 2, 0).contiguous().numpy()                       # (S, S, 3)


def crop_box(h, w, rng=None):
    """(top, left, height, width) of the centre square, or with rng of a RandomResizedCrop: area
    0.4-1 (App. A), width / height 3/4-4/3 (as torchvision); after ten misses the largest centre."""
    for _ in range(10 if rng else 0):
        area = h * w * rng.uniform(0.4, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_w, box_h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < box_w <= w and 0 < box_h <= h:
            top, left = int(rng.integers(h - box_h + 1)), int(rng.integers(w - box_w + 1))
            return top, left, box_h, box_w
    box_h, box_w = (min(a, round(b * (4 / 3 if rng else 1))) for a, b in ((h, w), (w, h)))
    return (h - box_h) // 2, (w - box_w) // 2, box_h, box_w


def vocab_size(data):
    """Number of ids of a data set's tokenizer, rounded up to a multiple of 8 for GPUs' speed."""
    ids = get_tokenizer().n_vocab if data == "procedural" else read_meta(data)["vocab_size"]
    return -(-ids // 8) * 8


# ---- The loader ----------------------------------------------------------------------------------

class Loader:
    """Batches as a pure function of (seed, step, rank, number of ranks).

    Row g of the run depends on (seed, g) alone, and step s reads rows s * R .. s * R + R - 1, dealt
    out to ranks and micro-batches. So a run resumes at any step without any saved state, and the
    global batch is the same for any number of ranks and any accumulation."""

    def __init__(self, cfg, seed, shape):
        self.cfg, self.seed, self.patch_size = cfg, seed, shape.patch_size
        self.source = (Procedural if cfg.data == "procedural" else Packed)(cfg, seed, shape)
        self.shares, self.encoding = cfg.shares, self.source.encoding
        there = self.source.kinds["train"]
        missing = [kind for kind in self.shares if kind not in there]
        check(not missing, f"--mixture {cfg.mixture}: {cfg.data} has only {', '.join(there)}; give "
              f"{' and '.join(missing)} 0 (it is {'-'.join(KINDS)})")
        # The kinds whose losses are reported (`loss` is their mean): the paper's three, whatever
        # the mixture is, and others that are in the mixture. But a mixture with conversations is
        # for finetuning, and then only the loss of conversations is reported.
        wanted = (["conversation"] if "conversation" in self.shares
                  else [k for k in KINDS if k in PRETRAINING or k in self.shares])
        kinds = [kind for kind in wanted if kind in self.source.kinds["val"]]
        check(kinds, f"{cfg.data} has no {' or '.join(wanted)} documents in its split val: "
              "pack some with --split val, or with a larger --val-fraction")
        self.val_kinds = [x for kind in kinds for x in self.source.validated_as.get(kind, [kind])]

    def epochs(self, n_rows):
        """{kind: number of passes over its data in the first n_rows rows of training}"""
        return {kind: n_rows * share / 100 / self.source.n_rows(kind, "train")
                for kind, share in self.shares.items()}

    def kind_of(self, g):
        """(kind, how many rows of that kind came before row g)."""
        block, place = divmod(g, 100)
        kinds = self.kinds_of_block(block)
        kind = kinds[place]
        return kind, block * self.shares[kind] + kinds[:place].count(kind)

    @lru_cache(maxsize=16)
    def kinds_of_block(self, block):
        """Every 100 rows hold the mixture's percentages exactly, in an order shuffled by the seed:
        no sampling noise in the shares."""
        kinds = np.repeat([*self.shares], [*self.shares.values()])
        order = np.random.default_rng((self.seed, 1, block)).permutation(100)
        return kinds[order].tolist()

    def __getitem__(self, g):
        """Training row g. (torch's DataLoader asks for it by this name.)"""
        return self.source.row(*self.kind_of(g))

    def train_batches(self, first_step, last_step, rows_per_step, micro_rows, rank=0, ranks=1,
                      pin=False):
        """Iterator over the micro-batches of steps first_step .. last_step - 1 for this rank.
        ranks * micro_rows must divide rows_per_step."""
        starts = range(first_step * rows_per_step + rank * micro_rows, last_step * rows_per_step,
                       ranks * micro_rows)
        workers = self.cfg.workers
        if workers < 0:  # because without any, the GPU would wait while a batch is prepared
            workers = 4 if pin and self.cfg.data != "procedural" else 0
        # spawn, not fork, because the threads of torch and tiktoken do not survive a fork
        return iter(torch.utils.data.DataLoader(
            self, batch_sampler=(range(n, n + micro_rows) for n in starts),
            collate_fn=partial(collate, patch_size=self.patch_size), pin_memory=pin,
            num_workers=workers, worker_init_fn=ignore_signals,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="spawn" if workers else None))

    def val_batches(self, kind, micro_rows, rank=0, ranks=1):
        """This rank's share of the fixed validation rows of one kind. All ranks get the same number
        of rows (the last may be an empty row), because FSDP would wait for a missing batch."""
        n = self.source.n_rows(kind, "val")
        mine = range(rank, -(-n // ranks) * ranks, ranks)
        for a in range(0, len(mine), micro_rows):
            rows = [self.source.val_row(kind, i) if i < n else self.source.new_row()
                    for i in mine[a:a + micro_rows]]
            yield collate(rows, self.patch_size)


def ignore_signals(worker):
    """Ctrl-C reaches all processes of a terminal, but training ends its workers after a save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
