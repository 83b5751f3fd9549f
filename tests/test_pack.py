"""Real data: python -m pytest -q tests/test_pack.py

Files that people have (../shared/data), and files as they arrive: cut, damaged, mislabelled. Every
bad sample must be counted, none may stop the packer, and what it writes must be complete."""
import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (IMAGE, Document, Packed, crop_box, draw_rows, get_tokenizer, load_image,
                       pack, read_source, row_segments)

ROOT = Path(data.__file__).resolve().parent
SHARED = ROOT.parent / "shared"
DAMAGED = ["truncated or damaged file"]
VAL, ALT = SHARED / "data" / "val", SHARED / "data" / "alt_layouts"


def picture(mode="RGB", size=(20, 16), fmt="PNG", colour=(200, 30, 30), **options):
    from PIL import Image
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, fmt, **options)
    return file.getvalue()


def bomb(side):
    """A PNG of a few bytes that claims side x side pixels."""
    data = picture()
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def obelics(texts, images):
    return json.dumps({"texts": texts, "images": images, "metadata": "", "general_metadata": ""})


def pack_one(tmp_path, kind, path, **options):
    options = {"image_size": 16, "val_fraction": 0, "workers": 1, **options}
    meta = pack({kind: [str(path)]}, tmp_path / "out", **options)
    return meta, Packed(tmp_path / "out")


def texts(packed, kind):
    """Documents in bytes as readable strings, an image as one character."""
    documents = (packed.tokens(kind, i) for i in range(packed.n_docs(kind)))
    return ["".join("▣" if t == IMAGE else chr(t) for t in ids) for ids in documents]


def skipped(meta):
    return {reason: count for reason, (count, _) in meta["skipped"].items()}


# ---- tokenizers

def test_bytes_tokenizer_keeps_everything():
    enc = get_tokenizer()
    text = "naïve 🐈‍⬛ \x00\r\n<|endoftext|> " * 40
    assert enc.decode(enc.encode_ordinary(text)) == text
    assert enc.encode_ordinary(text) == list(text.encode())
    assert (enc.eot_token, enc.n_vocab) == (256, 257)


def test_tiktoken_file_and_its_pattern(tmp_path):
    gpt2 = get_tokenizer(str(SHARED / "tokenizers" / "gpt2.tiktoken"))
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    small = SHARED / "tokenizers" / "bpe4096.tiktoken"
    assert get_tokenizer(small)._pat_str in (small.with_suffix(".pat.txt")).read_text("utf-8")
    broken = write_lines(tmp_path / "x.tiktoken", "not base64 at all")
    empty = write_lines(tmp_path / "z.tiktoken")
    no_bytes = write_lines(tmp_path / "n.tiktoken", "YQ== 0", "Yg== 1")
    for path, message in ((broken, "base64 token"), (tmp_path / "y.tiktoken", "No such file"),
                          (empty, "256 bytes is missing"), (no_bytes, "256 bytes is missing")):
        with pytest.raises(SystemExit, match=message):
            get_tokenizer(path)


def test_named_tokenizer_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizers" / "tiktoken_cache"))
    assert get_tokenizer("gpt2").encode_ordinary("hello world") == [31373, 995]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")     # nobody listens: offline
    with pytest.raises(SystemExit, match="\\.tiktoken.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer("p50k_edit")
    with pytest.raises(SystemExit, match="gtp2 cannot be used .*gpt2"):
        get_tokenizer("gtp2")


def test_literal_special_token_is_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"text": "a <|endoftext|> b"}))
    for tokenizer in ("bytes", str(SHARED / "tokenizers" / "bpe2048.tiktoken")):
        out = tmp_path / Path(tokenizer).stem
        pack({"text": [str(path)]}, out, tokenizer, 16, val_fraction=0, workers=1)
        packed = Packed(out)
        ids = packed.tokens("text", 0)
        assert packed.encoding.eot_token == packed.meta["eot"] and packed.meta["eot"] not in ids
        assert packed.encoding.decode(ids.tolist()) == "a <|endoftext|> b"


# ---- layouts

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    pack({"caption": [str(VAL / "captions")], "interleaved": [str(VAL / "interleaved")]}, out,
         image_size=32, split="val", workers=1)
    return Packed(out, "val")


