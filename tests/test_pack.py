"""Real data: python -m pytest -q tests/test_pack.py

Files that people have (../shared/data), and files as they arrive: cut, damaged, mislabelled. Every
bad sample must be counted, none may stop the packer, and what it writes must be complete."""
import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import time
import zlib
from multiprocessing.reduction import ForkingPickler
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image, ImageFile

import data
import tools.pack
from data import (IMAGE, READ, DataConfig, Loader, Packed, Shards, crop_box, get_tokenizer,
                  square)
from helpers import ROOT, one_line, refused, write_lines
from model import ModelConfig
from test_data import digest
from tools.obelics import main as obelics_main
from tools.pack import load_image, pack, read_source

SHARED = ROOT.parent / "shared"
VAL, ALT = SHARED / "data" / "val", SHARED / "data" / "alt_layouts"
DAMAGED = "truncated or damaged file"


def saved(image, fmt="PNG", **options):
    """The bytes of a file that holds this picture."""
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def picture(size=(20, 16), fmt="PNG", colour=(200, 30, 30)):
    return saved(Image.new("RGB", size, colour), fmt)


def bomb(side):
    """A PNG of a few bytes that claims side x side pixels."""
    data = picture()
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_texts(path, *documents):
    return write_lines(path, *(json.dumps({"text": text}) for text in documents))


def obelics(texts, images):
    return json.dumps({"texts": texts, "images": images, "metadata": ""})


def llava(image, *said):
    turns = [{"from": ("human", "gpt")[i % 2], "value": x} for i, x in enumerate(said)]
    return {"image": image, "conversations": turns}


def pack_one(tmp_path, kind, path, **options):
    options = {"image_size": 16, "val_fraction": 0, "workers": 1, **options}
    meta = pack({kind: [str(path)]}, tmp_path / "out", **options)
    return meta, Shards(tmp_path / "out")


def texts(shards, kind):
    """Documents in bytes as readable strings, an image as one character."""
    documents = (shards.tokens(kind, i) for i in range(len(shards.docs[kind])))
    return ["".join("▣" if t == IMAGE else chr(t) for t in ids) for ids in documents]


def skipped(meta):
    return {reason: count for reason, (count, _) in meta["skipped"].items()}


# ---- tokenizers

def test_tiktoken_file_and_its_pattern(tmp_path):
    gpt2 = get_tokenizer(str(SHARED / "tokenizers/gpt2.tiktoken"))
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    small = SHARED / "tokenizers/bpe4096.tiktoken"
    assert get_tokenizer(small)._pat_str in (small.with_suffix(".pat.txt")).read_text("utf-8")
    for name, lines, message in (("x", ["not base64"], "base64 token"), ("z", [], "256 bytes"),
                                 ("n", ["YQ== 0", "Yg== 1"], "256 bytes")):
        refused(message, get_tokenizer, write_lines(tmp_path / f"{name}.tiktoken", *lines))
    refused("y.tiktoken cannot be used", get_tokenizer, tmp_path / "y.tiktoken")


def test_named_tokenizer_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers/tiktoken_cache"))
    assert get_tokenizer("gpt2").encode_ordinary("hello world") == [31373, 995]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens: offline
    refused("\\.tiktoken.*TIKTOKEN_CACHE_DIR", get_tokenizer, "p50k_edit")
    refused("gtp2 cannot be used .*gpt2", get_tokenizer, "gtp2")


@pytest.mark.parametrize("tokenizer", ["bytes", str(SHARED / "tokenizers/bpe2048.tiktoken")])
def test_text_survives_the_tokenizer(tmp_path, tokenizer):
    """A special token in it is text; a megabyte of white space, which would overflow tiktoken's
    stack and end the packer, is shortened."""
    said = ["naïve 🐈‍⬛ \x00\r\n<|endoftext|> b" * 40, "\n" * 9 + "c", "a" + " " * 9999 + "b"]
    path = write_texts(tmp_path / "a.jsonl", *said[:2], "a" + " " * 1_500_000 + "b")
    _, shards = pack_one(tmp_path, "text", path, tokenizer=tokenizer)
    ids = [shards.tokens("text", i) for i in range(3)]
    assert shards.encoding.eot_token == shards.meta["eot"] not in np.concatenate(ids)
    assert [shards.encoding.decode(x.tolist()) for x in ids] == said


