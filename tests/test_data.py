"""python -m pytest tests/test_data.py -q"""

import collections
import math
import random

import numpy as np
import pytest
import torch

import data
from data import COLOURS, GRID, IMAGE, KINDS, VERBS, DataConfig, Document, Loader, Row, World

SHAPE = dict(context=256, image_size=32, patch_size=8)


def make_loader(seed=0, **options):
    return Loader(DataConfig(**options), seed, **SHAPE)


def text_of(document):
    return "".join("#" if t == IMAGE else chr(t) for t in document.tokens)


# -- the procedural world and its floor ---------------------------------------------------------


class SmallWorld(World):
    """Few enough things that every text about a scene can be counted."""

    THINGS, VALUES = 4, 3


def test_probabilities_of_all_captions_of_one_scene_add_up_to_one():
    """If two choices gave one text, or a charge were wrong, the sum would not be 1."""
    world, probability = SmallWorld(), {}
    world.scene = lambda rng, split: {1: (0, 2), 6: (3, 4), 14: (0, 5)}
    rng = random.Random(0)
    for _ in range(3000):
        document = world.document("caption", rng)
        p = math.exp(-float(document.nll.sum()))
        assert probability.setdefault(text_of(document), p) == pytest.approx(p)
    assert len(probability) == 2 * (1 + 2 * len(VERBS))  # style x (no fact, or thing x verb)
    assert sum(probability.values()) == pytest.approx(1, abs=1e-5)


def test_floor_of_stories_equals_the_entropy_counted_from_their_frequencies():
    """An independent count: the entropy of the first sentence and what follows it, from how often
    each text occurs, without looking at what the generator charged."""
    world, rng = SmallWorld(), random.Random(1)
    counts, charged, n = collections.Counter(), 0.0, 40_000
    for _ in range(n):
        writer = data.Writer(rng)
        world.story(writer)
        document = writer.document()
        text = text_of(document)
        stop = text.index(".") + 1  # the first sentence ends here
        counts[text[:stop]] += 1
        charged += float(document.nll[:stop].sum())
    frequencies = np.array(list(counts.values())) / n
    counted = -(frequencies * np.log(frequencies)).sum() + (len(counts) - 1) / (2 * n)
    assert len(counts) == SmallWorld.THINGS * len(VERBS)
    assert charged / n == pytest.approx(counted, abs=0.01)  # both have a standard error near 0.003


def test_no_distribution_scores_below_the_floor():
    """Smoothed bigram to 8-gram models of the validation text, trained on 1000 other documents:
    whatever they know, they stay above it."""
    world = World()
    train, rng = random.Random(2), random.Random(3)
    texts = [text_of(world.document("text", train)) + "\0" for _ in range(1000)]
    val = [world.document("text", rng, "val") for _ in range(100)]
    floor = sum(float(d.nll.sum()) for d in val) / sum(len(d.tokens) + 1 for d in val)
    for order in (2, 4, 8):
        after = collections.defaultdict(collections.Counter)
        for text in texts:
            for i, letter in enumerate(text):
                after[text[max(0, i - order + 1):i]][letter] += 1
        loss = n = 0
        for text in (text_of(d) + "\0" for d in val):
            for i, letter in enumerate(text):
                seen = after[text[max(0, i - order + 1):i]]
                loss -= math.log((seen[letter] + 0.01) / (sum(seen.values()) + 0.01 * 40))
                n += 1
        assert loss / n > floor > 0


def test_what_an_image_shows_costs_nothing_and_what_it_does_not_show_costs():
    world, rng = World(), random.Random(4)
    for _ in range(200):
        document = world.document("caption", rng)
        text, nll = text_of(document), document.nll
        names = text[1:].split(";")[0].rstrip(".")
        assert nll[:1 + len(names)].sum() == pytest.approx(nll[1]), "only the style is a choice"
        assert nll[-1] == 0, "the end of a caption is announced by its punctuation"
        if ";" in text:
            assert nll[text.index(";") + 1:].sum() >= math.log(len(VERBS)) - 1e-5


def test_interleaved_text_follows_from_the_pictures():
    """Reads the pictures back by their sprites and compares with what the text says of the last
    change: it is a function of the last two pictures."""
    world, rng = World(), random.Random(5)
    for _ in range(100):
        document = world.document("interleaved", rng)
        scenes = [see(world, image) for image in document.images]
        for before, after, said in zip(scenes, scenes[1:], text_of(document).split("#")[2:]):
            assert said == f" {told(world, before, after)} now {data.COUNTS[len(after)]}."