@pytest.mark.parametrize("kind, folder", [
    ("interleaved", "obelics_parquet"), ("interleaved", "obelics_jsonl"), ("interleaved", "mmc4"),
    ("interleaved", "openflamingo_wds")])
def test_every_layout_gives_the_plain_documents(tmp_path, plain, kind, folder):
    pack({kind: [str(ALT / folder)]}, tmp_path, image_size=32, split="val", workers=1)
    packed = Packed(tmp_path, "val")
    assert packed.meta["skipped"] == {}
    assert packed.n_docs(kind) == 60

    def documents(source):
        for i, text in enumerate(texts(source, kind)):
            images = [source.image(kind, i, j) for j in range(text.count("▣"))]
            yield "".join(text.split()), [x.tobytes() for x in images]

    known, found = list(documents(plain)), list(documents(packed))
    if folder in ("mmc4", "openflamingo_wds"):  # their white space is lost, and an image can only
        assert sum(document in known for document in found) >= 56   # stand before a sentence
        bare = {text.replace("▣", "") for text, _ in known}
        assert all(text.replace("▣", "") in bare for text, _ in found)
    else:
        assert all(document in known for document in found)


def test_caption_tar_without_txt_and_in_any_order(tmp_path):
    path = write_tar(tmp_path / "a.tar", [
        ("d/1.txt", "one"), ("d/1.json", "{}"), ("d/1.jpg", picture(fmt="JPEG")),
        ("../../2.webp", picture(fmt="WEBP")), ("../../2.json", json.dumps({"caption": " two\n"})),
        ("3.png", picture()), ("3.txt", "\ufeffthree")])
    _, packed = pack_one(tmp_path, "caption", path)
    assert texts(packed, "caption") == ["▣one", "▣two", "▣three"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tar", "out"]   # nothing extracted


def test_text_layouts(tmp_path):
    import zstandard
    line = json.dumps({"text": "héllo"}).encode() + b"\n"
    frames = zstandard.compress(line) + zstandard.compress(line * 2)
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(line))
    (tmp_path / "c.jsonl").write_bytes(b"\n" + line + b"\r\n" + line[:-1])
    (tmp_path / "d.txt").write_bytes("\ufeffone\n\ntwo\n".encode())
    _, packed = pack_one(tmp_path, "text", tmp_path)
    hello = "hÃ©llo"            # bytes as characters
    assert texts(packed, "text") == [hello] * 7 + ["one\n\ntwo\n"]


def test_long_plain_text_is_cut_and_complete(tmp_path):
    text = "".join(f"line {i}\n" for i in range(30000))
    _, packed = pack_one(tmp_path, "text", write_lines(tmp_path / "a.txt", text))
    pieces = texts(packed, "text")
    assert len(pieces) > 3 and max(map(len, pieces)) < 66000
    assert "".join(pieces) == text + "\n"


def test_white_space_without_end_is_shortened(tmp_path):
    """A megabyte of it would overflow tiktoken's stack and end the packer."""
    lines = [json.dumps({"text": text}) for text in ("a" + " " * 1_500_000 + "b", "\n" * 9 + "c")]
    pack({"text": [str(write_lines(tmp_path / "a.jsonl", *lines))]}, tmp_path / "out",
         str(SHARED / "tokenizers" / "bpe2048.tiktoken"), 16, val_fraction=0, workers=1)
    packed = Packed(tmp_path / "out")
    found = [packed.encoding.decode(packed.tokens("text", i).tolist()) for i in (0, 1)]
    assert found == ["a" + " " * 9999 + "b", "\n" * 9 + "c"]


# ---- damage: counted, named, survived