# ---- layouts

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    pack({"caption": [str(VAL / "captions")], "interleaved": [str(VAL / "interleaved")]}, out,
         image_size=32, split="val", workers=1)
    return Shards(out, "val")


def test_packed_rows_are_the_recorded_ones(tmp_path):
    """Files, shards and rows together. results/ was measured on such rows."""
    pack({"caption": [VAL / "captions"], "interleaved": [VAL / "interleaved"],
          "text": [VAL / "text"], "conversation": [ALT / "captions_llava_json" / "data.json"]},
         tmp_path, SHARED / "tokenizers/bpe4096.tiktoken", 64, val_fraction=0.1, workers=1)
    def source_of(**flags):
        return Loader(DataConfig(str(tmp_path), "40-40-10-10", val_rows=64, **flags), 5,
                      ModelConfig(context=256, image_size=64, patch_size=16)).source

    source = source_of()
    expected = {
        "caption": ("516ec5d0ddb4", "ffc4504214cf"), "text": ("37a64dbb716f", "08eea38a8d7a"),
        "interleaved": ("32280d59950d", "9dafd6e19767"),
        "conversation": ("94f06bc73c7e", "8cbcfd3fc37c")}
    for kind, recorded in expected.items():
        rows = [source.row(kind, n) for n in (*range(18), 300, 301)]
        n_val = min(20, source.n_rows(kind, "val"))
        val_rows = [source.val_row(kind, n) for n in range(n_val)]
        assert (digest(rows, pixels=False), digest(val_rows, pixels=False)) == recorded
    for flag in ("augment", "flip"):  # of training alone
        other = source_of(**{flag: True})
        assert digest([source.row("caption", 0)]) != digest([other.row("caption", 0)])
        assert digest([source.val_row("caption", 0)]) == digest([other.val_row("caption", 0)])


@pytest.mark.parametrize("folder", ["obelics_parquet", "obelics_jsonl", "mmc4", "openflamingo_wds"])
def test_every_layout_gives_the_plain_documents(tmp_path, shared, folder):
    pack({"interleaved": [str(ALT / folder)]}, tmp_path, image_size=32, split="val", workers=1)
    shards = Shards(tmp_path, "val")
    assert shards.meta["skipped"] == {}
    assert len(shards.docs["interleaved"]) == 60

    def documents(source):
        for i, text in enumerate(texts(source, "interleaved")):
            images = [source.image("interleaved", i, j) for j in range(text.count("▣"))]
            yield "".join(text.split()), [x.tobytes() for x in images]

    known, found = list(documents(shared)), list(documents(shards))
    if folder in ("mmc4", "openflamingo_wds"):  # their white space is lost, and an image can only
        assert sum(document in known for document in found) >= 56  # stand before a sentence
        bare = {text.replace("▣", "") for text, _ in known}
        assert all(text.replace("▣", "") in bare for text, _ in found)
    else:
        assert all(document in known for document in found)


