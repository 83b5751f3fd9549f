"""Pack published data into a folder that training reads memory-mapped (`--data FOLDER`).

    python -m tools.pack --captions 'A/*.tar' --interleaved B --text 'C/*.jsonl.zst' --out real

A file holds samples, a sample becomes the parts of a document (texts, questions, answers and
images), and data.encode makes the document. Every input file becomes one shard of its own (the
format stands in data.py), and data.json lists the shards. What cannot be used is counted and named
at the end, and never stops the packer.

Dimensions:  h, w height and width of a stored picture
"""
import base64
import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import warnings
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from functools import partial
from glob import escape, glob
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import check, encode, get_tokenizer
from tools import need, usable_cores
from train import Parser, only_process, write_whole
from world import Question, turn

MAX_PIXELS = 50_000_000  # a larger picture is skipped before it is decoded ("image bomb")
MAX_BYTES = 64_000_000  # of a sample (all its pictures and texts) in an archive, or of one picture
MAX_LINE = 16_000_000  # bytes of a line, or of a record in a list
MAX_CAPTION = 10_000  # characters: a longer one is a page that was scraped, not a caption
MIN_SIDE = 8  # pixels: smaller pictures are tracking pixels and rulers


class Skip(str):
    """Why an image, or a whole document, cannot be used. It stands in its place among the parts."""


# ---- From files to samples -----------------------------------------------------------------------


def read_samples(path):
    """Yields (key, record, members). The key is a name or a number from 0, the record the bytes of
    a json or a dict, and members is {name: bytes} in a tar, and empty elsewhere."""
    if path.suffix == ".tar":
        return tar_samples(path)
    records = enumerate(RECORDS[path.suffix](path))
    return ((i, x, {}) for i, x in records if x not in (b"\n", b"\r\n"))


def tar_samples(path):
    """Members side by side with one key are a sample. A key is the path up to the name's first dot
    (WebDataset's rule). Nothing is written to disk, so names of members can do no harm."""
    def key_of(member):
        folder, slash, name = member.name.rpartition("/")
        return folder + slash + name.split(".", 1)[0]

    with open(path, "rb") as file, tarfile.open(None, "r:", file, errors="replace") as tar:
        files = (x for x in tar if x.isfile() and not os.path.basename(x.name).startswith("."))
        for key, group in itertools.groupby(files, key_of):
            members, room = {}, MAX_BYTES
            for member in group:
                content = tar.extractfile(member).read(room + 1)  # a sparse one can claim terabytes
                members[os.path.basename(member.name)] = content
                room -= len(content)
                if room < 0:
                    break
                tar.members = []  # otherwise tarfile remembers every member
            record = members.get(os.path.basename(key) + ".json")
            yield key, record if room >= 0 else Skip("sample too large"), members
        file.seek(tar.offset)
        end = file.read(1 << 16)
    if not end or end.strip(b"\0"):  # tarfile stops silently at a cut and at a damaged header
        raise EOFError(f"the tar is cut or damaged at byte {tar.offset}")


def parquet_rows(path):
    """Only a few rows' images are in memory, because nothing is buffered ahead."""
    parquet = need("pyarrow.parquet", "pyarrow")
    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    for batch in file.iter_batches(64, columns=["texts", "images"], use_threads=False):
        yield from batch.to_pylist()


def text_pieces(path):
    """Documents of about 64 kB, because memory must not grow with the file."""
    with open(path, encoding="utf-8-sig") as file:
        while text := file.read(1 << 16) + file.readline(1 << 16):
            yield {"text": text}


def open_zstd(path):
    """The bytes of all frames. OSError where the file is cut."""
    stream = need("pyarrow", "pyarrow").input_stream(path, compression="zstd", buffer_size=1 << 16)
    return io.BufferedReader(stream)


def lines_of(path, open_file):
    """The lines of a file. A Skip replaces long ones, as 65 kB of zstd can be 2 GB of zeros."""
    with open_file(path) as file:
        while line := file.readline(MAX_LINE):
            whole = line.endswith(b"\n") or len(line) < MAX_LINE
            yield line if whole else Skip("line too long")
            while not whole:
                rest = file.readline(MAX_LINE)
                whole = rest.endswith(b"\n") or len(rest) < MAX_LINE


