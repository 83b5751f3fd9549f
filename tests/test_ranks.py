"""The CUDA and multi-GPU path, as far as a CPU can prove it.   python -m pytest tests/test_ranks.py

Ranks are gloo processes, and graphs are traced with aot_eager, which compiles no kernels.
"""
import dataclasses
import json
import shutil

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import model as model_file
import moe as moe_module
import train
from helpers import FLAGS, ROOT, build, make_batch, only_run, python, read_log
from model import PRESETS, ModelConfig

TINY = [*FLAGS, *"--depth 2 --val-rows 3 --mixture 30-30-40".split()]
MOE = ["--fusion", "late", "--moe", "learned", "--experts", "4"]


def launch(ranks, *command):
    """Runs a script under torchrun, or without it for one rank -> what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = python(*torchrun * (ranks > 1), *command, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(out, *flags, ranks=1, script=(str(ROOT / "train.py"),)):
    """-> the log of a run, and its row of results."""
    launch(ranks, *script, *TINY, *flags, "--out", str(out))
    row, = train.finished(out).values()
    return read_log(only_run(out)), row


def assert_equal(runs, within):
    """The losses of every step and of the validation."""
    (log, row), *others = runs
    for other_log, other_row in others:
        for a, b in zip(log, other_log, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=within), a["step"]
        assert row["loss"] == pytest.approx(other_row["loss"], abs=within)
        assert (row["D_vision"], row["padding"]) == (other_row["D_vision"], other_row["padding"])


# -- several ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], MOE, ["--fusion", "late", "--vision-lr", "0"]])
def test_two_ranks_follow_one(tmp_path, flags):
    """At every step, and whatever rows share a micro-batch: the balance loss of experts, too, is
    that of the whole step. A weight of 0.1 would show it sooner than the default. A frozen
    encoder has no gradient that DDP could wait for."""
    flags = ["--tokens", "30K", "--load-balancing-weight", "0.1", *flags]
    one = trained(tmp_path / "one", *flags)
    assert_equal([one, trained(tmp_path / "two", *flags, "--micro-rows", "1", ranks=2)], 1e-4)


CHUNKS = """import functools, sys
sys.path.insert(0, sys.argv[1])
import model, train
model.head_loss = functools.partial(model.head_loss, max_logits=20 * 264)
train.main(sys.argv[2:])"""


def test_sharded_ranks_follow_ddp(tmp_path):
    """Also where ranks have unequal numbers of validation rows, gradients accumulate, and the head
    works in chunks."""
    (tmp_path / "chunks.py").write_text(CHUNKS)
    chunks = str(tmp_path / "chunks.py"), str(ROOT)
    flags = ["--tokens", "10K", "--micro-rows", "1", *MOE]
    assert_equal([trained(tmp_path / "ddp", *flags, ranks=2),
                  trained(tmp_path / "chunks", *flags, ranks=2, script=chunks),
                  trained(tmp_path / "2", *flags, "--shard", ranks=2, script=chunks),
                  trained(tmp_path / "4", *flags, "--shard", ranks=4)], 1e-5)


WAYS = {"one": (1, []), "ddp": (2, []), "fsdp": (2, ["--shard"])}
BUDGETS = ["--tokens", "5K,10K", *MOE]
ELSEWHERE = """import os, sys
os.chdir(sys.argv[1 + int(os.environ.get("RANK", 0))])
sys.path.insert(0, sys.argv[3])
import train
train.main(sys.argv[4:])"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two budgets with a common trunk, trained in each way -> the folder of the studies."""
    root = tmp_path_factory.mktemp("studies")
    for way, (ranks, flags) in WAYS.items():
        launch(ranks, str(ROOT / "train.py"), *TINY, *BUDGETS, *flags, "--out", str(root / way))
    return root


@pytest.mark.parametrize("first, then", [
    ("one", "ddp"), ("ddp", "fsdp"), ("fsdp", "one"), ("one", "fsdp")])
