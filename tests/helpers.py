"""Random batches in the loader's format (data.py), made without data.py: hermetic and tiny."""
import torch

from model import ModelConfig

TINY = dict(width=32, depth=2, context=24, image_size=8, patch_size=4, vocab_size=37)  # P = 4


def tiny(**changes) -> ModelConfig:
    """A ModelConfig that runs in milliseconds."""
    return ModelConfig(**{**TINY, **changes})


def make_batch(cfg: ModelConfig, rows: list, seed: int = 0, length: int = 0) -> dict:
    """rows: a list of rows, a row a list of documents, a document a string of "t" (a random text
    token) and "I" (a random image); e.g. [["tIttt", "tttt"], ["tIItt"]]. Rows are padded to
    `length` (default cfg.context). Random text, seeded; a batch without images has a dummy one."""
    generator = torch.Generator().manual_seed(seed)
    length = length or cfg.context
    shape = (len(rows), length)
    tokens, doc, targets = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    patch_index = torch.full(shape, -1)
    n_images = 0
    for b, documents in enumerate(rows):
        t = 0
        for number, document in enumerate(documents, 1):
            first = t
            for part in document:
                size = 1 if part == "t" else cfg.n_patches
                if part == "t":
                    tokens[b, t] = torch.randint(cfg.vocab_size, (), generator=generator)
                else:
                    patch_index[b, t:t + size] = torch.arange(size) + n_images * size
                    n_images += 1
                t += size
            doc[b, first:t] = number
        assert t <= length, f"row {b} has {t} positions, the context {length}"
    is_target = torch.zeros(shape, dtype=torch.bool)  # next position: same document, and text
    is_target[:, :-1] = (doc[:, 1:] == doc[:, :-1]) & (doc[:, 1:] > 0) & (patch_index[:, 1:] < 0)
    targets[:, :-1] = tokens[:, 1:]
    images = torch.randint(256, (max(n_images, 1), cfg.n_patches, cfg.patch_dim),
                           generator=generator, dtype=torch.uint8)
    return {"tokens": tokens, "doc": doc, "patch_index": patch_index, "images": images,
            "targets": targets.masked_fill(~is_target, -1),
            "target_index": is_target.flatten().nonzero().flatten()}