def list_records(path):
    """The records of one long list. Only a few MB of it are in memory (LLaVA's list has 1 GB)."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(1 << 20).lstrip()
        going, text = text[:1] == "[", text[1:]
        while going and len(text) < MAX_LINE:
            at = gap.match(text).end()
            with contextlib.suppress(ValueError):  # it goes on in the next piece, or ends
                while at < len(text):
                    record, end = decode(text, at)
                    at = gap.match(text, end).end()
                    yield record
            more = file.read(1 << 20)
            if not more and text[at:].rstrip() == "]":
                return
            going, text = bool(more), text[at:] + more
    raise ValueError("not a list of records, or one without an end, or with too long a record")


RECORDS = {".parquet": parquet_rows, ".txt": text_pieces, ".json": list_records,
           ".zst": partial(lines_of, open_file=open_zstd),
           ".gz": partial(lines_of, open_file=gzip.open),
           ".jsonl": partial(lines_of, open_file=partial(open, mode="rb"))}


# ---- From samples to parts: texts, Question, Answer, the bytes of an image file, Skip ------------


def caption_parts(record, members, folder):
    """img2dataset: KEY.jpg (or .png, .webp), and KEY.txt or else the "caption" of KEY.json. A key
    ends at the first dot, so 2024.a.jpg and 2024.b.jpg have the same key."""
    images = [members[x] for x in members if x.lower().endswith((".jpg", ".jpeg", ".png", ".webp"))]
    texts = [members[x].decode("utf-8-sig") for x in members if x.endswith(".txt")]
    if max(len(images), len(texts)) > 1:
        return [Skip("several images or texts of one name (up to its first dot)")]
    caption = (texts[0] if texts else (record or {}).get("caption") or "").strip()
    if len(caption) > MAX_CAPTION or "\0" in caption:
        caption = Skip("caption too long" if len(caption) > MAX_CAPTION else "caption with NUL")
    return [images[0] if images else Skip("missing image"), caption]


def interleaved_parts(record, members, folder):
    """OBELICS has lists "images" and "texts", and one of the two is None at each place. MMC4 and
    OpenFlamingo have sentences, each of which comes after the images that match it."""
    if "text_list" in record:
        images = [(info["matched_text_index"], info) for info in record["image_info"]]
        texts, separator = record["text_list"], " "
    else:
        images, texts, separator = [*enumerate(record["images"])], record["texts"], "\n\n"
        if len(images) != len(texts):
            return [Skip("image count does not match")]
    places = [(i, False, find_image(image, members, folder)) for i, image in images if image]
    places += [(i, False, Skip("neither text nor image")) for i, image in images
               if not image and not texts[i]]
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
    names = names if isinstance(names, list) else [names]
    images = [find_image(name, members, folder) for name in names]
    turns, parts = record["conversations"], []
    if sum(said["value"].count("<image>") for said in turns[::2]) > len(images):
        return [Skip("missing image")]
    for human, gpt in zip(turns[::2], turns[1::2]):
        if (human["from"], gpt["from"]) != ("human", "gpt"):
            return [Skip("turns are not human, gpt, human, gpt, ...")]
        text = human["value"]
        parts += [images.pop(0) for _ in range(min(text.count("<image>"), len(images)))]
        parts += turn(text.replace("<image>", "").strip(), gpt["value"].strip())
    return [*images, *parts]  # images that no turn names stand before everything


def find_image(value, members, folder):
    """The bytes of an image, which lies in the record itself, in its tar or in a file beside it."""
    if isinstance(value, dict):  # image_info of OpenFlamingo or MMC4, or an image of a parquet file
        value = (base64.b64decode(value.get("image_base64") or "") or value.get("bytes")
                 or value.get("path") or value.get("image_name") or "")
    if isinstance(value, bytes):
        return value
    if os.path.basename(value) in members:
        return members[os.path.basename(value)]
    is_url = value.startswith(("http://", "https://"))
    value = file_of_url(value) if is_url else value
    for path in (folder / value, folder / "images" / value):
        inside = path.resolve().is_relative_to(folder.resolve())  # not by .. nor by a link
        if path.is_file():
            if not inside:
                return Skip("image outside the folder")
            with open(path, "rb") as file:
                return file.read(MAX_BYTES)
    return Skip("image is a URL (download it first)" if is_url else "missing image")


def file_of_url(url):
    """Where in images/ tools.obelics puts the image of a URL."""
    name = hashlib.sha256(url.encode()).hexdigest()
    return f"{name[:2]}/{name}.jpg"  # 256 folders, because one with millions of files is slow


# Every kind of document, in the order of --mixture: its flag, the function that makes parts of a
# record (with the members of its tar and the folder of its file), and the endings of its files.
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LAYOUTS = {
    "caption": ("--captions", caption_parts, (".tar",)),
    "interleaved": ("--interleaved", interleaved_parts, (".tar", ".parquet", *LINES)),
    "text": ("--text", lambda record, *_: [record["text"]], (".txt", *LINES)),
    "conversation": ("--conversations", conversation_parts, (".json", *LINES)),
}
OWN_CAPTIONS = "; of a folder of NAME.jpg and NAME.txt: python -m tarfile -c my.tar FOLDER"


def read_source(path, kind):
    """Yields (key, parts, record) of one file. If it is cut or damaged, a Skip comes last."""
    make_parts = LAYOUTS[kind][1]
    try:
        for key, record, members in read_samples(path):
            try:
                record = json.loads(record) if isinstance(record, bytes) else record
                parts = ([record] if isinstance(record, Skip)
                         else make_parts(record, members, path.parent))
            except KeyError as error:
                parts = [Skip(f"no field {str(error)[:40]}")]
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError,
                    OSError) as error:  # an image with links in a loop, or forbidden
                if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
                    raise  # it may pass
                parts = [Skip(f"broken record ({type(error).__name__})")]
            yield key, parts, record
    except Exception as error:  # on hostile files the libraries raise nearly every type
        reason = str(error).partition("\n")[0][:80]
        # a reason of its own for each file, because only the first place of a reason is named
        again = error if getattr(error, "errno", None) else None  # no permission, no connection
        yield reason, [Skip(f"truncated or damaged file {path.name}")], again


# ---- Images --------------------------------------------------------------------------------------


def load_image(data, store_size):
    """The bytes of an image file -> uint8 (h, w, 3), or Skip.

    First frame, upright, alpha over white, 8 bit, centre-cropped to at most 2:1. The short side is
    reduced to store_size, and never enlarged, so that room for a random crop remains."""
    Image, ImageOps = need("PIL.Image", "pillow"), need("PIL.ImageOps", "pillow")
    Image.MAX_IMAGE_PIXELS = None  # we count pixels ourselves, where Pillow would warn or raise
    safe = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start ghostscript
    try:
        image = Image.open(io.BytesIO(data), formats=safe)
        w, h = image.size
        if w * h > MAX_PIXELS:
            return Skip("image too large")
        if min(w, h) < MIN_SIDE:
            return Skip("image too small")
        shrink = min(1.0, 2 * store_size / min(w, h))
        image.draft(None, (int(w * shrink) + 1, int(h * shrink) + 1))  # a JPEG decodes less
        image = to_rgb(Image, ImageOps.exif_transpose(image))
    except Exception:  # on hostile bytes the decoders raise nearly every type
        return Skip("corrupt image")
    w, h = image.size
    scale = min(1.0, store_size / min(w, h))
    size = [round(scale * side) for side in (min(w, 2 * h), min(h, 2 * w))]
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))  # (h, w, 3)


def store_size(image_size):
    """The short side of stored images: 256 for crops of 224."""
    return round(image_size * 8 / 7)


def to_rgb(Image, image):
    if image.mode[0] in "IF":  # 16 bit or float, which convert("RGB") would clip
        grey = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0).clip(0)  # (h, w)
        ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        white = next((x for x in ranges if grey.max() <= x), grey.max())
        image = Image.fromarray((grey * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- One input file becomes one shard ------------------------------------------------------------


def make_document(parts, kind, encoding, store_size):
    """-> (Document, the reason of each image that was left out), or (None, [the first reason why]).
    Texts on both sides of a left-out image are two paragraphs."""
    kept, reasons, gap = [], [], False
    for part in (load_image(x, store_size) if isinstance(x, bytes) else x for x in parts):
        if isinstance(part, Skip):
            reasons.append(part)
        elif gap and type(part) is str and kept and type(kept[-1]) is str:
            kept[-1] += "\n\n" + part
        else:
            kept.append(part)
        gap = isinstance(part, Skip)
    document = encode(kept, encoding)
    if len(document.tokens) == len(document.images):
        return None, reasons[:1] or ["no text"]
    if reasons and kind != "interleaved":  # only there the text makes sense without the image
        return None, reasons[:1]
    return document, reasons


def split_of(parts, name, val_share):
    """A hash decides, so that a document is always in the same split, and all questions about one
    picture are in one split."""
    unit = name.encode("utf-8", "surrogateescape")  # in every locale the same
    if any(isinstance(part, Question) for part in parts):
        unit = next((part for part in parts if isinstance(part, bytes)), unit)
    return "val" if zlib.crc32(unit) / 2**32 < val_share else "train"


def pack_file(source, kind, folder, tokenizer, made_from):
    """Pack one input file into the shard `folder`. Runs in a worker process."""
    encoding, tmp = get_tokenizer(tokenizer), folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by a run that was killed
    tmp.mkdir(parents=True)
    warnings.filterwarnings("ignore", module="PIL")  # odd EXIF and the like
    tables, skipped, counts = {}, {}, {}
    with open(tmp / "tokens", "wb") as words, open(tmp / "images", "wb") as pixels:
        for key, parts, record in read_source(source, kind):
            if isinstance(record, OSError):  # which may pass, so this file is never finished
                made_from = {**made_from, "size": -1}
            document, reasons = make_document(parts, kind, encoding, made_from["store_size"])
            place = key + 1 if isinstance(key, int) else key  # lines as an editor counts them
            for reason in reasons:
                skipped.setdefault(reason, [0, f"{source.name}: {place}"])[0] += 1
            if document is None:
                continue
            tokens, images = document.tokens, document.images
            split = split_of(parts, f"{source.name}/{key}", made_from["val_share"])
            starts = words.tell(), pixels.tell()
            tables.setdefault(split, []).append((*starts, len(tokens), len(images)))
            words.write(tokens.tobytes())
            sizes = [side for image in images for side in image.shape[:2]]
            pixels.writelines(x.tobytes() for x in (np.array(sizes, np.int32), *images))
    for split, table in tables.items():
        table = np.array(table, np.int64)                                   # (documents, 4)
        table.tofile(tmp / f"{split}.docs")
        n_tokens, n_images = table.sum(0)[2:].tolist()
        counts[split] = {"docs": len(table), "tokens": n_tokens - n_images, "images": n_images}
    shard = {"made_from": made_from, "skipped": skipped, "splits": counts}
    (tmp / "shard.json").write_text(json.dumps(shard), encoding="utf-8")
    for path in tmp.iterdir():  # otherwise a power cut could leave the name without the content
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # made from another version of the file
    os.replace(tmp, folder)  # in one step, so that a shard is complete or absent


# ---- All files, side by side in worker processes -------------------------------------------------


def pack(sources, out, tokenizer="bytes", image_size=224, split="train", val_fraction=0.01,
         workers=0):
    """Pack {kind: [globs, files or folders]} into `out` and return the content of data.json.

    Safe to interrupt and start again, and to call again with more files (`split="val"`).
    SystemExit if nothing matches, if `out` was packed with other settings or cannot be written, or
    if no document survives."""
    out, encoding = Path(out), get_tokenizer(tokenizer)
    ranks = repr((encoding._pat_str, encoding._mergeable_ranks)).encode()
    config = {"tokenizer_hash": zlib.crc32(ranks), "vocab_size": encoding.n_vocab,
              "eot": encoding.eot_token, "image_size": image_size,
              "store_size": store_size(image_size)}
    val_share = 1.0 if split == "val" else val_fraction
    jobs = find_jobs(sources, out, str(tokenizer), config, val_share)
    try:
        with only_process(out, "packs"):
            todo = unfinished(jobs, out, config)
            run_jobs(todo, min(workers or usable_cores(), len(todo)))
            return write_index(out, config, tokenizer)
    except (KeyboardInterrupt, BrokenExecutor):
        raise SystemExit("interrupted, or a worker died (out of memory? try fewer --workers): "
                         "finished files are kept, the same command goes on") from None
    except OSError as error:  # a full disk, no permission
        raise SystemExit(f"cannot pack into {out} ({error}): make room, or choose another --out; "
                         "finished files are kept, the same command goes on") from None


def find_jobs(sources, out, tokenizer, config, val_share):
    """The arguments of pack_file for each input file."""
    jobs = []
    for kind, path in [(k, p) for k in LAYOUTS for p in find_sources(k, sources.get(k) or ())]:
        stat, real = path.stat(), Path(os.path.realpath(path))
        made_from = {**config, "path": str(real), "size": stat.st_size, "mtime": stat.st_mtime_ns,
                     "val_share": val_share}
        digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]  # two folders may use one name
        name = real.name if len(os.fsencode(real.name)) < 238 else kind  # systems allow 255 bytes
        jobs.append((path, kind, out / kind / f"{name}-{digest}", tokenizer, made_from))
    flags = ", ".join(flag for flag, *_ in LAYOUTS.values())
    check(jobs, f"nothing to pack: give files to one or more of {flags}")
    return jobs


def find_sources(kind, patterns):
    """Files of this kind that globs, files and folders (with all below them) name."""
    found, endings = {}, LAYOUTS[kind][2]
    for pattern in patterns:
        name = escape(pattern) if os.path.exists(pattern) else pattern
        paths = itertools.chain(*map(below, glob(name, recursive=True)))
        paths = [path for path in paths if path.endswith(endings) and os.path.isfile(path)]
        check(paths, f"{pattern!r}, seen from {os.getcwd()}, names no {kind} file "
              f"({' '.join(endings)})" + OWN_CAPTIONS * (kind == "caption"))
        found.update({os.path.realpath(path): Path(path) for path in paths})
    return [found[real] for real in sorted(found)]


def below(path):
    """This path, and all files below it. A folder is read once, because links can form a loop."""
    seen = {os.path.realpath(path)}
    yield path
    for root, folders, files in os.walk(path, followlinks=True):
        yield from (os.path.join(root, name) for name in files if name[0] != ".")
        real = {name: os.path.realpath(os.path.join(root, name)) for name in folders}
        folders[:] = [name for name in folders if name[0] != "." and real[name] not in seen]
        seen.update(real.values())


def unfinished(jobs, out, config):
    """The jobs that still lack a finished shard. SystemExit if `out` has another config."""
    done = {folder: shard["made_from"] for folder, shard in read_shards(out)}
    for made_from in done.values():
        differ = {field for field in config if made_from.get(field) != config[field]}
        told = [f"--image-size {made_from.get('image_size')}"] * ("image_size" in differ)
        told += [f"another --tokenizer than {jobs[0][3]}"] * ("tokenizer_hash" in differ)
        check(not differ, f"{out} was packed with {' and '.join(told)}: give what it was packed "
              "with, or choose another --out")
    for path, _, folder, _, made_from in jobs:
        if done.get(folder, made_from)["val_share"] != made_from["val_share"]:
            print(f"note: {path} was packed with another --split or --val-fraction; it is packed "
                  "again, because nothing may be in both train and val")
    todo = [job for job in jobs if done.get(job[2]) != job[4]]
    gone = {seen_as(x): (x["path"], folder) for folder, x in done.items()
            if not os.path.exists(x["path"]) or os.path.realpath(x["path"]) != x["path"]}
    for *_, made_from in todo:  # else its documents would be there twice, or in both splits
        before, folder = gone.get(seen_as(made_from), ("", ""))
        check(not before, f"{made_from['path']} seems to be {before}, which was packed before and "
              f"has moved: move it back, or delete {folder} to pack it anew")
    hint = f" (to pack one again, as when images were missing, delete its folder in {out})"
    print(f"{len(jobs)} files, {len(jobs) - len(todo)} of them packed before"
          + (hint if len(todo) < len(jobs) else ""))
    return todo


def seen_as(made_from):
    """What a file keeps when it moves."""
    return Path(made_from["path"]).name, made_from["size"], made_from["mtime"]


def read_shards(out):
    """[(folder, content of its shard.json)] of the finished shards."""
    shards = []
    for path in sorted(out.glob("*/*/shard.json")):
        if path.parent.suffix != ".tmp":
            try:
                shard = json.loads(path.read_text(encoding="utf-8"))
                shards.append((path.parent, {x: shard[x] for x in ("made_from", "splits",
                                                                   "skipped")}))
            except (ValueError, LookupError, TypeError):
                raise SystemExit(f"{path} is damaged: delete its folder, and the same command "
                                 "packs it again") from None
    return shards


def run_jobs(jobs, workers):
    if workers <= 1:
        for job in tqdm(jobs, "pack", unit="file"):
            pack_file(*job)
        return
    context = multiprocessing.get_context("spawn")  # tiktoken's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        futures = [pool.submit(pack_file, *job) for job in jobs]
        for done in tqdm(as_completed(futures), "pack", len(jobs), unit="file"):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    parent = multiprocessing.parent_process()  # and the death of the parent must end it, too
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_index(out, config, tokenizer):
    """Write data.json, the list of all shards in `out`, print its totals and return it."""
    splits, skipped = {}, {}
    for folder, shard in read_shards(out):
        for split, counts in shard["splits"].items():
            kinds = splits.setdefault(split, {})
            total = kinds.setdefault(folder.parent.name, {**dict.fromkeys(counts, 0), "shards": []})
            total.update({x: total[x] + n for x, n in counts.items()})
            total["shards"].append({"name": folder.name, **counts})
        for reason, (count, example) in shard["skipped"].items():
            skipped.setdefault(reason, [0, example])[0] += count
    print_totals(splits, skipped)
    why = "see the reasons above" if skipped else "the files hold no records"
    check(splits, f"no document could be packed into {out}: {why}")
    meta = {"tokenizer": copy_tokenizer(tokenizer, out), **config, "splits": splits,
            "skipped": skipped}
    text = json.dumps(meta, indent=1)
    write_whole(out / "data.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return meta


def copy_tokenizer(tokenizer, out):
    """The tokenizer's name in data.json. A file is copied to `out`, so that the folder can move."""
    if not str(tokenizer).endswith(".tiktoken"):
        return str(tokenizer)
    for source in map(Path(tokenizer).with_suffix, (".tiktoken", ".pat.txt")):
        if source.is_file():
            copy = out / source.name.replace(Path(tokenizer).stem, "tokenizer", 1)
            copy.write_bytes(source.read_bytes())
    return "tokenizer.tiktoken"