def test_conversations_keep_their_layout_and_what_is_a_target(tmp_path):
    """LLaVA's json: questions are stored as read only, each answer ends with end-of-text."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]
    records = [
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat?", "A dot.",
                                                             "Really?", "Yes.")},
        {"id": "2", "conversations": turns("Only text?", "Yes.")},
        {"id": "3", "image": "gone.png", "conversations": turns("<image>\nWhat?", "?")},
        {"id": "4", "image": "a.png", "conversations": turns("<image>\nNo answer")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    meta, packed = pack_one(tmp_path, "conversation", tmp_path / "a.json")
    documents = [packed.document("conversation", i, 16) for i in range(2)]
    assert packed.n_docs("conversation") == 2 and len(documents[0].images) == 1
    assert "missing image" in skipped(meta) and "no text" in skipped(meta)
    tokens = documents[0].tokens
    read = bytes(data.READ - t for t in tokens if t <= data.READ).decode()
    assert read == "\nquestion: What?\nanswer:\nquestion: Really?\nanswer:"
    end = packed.encoding.eot_token
    said = [t for t in tokens.tolist() if t >= 0]
    assert said == [*b" A dot.", end, *b" Yes."]  # the last end-of-text is added with the row


def test_questions_about_one_picture_are_in_one_split(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(colour=(50 * i, 0, 0)))
    records = [{"image": f"{i % 5}.png", "conversations": [
        {"from": "human", "value": f"<image>\nQuestion {i}?"}, {"from": "gpt", "value": "Yes."}]}
        for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    pack_one(tmp_path, "conversation", tmp_path / "a.json", val_fraction=0.4)
    colours = [{int(packed.image("conversation", i, 0)[0, 0, 0])
                for i in range(packed.n_docs("conversation"))}
               for packed in (Packed(tmp_path / "out"), Packed(tmp_path / "out", "val"))]
    assert len(colours[0] | colours[1]) == 5 and not colours[0] & colours[1]


def test_nothing_to_validate_on_is_said_before_training(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(2 * [{"conversations": [
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}]), encoding="utf-8")
    write_lines(tmp_path / "a.jsonl", *(json.dumps({"text": f"text {i}"}) for i in range(99)))
    sources = {"conversation": [str(tmp_path / "a.json")], "text": [str(tmp_path / "a.jsonl")]}
    pack(sources, tmp_path / "out", image_size=16, val_fraction=0.05, workers=1)
    assert Packed(tmp_path / "out", "val").kinds == ("text",)
    with pytest.raises(SystemExit, match="no conversation documents in its split val"):
        data.Loader(data.DataConfig(str(tmp_path / "out"), "0-0-50-50"), 0, 128, 16, 8)


def test_published_conversations_become_answers(tmp_path):
    meta, packed = pack_one(tmp_path, "conversation", ALT / "captions_llava_json" / "data.json")
    records = json.loads((ALT / "captions_llava_json" / "data.json").read_text("utf-8"))
    answers = {record["conversations"][1]["value"].strip() for record in records}
    tokens = packed.tokens("conversation", 0)
    assert packed.encoding.decode(tokens[tokens >= 0].tolist()).strip() in answers
    assert packed.n_docs("conversation") > 0.9 * len(records)


def test_bad_captions_are_counted(tmp_path):
    good, jpeg = picture(), picture(size=(300, 200), fmt="JPEG")
    path = write_tar(tmp_path / "a.tar", [
        ("0.png", good), ("0.txt", "fine"), ("1.jpg", jpeg[:len(jpeg) // 2]), ("1.txt", "cut"),
        ("2.png", good), ("2.txt", " \n"), ("3.png", good), ("3.txt", b"\xff\xfe caf\xe9"),
        ("4.png", bomb(13000)), ("4.txt", "bomb"), ("5.png", good), ("5.json", "{broken"),
        ("6.txt", "no image"), ("7.png", picture(size=(1, 1))), ("7.txt", "a tracking pixel"),
        ("8.jpg", b"<html>404</html>"), ("8.txt", "not found"), ("9.png", good), ("9.txt", "end")])
    meta, packed = pack_one(tmp_path, "caption", path)
    assert texts(packed, "caption") == ["▣fine", "▣end"]
    assert skipped(meta) == {
        "corrupt image": 2, "no text": 1, "broken record (UnicodeDecodeError)": 1,
        "image too large": 1, "broken record (JSONDecodeError)": 1, "missing image": 1,
        "image too small": 1}
    assert meta["skipped"]["corrupt image"] == [2, "a.tar: 1"]


def test_bad_interleaved_documents(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    (tmp_path / "images" / "b.png").write_bytes(picture()[:40])
    (tmp_path / "secret.png").write_bytes(picture())
    path = write_lines(
        tmp_path / "in" / "docs.jsonl", obelics(["one", None, "two"], [None, "images/a.png", None]),
        obelics(["x", None, None, "y"], [None, "images/b.png", "no.png", None]),
        obelics([None], ["images/b.png"]), obelics(["n"], [None, None]), "{oops", "[1, 2]",
        obelics(["up", None], [None, "../secret.png"]), '{"texts": 3, "images": 4}',
        obelics(["web", None], [None, "https://example.org/cat.jpg"]), obelics([], []),
        '{"text_list": ["s"], "image_info": [{"matched_text_index": 7, "image_name": "a.png"}]}',
        '{"text_list": ["s"], "image_info": "none"}', obelics(["\ud800 alone"], [None]))
    (tmp_path / "images").rename(tmp_path / "in" / "images")
    meta, packed = pack_one(tmp_path, "interleaved", path)
    assert texts(packed, "interleaved")[:5] == ["one▣two", "xy", "up", "web", "s▣"]
    assert skipped(meta) == {
        "corrupt image": 2, "missing image": 2, "image count does not match": 1,
        "broken record (JSONDecodeError)": 1, "broken record (TypeError)": 3,
        "image is a URL (download it first)": 1, "no text": 1}
    out = capsys.readouterr().out
    assert "broken record (JSONDecodeError) (first: docs.jsonl: 4)" in out


def test_an_image_that_may_not_be_read_costs_its_document_only(tmp_path, monkeypatch):
    def find_image(value, members, folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "find_image", find_image)
    path = write_lines(tmp_path / "a.jsonl", obelics(["x", None], [None, "a.png"]),
                       obelics(["y"], [None]))
    assert [parts for _, parts in read_source(path, "interleaved")] == [
        ["broken record (PermissionError)"], ["y"]]


def test_cut_and_damaged_files(tmp_path):
    import zstandard
    noise = [json.dumps({"text": hashlib.sha256(str(i).encode()).hexdigest() * 40})
             for i in range(400)]
    raw = "\n".join(noise).encode()
    whole = zstandard.compress(raw)
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(raw)[:-100])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"not zstd")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert next(read_source(tmp_path / "bad.parquet", "interleaved"))[1] == DAMAGED
    (tmp_path / "empty.jsonl").write_bytes(b"")
    meta, packed = pack_one(tmp_path, "text", tmp_path)
    assert skipped(meta) == {"truncated or damaged file": 3}
    assert packed.n_docs("text") > 0        # what came before the cut is kept


def test_cut_tar(tmp_path):
    members = [(f"{i}.{x}", data) for i in range(9) for x, data in (("png", picture()),
                                                                   ("txt", f"number {i}"))]
    path = write_tar(tmp_path / "a.tar", members)
    data = path.read_bytes()
    for end in (1024 * 6, 1024 * 6 + 300, 1024 * 6 + 700):  # between members, in a header, in data
        path.write_bytes(data[:end])
        items = list(read_source(path, "caption"))
        assert items[-1][1] == DAMAGED, end
        assert len(items) >= 3
    path.write_bytes(data[:1024 * 6] + b"x" * 512 + data[1024 * 6 + 512:])
    assert list(read_source(path, "caption"))[-1][1] == DAMAGED
    path.write_bytes(data)
    assert len(list(read_source(path, "caption"))) == 9


def test_user_mistakes_end_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    text = write_lines(tmp_path / "a.jsonl", '{"text": ""}')
    cases = [({"caption": [str(tmp_path / "*.tar")]}, "names no caption file"),
             ({"text": [str(tmp_path / "notes.md")]}, "names no text file"),
             ({}, "nothing to pack"), ({"text": [str(text)]}, "no document could be packed")]
    for sources, message in cases:
        with pytest.raises(SystemExit, match=message):
            pack(sources, tmp_path / "out", image_size=16, workers=1)
    with pytest.raises(SystemExit, match="data.py pack"):
        Packed(tmp_path / "nowhere")
    packed = pack_one(tmp_path, "text", write_lines(text, '{"text": "x"}'))[1]
    with pytest.raises(SystemExit, match="--split val"):
        Packed(tmp_path / "out", "val")
    with pytest.raises(SystemExit, match="a.jsonl.*choose another --out"):  # OUT is a file
        pack({"text": [str(text)]}, text, image_size=16, workers=1)
    for content in ("", "[]", '{"tokenizer": 3}'):
        (tmp_path / "data.json").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match="is damaged"):
            data.vocab_size(tmp_path)
    next((tmp_path / "out").rglob("data")).unlink()
    with pytest.raises(SystemExit, match="missing or cut"):
        packed.tokens("text", 0)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)     # not installed
    with pytest.raises(SystemExit, match="pip install pillow"):
        load_image(b"", 64)


# ---- images

def test_image_modes(tmp_path):
    from PIL import Image

    def stored(image, fmt="PNG", **options):
        file = io.BytesIO()
        image.save(file, fmt, **options)
        return load_image(file.getvalue(), 64)

    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    expected = (ramp / 257)[..., None]
    grey16 = Image.fromarray(ramp.astype(np.uint16))
    assert abs(stored(grey16) - expected).max() <= 1
    assert abs(stored(grey16, "TIFF") - expected).max() <= 1
    assert abs(stored(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF") -
               expected).max() <= 1
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    assert (stored(palette) == (250, 0, 0)).all()
    assert (stored(palette, transparency=1) == 255).all()           # on white, not on black
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (stored(clear) == 255).all()
    assert (stored(Image.new("LA", (16, 16), (0, 128))) == 127).all()
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    gif = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (gif == (255, 0, 0)).all()
    assert abs(stored(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG").astype(int)).max() < 5


def test_exif_turns_and_long_sides_are_cropped():
    from PIL import Image
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255
    exif = Image.Exif()
    exif[274] = 6                           # turn by 90 degrees clockwise
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    upright = load_image(file.getvalue(), 32)
    assert upright.shape == (64, 32, 3)     # left half became the upper half
    assert upright[:28].min() > 240 and upright[-28:].max() < 15
    assert load_image(picture(size=(4000, 10)), 64).shape == (10, 20, 3)    # 2:1, never enlarged
    assert load_image(picture(size=(2000, 1500), fmt="JPEG"), 64).shape == (64, 85, 3)


def test_memory_is_bounded_by_the_header():
    start = time.perf_counter()
    for side in (8000, 13000, 60000):       # of itself Pillow says nothing, warns, raises
        assert load_image(bomb(side), 64) == "image too large"
    assert time.perf_counter() - start < 0.5


def test_crops_come_from_rng_alone(plain):
    def crops(seed, **options):
        rng = np.random.default_rng(seed)
        return [x.tobytes() for i in range(8)
                for x in plain.document("interleaved", i, 32, rng, **options).images]

    assert crops(1, augment=True) == crops(1, augment=True) != crops(2, augment=True)
    assert crops(1) == crops(2)             # the centre crop draws nothing
    rng = np.random.default_rng(0)
    for h, w in ((64, 64), (64, 128), (100, 10)):
        for _ in range(200):
            top, left, box_h, box_w = crop_box(h, w, rng)
            assert 0 <= top <= h - box_h and 0 <= left <= w - box_w
            assert box_h == box_w == 10 or (0.39 < box_h * box_w / h / w <= 1.02
                                            and 0.7 < box_w / box_h < 1.4)


def test_flip_never_where_the_text_says_left_or_right(tmp_path):
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, :8] = 255
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(half).save(file, "PNG")
    members = []
    for key, caption in (("0", "a bar on the LEFTmost side"), ("1", "a bright copyright sign")):
        members += [(key + ".png", file.getvalue()), (key + ".txt", caption)]
    _, packed = pack_one(tmp_path, "caption", write_tar(tmp_path / "a.tar", members))
    rng = np.random.default_rng(0)
    sides = [[packed.document("caption", i, 16, rng, flip=True).images[0][0, 0, 0]
              for _ in range(40)] for i in (0, 1)]
    assert set(sides[0]) == {255} and 8 < sides[1].count(0) < 32


# ---- shards

def files_of(folder):
    """{name: content}; shards' names hold a hash of the source's path, which is the same here."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    paths = [write_tar(tmp_path / "in" / f"{n}.tar", [
        (f"{i:05}.{x}", data) for i in range(150)
        for x, data in (("png", picture(size=(200, 150), colour=(i, n, 9))), ("txt", f"{n} {i}"))])
        for n in range(6)]
    sources = {"caption": [str(tmp_path / "in" / "*.tar")]}
    pack(sources, tmp_path / "a", image_size=64, val_fraction=0.1, workers=1)
    (tmp_path / "b").mkdir()
    command = [sys.executable, str(ROOT / "data.py"), "pack", "--captions", *map(str, paths),
               "--image-size",
               "64", "--val-fraction", "0.1", "--workers", "2", "--out", str(tmp_path / "b")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "b").rglob("*.tmp")):
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(1)               # its workers notice and go
    assert not (tmp_path / "b" / "data.json").exists()
    pack(sources, tmp_path / "b", image_size=64, val_fraction=0.1, workers=1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not list(tmp_path.rglob("*.tmp"))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("data")}
    pack(sources, tmp_path / "b", image_size=64, val_fraction=0.1, workers=1)
    assert len(kept) == 6 and kept == {p: p.stat().st_mtime_ns for p in kept}
    train, val = Packed(tmp_path / "b"), Packed(tmp_path / "b", "val")
    assert train.n_docs("caption") + val.n_docs("caption") == 900
    assert 40 < val.n_docs("caption") < 160
    assert not set(texts(train, "caption")) & set(texts(val, "caption"))


