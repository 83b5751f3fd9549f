"""The benchmark counts what is executed, compares with an equal, and runs: no test times anything.

    python -m pytest -q tests/test_bench.py
"""
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import SIZES, Stock, main, step_flops
from helpers import make_batch, tiny
from model import Model


@pytest.mark.parametrize("changes, bookkeeping", [
    ({}, 0), ({"fusion": "late"}, 0), ({"moe": "modality"}, 4 * 2),
    ({"moe": "learned", "experts": 4, "top_k": 2}, 8 * 4)])
def test_the_flops_are_those_that_torch_counts(changes, bookkeeping):
    """bookkeeping: FLOPs a position and layer of the experts' statistics, no part of the model."""
    cfg = tiny(**changes)
    model, batch = Model(cfg), make_batch(cfg, [["tIttt", "tttt"], ["tIItt"]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(batch)
        (out.loss + sum(out.aux.values())).backward()
    positions, images, targets = (len(batch["tokens"].flatten()), len(batch["images"]),
                                  len(batch["target_index"]))
    full = step_flops(cfg, positions, images, targets, full=True)
    assert counter.get_total_flops() == full + bookkeeping * cfg.depth * positions
    once = step_flops(cfg, positions, images, targets)  # causality counted once: half the pairs
    assert full - once == 6 * cfg.depth * cfg.context * cfg.width * positions


@pytest.mark.parametrize("size", ["1M", "5M"])
def test_the_reference_has_the_models_size(size):
    cfg = train.make_cell(SIZES[size]).model
    with torch.device("meta"):
        ours, stock = (sum(p.numel() for p in kind(cfg).parameters()) for kind in (Model, Stock))
    assert stock == pytest.approx(ours, rel=0.05)


def test_a_quick_run_writes_its_rows(tmp_path):
    main(["--quick", "--only", "scaling,gpu932m,overhead", "--json", str(tmp_path / "bench.json")])
    told = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert told["hardware"] and told["torch"] == torch.__version__
    verdicts = {row["what"]: row["verdict"] for row in told["rows"]}
    assert verdicts["DDP scaling on paper, 932m on 8 H100s"] == "reached"
    assert verdicts["overhead of a step at width 64, without data"] in ("reached", "NOT reached")
    if not torch.cuda.is_available():
        assert verdicts["932m early"] == "not measured here"


def test_an_unknown_mark_is_one_line():
    with pytest.raises(SystemExit, match="--only takes some of ceiling"):
        main(["--only", "everything"])