def print_totals(splits, skipped):
    for split, kinds in splits.items():
        for kind, total in kinds.items():
            counts = [f"{n:14,} {x}" for x, n in total.items() if x != "shards"]
            print(f"{split:5} {kind:11}", *counts)
    for reason, (count, example) in skipped.items():
        print(f"skipped {count:,}: {reason} (first: {example})")
    if splits and "val" not in splits:
        print("note: nothing is in the split val, which training needs: give other files with "
              "--split val, or the same with a larger --val-fraction")
    there = splits.get("val", {})
    few = [kind for kind in {**splits.get("train", {}), **there}
           if there.get(kind, {"docs": 0})["docs"] < 20]
    if there and few:
        print(f"note: a loss of fewer than 20 documents says little ({', '.join(few)} of the split "
              "val): give more files, or a larger --val-fraction")


def main(argv=None):
    parser = Parser(prog="python -m tools.pack", description=__doc__.splitlines()[0])
    add = parser.add_argument
    for kind, (flag, _, endings) in LAYOUTS.items():
        add(flag, dest=kind, nargs="+", default=[], metavar="GLOB",
            help=f"files ({' '.join(endings)}), folders or quoted globs"
            + OWN_CAPTIONS * (kind == "caption"))
    add("--out", required=True, help="folder for the packed data")
    add("--tokenizer", default="bytes", help="bytes (the default), a tiktoken name or a path to a "
        ".tiktoken file")
    add("--image-size", type=int, default=224, help="pixels, as in training (default: 224)")
    add("--split", choices=("train", "val"), default="train", help="(default: train)")
    add("--val-fraction", type=float, default=0.01, help="share of train that becomes val (default:"
        " 0.01)")
    add("--workers", type=int, default=0, help="processes; 0 = one per core")
    args = vars(parser.parse_args(argv))
    if sys.stdout:  # or it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    check(0 <= args["val_fraction"] < 1 and args["image_size"] >= 1, "--val-fraction must be in "
          f"[0, 1) and --image-size at least 1, not {args['val_fraction']}, {args['image_size']}")
    pack({kind: args.pop(kind) for kind in LAYOUTS}, **args)


if __name__ == "__main__":
    main()
