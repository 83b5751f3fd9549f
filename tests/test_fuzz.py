"""Inputs that nobody thought of: python -m pytest -q tests/test_fuzz.py

The same examples each time. FUZZ=50 in the environment draws 50 times as many, and new ones."""
import gzip
import io
import itertools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import fit_laws
import train
from data import IMAGE, READ, DataConfig, Loader, Row, Shards
from test_pack import llava, obelics, picture, write_tar, zstd
from tools.pack import make_document, pack, read_source

TIMES = int(os.environ.get("FUZZ", "1"))
EOT, P = 10**6, 4  # patches of an image


def examples(count):
    return settings(max_examples=count * TIMES, derandomize=TIMES == 1, deadline=None,
                    database=None, suppress_health_check=list(HealthCheck))


def in_one_line(function, *args):
    """What a call returns; None where it ends in one line for the user. Nothing else may happen."""
    try:
        return function(*args)
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code and "\n" not in error.code
        return None


# -- documents in rows -----------------------------------------------------------------------------
# A document is a string: t is a token, r a token that is only read, I an image.


class Numbered(Shards):
    """Every token of every document is another one, and so is every image, whose side is 1."""

    def __init__(self, documents):
        self.encoding = data.get_tokenizer()
        self.ids = [np.array([{"t": 100 * i + n, "r": READ - 100 * i - n, "I": IMAGE}[c]
                              for n, c in enumerate(document)], np.int32)
                    for i, document in enumerate(documents, 1)]
        self.docs = {"text": np.array([(0, 0, len(ids), (ids == IMAGE).sum())
                                       for ids in self.ids])}

    def tokens(self, kind, i):
        return self.ids[i]

    def image(self, kind, i, j):
        return np.full((1, 1, 3), 40 * i + j, np.uint8)


@examples(200)
@given(st.lists(st.text("tttrI", min_size=1, max_size=40), min_size=1, max_size=6),
       st.integers(P + 2, 30))
def test_packing_predicts_each_token_once_and_from_the_one_before_it(documents, context):
    """Or from the image before it. No image is cut or placed twice."""
    shards = Numbered(documents)
    plan, found, shown = data.Plan(shards, "text", context, P), Counter(), []
    for n in range(plan.n_rows):
        row = Row(context, P, EOT)
        for i, start, stop in plan.row(n):
            row.add(shards.document("text", i, 1, start, stop))
        is_patch, images = row.patch >= 0, [int(image[0, 0, 0]) for image in row.images]
        shown += images
        assert row.patch[is_patch].tolist() == [*range(P * len(images))]
        seen = [("image", images[patch // P]) if patch >= 0 else int(token)
                for token, patch in zip(row.tokens, row.patch)]
        owners = {(row.doc[at], part[1] // 40 if is_patch[at] else part // 100 - 1)
                  for at, part in enumerate(seen) if row.doc[at] and part != EOT}
        assert len(owners) == len(dict(owners)), "the mask would let a document see another"
        for at in np.flatnonzero(row.target >= 0):
            assert row.doc[at] and (not is_patch[at] or row.patch[at] % P == P - 1)
            found[seen[at], row.target[at]] += 1
    assert len(shown) == len({*shown})
    expected = Counter()
    for i, ids in enumerate(shards.ids):
        number = itertools.count(40 * i)
        parts = [("image", next(number)) if x == IMAGE else x for x in data.ids_of(ids).tolist()]
        expected.update((a, b) for a, b in zip([EOT, *parts], [*ids.tolist(), EOT]) if b >= 0)
    assert found == expected


@examples(100)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=3), st.integers(0, 2**62))
def test_any_mixture_has_exact_shares_and_loses_no_row(cuts, seed):
    cuts = [0, *sorted(cuts), 100]
    shares = [b - a for a, b in itertools.pairwise(cuts)]
    loader = object.__new__(Loader)  # without its data, which would take most of the time
    loader.seed, loader.shares = seed, DataConfig(mixture="-".join(map(str, shares))).shares
    kinds = [loader.kind_of(g) for g in range(200)]
    for kind, share in zip(data.KINDS, shares):
        assert [n for k, n in kinds if k == kind] == [*range(2 * share)]
        assert sum(k == kind for k, _ in kinds[:100]) == share


# -- flags -----------------------------------------------------------------------------------------

FIELDS = [field for kind in (train.TrainConfig, train.ModelConfig, DataConfig)
          for field in train.fields(kind) if field.name != "vocab_size"]
NUMBERS = st.integers(-2**70, 2**70).map(str) | st.integers(0, 64).map(str) | st.floats().map(str)
WORDS = ["", ",", "0", "-1", "1.5", "1e15", "1e999", "nan", "²-0-100", "{seed}", "x" * 300, "/"]
VALUES = (NUMBERS | st.sampled_from([*WORDS, *train.SIZES, "late", "learned", "modality", "64",
                                     "2M", "on", "0-0-100"])
          | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))