def test_images_that_were_fetched_for_obelics_are_found_by_their_urls(tmp_path, printed):
    """The second URL was not to be had. The files are those of img2dataset's FilesSampleWriter."""
    urls = [f"https://example.org/w_9,h_{i}/{i}.png?x=ü" for i in range(2)]
    folder, fetched = tmp_path / "obelics", tmp_path / "fetched"
    for made in (folder, fetched / "00000"):
        made.mkdir(parents=True)
    write = pyarrow.parquet.write_table
    write(pyarrow.table({"images": [[urls[0], None, urls[1]]], "texts": [[None, "seen", None]]}),
          folder / "a.parquet")
    obelics_main([str(folder), "--urls", str(tmp_path / "new" / "urls.tsv")])
    listed = pyarrow.csv.read_csv(  # as img2dataset reads it
        tmp_path / "new" / "urls.tsv", parse_options=pyarrow.csv.ParseOptions(delimiter="\t"))
    assert listed["url"].to_pylist() == urls
    write(pyarrow.table({"url": urls, "key": ["000000", "000001"]}), fetched / "00000.parquet")
    (fetched / "00000" / "000000.jpg").write_bytes(picture(fmt="JPEG"))
    for _ in range(2):  # it may be given again
        said = printed(obelics_main, [str(folder), "--fetched", str(fetched)])
        assert "1 of 2 images" in said
    _, shards = pack_one(tmp_path, "interleaved", folder)
    assert texts(shards, "interleaved") == ["▣seen"]
    assert shards.meta["skipped"] == {"image is a URL (download it first)": [1, "a.parquet: 1"]}
    for flags in (["--urls", str(tmp_path / "none.txt")], ["--fetched", str(tmp_path)]):
        one_line(SystemExit, obelics_main, [str(tmp_path), *flags])
    flags = [str(folder), "--fetched", str(folder)]
    refused("a.parquet.* url", obelics_main, flags)
    (folder / "a.parquet").write_bytes(b"PAR1")  # img2dataset is not yet at its end
    refused("a.parquet", obelics_main, flags)


def test_caption_tar_without_txt_and_in_any_order(tmp_path):
    path = write_tar(tmp_path / "a.tar", [
        ("d/1.txt", "one"), ("d/1.json", "{}"), ("d/1.jpg", picture(fmt="JPEG")),
        ("../../2.webp", picture(fmt="WEBP")), ("../../2.json", json.dumps({"caption": " two\n"})),
        ("3.png", picture()), ("3.txt", "\ufeffthree")])
    _, shards = pack_one(tmp_path, "caption", path)
    assert texts(shards, "caption") == ["▣one", "▣two", "▣three"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tar", "out"]  # nothing extracted


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def test_text_layouts(tmp_path):
    line = json.dumps({"text": "héllo"}).encode() + b"\n"
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(line) + zstd(line * 2))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(line))
    (tmp_path / "c.jsonl").write_bytes(b"\n" + line + b"\r\n" + line[:-1])
    (tmp_path / "d.txt").write_bytes("\ufeffone\n\ntwo\n".encode())
    _, shards = pack_one(tmp_path, "text", tmp_path)
    hello = "hÃ©llo"  # bytes as characters
    assert texts(shards, "text") == [hello] * 7 + ["one\n\ntwo\n"]


def test_long_plain_text_is_cut_and_complete(tmp_path):
    path = write_lines(tmp_path / "a.txt", *(f"line {i}" for i in range(30000)))
    pieces = texts(pack_one(tmp_path, "text", path)[1], "text")
    assert len(pieces) > 3 and max(map(len, pieces)) < 66000
    assert "".join(pieces) == path.read_text()


# ---- conversations

