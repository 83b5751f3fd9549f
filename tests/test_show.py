"""The drawings of documents, masks and models: python -m pytest -q tests/test_show.py"""
import numpy as np
from PIL import Image

import tools.show
from data import DataConfig, Document, Loader, Row, collate, encode, get_tokenizer
from helpers import build, refused, save_run
from model import ModelConfig, attention_mask
from test_pack import pack_one, picture, write_tar, write_texts
from tools import architectures, sample


def test_a_row_in_segments_and_its_pictures():
    encoding, ramp = get_tokenizer(), np.zeros((16, 16, 3), np.uint8)
    ramp[..., 0] = np.arange(16) * 16
    caption, story = [ramp, "a red ramp"], ["Before $x$,\n", ramp, ramp[::-1], "after"]
    rows = []
    for documents in ([caption, caption, story], [["only text " * 30]]):
        rows.append(Row(96, n_patches=4, eot=encoding.eot_token))
        for parts in documents:
            rows[-1].add(encode(parts, encoding))
    batch = collate(rows, 8)
    segments = list(tools.show.row_segments(batch, 0))
    assert [(d, kind) for d, kind, *_ in segments] == [
        (1, "context"), (1, "image"), (1, "target"), (2, "context"), (2, "image"), (2, "target"),
        (3, "context"), (3, "target"), (3, "image"), (3, "image"), (3, "target")]
    assert encoding.decode(segments[2][2]) == "a red ramp<|endoftext|>"
    assert np.array_equal(tools.show.picture(batch["images"], 8, 16), [*3 * [ramp], ramp[::-1]])


def test_show_with_its_defaults_and_with_mistakes(tmp_path, monkeypatch, printed):
    out = tmp_path / "out"
    for split in ("train", "val"):
        path = write_tar(tmp_path / f"{split}.tar", [("0.png", picture()), ("0.txt", split)])
        pack_one(tmp_path, "caption", path, image_size=224, split=split)
    pack_one(tmp_path, "text", write_texts(tmp_path / "a.jsonl", "x"), image_size=224)
    with monkeypatch.context() as patch:
        patch.setattr(tools.show, "draw_rows", lambda batch, *_: print(batch["tokens"].shape))
        val = ["--split", "val", "--mixture", "100-0-0"]  # of the folder it has one row
        for flags, shape in (([str(out)], "[4, 1024]"),  # the kinds that are there; 256 patches
                             ([str(out), "-n", "3", *val], "[3, 1024]"),
                             (["-n", "70", *val], "[70, 128]")):
            assert shape in printed(tools.show.main, flags)
    for argv, message in (([str(out), "--mixture", "45-45-10"], "no interleaved documents"),
                          (["--patch-size", "-8"], "--patch-size -8"),
                          (["--splt", "val"], "--split"),
                          ([str(out), "--mixture", "0-0-100", "--split", "val"], "split val"),
                          (["-n", "1", "--out", str(tmp_path / "no/page.png")], "no/page.png"),
                          (["-n", "1", "--out", str(tmp_path / "page.nonsense")], "page.nonsense")):
        refused(message, tools.show.main, argv)


def world_batch():
    """A held-out row of each kind."""
    loader = Loader(DataConfig(val_rows=1), 0, ModelConfig())
    return collate([loader.source.val_row(kind, 0) for kind in loader.shares], 8), loader.encoding


def test_the_page_of_the_world_holds_every_target_and_the_nats_of_every_choice(pages):
    batch, encoding = world_batch()
    tools.show.draw_rows(batch, encoding.decode, "world.png", 8, 32, ["a", "b", "c"])
    axes, = pages["world.png"].axes
    blue, small = ([text.get_text() for text in axes.texts if text.get_color() == ink][1:]
                   for ink in (tools.show.INK["target"], tools.show.INK["nats"]))
    told = encoding.decode(batch["targets"].flatten()[batch["target_index"]].tolist())
    told = told.replace("<|endoftext|>", "⟨end⟩")
    assert "".join("".join(blue).split()) == "".join(told.split())
    assert small == [f"{nats:.1f}" for nats in batch["nll"].tolist() if nats > 0] and len(small) > 9
    assert len(axes.images) == len(batch["images"])