@examples(400)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=4))
def test_any_value_of_any_flag_makes_runs_or_one_line(pairs):
    parse(pairs)


@pytest.mark.parametrize("word", WORDS)
def test_no_flag_chokes_on_a_word(word):
    for field in FIELDS:
        parse([(field, word)])


def parse(pairs):
    argv = []
    for field, value in pairs:
        flag = f"--{field.name.replace('_', '-')}"
        argv += [flag] if isinstance(field.default, bool) else [f"{flag}={value}"]
    try:
        runs = train.parse_runs(argv)
    except SystemExit as error:
        said = str(error)
        for _, value in pairs:
            said = said.replace(value, "")
        assert "\n" not in said and len(said) > 9
    else:
        assert runs and all(run.steps >= 1 and run.name for run in runs)


# -- tables of results -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(10**400) | st.text(max_size=9)
    | st.sampled_from(["<image>", "a.png", "http://a/b.png", "human", "gpt", " ", "../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from("text texts images image bytes value from run N D".split())
                      | st.text(max_size=5), inner, max_size=3), max_leaves=6)


def places_of(value, path=()):
    """The ways to all values inside a value of JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(
        value if isinstance(value, list) else ())
    return [path, *(deeper for key, item in inside for deeper in places_of(item, (*path, key)))]


def replaced(value, path, new):
    if not path:
        return new
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@st.composite
def records(draw, *good):
    """One of the good records, in which one value, or all of it, may be another one."""
    record = draw(st.sampled_from(good))
    if draw(st.booleans()):
        return record
    return replaced(record, draw(st.sampled_from(places_of(record))), draw(JSON))


def mutations():
    """Bytes -> bytes with up to three faults."""
    fault = st.tuples(st.sampled_from(["flip", "put", "cut", "end", "twice"]),
                      st.integers(0, 2**20), st.binary(min_size=1, max_size=6))
    return st.lists(fault, max_size=3)


def mutated(content, faults):
    for what, place, new in faults:
        at = place % max(len(content), 1)
        before, after = content[:at], content[at:]
        content = {"flip": before + bytes(x ^ 1 << place % 8 for x in after[:1]) + after[1:],
                   "put": before + new + after[len(new):], "cut": before + after[new[0]:],
                   "end": before, "twice": before + after[:new[0]] + after}[what]
    return content


ROW = {"run": "early-w16-d1-5K-s0", "fusion": "early", "moe": "none", "mixture": "45-45-10",
       "N": 9000, "N_vision": 0, "D": 5120, "C": 3e8, "loss": 3.5, "loss_text": 3.5, "floor": 0.5,
       "tok_per_s": 9.5, "status": "ok"}
ROWS = [{**ROW, "run": f"{n}/{d}", "N": n, "D": d, "loss": 0.5 + 50 / n**0.5 + 90 / d**0.5}
        for n in (1e4, 4e4, 1e5) for d in (1e6, 3e6, 1e7)]


@examples(150)
@given(st.lists(records(ROW, *ROWS[:2]).map(json.dumps) | st.text(max_size=20)
                | st.just("[" * 100_000), max_size=4), mutations())
def test_a_line_that_is_no_result_costs_only_itself(lines, faults):
    whole = [json.dumps({**ROW, "run": "first"}), json.dumps({**ROW, "run": "last"})]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.jsonl")
        middle = mutated("\n".join(lines).encode(), faults)
        path.write_bytes(b"\n".join([whole[0].encode(), middle, whole[1].encode()]) + b"\n")
        rows = train.finished(folder, tell=True)
    assert {"first", "last"} <= rows.keys() or b"first" in middle or b"last" in middle
    for name, row in rows.items():
        assert row["run"] == name and train.summary(row)


def table_of(kind, rows):
    if kind == ".jsonl":
        return jsonl(rows)
    comma = {".csv": ",", ".tsv": "\t"}[kind]
    return "\n".join(comma.join(map(str, line))
                     for line in [ROW, *(row.values() for row in rows)]).encode()


@examples(25)
@given(st.sampled_from([".csv", ".tsv", ".jsonl"]), mutations(),
       st.lists(records(*ROWS), max_size=2))
def test_any_table_is_fitted_or_refused_in_one_line(kind, faults, more):
    more = [row for row in more if isinstance(row, dict) or kind == ".jsonl"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"table{kind}")
        path.write_bytes(mutated(table_of(kind, [*ROWS, *more]), faults))
        args = fit_laws.parse_args([str(path), "--bootstrap", "2", "--out", folder])
        in_one_line(fit_laws.gather, args)


@pytest.mark.parametrize("name,content", [
    ("deep.jsonl", "[" * 100_000), ("long.csv", "N,D,loss\n" + "1" * 200_000),
    ("pairs.jsonl", "[[1, 2]]"), ("huge.jsonl", '{"N": 1' + "0" * 400 + "}"),
    ("shape.jsonl", json.dumps({**ROW, "mixture": [9], "N": {}, "loss": None, "moe": []})),
    ("long.jsonl", json.dumps({"a": "x" * 200_000}))])
def test_tables_that_are_no_tables(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert in_one_line(fit_laws.main, [str(tmp_path / name), "--out", str(tmp_path)]) is None


# -- files of data ---------------------------------------------------------------------------------

DOCUMENTS = [obelics(["one", None, "two"], [None, "a.png", None]), obelics(["x"], [None])]
FLAMINGO = {"text_list": ["s", "t"],
            "image_info": [{"matched_text_index": 0, "image_name": "1.png"}]}
TALKS = [llava("a.png", "<image>\nWhat?", "A dot.", "Really?", "Yes."), llava(None, "Hm?", "No.")]
TEXTS = [{"text": "a text of some length " * 3}, {"text": "b"}]
RECORDS = {"text": TEXTS, "interleaved": [*map(json.loads, DOCUMENTS), FLAMINGO],
           "conversation": TALKS}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tar(*members):
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder, "a.tar"), members).read_bytes()


def parquet():
    table = pyarrow.table({"texts": [["a", None], [None, "b"], [None]],
                           "images": [[None, picture()], [b"no image", None], [b""]]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


CAPTIONS = [(f"{i}.{end}", content) for i in range(3)
            for end, content in (("png", picture()), ("txt", f"number {i}"))]
CAPTIONS += [("j.jpg", picture(fmt="JPEG")), ("j.json", json.dumps({"caption": "a jpeg"}))]
FILES = {  # (kind, name): content
    ("caption", "a.tar"): tar(*CAPTIONS),
    ("interleaved", "a.tar"): tar(("d/0.json", json.dumps(FLAMINGO)), ("d/0.1.png", picture())),
    ("interleaved", "a.parquet"): parquet(),
    ("interleaved", "a.jsonl"): jsonl(RECORDS["interleaved"]),
    ("text", "a.txt"): "naïve text\n".encode() * 9, ("text", "a.jsonl"): jsonl(TEXTS),
    ("text", "a.jsonl.gz"): gzip.compress(jsonl(TEXTS), mtime=0),
    ("text", "a.jsonl.zst"): zstd(jsonl(TEXTS)),
    ("conversation", "a.jsonl"): jsonl(TALKS),
    ("conversation", "a.json"): json.dumps(TALKS).encode()}


def packed(kind, name, content):
    """(samples seen, documents used, dropped, images left out), after comparing the packer's own
    figures and what it stored with the documents that the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        folder, encoding = Path(folder), data.get_tokenizer()
        (folder / "a.png").write_bytes(picture())
        (folder / name).write_bytes(content)
        made = [make_document(parts, kind, encoding, 9)
                for _, parts, _ in read_source(folder / name, kind)]
        used = [document for document, _ in made if document]
        dropped = [reasons for document, reasons in made if not document]
        assert all(len(reasons) == 1 for reasons in dropped)
        lost = sum(len(reasons) for document, reasons in made if document)
        meta = in_one_line(pack, {kind: [str(folder / name)]}, folder / "out", "bytes", 8, "train",
                           0, 1)
        assert bool(meta) == bool(used)
        if meta:
            assert meta["splits"]["train"][kind]["docs"] == len(used)
            assert sum(n for n, _ in meta["skipped"].values()) == len(dropped) + lost
            shards = Shards(folder / "out")
            for i, document in enumerate(used):
                assert shards.tokens(kind, i).tolist() == document.tokens.tolist()
                assert all((shards.image(kind, i, j) == image).all()
                           for j, image in enumerate(document.images))
        return len(made), len(used), len(dropped), lost


@pytest.mark.parametrize("kind,name", FILES)
def test_a_damaged_file_stops_nothing(kind, name):
    whole = packed(kind, name, FILES[kind, name])

    @examples(25)
    @given(mutations())
    def attack(faults):
        content = mutated(FILES[kind, name], faults)
        seen, used, dropped, _ = packed(kind, name, content)
        assert seen == used + dropped
        if name == "a.jsonl":
            assert seen == sum(line not in (b"\n", b"\r\n") for line in io.BytesIO(content))

    assert whole[1] >= 1
    attack()


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_of_any_shape_is_used_or_counted(kind):
    @examples(60)
    @given(st.lists(records(*RECORDS[kind]), min_size=1, max_size=4))
    def attack(some):
        for name in ("a.jsonl", "a.json")[:1 + (kind == "conversation")]:
            content = jsonl(some) if name == "a.jsonl" else json.dumps(some).encode()
            seen, used, dropped, _ = packed(kind, name, content)
            assert seen == len(some) == used + dropped

    attack()
