"""The page of rows: python -m pytest -q tests/test_show.py"""
import numpy as np
import pytest
from PIL import Image

import tools.show
from data import Row, collate, encode, get_tokenizer
from test_pack import picture, write_tar, write_texts
from tools.pack import pack


def test_page(tmp_path):
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
    assert [(d, kind) for d, kind, _ in segments] == [
        (1, "context"), (1, "image"), (1, "target"), (2, "context"), (2, "image"), (2, "target"),
        (3, "context"), (3, "target"), (3, "image"), (3, "image"), (3, "target")]
    assert encoding.decode(segments[2][2]) == "a red ramp<|endoftext|>"
    tools.show.draw_rows(batch, encoding.decode, tmp_path / "page.png", 8, 16)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert page.shape[1] > 800
    blue, grey = (abs(page - ink).max(-1) < 9 for ink in ((11, 61, 145), (153, 153, 153)))
    assert blue.sum() > 100 and grey.sum() > 100
    assert (abs(page - (240, 0, 0)).max(-1) < 12).any()  # the picture is there, in colour


def test_show_with_its_defaults_and_with_mistakes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    for split in ("train", "val"):
        path = write_tar(tmp_path / f"{split}.tar", [("0.png", picture()), ("0.txt", split)])
        pack({"caption": [str(path)]}, out, split=split, val_fraction=0, workers=1)
    text = write_texts(tmp_path / "a.jsonl", "x")
    pack({"text": [str(text)]}, out, val_fraction=0, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(tools.show, "draw_rows", lambda batch, *_: print(batch["tokens"].shape))
        tools.show.main([str(out)])  # the kinds that are there; images of 224: 256 patches
        assert "[4, 1024]" in capsys.readouterr().out
        tools.show.main([str(out), "-n", "3", "--split", "val", "--mixture", "100-0-0"])  # one row
        assert "[3, 1024]" in capsys.readouterr().out
        tools.show.main(["-n", "70", "--split", "val", "--mixture", "100-0-0"])
        assert "[70, 256]" in capsys.readouterr().out
    for argv, message in (([str(out), "--mixture", "45-45-10"], "give interleaved 0"),
                          (["--patch-size", "-8"], "--patch-size -8"),
                          (["--splt", "val"], "--split"),
                          ([str(out), "--mixture", "0-0-100", "--split", "val"], "split val"),
                          (["-n", "1", "--out", str(tmp_path / "no/page.png")], "no/page.png"),
                          (["-n", "1", "--out", str(tmp_path / "page.nonsense")], "page.nonsense")):
        with pytest.raises(SystemExit, match=message):
            tools.show.main(argv)
