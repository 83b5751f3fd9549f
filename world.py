"""The procedural world: documents without end whose irreducible loss is known exactly.

    python world.py                  a document of each kind, with the nats of each choice beside it
    python world.py text --seed 3

A language model can be judged against the best possible model only if somebody knows the loss of
the best one. Here we do, because every choice that a text reveals has a known probability.
"""
import argparse
import bisect
import hashlib
import random

import numpy as np

COLOURS = {  # brighter than the background, so that one linear layer sees a shape of any colour
    "red": (250, 90, 90), "green": (90, 250, 90), "blue": (90, 90, 250), "white": (250, 250, 250),
    "yellow": (250, 250, 90), "pink": (250, 90, 250), "cyan": (90, 250, 250),
    "orange": (250, 170, 90),
}
VERBS = ("eats", "owns", "digs", "sees")
COUNTS = ("none", "one", "two", "three")
ACTS = ("left", "came", "turned", "moved")
# The order of --mixture; new kinds come last, each with a new method of World. A new kind must
# start with a Question, or as a caption or a text does, and first differ from it in a picture. Or
# its words would reveal the kind, a choice that nobody charges, and the floor would be too low.
KINDS = ("caption", "interleaved", "text", "conversation")
QUESTIONS = ("colour", "count", "relation", "compare")  # the kinds of conversation
GRID = 4  # a scene has GRID x GRID cells; if S / patch_size is 4, too, a patch is one cell


class Question(str):
    """A part of a document that is read and never predicted (finetuning, section 5)."""


class Answer(str):
    """What a question asks for. The model has to predict it and the end-of-text after it."""


def turn(question, answer):
    """One exchange of a conversation, laid out the same in real and in procedural data."""
    return Question(f"\nquestion: {question}\nanswer:"), Answer(f" {answer}")


class Writer:
    """Collects the parts of a document and what each choice cost.

    Every random choice that the *text* reveals goes through `choose`, which charges -log p of what
    was drawn to the next text that is added. Choices that an image has already shown are not
    charged because the reader can see them. So the sum of the charges is -log p(text | images),
    exactly, if two different choices never give the same text, as in every sentence below."""

    def __init__(self, rng):
        self.rng, self.parts = rng, []
        self.costs = [0.0]  # nats of each part; the last entry is for the next text or the end

    def choose(self, probabilities):
        """Draws an index from a list of probabilities, and charges it."""
        u, i = self.rng.random(), 0
        while i < len(probabilities) - 1 and u >= probabilities[i]:
            u, i = u - probabilities[i], i + 1
        self.charge(probabilities[i])
        return i

    def charge(self, probability):
        self.costs[-1] -= float(np.log(probability))

    def add(self, part):
        self.parts.append(part)  # an image is never predicted, so a charge waits for a text
        self.costs.insert(len(self.costs) if isinstance(part, str) else -1, 0.0)