def test_conversations_keep_their_layout_and_what_is_a_target(tmp_path):
    """LLaVA's json: questions are stored as read only, each answer ends with end-of-text."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    write_lines(tmp_path / "a.json", json.dumps([
        llava("a.png", "<image>\nWhat?", "A dot.", "Really?", "Yes."), llava(None, "Text?", "Yes."),
        llava("gone.png", "<image>\nWhat?", "?"), llava("a.png", "<image>\nNo answer")]))
    meta, shards = pack_one(tmp_path, "conversation", tmp_path / "a.json")
    assert shards.docs["conversation"][:, 4].tolist() == [1, 0]
    assert skipped(meta) == {"missing image": 1, "no text": 1}
    tokens = shards.tokens("conversation", 0)
    read = bytes(READ - t for t in tokens if t <= READ).decode()
    assert read == "\nquestion: What?\nanswer:\nquestion: Really?\nanswer:"
    said = [t for t in tokens.tolist() if t >= 0]  # the last end-of-text is added with the row
    assert said == [*b" A dot.", shards.encoding.eot_token, *b" Yes."]


def test_questions_about_one_picture_are_in_one_split(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(colour=(50 * i, 0, 0)))
    records = [llava(f"{i % 5}.png", f"<image>\nQuestion {i}?", "Yes.") for i in range(100)]
    path = write_lines(tmp_path / "a.json", json.dumps(records))
    _, train = pack_one(tmp_path, "conversation", path, val_fraction=0.4)
    reds = [{int(shards.image("conversation", i, 0)[0, 0, 0])
             for i in range(len(shards.docs["conversation"]))}
            for shards in (train, Shards(tmp_path / "out", "val"))]
    assert len(reds[0] | reds[1]) == 5 and not reds[0] & reds[1]


def test_nothing_to_validate_on_is_said_before_training(tmp_path):
    write_lines(tmp_path / "a.json", json.dumps(2 * [llava(None, "Why?", "So.")]))
    write_texts(tmp_path / "a.jsonl", *(f"text {i}" for i in range(99)))
    sources = {"conversation": [str(tmp_path / "a.json")], "text": [str(tmp_path / "a.jsonl")]}
    pack(sources, tmp_path / "out", image_size=16, val_fraction=0.05, workers=1)
    assert Shards(tmp_path / "out", "val").kinds == ("text",)
    refused("no conversation documents in its split val", Loader,
            DataConfig(str(tmp_path / "out"), "0-0-50-50"), 0, ModelConfig(image_size=16))


# ---- damage: counted, named, survived

def test_bad_captions_are_counted(tmp_path):
    good, jpeg = picture(), picture(size=(300, 200), fmt="JPEG")
    path = write_tar(tmp_path / "a.tar", [
        ("0.png", good), ("0.txt", "fine"), ("1.jpg", jpeg[:len(jpeg) // 2]), ("1.txt", "cut"),
        ("2.png", good), ("2.txt", " \n"), ("3.png", good), ("3.txt", b"\xff\xfe caf\xe9"),
        ("4.png", bomb(13000)), ("4.txt", "bomb"), ("5.png", good), ("5.json", "{broken"),
        ("6.txt", "no image"), ("7.png", picture(size=(1, 1))), ("7.txt", "a tracking pixel"),
        ("8.jpg", b"<html>404</html>"), ("8.txt", "not found"), ("9.png", good), ("9.txt", "end"),
        ("2024.1.png", good), ("2024.1.txt", "one"), ("2024.2.png", good), ("2024.2.txt", "two")])
    meta, shards = pack_one(tmp_path, "caption", path)
    assert texts(shards, "caption") == ["▣fine", "▣end"]
    assert skipped(meta) == {
        "several images or texts of one name (up to its first dot)": 1,
        "corrupt image": 2, "no text": 1, "broken record (UnicodeDecodeError)": 1,
        "image too large": 1, "broken record (JSONDecodeError)": 1, "missing image": 1,
        "image too small": 1}
    assert meta["skipped"]["corrupt image"] == [2, "a.tar: 1"]


def test_bad_interleaved_documents(tmp_path):
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(picture())
    (folder / "images" / "b.png").write_bytes(picture()[:40])
    (tmp_path / "secret.png").write_bytes(picture())
    path = write_lines(
        folder / "docs.jsonl", obelics(["one", None, "two"], [None, "images/a.png", None]),
        obelics(["x", None, None, "y"], [None, "images/b.png", "no.png", None]),
        obelics([None], ["images/b.png"]), obelics(["n"], [None, None]), "{oops", "[1, 2]",
        obelics(["up", None], [None, "../secret.png"]), '{"texts": 3, "images": 4}',
        obelics(["web", None], [None, "https://example.org/cat.jpg"]), obelics([], []),
        '{"text_list": ["s"], "image_info": [{"matched_text_index": 7, "image_name": "a.png"}]}',
        '{"text_list": ["s"], "image_info": "none"}', obelics(["\ud800 alone"], [None]))
    meta, shards = pack_one(tmp_path, "interleaved", path)
    assert texts(shards, "interleaved")[:5] == ["one▣two", "x\n\ny", "up", "web", "s▣"]
    assert skipped(meta) == {
        "corrupt image": 2, "missing image": 1, "image outside the folder": 1,
        "image count does not match": 1,
        "broken record (JSONDecodeError)": 1, "broken record (TypeError)": 3,
        "image is a URL (download it first)": 1, "no text": 1}


def test_an_image_that_may_not_be_read_costs_its_document_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tools.pack, "find_image", Mock(side_effect=PermissionError))
    path = write_lines(tmp_path / "a.jsonl", obelics(["x", None], [None, "a.png"]),
                       obelics(["y"], [None]))
    assert [parts for _, parts, _ in read_source(path, "interleaved")] == [
        ["broken record (PermissionError)"], ["y"]]


def test_cut_and_damaged_files(tmp_path):
    noise = [hashlib.sha256(str(i).encode()).hexdigest() * 40 for i in range(400)]
    raw = write_texts(tmp_path / "whole", *noise).read_bytes()
    whole = zstd(raw)
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(raw)[:-100])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"not zstd")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name, kind in (("cut.jsonl.zst", "text"), ("bad.parquet", "interleaved")):
        *before, (_, last, _) = read_source(tmp_path / name, kind)
        assert last == [f"{DAMAGED} {name}"]
        assert (len(before) > 100) == (kind == "text"), "it keeps the rest"
    meta, shards = pack_one(tmp_path, "text", tmp_path)
    named = ("bad.jsonl.zst", "cut.jsonl.gz", "cut.jsonl.zst")
    assert skipped(meta) == {f"{DAMAGED} {name}": 1 for name in named}
    assert len(shards.docs["text"]) > 100


def test_cut_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member for i in range(9) for member in (
        (f"{i}.png", picture()), (f"{i}.txt", f"number {i}"))])
    whole = path.read_bytes()
    for end in (1024 * 6, 1024 * 6 + 300, 1024 * 6 + 700):  # between members, in a header, in data
        path.write_bytes(whole[:end])
        items = list(read_source(path, "caption"))
        assert items[-1][1] == [f"{DAMAGED} a.tar"], end
        assert len(items) >= 3
    path.write_bytes(whole[:1024 * 6] + b"x" * 512 + whole[1024 * 6 + 512:])
    assert list(read_source(path, "caption"))[-1][1] == [f"{DAMAGED} a.tar"]
    path.write_bytes(whole)
    assert len(list(read_source(path, "caption"))) == 9


def test_user_mistakes_end_in_one_line(tmp_path, monkeypatch):
    notes = write_lines(tmp_path / "notes.md", "x")
    text, blank = write_texts(tmp_path / "a.jsonl", ""), write_lines(tmp_path / "b.jsonl", "")
    for sources, message in (({"caption": [str(tmp_path / "*.tar")]}, "tar.*names no caption file"),
                             ({"text": [str(notes)]}, "notes.md.*names no text file"),
                             ({}, "nothing to pack.*--captions.*--conversations"),
                             ({"text": [str(blank)]}, "the files hold no records"),
                             ({"text": [str(text)]}, "no document could be packed")):
        refused(message, pack, sources, tmp_path / "mistakes", image_size=16, workers=1)
    refused("python -m tools.pack", Shards, tmp_path / "nowhere")
    shards = pack_one(tmp_path, "text", write_texts(text, "x"))[1]
    refused("--split val", Shards, tmp_path / "out", "val")
    for content in ("", "[]", '{"tokenizer": 3}'):
        (tmp_path / "data.json").write_text(content)
        refused("data.json is damaged", data.vocab_size, tmp_path)
    next((tmp_path / "out").rglob("tokens")).unlink()
    refused("missing or cut", shards.tokens, "text", 0)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # not installed
    refused("pip install pillow", load_image, b"", 64)


def test_flags_reach_the_packer_and_mistakes_in_them_are_named(tmp_path):
    text = write_texts(tmp_path / "a.jsonl", *map(str, range(99)))
    argv = ["--text", str(text), "--out", str(tmp_path / "out"), "--workers", "1"]
    tools.pack.main([*argv, "--image-size", "16", "--val-fraction", "0.5"])
    train, val = (Shards(tmp_path / "out", split) for split in ("train", "val"))
    assert train.meta["image_size"] == 16
    assert data.vocab_size(tmp_path / "out") == data.vocab_size("procedural") == 264
    assert sorted(texts(train, "text") + texts(val, "text"), key=int) == [*map(str, range(99))]
    for wrong in (["--val-fraction", "1"], ["--image-size", "0"], ["--texts", "x"]):
        refused(wrong[0], tools.pack.main, [*argv, *wrong])


# ---- images

def test_image_modes():
    def stored(image, fmt="PNG", **options):
        return load_image(saved(image, fmt, **options), 64)

    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    grey16, grey32 = (Image.fromarray(x) for x in (ramp.astype(np.uint16),
                                                   (ramp / 65535).astype(np.float32)))
    for image, fmt in ((grey16, "PNG"), (grey16, "TIFF"), (grey32, "TIFF")):
        assert abs(stored(image, fmt) - (ramp / 257)[..., None]).max() <= 1
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    assert (stored(palette) == (250, 0, 0)).all()
    assert (stored(palette, transparency=1) == 255).all()  # on white, not on black
    assert (stored(Image.new("RGBA", (16, 16), (0, 0, 0, 0))) == 255).all()
    assert (stored(Image.new("LA", (16, 16), (0, 128))) == 127).all()
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    gif = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (gif == (255, 0, 0)).all()
    assert abs(stored(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG").astype(int)).max() < 5


def test_exif_turns_and_long_sides_are_cropped():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise
    upright = load_image(saved(Image.fromarray(pixels), "JPEG", quality=95, exif=exif), 32)
    assert upright.shape == (64, 32, 3)  # left half became the upper half
    assert upright[:28].min() > 240 and upright[-28:].max() < 15
    assert load_image(picture(size=(4000, 10)), 64).shape == (10, 20, 3)  # 2:1, never enlarged
    assert load_image(picture(size=(2000, 1500), fmt="JPEG"), 64).shape == (64, 85, 3)


def test_images_are_reduced_by_means():
    noise = np.random.default_rng(0).integers(256, size=(48, 48, 3), dtype=np.uint8)
    small = square(noise, 16), load_image(saved(Image.fromarray(noise)), 16)
    assert max(image.std() for image in small) < 40 < noise.std()


def test_a_picture_that_is_too_large_is_never_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # decoding it would end in an error
    assert load_image(picture(), 64) == "corrupt image"
    for side in (8000, 13000, 60000):  # of itself Pillow says nothing, warns, raises
        assert load_image(bomb(side), 64) == "image too large"


def test_crops_come_from_rng_alone(shared):
    def crops(seed, **options):
        rng = np.random.default_rng(seed)
        return [x.tobytes() for i in range(8)
                for x in shared.document("interleaved", i, 32, rng=rng, **options).images]

    assert crops(1, augment=True) == crops(1, augment=True) != crops(2, augment=True)
    assert crops(1) == crops(2)  # the centre crop draws nothing
    rng = np.random.default_rng(0)
    for h, w in ((64, 128), (64, 64)):
        top, left, box_h, box_w = np.transpose([crop_box(h, w, rng) for _ in range(4000)])
        assert min(top) == min(left) == 0 and max(top + box_h) == h and max(left + box_w) == w
        area, ratio = box_h * box_w / h / w, box_w / box_h
        assert 0.39 < min(area) and max(area) <= 1.02 and 0.7 < min(ratio) and max(ratio) < 1.4
    assert abs(np.log(ratio).mean()) < 0.01  # of the square: as often wide as high
    assert crop_box(100, 10, rng) == (43, 0, 13, 10)  # none fits: as torchvision, the centre, 3:4
    assert crop_box(256, 1024, rng) == (0, 341, 256, 341) != crop_box(256, 1024)  # and 4:3


def test_crops_differ_with_the_seed_and_the_epoch(tmp_path):
    """Of one picture, which is a row: the n-th is of epoch n."""
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    for split in ("train", "val"):
        tar = write_tar(tmp_path / f"{split}.tar", [
            ("0.png", saved(Image.fromarray(noise))), ("0.txt", "noise")])
        pack_one(tmp_path, "caption", tar, image_size=32, split=split)
    cfg = DataConfig(str(tmp_path / "out"), "100-0-0", augment=True)
    assert 3 == len({Packed(cfg, seed, ModelConfig()).row("caption", n).images[0].tobytes()
                     for seed, n in ((0, 0), (0, 1), (1, 0))})


def test_flip_never_where_the_text_says_left_or_right(tmp_path):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, :8] = 255
    half = saved(Image.fromarray(half))
    path = write_tar(tmp_path / "a.tar", [
        ("0.png", half), ("0.txt", "a bar on the LEFTmost side"),
        ("1.png", half), ("1.txt", "a bright copyright sign")])
    _, shards = pack_one(tmp_path, "caption", path)
    rng = np.random.default_rng(0)
    sides = [[shards.document("caption", i, 16, rng=rng, flip=True).images[0][0, 0, 0]
              for _ in range(40)] for i in (0, 1)]
    assert set(sides[0]) == {255} and 8 < sides[1].count(0) < 32


# ---- shards

def files_of(folder):
    """{name: content}; shards' names hold a hash of the source's path, which is the same here."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    for n in range(6):
        write_tar(tmp_path / f"{n}.tar", [member for i in range(150) for member in (
            (f"{i:05}.png", picture((200, 150), colour=(i, n, 9))), (f"{i:05}.txt", f"{n} {i}"))])
    tars, a, b = str(tmp_path / "*.tar"), tmp_path / "a", tmp_path / "b"
    sources, options = {"caption": [tars]}, dict(image_size=64, val_fraction=0.1, workers=1)
    pack(sources, a, **options)
    command = [sys.executable, "-m", "tools.pack", "--captions", tars, "--image-size", "64",
               "--val-fraction", "0.1", "--workers", "2", "--out", str(b)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while process.poll() is None and not list(b.rglob("*.tmp")):
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=300)  # its workers hold the pipe, too, so they are gone after this
    assert not (b / "data.json").exists()
    pack(sources, b, **options)
    assert files_of(a) == files_of(b)
    assert not list(tmp_path.rglob("*.tmp"))
    kept = {p: p.stat().st_mtime_ns for p in b.rglob("tokens")}
    pack(sources, b, **options)
    assert len(kept) == 6 and kept == {p: p.stat().st_mtime_ns for p in kept}
    train, val = (texts(Shards(b, split), "caption") for split in ("train", "val"))
    assert len({*train, *val}) == len(train) + len(val) == 900 and 40 < len(val) < 160


