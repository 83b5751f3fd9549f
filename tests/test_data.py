"""Rows, batches and packing: python -m pytest -q tests/test_data.py"""
import hashlib
import random
import types

import numpy as np
import pytest
import torch

import data
from data import IMAGE, KINDS, PRETRAINING, DataConfig, Document, Loader, Row, collate
from model import ModelConfig
from world import QUESTIONS, World

SHAPE = ModelConfig()
RECORDED = {  # 20 rows of each kind; results/ was measured on these
    "train caption": "4c3662fa755a", "train interleaved": "d2cca1d642ad",
    "train text": "3a677f0ae263", "train conversation": "8bf014bead26",
    "val caption": "b0b34bd792ff", "val interleaved": "ef46581f9ebc", "val text": "a008cc06405a",
    "val conversation": "5bb1470d456f", "val colour": "14d09ba7d7af", "val count": "b7209702e5fb",
    "val relation": "84ff1a3864b9", "val compare": "cd020754e437"}


def make_loader(seed=0, **options):
    return Loader(DataConfig(**options), seed, SHAPE)


def digest(rows, pixels=True):
    """A hash of everything in some rows; packed pixels depend on the version of the decoder."""
    total = hashlib.sha256()
    for row in rows:
        for array in (row.tokens, row.doc, row.patch, row.target, row.nll, *row.images * pixels):
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:12]


# -- rows and batches ----------------------------------------------------------------------------


def test_rows_and_batches_are_the_recorded_ones():
    loader = make_loader(3, mixture="30-30-20-20", val_rows=20)
    for name, recorded in RECORDED.items():
        split, kind = name.split()
        make_row = loader.source.row if split == "train" else loader.source.val_row
        assert digest(make_row(kind, n) for n in range(20)) == recorded, name
    assert digest(loader[g] for g in range(95, 125)) == "328b2ab6cb62"  # their order
    batch = collate([loader[g] for g in range(4)], 8)
    content = b"".join(tensor.numpy().tobytes() for tensor in batch.values())
    assert hashlib.sha256(content).hexdigest()[:12] == "6b699b9d92d3"


