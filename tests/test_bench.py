"""The benchmark counts what is executed, compares with an equal, and runs. Nothing is timed."""
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import make_batch, tiny
from model import Model
from tools.bench import (GPU_STEP, MARKS, SIZES, Bench, Stock, config_of, main, make_batches,
                         step_flops, trainee)
from train import Machine


@pytest.mark.parametrize("changes, bookkeeping", [
    ({}, 0), ({"fusion": "late"}, 0), ({"moe": "modality"}, 4 * 2),
    ({"moe": "learned", "experts": 4, "top_k": 2}, 8 * 4)])
def test_the_flops_are_those_that_torch_counts(changes, bookkeeping):
    """Torch computes all T x T pairs of a head; we count causality once, which is half of them.
    bookkeeping: FLOPs a position and layer of the experts' statistics, no part of the model."""
    cfg = tiny(**changes)
    model, batch = Model(cfg), make_batch(cfg, [["tIttt", "tttt"], ["tIItt"]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(batch)
        (out.loss + out.balance).backward()
    positions = batch["tokens"].numel()
    ours = step_flops(cfg, positions, len(batch["images"]), len(batch["target_index"]))
    pairs = 6 * cfg.context * cfg.width
    assert counter.get_total_flops() == ours + cfg.depth * positions * (pairs + bookkeeping)


def test_the_reference_has_the_models_size():
    for size in ("1M", "5M"):
        with torch.device("meta"):
            ours, stock = (sum(p.numel() for p in kind(config_of(SIZES[size])).parameters())
                           for kind in (Model, Stock))
        assert stock == pytest.approx(ours, rel=0.05)


def test_batches_for_the_papers_sizes_are_full_and_half_images():
    given = {"preset": "275m", "tokens_per_step": 2048, "width": 16, "depth": 1}
    batch = make_batches(trainee(Machine.start("cpu"), given), 1)[0]
    assert batch["tokens"].shape == (2, 1024) and (batch["doc"] > 0).all()
    assert (batch["patch_index"] >= 0).float().mean() == 0.5


SLOW = {"compiled", "parallel"}  # a minute each
FUNCTIONS = {name: function for name, (_, function) in MARKS.items() if name not in SLOW}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_mark_runs_those_of_a_gpu_too(function, tmp_path, monkeypatch):
    small = {"width": 32, "depth": 1, "heads": 2}
    sizes = {"context": 256, "image_size": 56, "tokens_per_step": 1024, "micro_rows": 2, **small}
    for shape in (*SIZES.values(), GPU_STEP):
        for field, value in (sizes if shape is GPU_STEP else small).items():
            monkeypatch.setitem(shape, field, value)
    rows = list(function(Bench(Machine.start("cpu"), True, tmp_path)))
    assert rows and all(row.low <= row.value <= row.high for row in rows)


def test_a_quick_run_writes_its_rows(tmp_path):
    main(["--quick", "--only", "scaling,gpu932m,overhead", "--json", str(tmp_path / "bench.json")])
    told = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert told["hardware"] and told["torch"] == torch.__version__
    verdicts = {row["what"]: row["verdict"] for row in told["rows"]}
    assert verdicts["DDP scaling on paper, 932m on 8 H100s"] == "reached"
    assert verdicts["overhead of a default step, without data"] in ("reached", "NOT reached")
    if not torch.cuda.is_available():
        assert verdicts["932m early"] == "not measured here"