def test_interrupt_keeps_nothing_half_written(tmp_path, monkeypatch):
    path = write_texts(tmp_path / "a.jsonl", *"123456789")

    def interrupted(*args):
        yield "0", ["something"], None
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="same command"):
        patch.setattr(tools.pack, "read_source", interrupted)
        pack_one(tmp_path, "text", path)
    assert not list((tmp_path / "out").rglob("*.json"))
    assert len(pack_one(tmp_path, "text", path)[1].docs["text"]) == 9
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_do_not_collide_and_changed_files_are_packed_again(tmp_path):
    for folder in ("x", "y"):
        write_texts(tmp_path / "a" / folder / "p" / "0.jsonl", folder)
    sources = {"text": [str(tmp_path / "a"), str(tmp_path / "a" / "**" / "*.jsonl")]}
    pack(sources, tmp_path / "out", val_fraction=0, workers=1)
    assert sorted(texts(Shards(tmp_path / "out"), "text")) == ["x", "y"]
    write_texts(tmp_path / "a" / "x" / "p" / "0.jsonl", "longer")
    pack(sources, tmp_path / "out", val_fraction=0, workers=1)
    assert sorted(texts(Shards(tmp_path / "out"), "text")) == ["longer", "y"]
    pack(sources, tmp_path / "out", split="val", workers=1)  # never in both train and val
    assert list(json.loads((tmp_path / "out" / "data.json").read_text())["splits"]) == ["val"]
    gpt2 = {"tokenizer": str(SHARED / "tokenizers/gpt2.tiktoken")}
    for said, options in (("with --image-size 224:", {"image_size": 112}),
                          ("with another --tokenizer than .*gpt2.tiktoken:", gpt2),
                          ("with --image-size 224 and another", {"image_size": 112, **gpt2})):
        refused(f"{said}.*choose another --out", pack, sources, tmp_path / "out",
                val_fraction=0, workers=1, **options)