class World:
    """A world of THINGS, each with a name, a sprite and facts.

    Things are met with Zipfian frequency, so that there is always a rarer name, sprite or fact left
    to learn. That is what makes the loss fall as a power law in both N and D rather than drop to
    its floor (Hutter 2021, Michaud et al. 2023). The run's seed never changes the world; it only
    picks the documents that are read about it."""

    THINGS, VALUES = 4096, 64
    ZIPF, HEAD = 1.5, 4  # p(thing k) ~ (k + HEAD)^-ZIPF: HEAD keeps the first from being everywhere

    def __init__(self, image_size=32):
        if image_size % GRID or image_size < 8 * GRID:  # or two sprites could look alike
            raise SystemExit(f"--image-size {image_size}: the procedural world needs a multiple of "
                             f"{GRID}, at least {8 * GRID}")
        rng = np.random.default_rng(2504_07951)
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        words = {}  # of two syllables, each once
        while len(words) < self.THINGS + self.VALUES:
            words["".join(rng.choice(syllables, 2))] = None
        self.values, self.names = [*words][:self.VALUES], [*words][self.VALUES:]
        self.facts = rng.integers(self.VALUES, size=(self.THINGS, len(VERBS)))
        sprites = rng.random((self.THINGS, 8, 8)) < 0.5  # ~32 bits differ, so noise confuses no two
        self.cell = image_size // GRID
        near = np.arange(self.cell) * 8 // self.cell  # nearest neighbour
        self.sprites = sprites[:, near][:, :, near]                    # (THINGS, cell, cell)
        p = (np.arange(self.THINGS) + self.HEAD) ** -self.ZIPF
        self.p = p / p.sum()
        # each thing has a friend, which often stands beside it or is met in its stories
        self.friend = rng.choice(self.THINGS, size=self.THINGS, p=self.p)
        self.cumulative = np.cumsum(self.p).tolist()
        grey = rng.integers(12, 40, size=(64, 1, 1, 1))
        noise = rng.integers(-12, 13, size=(64, image_size, image_size, 3))
        self.backgrounds = (grey + noise).astype(np.uint8)             # (64, S, S, 3)

    def document(self, kind, rng, split="train"):
        """A document of one of KINDS or QUESTIONS -> parts, a list of texts and uint8 (S, S, 3)
        images, and costs, a list of nats: what each part reveals, and last what it cost to stop."""
        writer = Writer(rng)
        getattr(self, kind)(writer, split)
        return writer.parts, writer.costs

    # -- kinds of document -----------------------------------------------------------------------

    def caption(self, w, split):
        """One picture and what it shows in reading order, perhaps with a fact about one thing."""
        scene = self.scene(w.rng, split)
        w.add(self.draw(scene, w.rng))
        self.describe(w, scene)
        return scene

    def interleaved(self, w, split):
        """A captioned picture, then the same scene with one change, which can only be told by
        comparing the two pictures. Its start is distributed exactly like a caption, and the first
        difference is an image, which is never a target; so not knowing the kind of document costs
        nothing, and the floor is the same for any mixture."""
        scene, who, deed = self.change(self.caption(w, split), w.rng, split)
        w.add(self.draw(scene, w.rng))
        w.add(f" {who} {deed}.")

    def text(self, w, split):
        """A walk from thing to thing that tells facts. The words of a story decide its split."""
        while not w.parts or not belongs(w.parts, split):
            w.parts, w.costs = [], [0.0]
            self.story(w)

    def conversation(self, w, split):
        """A question whose answer follows from the pictures, so that its floor is 0."""
        getattr(self, w.rng.choice(QUESTIONS))(w, split)

    # -- scenes ----------------------------------------------------------------------------------

    def thing(self, rng):
        return min(bisect.bisect(self.cumulative, rng.random()), self.THINGS - 1)

    def scene(self, rng, split, distinct=False):
        """{cell: (thing, colour)}, one thing in the upper half and one in the lower. (With things
        anywhere, each seed learned at a different time which thing a caption speaks of.)"""
        while True:
            scene, last, half = {}, None, GRID * GRID // 2
            for cell in (rng.randrange(half), half + rng.randrange(half)):
                friend = last is not None and rng.random() < 0.5
                last = int(self.friend[last]) if friend else self.thing(rng)
                scene[cell] = (last, rng.randrange(len(COLOURS)))
            same = len({thing for thing, _ in scene.values()}) == 1
            if belongs(sorted(scene.items()), split) and not (distinct and same):
                return scene

    def draw(self, scene, rng):
        """uint8 (S, S, 3), S pixels a side."""
        canvas, c = self.backgrounds[rng.randrange(64)].copy(), self.cell
        rgb = list(COLOURS.values())
        for cell, (thing, colour) in scene.items():
            y, x = cell // GRID * c, cell % GRID * c
            canvas[y:y + c, x:x + c][self.sprites[thing]] = rgb[colour]
        return canvas

    def change(self, scene, rng, split):
        """-> new scene of the same split, the thing that changed ("the red mivo"), what it did."""
        while True:
            changed, who, deed = self.any_change(dict(scene), rng)
            if belongs(sorted(changed.items()), split):
                return changed, who, deed

    def any_change(self, scene, rng):
        free = rng.choice([c for c in range(GRID * GRID) if c not in scene])
        act, cell = rng.choice(ACTS), rng.choice(sorted(scene))
        if act == "came":
            scene[free] = (self.thing(rng), rng.randrange(len(COLOURS)))
            return scene, f"a {self.noun(scene[free])}", act
        who = f"the {self.noun(scene[cell])}"
        thing, colour = scene.pop(cell)
        if act == "moved":
            scene[free] = (thing, colour)
        if act == "turned":
            colour = (colour + rng.randrange(1, len(COLOURS))) % len(COLOURS)
            scene[cell] = (thing, colour)
            act = f"turned {list(COLOURS)[colour]}"
        return scene, who, act

    # -- sentences -------------------------------------------------------------------------------

    def noun(self, scene_item):
        thing, colour = scene_item
        return f"{list(COLOURS)[colour]} {self.names[thing]}"

    def describe(self, w, scene):
        """"a red mivo, a green pelu; the pelu eats sodi." The "." or ";" says if a fact follows, so
        that the end of a caption reveals nothing more (see `interleaved`)."""
        for i, cell in enumerate(sorted(scene)):
            w.add(f"{', ' if i else ''}a {self.noun(scene[cell])}")
        if w.choose([0.5, 0.5]):
            return w.add(".")
        things = sorted({thing for thing, _ in scene.values()})
        w.add("; the")
        thing = things[w.choose([1 / len(things)] * len(things))]
        w.add(f" {self.names[thing]}")
        self.say_fact(w, thing)

    def say_fact(self, w, thing):
        verb = w.choose([1 / len(VERBS)] * len(VERBS))
        w.add(f" {VERBS[verb]}")
        w.add(f" {self.values[self.facts[thing, verb]]}.")

    def story(self, w):
        thing = self.thing(w.rng)
        w.charge(self.p[thing])
        w.add(f"the {self.names[thing]}")
        for _ in range(3):  # no more, so that a row of 128 holds every document
            self.say_fact(w, thing)
            act = w.choose([0.1, 0.65, 0.25])
            if act == 0:
                return
            if act == 2:
                known = int(self.friend[thing])
                thing = known if w.rng.random() < 0.5 else self.thing(w.rng)
                w.charge(0.5 * (thing == known) + 0.5 * self.p[thing])  # two ways to the friend
                w.add(f" it met the {self.names[thing]}")
            w.add(". it" if act == 2 else " it")
        self.say_fact(w, thing)

    # -- questions about pictures ----------------------------------------------------------------

    def ask(self, w, scenes, question, answer):
        for scene in scenes:
            w.add(self.draw(scene, w.rng))
        for part in turn(question, answer):
            w.add(part)

    def colour(self, w, split):
        scene = self.scene(w.rng, split, distinct=True)  # otherwise "the" could mean either thing
        thing, colour = scene[w.rng.choice(sorted(scene))]
        question = f"what colour is the {self.names[thing]}?"
        self.ask(w, [scene], question, list(COLOURS)[colour])

    def count(self, w, split):
        scene, _, _ = self.change(self.scene(w.rng, split), w.rng, split)
        self.ask(w, [scene], "how many things?", COUNTS[len(scene)])

    def relation(self, w, split):
        scene = self.scene(w.rng, split, distinct=True)
        here, there = w.rng.sample(sorted(scene), 2)
        down, right = (a - b for a, b in zip(divmod(here, GRID), divmod(there, GRID)))
        vertical = abs(down) > abs(right) or abs(down) == abs(right) and w.rng.random() < 0.5
        names = [self.names[scene[cell][0]] for cell in (here, there)]
        before = (down if vertical else right) < 0
        question = f"is the {names[0]} {'above' if vertical else 'left of'} the {names[1]}?"
        self.ask(w, [scene], question, "yes" if before else "no")

    def compare(self, w, split):
        act, deed, after = w.rng.choice(ACTS), "", {}
        while act not in deed or not belongs(sorted(after.items()), split):
            before = self.scene(w.rng, split)  # a new scene, because some allow no such act in val
            after, _, deed = self.any_change(dict(before), w.rng)
        self.ask(w, [before, after], "what changed?", f"one {deed}")


def belongs(content, split):
    """Whether a scene or a story belongs to this split. One in sixteen is for validation, so that
    nothing in it is ever trained on; the hash is the same on every machine (Python's own is not). A
    text's probability given its pictures does not depend on the split, so the floor stays exact. A
    story has no pictures, and its floor is the loss of a reader who cannot guess the hash. (A CRC
    is linear, so that a val scene whose colour changes would never stay in val.)"""
    return (hashlib.sha256(repr(content).encode()).digest()[0] % 16 == 0) == (split == "val")


def main():
    parser = argparse.ArgumentParser(description="Print documents of the world with their nats.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: one of each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    world, rng = World(), random.Random(args.seed)
    for kind in [args.kind] if args.kind else KINDS:
        parts, costs = world.document(kind, rng)
        print(f"\n{kind}: {sum(costs):.3f} nats")
        for part, cost in zip([*parts, "(the end)"], costs):
            print(f"{cost:7.3f}  {part if isinstance(part, str) else '(a picture)'!r}")


if __name__ == "__main__":
    main()