def test_interrupt_keeps_nothing_half_written(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", *[json.dumps({"text": "x"})] * 9)

    def interrupted(*args):
        yield "0", ["something"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="same command"):
        patch.setattr(data, "read_source", interrupted)
        pack({"text": [str(path)]}, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").rglob("*.json"))
    assert pack_one(tmp_path, "text", path)[1].n_docs("text") == 9
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_do_not_collide_and_changed_files_are_packed_again(tmp_path):
    for folder in ("x", "y"):
        write_lines(tmp_path / "a" / folder / "p" / "0.jsonl", json.dumps({"text": folder}))
    sources = {"text": [str(tmp_path / "a"), str(tmp_path / "a" / "**" / "*.jsonl")]}
    pack(sources, tmp_path / "out", val_fraction=0, workers=1)
    assert sorted(texts(Packed(tmp_path / "out"), "text")) == ["x", "y"]
    write_lines(tmp_path / "a" / "x" / "p" / "0.jsonl", json.dumps({"text": "longer"}))
    pack(sources, tmp_path / "out", val_fraction=0, workers=1)
    assert sorted(texts(Packed(tmp_path / "out"), "text")) == ["longer", "y"]
    pack(sources, tmp_path / "out", split="val", workers=1)     # never in both train and val
    assert list(json.loads((tmp_path / "out" / "data.json").read_text())["splits"]) == ["val"]
    for options in ({"image_size": 112}, {"tokenizer": str(SHARED / "tokenizers/gpt2.tiktoken")}):
        with pytest.raises(SystemExit, match="another tokenizer.*choose another --out"):
            pack(sources, tmp_path / "out", val_fraction=0, workers=1, **options)


def test_packed_counts_pickles_and_fetches_in_part(plain):
    sizes = plain.sizes("interleaved")
    total = plain.meta["splits"]["val"]["interleaved"]
    assert sizes.shape == (total["docs"], 2)
    assert sizes.sum(0).tolist() == [total["tokens"], total["images"]]
    i = int(sizes[:, 1].argmax())
    tokens = plain.tokens("interleaved", i)
    assert (tokens >= 0).sum() == sizes[i, 0] and (tokens == IMAGE).sum() == sizes[i, 1] >= 3
    twin = pickle.loads(pickle.dumps(plain))
    whole, part = plain.document("interleaved", i, 32), twin.document(
        "interleaved", i, 32, first_image=1, last_image=3)
    assert [x is not None for x in part.images] == [0 < j < 3 for j in range(sizes[i, 1])]
    assert all((whole.images[j] == part.images[j]).all() for j in (1, 2))
    assert whole.images[0].shape == (32, 32, 3) and whole.images[0].dtype == np.uint8
    assert data.vocab_size(Path(plain._data["caption"][0]).parents[2]) == 264  # though all is val
    assert plain.n_docs("text") == 0 and plain.sizes("text").shape == (0, 2)
    with pytest.raises(IndexError):
        plain.image("interleaved", i, sizes[i, 1])


# ---- the page

def make_batch(rows, context, eot, size=16, p=8):
    """A batch in the loader's format from lists of Documents, written here a second time."""
    n, g = (size // p) ** 2, size // p
    images, columns = [], []
    for documents in rows:
        row = []                            # (token, doc, patch_index, target)
        for number, document in enumerate(documents, 1):
            pictures = iter(document.images)
            ids = [eot, *document.tokens.tolist()]
            for token, following in zip(ids, [*ids[1:], eot]):
                if token != IMAGE:
                    row.append((token, number, -1, following))
                    continue
                first = len(images) * n
                x = next(pictures).reshape(g, p, g, p, 3).transpose(0, 2, 1, 3, 4)
                images.append(x.reshape(n, -1))
                row += [(0, number, first + k, -1) for k in range(n - 1)]
                row.append((0, number, first + n - 1, following))
        columns.append((row + [(0, 0, -1, -1)] * (context - len(row)))[:context])
    fields = torch.tensor(columns).permute(2, 0, 1)             # (4, B, T)
    names = ("tokens", "doc", "patch_index", "targets")
    images = images or [np.zeros((n, 3 * p * p), np.uint8)]
    return {**dict(zip(names, fields)), "images": torch.from_numpy(np.stack(images))}


def test_page(tmp_path):
    enc = get_tokenizer()
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = np.arange(16) * 16
    encode = lambda text: np.array(enc.encode_ordinary(text), np.int32)     # noqa: E731
    caption = Document(np.concatenate([[IMAGE], encode("a red ramp")]), [red])
    story = Document(np.concatenate([encode("Before $x$,\n"), [IMAGE, IMAGE], encode("after")]),
                     [red, red[::-1]])
    text = Document(encode("only text " * 30), [])
    batch = make_batch([[caption, caption, story], [text]], 96, 256)
    segments = list(row_segments(batch, 0))
    assert [(d, kind) for d, kind, _ in segments] == [
        (1, "context"), (1, "image"), (1, "target"), (2, "context"), (2, "image"), (2, "target"),
        (3, "context"), (3, "target"), (3, "image"), (3, "image"), (3, "target")]
    assert enc.decode(segments[2][2]) == "a red ramp<|endoftext|>"
    draw_rows(batch, enc.decode, tmp_path / "page.png", 8, 16)
    from PIL import Image
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert page.shape[1] > 800
    blue, grey = (abs(page - ink).max(-1) < 9 for ink in ((11, 61, 145), (153, 153, 153)))
    assert blue.sum() > 100 and grey.sum() > 100
    assert (abs(page - (240, 0, 0)).max(-1) < 12).any()        # the picture is there, in colour


def test_show_with_its_defaults_and_with_mistakes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    for split in ("train", "val"):
        members = [("0.png", picture()), ("0.txt", split)]
        pack({"caption": [str(write_tar(tmp_path / f"{split}.tar", members))]}, out, split=split,
             val_fraction=0, workers=1)
    text = write_lines(tmp_path / "a.jsonl", '{"text": "x"}')
    pack({"text": [str(text)]}, out, val_fraction=0, workers=1)
    monkeypatch.setattr(data, "draw_rows", lambda batch, *rest: print(batch["tokens"].shape))
    data.show_command([str(out), "--mixture", "100-0-0"])       # images of 224: 256 patches
    data.show_command(["-n", "70", "--split", "val", "--mixture", "100-0-0"])
    assert "[4, 1024]" in (shown := capsys.readouterr().out) and "[70, 256]" in shown
    for argv, message in (([str(out)], "no interleaved documents, only caption, text; give"),
                          (["--patch-size", "-8"], "not possible"),
                          ([str(out), "--mixture", "0-0-100", "--split", "val"], "split val")):
        with pytest.raises(SystemExit, match=message):
            data.show_command(argv)
    monkeypatch.undo()
    for name in ("nowhere/page.png", "page.nonsense"):
        with pytest.raises(SystemExit, match="cannot write the page"):
            data.show_command(["-n", "1", "--out", str(tmp_path / name)])