def test_kinds_that_are_not_validated_are_noted(tmp_path, printed):
    """They would drop out of the loss without a word."""
    tar = write_tar(tmp_path / "a.tar", [("0.png", picture()), ("0.txt", "one")])
    lines = write_texts(tmp_path / "a.jsonl", *map(str, range(200)))
    sources = {"caption": [str(tar)], "text": [str(lines)]}
    note = printed(pack, sources, tmp_path / "out", "bytes", 16, "train", 0.3, 1).splitlines()[-1]
    assert "caption" in note and "text" not in note


def test_a_file_that_has_moved_is_not_packed_twice(tmp_path):
    """Its documents would be there twice, and with another split in both."""
    write_texts(tmp_path / "raw" / "a.jsonl", "one", "two")
    pack_one(tmp_path, "text", tmp_path / "raw")
    (tmp_path / "raw").rename(tmp_path / "moved")
    for split in ("train", "val"):
        if split == "val":
            (tmp_path / "raw").symlink_to(tmp_path / "moved")
        named = one_line(SystemExit, pack_one, tmp_path, "text", tmp_path / "moved", split=split)
        assert str(tmp_path / "raw" / "a.jsonl") in named and "out/text" in named
    assert texts(Shards(tmp_path / "out"), "text") == ["one", "two"]