def see(world, image):
    """{cell: (thing, colour)} from the pixels alone: exact colours against noisy grey."""
    scene, c = {}, world.cell
    for cell in range(GRID * GRID):
        y, x = cell // GRID * c, cell % GRID * c
        patch = image[y:y + c, x:x + c]
        for number, rgb in enumerate(COLOURS.values()):
            mask = (patch == rgb).all(-1)
            match = (world.sprites == mask).all((1, 2))
            if mask.any() and match.any():
                scene[cell] = (int(match.argmax()), number)
    return scene


def told(world, before, after):
    gone = {c: before[c] for c in before if after.get(c) != before[c]}
    new = {c: after[c] for c in after if before.get(c) != after[c]}
    if not gone:
        return f"a {world.noun(*new.values())} came,"
    noun = world.noun(*gone.values())
    if not new:
        return f"the {noun} left,"
    if gone.keys() == new.keys():
        (_, colour), = new.values()
        return f"the {noun} turned {list(COLOURS)[colour]},"
    return f"the {noun} moved,"


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_follow_from_the_pictures(split):
    """Reads the pictures back by their sprites and answers from them."""
    world, rng = World(), random.Random(6)
    for kind in data.QUESTIONS * 8:
        document = world.document(kind, rng, split)
        question, answer = asked(document)
        scenes = [see(world, image) for image in document.images]
        assert answer == {"colour": the_colour, "count": the_count, "relation": the_relation,
                          "compare": the_change}[kind](world, question, *scenes)
        assert document.nll.sum() == 0, "nothing is left to chance"


def asked(document):
    """(question, answer) of a document; only the answer is a target."""
    read = bytes(data.READ - t for t in document.tokens if t <= data.READ).decode()
    said = bytes(t for t in document.tokens if t >= 0).decode()
    assert read.startswith("\nquestion: ") and read.endswith("\nanswer:")
    return read.removeprefix("\nquestion: ").removesuffix("\nanswer:"), said.strip()


def the_colour(world, question, scene):
    name = question.removeprefix("what colour is the ").rstrip("?")
    colour, = {colour for thing, colour in scene.values() if world.names[thing] == name}
    return list(COLOURS)[colour]


def the_count(world, question, scene):
    return data.COUNTS[len(scene)]


def the_relation(world, question, scene):
    words = question.rstrip("?").split()
    (y0, x0), (y1, x1) = (divmod(cell, GRID) for name in (words[2], words[-1])
                          for cell, (thing, _) in scene.items() if world.names[thing] == name)
    return "yes" if (y0 < y1 if "above" in words else x0 < x1) else "no"


def the_change(world, question, before, after):
    return f"one {told(world, before, after).rstrip(',').split(' ', 3)[-1]}"


def test_splits_never_share_a_scene_or_a_story():
    world, rng = SmallWorld(), random.Random(6)  # small, so that chance repeats are certain
    scenes = {split: {repr(world.scene(rng, split)) for _ in range(3000)}
              for split in ("train", "val")}
    for split in scenes:  # pictures that a change made too
        rng2 = random.Random(7)
        scenes[split] |= {repr(dict(sorted(world.change(eval(s), rng2, split)[0].items())))
                          for s in list(scenes[split])[:1000]}
    assert not scenes["train"] & scenes["val"]
    stories = {split: {text_of(world.document("text", rng, split)) for _ in range(500)}
               for split in ("train", "val")}
    assert not stories["train"] & stories["val"]


def test_sprites_can_be_told_apart():
    flat = World().sprites.reshape(World.THINGS, -1).astype(np.int32)
    same = flat @ flat.T + (1 - flat) @ (1 - flat).T
    np.fill_diagonal(same, 0)
    assert same.max() <= 64 - 6, "some pair of sprites differs in fewer than 6 of 64 pixels"


# -- rows and batches ----------------------------------------------------------------------------


def test_rows_depend_on_seed_and_number_only():
    first, second = make_loader(), make_loader()
    second.row(5), second.row(900)  # what was read before must not matter
    for g in (0, 7, 123):
        assert (first.row(g).tokens == second.row(g).tokens).all()
    assert (first.row(7).tokens != make_loader(seed=1).row(7).tokens).any()


