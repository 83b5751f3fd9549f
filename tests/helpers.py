"""Tiny models, batches and files, and what several tests ask of them."""
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import IMAGE, READ, Document, Row, collate
from model import Model, ModelConfig, read_checkpoint
from train import code_version

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(width=32, depth=2, context=24, image_size=8, patch_size=4, vocab_size=37)  # P = 4
FLAGS = ("--width 16 --depth 1 --context 128 --tokens-per-step 512 --warmup 4 --val-rows 2 "
         "--device cpu").split()  # of a run of train.py that takes a second


def tiny(**changes) -> ModelConfig:
    """A ModelConfig that runs in milliseconds."""
    return ModelConfig(**{**TINY, **changes})


def build(seed=0, **changes) -> Model:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return Model(tiny(**changes))


def hidden(model, batch):
    """The decoder's last hidden states, without gradients."""
    with torch.no_grad():
        return model.decode(batch)[0]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    """The names under which both hold equal tensors."""
    return {name for name in a if torch.equal(a[name], b[name])}


def save_run(folder, model, **data):
    """A directory with ckpt.pt, as train.py leaves it: what reads a run needs no more."""
    folder.mkdir(exist_ok=True)
    data = {"data": "procedural", "mixture": "45-45-10", "tokenizer": "bytes", **data}
    config = {"model": dataclasses.asdict(model.cfg), "data": data,
              "made": {"code": code_version()}}
    torch.save({"model": model.state_dict(), "config": config}, folder / "ckpt.pt")


def only_run(out):
    """The folder of the only run in a study."""
    folder, = (path.parent for path in Path(out).glob("*/log.jsonl"))
    return folder


def read_log(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def read_weights(source):
    """-> fields of ModelConfig, weights of a checkpoint."""
    return read_checkpoint(source, lambda saved: (saved["config"]["model"], saved["model"]))


def python(*words, cwd=ROOT, **options):
    """A Python of its own, which has ended."""
    return subprocess.run([sys.executable, *words], cwd=cwd, text=True, capture_output=True,
                          **options)


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_rows(path, rows) -> str:
    """A file of a json a line -> its path."""
    return str(write_lines(path, *map(json.dumps, rows)))


def one_line(kind, function, *args, **options) -> str:
    """The message of the error of this kind that a call must end in: one line."""
    with pytest.raises(kind) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(pattern, function, *args, **options):
    """The call ends in one line for the user, and the line says this."""
    line = one_line(SystemExit, function, *args, **options)
    assert re.search(pattern, line), line


def make_batch(cfg: ModelConfig, rows: list, seed: int = 0, length: int = 0) -> dict:
    """rows: a list of rows, a row a list of documents, a document a string of "t" (a random text
    token) and "I" (a random image); e.g. [["tIttt", "tttt"], ["tItIttt"]]. Rows are padded to
    `length` (default cfg.context). Random text, seeded; a batch without images has a dummy one."""
    rng, found = np.random.default_rng(seed), []
    for documents in rows:
        found.append(Row(length or cfg.context, cfg.n_patches, eot=0))
        for document in documents:
            ids = [IMAGE if part == "I" else rng.integers(cfg.vocab_size) for part in document]
            side = cfg.image_size
            images = rng.integers(256, size=(document.count("I"), side, side, 3), dtype=np.uint8)
            # as a piece without its ends, whose last token is only read, it has no other positions
            piece = Document(np.array([*ids, READ]), [*images], ends=(False, False))
            assert found[-1].add(piece, whole=True), f"{document} has no target, or no room"
    return collate(found, cfg.patch_size)