def test_a_plan_reads_no_pixels_and_goes_to_the_workers_of_the_loader(tmp_path, monkeypatch):
    """At a megabyte of pixels a document, it would read terabytes before the first step."""
    pack({"interleaved": [VAL / "interleaved"]}, tmp_path, val_fraction=0.1, workers=1)
    source, seen, whole = Packed(DataConfig(str(tmp_path)), 0, ModelConfig()), [], Shards.map
    monkeypatch.setattr(Shards, "map", lambda self, path: seen.append(path) or whole(self, path))
    plan = source.plan("interleaved", "train")
    assert {path.split("/")[-1] for path in seen} == {"tokens"} and len(seen) > 9
    there = pickle.loads(pickle.dumps(source)).plans["interleaved", "train"]
    np.testing.assert_array_equal(there.pieces, plan.pieces)
    ForkingPickler.dumps(source)  # as a worker gets it. 40 copies of gigabytes would fill a node
    large = plan.pieces, plan.first, source.shards["train"].docs["interleaved"]
    assert all(table.is_shared() for table in large)
    np.testing.assert_array_equal(there.pieces, plan.pieces)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_thousand_shards_are_not_a_thousand_open_files(tmp_path):
    """Most systems allow a process 1024, and the data of one large run have more shards."""
    resource, table = pytest.importorskip("resource"), np.array([0, 0, 9, 0])
    shards = [{"name": str(i), "docs": 1} for i in range(300)]
    for i in range(300):
        (tmp_path / "text" / str(i)).mkdir(parents=True)
        (table + [0, 0, i, 0]).tofile(tmp_path / "text" / str(i) / "train.docs")
    (tmp_path / "data.json").write_text(json.dumps({
        "tokenizer": "bytes", "vocab_size": 257, "image_size": 16,
        "splits": {"train": {"text": {"shards": shards}}}}), "utf-8")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "data.json", "rb") as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 200, before[1]))
        try:
            docs = Shards(tmp_path).docs["text"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert docs.tolist() == [[i, 0, 0, 9 + i, 0] for i in range(300)]


def test_shards_count_and_go_to_other_processes(shared):
    total, sizes = shared.meta["splits"]["val"]["interleaved"], shared.docs["interleaved"][:, 3:]
    assert sizes.shape == (total["docs"], 2)
    assert sizes.sum(0).tolist() == [total["tokens"] + total["images"], total["images"]]
    i = int(sizes[:, 1].argmax())
    tokens = shared.tokens("interleaved", i)
    assert [len(tokens), (tokens == IMAGE).sum()] == sizes[i].tolist() and sizes[i, 1] >= 3
    image = pickle.loads(pickle.dumps(shared)).document("interleaved", i, 32).images[0]
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