@pytest.mark.parametrize("world,micro", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_the_global_batch_is_the_same_for_any_ranks_and_accumulation(world, micro):
    loader = make_loader()
    expected = loader.batch([loader.row(g) for g in range(16, 24)])["tokens"]  # step 2 of 8 rows
    seen = [batch["tokens"] for rank in range(world)
            for batch in loader.train_batches(2, 3, 8, micro, rank, world)]
    rows = torch.cat(seen)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_worker_processes_change_nothing():
    plain = list(make_loader().train_batches(0, 3, 4, 2))
    workers = list(make_loader(workers=2).train_batches(0, 3, 4, 2))
    for a, b in zip(plain, workers, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_hundred_rows_hold_the_mixture_exactly():
    loader = make_loader(mixture="20-40-40")
    kinds = [loader.kind_of(g) for g in range(300)]
    for block in range(3):
        count = collections.Counter(kind for kind, _ in kinds[100 * block:100 * (block + 1)])
        assert [count[kind] for kind in KINDS] == [20, 40, 40, 0]
    for kind in KINDS:  # rows of a kind are numbered without gaps, so an epoch misses none
        assert [n for k, n in kinds if k == kind] == list(range(sum(k == kind for k, _ in kinds)))


def test_validation_rows_hold_whole_documents_and_an_exact_floor():
    loader = make_loader()
    for kind in KINDS:
        rng = random.Random(f"val/{kind}")
        for n in range(3):  # every document of the stream, none left out for its length
            row = loader.fill(kind, n, "val")
            documents = [loader.world.document(kind, rng, "val") for _ in range(row.n_docs)]
            assert row.nll.sum() == pytest.approx(sum(d.nll.sum() for d in documents), rel=1e-5)
            assert (row.target >= 0).sum() == sum((d.tokens >= 0).sum() + 1 for d in documents)


def toy_image(value):
    return np.full((4, 4, 3), value, np.uint8)


def test_a_row_lays_documents_out_as_the_docstring_says():
    """Two documents, patches of 2: e i i i i A B | e C (e is end-of-text, i a patch)."""
    row = Row(context=12, n_patches=4, eot=9)
    row.add(Document(np.array([IMAGE, 1, 2], np.int32), [toy_image(7)]))
    row.add(Document(np.array([3], np.int32), []))
    assert row.tokens.tolist() == [9, 0, 0, 0, 0, 1, 2, 9, 3, 0, 0, 0]
    assert row.doc.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0]
    assert row.patch.tolist() == [-1, 0, 1, 2, 3] + [-1] * 7
    assert row.target.tolist() == [-1, -1, -1, -1, 1, 2, 9, 3, 9, -1, -1, -1]


def test_an_image_that_does_not_fit_is_left_out_whole():
    row = Row(context=6, n_patches=4, eot=9)
    placed = row.add(Document(np.array([1, 2, IMAGE, 3], np.int32), [toy_image(7)]))
    assert placed == 3 and row.images == [] and (row.patch == -1).all()
    assert row.target.tolist() == [1, 2, -1, -1, -1, -1]


def test_a_piece_of_a_document_brings_only_its_own_images():
    document = Document(np.array([IMAGE, 1, IMAGE, 2], np.int32), [toy_image(7), toy_image(8)])
    row = Row(context=12, n_patches=4, eot=9)
    assert row.add(document, start=6) == 5
    assert row.patch.tolist()[:5] == [0, 1, 2, 3, -1] and row.images[0][0, 0, 0] == 8
    assert row.target.tolist()[:5] == [-1, -1, -1, 2, 9]


def test_a_question_is_read_and_not_predicted():
    """e i i i i q q A e | : the answer and the end-of-text are the only targets."""
    row = Row(context=12, n_patches=4, eot=9)
    q, r, answer = 5, 6, 7
    document = Document(np.array([IMAGE, data.READ - q, data.READ - r, answer]), [toy_image(1)])
    row.add(document)
    assert row.tokens.tolist() == [9, 0, 0, 0, 0, q, r, answer, 0, 0, 0, 0]
    assert row.target.tolist() == [-1] * 6 + [answer, 9] + [-1] * 4


def test_a_finetuning_mixture_is_validated_on_its_questions():
    loader = make_loader(mixture="10-0-0-90", val_rows=1)
    assert tuple(loader.val_kinds()) == data.QUESTIONS
    kinds = collections.Counter(loader.kind_of(g)[0] for g in range(100))
    assert kinds == {"caption": 10, "conversation": 90}
    assert tuple(make_loader().val_kinds()) == data.PRETRAINING == KINDS[:3]


def test_patches_are_cut_in_reading_order():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    patches = data.patchify(image, 2)
    assert patches[1].reshape(2, 2, 3).tolist() == image[:2, 2:].tolist()
    assert patches[2].reshape(2, 2, 3).tolist() == image[2:, :2].tolist()


def test_a_batch_without_images_has_a_dummy_one():
    loader = make_loader(mixture="0-0-100")
    batch = loader.batch([loader.row(0)])
    assert batch["images"].shape == (1, 16, 192) and (batch["patch_index"] == -1).all()


@pytest.mark.parametrize("mixture", ["45-45", "50-50-50", "a-b-c", "45-45-10-1", "20-20-20-20-20"])
def test_bad_mixture_is_one_clear_line(mixture):
    with pytest.raises(SystemExit, match="add up to 100"):
        DataConfig(mixture=mixture)


# -- packing real documents into rows ------------------------------------------------------------


class FakePacked:
    """Documents given as strings of t (text) and I (image), patches of 4."""

    def __init__(self, documents):
        self.ids = [np.array([IMAGE if c == "I" else n for n, c in enumerate(d, 1)], np.int32)
                    for d in documents]

    def sizes(self, kind):
        return np.array([((ids != IMAGE).sum(), (ids == IMAGE).sum()) for ids in self.ids])

    def tokens(self, kind, i):
        return self.ids[i]


@pytest.mark.parametrize("documents", [
    ["ttt", "ItI", "t", "IIIIIIII", "t" * 100, "tItItItItItItIt", "tt"],
    ["t" * 57], ["I" * 9] * 3, ["ttttttttttI" * 5] * 4,  # nothing but documents longer than a row
])
def test_packing_places_every_position_once_and_cuts_no_image(documents):
    """And says of each piece which images it needs."""
    packed, context = FakePacked(documents), 12
    plan = data.Plan(packed, "text", context, 4)
    covered = collections.defaultdict(list)
    for n in range(plan.n_rows):
        pieces = plan.row(n)
        assert 0 < sum(stop - start for _, start, stop, *_ in pieces) <= context
        for i, start, stop, first, last in pieces:
            covered[i].append((start, stop))
            patch = data.expand(Document(packed.ids[i], []), 0, 4)[1][start:stop]
            assert sorted(set((patch[patch >= 0] // 4).tolist())) == list(range(first, last))
    for i, ids in enumerate(packed.ids):
        patch = data.expand(Document(ids, []), 0, 4)[1]
        pieces = sorted(covered[i])
        assert pieces[0][0] == 0 and pieces[-1][1] == len(patch)
        assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:]))
        assert all(stop == len(patch) or patch[stop] % 4 == 0 or patch[stop] < 0
                   for _, stop in pieces), "an image is cut"


def test_every_token_is_a_target_exactly_once_however_documents_are_cut():
    packed = FakePacked(["t" * 30, "tItttttttIttt", "tt"])
    plan, targets = data.Plan(packed, "text", 12, 4), []
    for n in range(plan.n_rows):
        row = Row(12, 4, eot=99)
        for i, start, stop, *_ in plan.row(n):
            images = [toy_image(0)] * int((packed.ids[i] == IMAGE).sum())
            row.add(Document(packed.ids[i], images), start, stop)
        targets += row.target[row.target >= 0].tolist()
    expected = [t for ids in packed.ids for t in [*ids[ids != IMAGE].tolist(), 99]]
    assert sorted(targets) == sorted(expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_piece_fills_a_row_as_its_whole_document_does(seed):
    rng = random.Random(seed)
    packed = FakePacked(["".join(rng.choice("tttI") for _ in range(60)) for _ in range(3)])
    plan = data.Plan(packed, "text", 12, 4)
    for n in range(plan.n_rows):
        rows = Row(12, 4, eot=99), Row(12, 4, eot=99)
        for i, start, stop, *images in plan.row(n):
            document = Document(packed.ids[i], [toy_image(j) for j in range(60)])
            rows[0].add(document, start, stop)
            rows[1].add(*data.part_of(document, start, stop, *images, 4))
        for name in ("tokens", "doc", "patch", "target", "nll", "images"):
            assert np.array_equal(getattr(rows[0], name), getattr(rows[1], name))


def test_a_plan_of_many_long_texts_is_made_without_reading_them():
    class Many:
        def sizes(self, kind):
            return np.stack([np.arange(200_000) % 999, np.zeros(200_000, int)], 1)

    plan = data.Plan(Many(), "text", 128, 4)
    assert (plan.pieces[:, 2] - plan.pieces[:, 1]).sum() == (1 + np.arange(200_000) % 999).sum()