def test_a_run_goes_on_in_any_other_way(studies, tmp_path, first, then):
    """From a trunk that only rank 0 can see, as on machines without a common disk."""
    rows = list(train.finished(studies / first).values())
    shutil.copytree(studies / first, tmp_path / "here" / "run")
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "run" / "results.jsonl").write_text(json.dumps(rows[0]) + "\n")
    shutil.rmtree(tmp_path / "here" / "run" / rows[1]["run"])
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    ranks, flags = WAYS[then]
    out = launch(ranks, str(tmp_path / "elsewhere.py"), str(tmp_path / "here"),
                 str(tmp_path / "there"), str(ROOT), *TINY, *BUDGETS, *flags, "--out", "run")
    assert "from step 8" in out
    row = train.finished(tmp_path / "here" / "run")[rows[1]["run"]]
    assert row["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [80e9, 141e9])
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("moe", ["none", "learned"])
def test_every_preset_fits_or_says_what_would(memory, ranks, moe):
    """And what it says is true: with the flags of the advice it fits."""
    for preset in PRESETS:
        machine = train.Machine(torch.device("cuda"), 0, ranks, memory=memory,
                                dtype=torch.bfloat16)
        flags = ["--preset", preset, "--tokens", "4B", "--moe", moe]
        run, = train.parse_runs(flags)
        try:
            rows, steps = train.divide_step(run, machine)
        except SystemExit as error:
            advice = str(error).partition(": it would with ")[2]
            assert advice or "smaller --preset" in str(error) and preset == "8.13b"
            if advice:
                words, _, gpus = advice.partition(" on ")
                run, = train.parse_runs([*flags, *words.split()])
                machine = dataclasses.replace(machine, ranks=int((gpus or str(ranks)).split()[0]))
                rows, steps = train.divide_step(run, machine)
        fixed, row = model_file.training_memory(run.model, machine.ranks, run.train.shard)
        assert fixed + rows * row <= 0.92 * memory and rows * steps * machine.ranks == 2048


def test_what_is_known_to_fit_fits():
    """932m on one 80 GB card, 3.35b on eight in shards; 8.13b and large MoE only in shards."""
    def rows(preset, ranks=1, shard=False, dtype=torch.bfloat16, **changes):
        sizes = {k: v for k, v in PRESETS[preset].items() if k != "lr"}
        machine = train.Machine(torch.device("cuda"), 0, ranks, memory=80e9, dtype=dtype)
        return train.rows_that_fit(ModelConfig(**sizes, **changes), machine, shard)
    assert rows("932m") >= 16 and rows("3.35b", 8, True) >= 8
    assert rows("3.35b", 8) < 1 <= rows("3.35b")  # DDP holds the gradients twice
    assert rows("3.35b", 8, checkpointing=True) < 1 and rows("932m", checkpointing=True) >= 256
    assert rows("8.13b") < 1 <= rows("8.13b", 8, True)
    assert rows("932m", moe="learned") < 1 <= rows("932m", 8, True, moe="learned")
    assert rows("275m", dtype=torch.float32) <= rows("275m") / 2  # of a GPU without bf16


# -- compiled graphs -------------------------------------------------------------------------------


BATCHES = [["tIttt", "tttt"], ["tItIttt"]], [["tItt", "tttIt"], ["tIt"]], [["ttt"], ["tIttt"]]


def graphs(monkeypatch, model, run, backend="aot_eager"):
    """Graphs that a run of the compiled model's blocks makes, with the grouped kernel of a GPU."""
    torch.compiler.reset()
    monkeypatch.setattr(moe_module, "grouped_mm_is_fast", lambda *args: True)
    counter = CompileCounterWithBackend(backend)
    for module in model.modules():
        if isinstance(module, model_file.Block):
            module.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run()
    return counter.graphs


@pytest.mark.parametrize("kind, most, evaluation", [
    (dict(), 1, ()), (dict(fusion="late"), 3, ()), (dict(moe="learned"), 1, ()),
    (dict(moe="modality"), 1, ()), (dict(checkpointing=True), 1, ()),
    (dict(fusion="late"), 8, (*BATCHES, [["tIttt"]], [["ttt"]]))])
def test_batches_of_other_shapes_compile_nothing_anew(monkeypatch, kind, most, evaluation):
    """In bf16: training, then evaluation with a smaller last batch and with a single image. Late
    fusion's encoder is a graph of its own, and so is one for any number of images after the first.
    """
    model = build(**kind)
    model.dtype = torch.bfloat16

    def run():
        for rows in BATCHES:
            out = model(make_batch(model.cfg, rows))
            (out.loss + out.balance).backward()
        model.eval()
        with torch.no_grad():
            for rows in evaluation:
                model(make_batch(model.cfg, rows))
    assert len(graphs(monkeypatch, model, run)) <= most


def test_ddp_does_not_cut_compiled_blocks(monkeypatch, tmp_path):
    """With its optimizer on, a block would be split where a bucket of gradients ends."""
    from torch._dynamo.backends.distributed import DDPOptimizer
    monkeypatch.setattr(DDPOptimizer, "compile_fn", lambda *args: pytest.fail("it cut a block"))
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build()
        monkeypatch.setattr(model_file.Block, "compile",
                            lambda self: torch.nn.Module.compile(self, backend="aot_eager"))
        train.compile_blocks(model)
        batch = make_batch(model.cfg, BATCHES[0])
        wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
        wrapped(batch).loss.backward()
        plain = build()
        plain(batch).loss.backward()
        for a, b in zip(model.parameters(), plain.parameters()):
            assert torch.allclose(a.grad, b.grad, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_fsdp_leaves_head_dims_numbers(monkeypatch):
    """Late fusion has two, which torch.compile would read as one variable in FSDP's modules, and
    FlexAttention would not compile."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with torch._dynamo.config.patch(specialize_int=False):  # distribute sets it
            model = build(fusion="late", width=64)
            train.distribute(model, True, train.Machine(torch.device("cpu"), 0, 2))
            run = torch.no_grad()(lambda: model(make_batch(model.cfg, BATCHES[0])))
            found = graphs(monkeypatch, model, run, "eager")
        splits = [node for each in found for node in each.graph.find_nodes(
            op="call_method", target="unflatten")]
        dims = {node.args[2][1] for node in splits} - {2}  # RoPE's pairs
        assert dims == {model.cfg.head_dim, model_file.split_heads(model.cfg.encoder_width)}
        assert len(dims) == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_of_other_batches_compile_nothing_anew(monkeypatch):
    model = build(context=128)
    model.flex = True

    @torch.no_grad()
    def run():
        for rows in BATCHES:
            model(make_batch(model.cfg, rows))
    assert len(graphs(monkeypatch, model, run, "eager")) == 1