def test_the_page_marks_a_document_that_its_row_has_cut(pages):
    """The pieces of a long text, of which one is cut at its end, one at both ends and one at its
    start. Another document beside the last is whole."""
    encoding, rows = get_tokenizer(), [Row(96, n_patches=4, eot=256) for _ in range(3)]
    ids = np.array(encoding.encode("only text " * 4))
    for row, ends in zip(rows, ((True, False), (False, False), (False, True))):
        row.add(Document(ids, [], ends=ends))
    rows[2].add(encode(["short"], encoding))
    tools.show.draw_rows(collate(rows, 8), encoding.decode, "page.png", 8, 16, ["text"] * 3)
    texts = [text.get_text() for text in pages["page.png"].axes[0].texts]
    assert [text for text in texts if text.startswith("doc")] == [
        "doc 1\n(cut)", "doc 1\n(cut)", "doc 1\n(cut)", "doc 2"]
    assert "row 2, text: 96 positions, 0 of them image patches, 50 padding; 46 targets" in texts


def test_the_drawn_mask_is_that_of_the_model(pages):
    batch, _ = world_batch()
    tools.show.draw_mask(batch, "mask.png")
    values = pages["mask.png"].axes[0].images[0].get_array()
    image = batch["patch_index"] // 16
    assert np.array_equal(values > 0, attention_mask(batch["doc"], image)[0, 0])
    assert np.array_equal(values[0 <= image[0]].max(1), [2] * int((image[0] >= 0).sum()))
    assert (values[image[0] < 0] < 2).all() and (np.triu(values, 1) > 0).any()


def test_text_stays_in_its_box_and_arrows_join_boxes(pages):
    architectures.main(["--out", "a.png"])
    axes, = pages["a.png"].axes
    boxes = [patch.get_window_extent() for patch in axes.patches]
    texts = {text.get_text(): text for text in axes.texts}
    for name, (_, _, _, _, words, _) in architectures.BOXES.items():
        box = boxes[[*architectures.BOXES].index(name)]
        inner = texts[words].get_window_extent()
        assert inner.width < box.width and inner.height < box.height, name
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    arrows = [text for text in axes.texts if not text.get_text()]
    for arrow in arrows:
        ends = axes.transData.transform([arrow.xy, arrow.xyann])
        assert all(any(box.expanded(1.01, 1.05).contains(*end) for box in boxes) for end in ends)
    assert len(arrows) == architectures.ARROWS.count(">")


def test_the_page_of_a_model_holds_what_the_data_say_and_what_it_says(pages, tmp_path, capsys):
    save_run(tmp_path / "run", build(context=128, image_size=32, patch_size=8, vocab_size=264))
    sample.main([str(tmp_path / "run"), "--out", "sample.png"])
    axes, = pages["sample.png"].axes
    texts = [text.get_text() for text in axes.texts]
    batch, encoding = world_batch()
    truth = encoding.decode(batch["targets"][0][batch["targets"][0] >= 0].tolist()).split("<|")[0]
    assert f"the data say:   {truth}" in texts and len(axes.images) == 3
    assert sum(text.startswith("the data say") for text in texts) == 3
    assert sum(text.startswith("the model says") for text in texts) == 3
    refused("leave out --image", sample.main,
            [str(tmp_path / "run"), "--out", "sample.png", "--prompt", "x"])
    Image.new("RGB", (9, 9)).save(tmp_path / "cat.png")
    sample.main([str(tmp_path / "run"), "--image", str(tmp_path / "cat.png")])
    assert "procedural world only" in capsys.readouterr().err