@pytest.mark.parametrize("ranks,micro", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_the_global_batch_is_the_same_for_any_ranks_and_accumulation(ranks, micro):
    loader = make_loader()
    expected = collate([loader[g] for g in range(16, 24)], 8)["tokens"]  # step 2 of 8 rows
    rows = torch.cat([batch["tokens"] for rank in range(ranks)
                      for batch in loader.train_batches(2, 3, 8, micro, rank, ranks)])
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_ranks_share_the_validation_rows():
    whole, first, second = ([row for batch in make_loader(val_rows=5).val_batches("text", 2, *ranks)
                             for row in batch["tokens"].tolist()] for ranks in ((), (0, 2), (1, 2)))
    empty = [0] * len(whole[0])  # so that both have as many, which FSDP needs
    assert first == whole[::2] and second == [*whole[1::2], empty]


def test_worker_processes_change_nothing():
    plain = list(make_loader().train_batches(0, 3, 4, 2))
    workers = list(make_loader(workers=2).train_batches(0, 3, 4, 2))
    for a, b in zip(plain, workers, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_rows_hold_whole_documents_and_an_exact_floor():
    source = make_loader(val_rows=3).source
    for kind in KINDS:
        rng = random.Random(f"val/{kind}")
        for n in range(3):  # every document of the stream, none left out for its length
            row = source.val_row(kind, n)
            documents = [source.document(kind, rng, "val") for _ in range(row.n_docs)]
            assert row.nll.sum() == pytest.approx(sum(d.nll.sum() for d in documents), rel=1e-5)
            assert (row.target >= 0).sum() == sum((d.tokens >= 0).sum() + 1 for d in documents)


def test_epochs_count_how_often_data_are_read():
    loader, n_rows = make_loader(mixture="90-0-10"), {"caption": 90, "text": 5}
    loader.source = types.SimpleNamespace(n_rows=lambda kind, split: n_rows[kind])
    assert loader.epochs(200) == {"caption": 2, "text": 4}


def test_a_new_kind_changes_nothing_for_mixtures_without_it(monkeypatch):
    def measure():
        loaders = [make_loader(mixture=m, val_rows=1) for m in ("45-45-10", "10-0-0-90")]
        return [(x.val_kinds, digest(x[g] for g in range(20))) for x in loaders]

    before = measure()  # the paper's three kinds; of a mixture for finetuning conversations alone
    assert [kinds for kinds, _ in before] == [[*PRETRAINING], [*QUESTIONS]]
    monkeypatch.setattr(data, "KINDS", (*KINDS, "toy"))
    monkeypatch.setattr(World, "toy", lambda world, w, split: w.add("why?"), raising=False)
    assert measure() == before
    loader = make_loader(mixture="50-" + "0-" * (len(KINDS) - 1) + "50", val_rows=1)
    assert loader.val_kinds == [*PRETRAINING, "toy"]
    assert {loader.kind_of(g)[0] for g in range(100)} == {"caption", "toy"}
    assert loader.source.row("toy", 0).tokens[1:5].tolist() == list(b"why?")


# -- documents in a row --------------------------------------------------------------------------


def test_an_image_comes_whole_or_not_at_all():
    image = np.zeros((4, 4, 3), np.uint8)
    for context, documents in ((6, [[1, 2, IMAGE, 3]]), (8, [[1, 2], [3, IMAGE, 4]])):
        row = Row(context, n_patches=4, eot=9)
        for tokens in documents:
            row.add(Document(np.array(tokens, np.int32), [image] * tokens.count(IMAGE)))
        assert row.images == [] and (row.patch == -1).all() and row.used == context - 3


# -- packing long documents into rows ------------------------------------------------------------


def test_a_plan_of_many_long_texts_is_made_without_reading_them():
    lengths, zeros = np.arange(200_000) % 999, np.zeros(200_000, int)
    shards = types.SimpleNamespace(docs={"text": np.stack([zeros, zeros, lengths, zeros], 1)})
    plan = data.Plan(shards, "text", 128, 4)
    assert plan.pieces[:, 3].sum() == (1 + lengths).sum()


def test_long_documents_are_cut_side_by_side_as_each_alone(monkeypatch):
    """Each alone takes half a minute for a million documents, and OBELICS has 141 million."""
    rng, calls, search = np.random.default_rng(0), [], np.searchsorted
    tokens = [np.where(rng.random(n) < 0.05, IMAGE, 97) for n in rng.integers(99, 999, 250)]
    tokens = [ids[:40] if i % 7 == 0 else ids for i, ids in enumerate(tokens)]  # not all are long

    def plan_of(*tokens):
        table = np.array([[0, 0, len(ids), (ids == IMAGE).sum()] for ids in tokens])
        return data.Plan(types.SimpleNamespace(
            docs={"text": table}, tokens=lambda kind, i: tokens[i]), "text", 64, 4)

    alone = [[i, *piece[1:]] for i, ids in enumerate(tokens)
             for piece in plan_of(ids).pieces.tolist()]
    monkeypatch.setattr(np, "searchsorted",
                        lambda *args, **how: calls.append(1) or search(*args, **how))
    assert plan_of(*tokens).pieces.tolist() == alone
    assert len(calls) < 150


def test_a_gallery_without_a_word_gets_no_row():
    """Nothing would be predicted there, so its row would be padding that counts as training. Nor
    does what is only read of a long question."""
    for kind, images, start, size in (("interleaved", 4, 4, 456), ("conversation", 0, 1024, 477)):
        ids = [IMAGE] * images or [data.READ - 97] * 1300
        ids = np.array(ids + [97] * 200, np.int32)
        shards = types.SimpleNamespace(docs={kind: np.array([[0, 0, len(ids), images]])},
                                       tokens=lambda kind, i, ids=ids: ids)
        plan = data.Plan(shards, kind, 1024, 256)
        assert plan.pieces.tolist() == [[0, start, len(ids) + 2, size]] and plan.n_rows == 1
