"""The procedural world and its exact floor: python -m pytest -q tests/test_world.py"""
import collections
import math
import random

import numpy as np
import pytest

import world as house
from helpers import python
from world import ACTS, COLOURS, COUNTS, GRID, QUESTIONS, VERBS, Answer, Question, World, Writer


class SmallWorld(World):
    """Few enough things that every text about a scene can be counted."""

    THINGS, VALUES = 4, 3


def text_of(parts):
    return "".join(part if isinstance(part, str) else "#" for part in parts)


def pictures(parts):
    return [part for part in parts if not isinstance(part, str)]


def test_an_image_does_not_pay_for_a_choice():
    writer = Writer(random.Random(0))
    for part in ("a", np.zeros(1), "b"):
        writer.choose([0.5, 0.5])
        writer.add(part)
    writer.charge(0.25)
    assert writer.costs == pytest.approx([math.log(2), 0, math.log(4), math.log(4)])


# -- the floor -----------------------------------------------------------------------------------


def test_probabilities_of_all_captions_of_one_scene_add_up_to_one():
    """If two choices gave one text, or a charge were wrong, the sum would not be 1."""
    world, rng, probability = SmallWorld(), random.Random(0), {}
    world.scene = lambda rng, split: {1: (0, 2), 14: (3, 4)}
    for _ in range(3000):
        parts, costs = world.document("caption", rng)
        p = math.exp(-sum(costs))
        assert probability.setdefault(text_of(parts), p) == pytest.approx(p)
    assert len(probability) == 1 + 2 * len(VERBS)  # no fact, or thing x verb
    assert sum(probability.values()) == pytest.approx(1)


def test_stories_are_charged_what_they_are_drawn_with():
    """Up to the second thing, which a friend can be in two ways: what the charges say of each
    beginning adds up to one, and is how often it occurs."""
    world, rng, n = SmallWorld(), random.Random(1), 20_000
    counts, probability = collections.Counter(), {}
    for _ in range(n):
        writer = Writer(rng)
        world.story(writer)
        text = "".join(writer.parts[:4])  # "the X", " verb", " value.", " it met the Y"
        counts[text] += 1
        probability[text] = math.exp(-sum(writer.costs[:4]))
    assert len(counts) == world.THINGS * len(VERBS) * (2 + world.THINGS)  # or it stops, or goes on
    assert sum(probability.values()) == pytest.approx(1)
    assert all(abs(counts[text] - n * p) < 5 * (n * p) ** 0.5 for text, p in probability.items())


def test_what_an_image_shows_costs_nothing_and_what_it_does_not_show_costs():
    world, rng = World(), random.Random(4)
    for _ in range(200):
        parts, costs = world.document("caption", rng)
        mark = next(i for i, part in enumerate(parts) if isinstance(part, str) and part[0] in ".;")
        assert sum(costs[:mark]) == 0 < costs[mark], "only what follows is a choice"
        assert costs[-1] == 0, "the end of a caption is announced by its punctuation"
        assert (sum(costs[mark + 1:]) >= math.log(len(VERBS)) - 1e-9) == (parts[mark] == "; the")


# -- the texts follow from the pictures ----------------------------------------------------------


def see(world, image):
    """{cell: (thing, colour)} from the pixels alone: exact colours against noisy grey."""
    scene, c = {}, world.cell
    for cell in range(GRID * GRID):
        y, x = cell // GRID * c, cell % GRID * c
        patch = image[y:y + c, x:x + c]
        for number, rgb in enumerate(COLOURS.values()):
            mask = (patch == rgb).all(-1)
            match = (world.sprites == mask).all((1, 2)) if mask.any() else mask
            if match.any():
                scene[cell] = (int(match.argmax()), number)
    return scene


def told(world, before, after):
    gone = {c: before[c] for c in before if after.get(c) != before[c]}
    new = {c: after[c] for c in after if before.get(c) != after[c]}
    if not gone:
        return f"a {world.noun(*new.values())} came"
    noun = world.noun(*gone.values())
    if not new:
        return f"the {noun} left"
    if gone.keys() == new.keys():
        (_, colour), = new.values()
        return f"the {noun} turned {list(COLOURS)[colour]}"
    return f"the {noun} moved"


def answer(world, kind, question, *scenes):
    """The answer to a question of a kind, from the scenes that the pictures show."""
    scene, words = scenes[0], question.rstrip("?").split()
    cells = {world.names[thing]: cell for cell, (thing, _) in scene.items()}
    if kind == "colour":
        return list(COLOURS)[scene[cells[words[-1]]][1]]
    if kind == "count":
        return COUNTS[len(scene)]
    if kind == "relation":
        (y0, x0), (y1, x1) = (divmod(cells[name], GRID) for name in (words[2], words[-1]))
        return "yes" if (y0 < y1 if "above" in words else x0 < x1) else "no"
    return f"one {told(world, *scenes).split(' ', 3)[-1]}"


def test_interleaved_text_is_a_function_of_the_last_two_pictures():
    world, rng = World(), random.Random(5)
    for _ in range(100):
        parts, _ = world.document("interleaved", rng)
        scenes = [see(world, image) for image in pictures(parts)]
        for before, after, said in zip(scenes, scenes[1:], text_of(parts).split("#")[2:]):
            assert said == f" {told(world, before, after)}."


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_follow_from_the_pictures(split):
    world, rng = World(), random.Random(6)
    for kind in QUESTIONS * 8:
        parts, costs = world.document(kind, rng, split)
        question, said = parts[-2:]
        assert isinstance(question, Question) and isinstance(said, Answer)
        asked = question.removeprefix("\nquestion: ").removesuffix("\nanswer:")
        scenes = [see(world, image) for image in pictures(parts)]
        assert said == f" {answer(world, kind, asked, *scenes)}"
        assert sum(costs) == 0, "nothing is left to chance"


def test_splits_never_share_a_scene_or_a_story():
    world, rng = SmallWorld(), random.Random(6)  # small, so that chance repeats are certain
    seen = {}
    for split in ("train", "val"):
        scenes = [world.scene(rng, split) for _ in range(3000)]
        scenes += [world.change(scene, rng, split)[0] for scene in scenes[:1000]]
        seen[split] = {repr(sorted(scene.items())) for scene in scenes}
        seen[split] |= {text_of(world.document("text", rng, split)[0]) for _ in range(500)}
    assert not seen["train"] & seen["val"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_change_is_met_in_both_splits(split):
    world, rng = World(), random.Random(7)
    said = [world.document("interleaved", rng, split)[0][-1] for _ in range(200)]
    acts = collections.Counter(next(act for act in ACTS if act in text) for text in said)
    assert min(acts[act] for act in ACTS) > 5


def test_sprites_can_be_told_apart():
    flat = World().sprites.reshape(World.THINGS, -1).astype(np.float32)
    same = flat @ flat.T + (1 - flat) @ (1 - flat).T
    np.fill_diagonal(same, 0)
    assert same.max() <= 64 - 6, "some pair of sprites differs in fewer than 6 of 64 pixels"


def test_world_prints_its_documents_with_the_nats_of_each_choice():
    out = python(house.__file__, "conversation", "--seed", "1").stdout
    assert "conversation: 0.000 nats" in out and "(a picture)" in out and "question: " in out
