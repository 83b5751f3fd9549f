"""OMP_NUM_THREADS=1 python -m pytest tests/test_model.py   (about 20 seconds)"""
import dataclasses
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model as model_module  # noqa: E402
from helpers import make_batch, tiny  # noqa: E402
from model import (  # noqa: E402
    PRESETS, Model, ModelConfig, adopt, attention_mask, flex_error, from_open_lm, generate,
    head_loss, prompt_batch, read_weights, rope_table, rotate)

KINDS = [dict(), dict(fusion="late"), dict(moe="learned"), dict(moe="modality"),
         dict(fusion="late", moe="learned", top_k=2, granularity=2)]
NAMES = ["early", "late", "moe", "modality", "late-moe-top2-fine"]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=NAMES)
ROWS = [["tIttt", "tttt"], ["tItIttt"]]  # with P = 4: 8 + 4 positions, and 13


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return Model(tiny(**changes))


def hidden(model, batch):
    with torch.no_grad():
        return model.decode(batch)[0]


def changed(model, before, batch):
    """(B,T) bool: positions whose hidden state (so whose logits) differ by more than noise."""
    return (hidden(model, batch) - before).abs().amax(-1) > 1e-5


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out.loss + sum(out.aux.values())).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- who sees whom


def test_mask_against_a_triple_loop():
    generator = torch.Generator().manual_seed(1)
    doc = torch.randint(0, 3, (3, 12), generator=generator).sort(1)[0]
    image = torch.randint(-1, 3, (3, 12), generator=generator)
    mask = attention_mask(doc, image)
    assert mask.shape == (3, 1, 12, 12) and mask.dtype == torch.bool
    for b in range(3):
        for q in range(12):
            for k in range(12):
                same_image = image[b, q] == image[b, k] and image[b, q] >= 0
                expected = doc[b, q] == doc[b, k] and (k <= q or same_image)
                assert mask[b, 0, q, k] == expected, (b, q, k)
    assert mask.any(-1).all(), "a row that sees nothing makes NaN"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_dense_mask():
    """Uncompiled, as a CPU can; train.py tries it compiled, with gradients, on its GPU."""
    model = build(context=256)
    batch = make_batch(model.cfg, [["tIttt" * 9, "tttt" * 20], ["tItIttt"], []])
    dense = hidden(model, batch)
    model.flex = True
    assert torch.allclose(hidden(model, batch), dense, atol=1e-5)
    model.flex = False
    reason = flex_error(model.blocks[0], model.rope, 2)  # no gradients on a CPU: said, not raised
    assert "CPU" in reason


@every_kind
def test_text_sees_only_the_past_of_its_document(kind):
    model, batch = build(**kind), make_batch(tiny(), ROWS)
    before = hidden(model, batch)
    for b, t in ((0, 0), (0, 6), (0, 9), (1, 0), (1, 11)):
        probe = {**batch, "tokens": batch["tokens"].clone()}
        probe["tokens"][b, t] = (probe["tokens"][b, t] + 1) % 37
        moved = changed(model, before, probe)
        expected = torch.zeros_like(moved)
        expected[b, t:] = batch["doc"][b, t:] == batch["doc"][b, t]
        assert torch.equal(moved, expected), (b, t)


@every_kind
def test_patches_of_one_image_see_each_other_and_nothing_earlier_sees_them(kind):
    model, batch = build(**kind), make_batch(tiny(), ROWS)
    before = hidden(model, batch)
    for image, row, first in ((0, 0, 1), (1, 1, 1), (2, 1, 6)):
        for patch in (0, 3):  # the last patch moves the first one: both directions
            probe = {**batch, "images": batch["images"].clone()}
            probe["images"][image, patch] ^= 255
            moved = changed(model, before, probe)
            expected = torch.zeros_like(moved)  # the image, and its document after it
            expected[row, first:] = batch["doc"][row, first:] == batch["doc"][row, first]
            assert torch.equal(moved, expected), (image, patch)


@every_kind
def test_packed_documents_are_as_if_alone(kind):
    model, cfg = build(**kind), tiny()
    packed = make_batch(cfg, [["tIttt", "tItt"]])
    out = model(packed)
    for number, image in ((1, 0), (2, 1)):
        at = packed["doc"][0] == number
        alone = {name: packed[name][:, at] for name in ("tokens", "doc", "targets", "patch_index")}
        alone["patch_index"] = torch.where(alone["patch_index"] >= 0,
                                           alone["patch_index"] - image * cfg.n_patches, -1)
        alone["images"] = packed["images"][image:image + 1]
        alone["target_index"] = (alone["targets"].flatten() >= 0).nonzero().flatten()
        in_row = packed["doc"].flatten()[packed["target_index"]] == number
        assert torch.allclose(model(alone).token_loss, out.token_loss[in_row], atol=2e-5)


def test_rope_is_relative_and_both_forms_agree():
    torch.manual_seed(0)
    table = rope_table(12, 8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    q, k = rotate(q.expand(1, 12, 1, 8), table), rotate(k.expand(1, 12, 1, 8), table)
    scores = torch.einsum("bqhd,bkhd->qk", q, k)
    assert torch.allclose(scores[3, 1], scores[10, 8], atol=1e-5)
    x = torch.randn(2, 12, 3, 8)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    by_hand = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    assert torch.allclose(rotate(x, table), by_hand, atol=1e-6)


# ---------------------------------------------------------------- loss and gradients


@every_kind
def test_initial_loss_is_near_log_vocabulary(kind):
    """Logits of std about 1 add half a nat to ln V; more means a wrong init."""
    model = build(vocab_size=512, width=64, **kind)
    out = model(make_batch(model.cfg, [["tIt" + "t" * 16]] * 8))
    assert math.log(512) - 0.2 < out.loss.item() / out.count < math.log(512) + 0.9


@every_kind
def test_text_only_batch_touches_every_parameter(kind):
    model = build(**kind)
    _, grads = gradients(model, make_batch(tiny(), [["tttttt"], ["ttt", "tt"]]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and grads[name].isfinite().all(), name
        if name.startswith("vision"):
            assert not grads[name].any(), f"{name} must get zero from a dummy image"


@every_kind
def test_no_target_gives_a_connected_zero(kind):
    model = build(**kind)
    out, grads = gradients(model, make_batch(tiny(), [["t"], ["I"]]))
    assert out.count == 0 and out.loss.item() == 0 and out.token_loss.shape == (0,)
    assert all(grad.isfinite().all() for grad in grads.values())


@every_kind
def test_loss_does_not_depend_on_padding(kind):
    model = build(**kind)
    short, long = (make_batch(tiny(), ROWS, length=n) for n in (13, 24))
    long["tokens"][long["doc"] == 0] = 5  # whatever lies there
    a, b = model(short), model(long)
    assert a.count == b.count and torch.allclose(a.token_loss, b.token_loss, atol=1e-5)
    for name in a.aux:
        assert torch.allclose(a.aux[name], b.aux[name], atol=1e-6), name
    if a.expert_counts is not None:
        assert torch.equal(a.expert_counts, b.expert_counts)


def test_loss_is_the_sum_over_text_targets():
    model, batch = build(), make_batch(tiny(), ROWS)
    out = model(batch)
    logits = model.head(hidden(model, batch))
    plain = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1,
                            reduction="sum")
    assert out.count == (batch["targets"] >= 0).sum() == 3 + 3 + 4
    assert torch.allclose(out.loss, plain) and torch.allclose(out.token_loss.sum(), plain)
    assert not out.token_loss.requires_grad


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunked_loss_equals_plain(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16), torch.randn(29, 16)
    targets, pull = torch.randint(29, (7,)), torch.randn(7)
    results = []
    for limit in (10 ** 9, rows * 29):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = head_loss(a, w, targets, limit)
        (loss * pull).sum().backward()
        results.append((loss.detach(), a.grad, w.grad))
    for plain, chunked in zip(*results):
        assert torch.allclose(plain, chunked, atol=1e-5)


@every_kind
def test_checkpointing_changes_nothing(kind):
    batch = make_batch(tiny(), ROWS)
    (a, plain), (b, recomputed) = (gradients(build(checkpointing=flag, **kind), batch)
                                   for flag in (False, True))
    assert torch.equal(a.loss, b.loss) and a.aux == b.aux
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], atol=1e-6), name


@every_kind
def test_overfits_one_batch(kind):
    model, batch = build(**kind), make_batch(tiny(), ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(120):
        out = model(batch)
        optimizer.zero_grad()
        (out.loss / out.count + 0.01 * sum(out.aux.values())).backward()
        optimizer.step()
    assert model(batch).loss.item() / out.count < 0.1


def test_pixels_become_minus_one_to_one():
    model, batch = build(), make_batch(tiny(), [["tItt"]])
    batch["images"] = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 4, 24)
    seen = []
    model.vision.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(batch)
    assert seen[0].unique().tolist() == [-1, 1] and seen[0].dtype == torch.float32


def test_the_picture_is_used():
    """Two rows that differ in their image only, and have different captions, can be learnt."""
    model, batch = build(), make_batch(tiny(), [["tItt"], ["tItt"]])
    batch["tokens"] = torch.where(batch["patch_index"] >= 0, 0, batch["tokens"][:1])
    batch["targets"][1, 4] = (batch["targets"][0, 4] + 1) % 37  # after the last patch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


# ---------------------------------------------------------------- sizes


def count_on_meta(name, **changes):
    fields = {key: value for key, value in PRESETS[name].items() if key != "lr"}
    with torch.device("meta"):
        return Model(ModelConfig(**{**fields, **changes})).num_params()


def in_billions(count, printed, cut=False):
    """count as the paper would print it: as many decimals as `printed`, rounded or cut off."""
    decimals = len(printed.partition(".")[2])
    scaled = count / 1e9 * 10 ** decimals
    return f"{(math.floor if cut else round)(scaled) / 10 ** decimals:.{decimals}f}"


def test_early_sizes_are_the_legends():
    legends = {"275m": "0.275", "464m": "0.464", "932m": "0.932", "1.63b": "1.627",
               "2.28b": "2.280", "3.35b": "3.354", "8.13b": "8.13"}
    for name, printed in legends.items():
        n = count_on_meta(name)
        assert in_billions(n["N"], printed) == printed and n["N_vision"] == 0, name


def test_late_sizes_are_the_legends():
    """No one definition gives all six, so each says which does (sum: N + N_vision)."""
    for name, printed, definition, cut in (
            ("289m", "0.289", "sum", True), ("494m", "0.494", "N_total", False),
            ("1b", "1", "sum", False), ("1.75b", "1.748", "sum", False),
            ("2.43b", "2.430", "sum", False), ("3.7b", "3.714", "N_total", False)):
        n = count_on_meta(name)
        n["sum"] = n["N"] + n["N_vision"]
        assert in_billions(n[definition], printed, cut) == printed, name


def test_moe_sizes_are_the_totals_of_eight_experts():
    totals = {"275m": "1.20", "464m": "2.15", "932m": "4.51", "1.63b": "8.18", "2.28b": "11.8",
              "3.35b": "17.5"}
    for name, printed in totals.items():
        moe = count_on_meta(name, moe="learned")
        assert in_billions(moe["N_total"], printed) == printed, name
        assert moe["N"] == count_on_meta(name)["N"], "equal active parameters"


def test_late_sizes_with_one_encoder_are_the_legends_of_fig_19():
    for width, printed in ((768, "0.555"), (1536, "1.14"), (2464, "2.320"), (3072, "3.33")):
        n = count_on_meta("289m", width=width, vision_width=1024)
        assert in_billions(n["N"] + n["N_vision"], printed, cut=True) == printed, width


def test_early_and_late_sizes_are_pairs_of_equal_flops():
    pairs = (("275m", "289m", "0.270"), ("464m", "494m", "0.456"), ("932m", "1b", "0.927"),
             ("1.63b", "1.75b", "1.607"), ("2.28b", "2.43b", "2.240"), ("3.35b", "3.7b", "3.397"))
    for early, late, printed in pairs:
        n = count_on_meta(late)
        cost = n["N"] + 0.544 * n["N_vision"]
        assert in_billions(cost, printed) == printed, late
        assert abs(cost / count_on_meta(early)["N"] - 1) < 0.02, late


def test_fine_grained_experts_cost_what_the_coarse_do():
    """Table 13: twice the experts of half the size, two of them for a token."""
    coarse = count_on_meta("275m", moe="learned")
    fine = count_on_meta("275m", moe="learned", experts=16, top_k=2, granularity=2)
    assert fine["N"] == coarse["N"]
    assert fine["N_total"] - coarse["N_total"] == 24 * 8 * 800, "only the router is larger"
    layer = Model(tiny(moe="learned", granularity=3)).blocks[0].ffn
    assert layer.gate.shape == layer.up.shape == (8, 32, 32) and layer.down.shape == (8, 32, 32)


def test_sizes_are_printed_without_a_run(capsys):
    model_module.main(["--sizes"])
    lines = capsys.readouterr().out.splitlines()[:-3]  # below them, what the columns are
    rows = {tuple(line.split()[:-12]): line.split()[-12:] for line in lines[1:]}
    assert len(lines) == len(rows) + 1 == 1 + 13 + 7 and max(map(len, lines)) <= 100
    assert all(len(line) == len(lines[0]) for line in lines), "columns are aligned"
    for key, early in (("early",), True), (("early", "moe"), True), (("late",), False):
        for name in (n for n, preset in PRESETS.items() if (preset["fusion"] == "early") == early):
            n = count_on_meta(name, moe="learned" if "moe" in key else "none")
            flops = 6 * (n["N"] + 0.544 * n["N_vision"])
            row = rows[(name, *key)]
            assert row[2:6] == [f"{x / 1e9:.3f}" for x in (n["N"], n["N_vision"], n["N_total"],
                                                           flops)], name
            assert row[9:] == [f"{C / flops / 1e9:.1f}" for C in (1e20, 1e21, 1e22)], name
    # 16 bytes for each of 0.2754e9 and 8.1326e9 parameters, and 0.94e9 bytes of logits; or an
    # eighth of it, 2 bytes for each of a block's 4w^2 + 3wh, and the logits
    assert rows["275m", "early"][6:8] == ["5.3", "1.5"]
    assert rows["8.13b", "early"][6:8] == ["131.1", "17.8"]
    assert rows["275m", "early"][8] == f"{1024 * 800 * (4 * 24 + 54) / 1e9:.2f}"


@every_kind
def test_counts_equal_the_parameters_there_are(kind):
    model = build(**kind)
    cfg, n, w, h = model.cfg, model.num_params(), 32, 96  # int(8*32/3) = 85 -> 96
    assert cfg.hidden == h and n["N_total"] == sum(p.numel() for p in model.parameters())
    active = cfg.top_k if cfg.moe == "learned" else 1
    inner = 2 * (4 * w * w + active * 3 * w * h // cfg.granularity)
    assert n["N_nonembedding"] == inner and n["N"] == inner + 2 * 37 * w
    v, g = 16, 48  # the encoder's width and hidden
    assert n["N_vision"] == (2 * (4 * v * v + 3 * v * g) if cfg.fusion == "late" else 0)
    assert model.flops(1000, 400) == 6 * (n["N_vision"] * 400 + n["N"] * 1000)


def test_init_follows_the_fan_in_and_the_depth():
    model = Model(ModelConfig(width=256, depth=3))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    cut = 0.9866  # std of a normal of std 1 cut at 3
    hidden_size = model.cfg.hidden
    for layer in range(3):
        block = f"blocks.{layer}"
        for name, expected in {"attention.q": 256, "attention.out": 512 * (layer + 1),
                               "ffn.up": 256, "ffn.down": hidden_size * 2 * (layer + 1)}.items():
            wanted = cut / math.sqrt(expected)
            assert abs(std[f"{block}.{name}.weight"] / wanted - 1) < 0.03, (layer, name)
    assert abs(std["embedding.weight"] / (cut / 16) - 1) < 0.03


def test_auto_heads():
    dims = {64: 32, 96: 48, 128: 64, 800: 80, 1088: 64, 5120: 64, 12: 6}
    assert {w: model_module.split_heads(w) for w in dims} == dims


@pytest.mark.parametrize("wrong, words", [
    (dict(width=30, heads=4), "width 30 is not divisible by heads 4"),
    (dict(width=33), "width 33"), (dict(width=20, heads=4), "odd"), (dict(depth=0), "depth 0"),
    (dict(context=5), "at least 6"), (dict(image_size=9), "multiple of patch_size 4"),
    (dict(moe="learned", experts=2, top_k=3), "top_k 3 exceeds experts 2"),
    (dict(granularity=2), "granularity 2 needs moe learned"), (dict(granularity=0), "below 1"),
    (dict(moe="learned", granularity=5), "96 is not divisible by granularity 5"),
    (dict(fusion="middle"), "use early or late"), (dict(heads=-1), "heads -1")])
def test_wrong_config_says_so_in_one_line(wrong, words):
    with pytest.raises(ValueError) as error:
        tiny(**wrong)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- generation


def random_image(cfg, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (cfg.n_patches, cfg.patch_dim), generator=generator,
                         dtype=torch.uint8)


@every_kind
def test_cached_generation_equals_uncached(kind):
    model = build(**kind).eval()
    prompt = [[3], random_image(model.cfg, 0), [5, 6], random_image(model.cfg, 1),
              random_image(model.cfg, 2), [7]]
    ids = generate(model, prompt, 6)
    assert len(ids) == 6
    for n in range(6):  # the whole sequence again for each token, no cache
        batch = prompt_batch(prompt + [ids[:n]], model.cfg, "cpu")
        assert model.head(hidden(model, batch)[0, -1]).argmax().item() == ids[n]


@every_kind
def test_cached_states_equal_uncached_states(kind):
    model = build(**kind).eval()
    whole = prompt_batch([[3], random_image(model.cfg, 0), [5, 6, 7]], model.cfg, "cpu")
    caches, states = [[] for _ in model.blocks], []
    cuts = [(0, 5), (5, 6), (6, 7), (7, 8)]
    for start, end in cuts:
        part = {name: whole[name][:, start:end] for name in ("tokens", "doc", "patch_index")}
        if start == 0:
            part["images"] = whole["images"]
        with torch.no_grad():
            states.append(model.decode(part, caches, start)[0])
    assert torch.allclose(torch.cat(states, 1), hidden(model, whole), atol=1e-5)


def test_sampling():
    model = build().eval()
    draw = [generate(model, [[1, 2]], 12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    greedy = generate(model, [[1, 2]], 12)
    assert generate(model, [[1, 2]], 12, temperature=2.0, top_k=1) == greedy
    assert generate(model, [[1, 2]], 12, stop=greedy[3]) == greedy[:greedy.index(greedy[3])]
    assert max(generate(model, [[1]], 20, temperature=50.0, n_vocab=5)) < 5
    assert len(generate(model, [[1] * 20], 99)) == 4, "ends with the context of 24"
    with pytest.raises(ValueError, match="no room"):
        generate(model, [[1] * 24], 1)


# ---------------------------------------------------------------- the script


def save_run(folder, model, tokenizer="bytes"):
    folder.mkdir(exist_ok=True)
    config = {"model": dataclasses.asdict(model.cfg), "data": {"tokenizer": tokenizer}}
    torch.save({"model": model.state_dict(), "config": config}, folder / "ckpt.pt")


def test_script_prints_a_caption(tmp_path, capsys):
    from PIL import Image
    pixels = np.arange(20 * 14 * 3, dtype=np.uint8).reshape(14, 20, 3)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    save_run(tmp_path / "run", build(vocab_size=264))
    args = [str(tmp_path / "run"), "--prompt", "a cat", "--max-new-tokens", "3"]
    model_module.main(args)
    plain = capsys.readouterr().out
    model_module.main(args + ["--image", str(tmp_path / "cat.png")])
    assert plain.startswith("a cat") and capsys.readouterr().out.startswith("a cat")


def test_script_mistakes_end_in_one_line(tmp_path):
    run, broken, other = tmp_path / "run", tmp_path / "broken", tmp_path / "other"
    save_run(run, build(vocab_size=264))
    broken.mkdir()
    (broken / "ckpt.pt").write_bytes(b"not a checkpoint")
    model = build(vocab_size=264)
    save_run(other, model)
    ckpt = torch.load(other / "ckpt.pt", weights_only=True)
    ckpt["config"]["model"]["width"] = 64
    torch.save(ckpt, other / "ckpt.pt")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for args, words in (([], "or give --sizes"),
                        ([tmp_path / "nowhere"], f"does not exist: name the directory of one run "
                                                 f"of train.py, as {tmp_path / 'broken'}"),
                        ([broken], "not a checkpoint"),
                        ([other], "not a checkpoint"),
                        ([run, "--image", tmp_path / "none.png"], "cannot read the image"),
                        ([run, "--image", tmp_path / "no.png"], "cannot read the image"),
                        ([run, "--prompt", "x" * 30], "fewer images or less text")):
        with pytest.raises(SystemExit) as error:
            model_module.main([str(arg) for arg in args])
        message = str(error.value.code)
        assert words in message and "\n" not in message, message


def test_unknown_flag_names_the_nearest(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        model_module.main([str(tmp_path), "--promt", "x"])
    assert "--prompt" in f"{error.value.code} {capsys.readouterr().err}"


def test_checkpoint_is_a_plain_state_dict():
    """weights_only can read it, and no buffer that the config already determines is in it."""
    model, buffer = build(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {name for name, _ in model.named_parameters()}


# ---------------------------------------------------------------- trained weights


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return {name for name in a if torch.equal(a[name], b[name])}


@every_kind
def test_weights_of_a_run_go_back_in_part_by_part(kind, tmp_path):
    source = build(seed=1, **kind)
    save_run(tmp_path / "run", source)
    config, weights = read_weights(tmp_path / "run")
    assert ModelConfig(**config) == source.cfg
    assert same(weights, read_weights(str(tmp_path / "run" / "ckpt.pt"))[1]) == set(weights)
    model = build(**kind)
    before, theirs = parameters(model), parameters(source)
    vision = {name for name in before if name.startswith("vision.")}
    equal = same(before, theirs)  # gains all start as 1
    adopt(model, weights, "vision", "run")
    assert vision and same(parameters(model), theirs) == vision | equal
    adopt(model, weights, "decoder", "run")
    assert same(parameters(model), theirs) == set(before)


@pytest.mark.parametrize("changes, part, words", [
    (dict(width=40), "decoder", "(37, 40) in this model: give the --width"),
    (dict(vocab_size=40), "decoder", "embedding.weight is (37, 32) there, (40, 32) in this model: "
                                     "pack the data with the tokenizer"),
    (dict(depth=3), "decoder", "blocks.2.attention_norm.weight is missing there"),
    (dict(depth=1), "decoder", "blocks.1.attention_norm.weight is (32,) there, missing in this"),
    (dict(moe="learned"), "decoder", "blocks.0.ffn.gate is missing there"),
    (dict(patch_size=2), "vision", "vision.weight is (32, 48) there, (32, 12) in this model"),
    (dict(fusion="late"), "vision", "--vision-width")])
def test_weights_that_do_not_fit_say_so_and_change_nothing(changes, part, words):
    weights, model = parameters(build(seed=1)), build(**changes)
    before = parameters(model)
    with pytest.raises(SystemExit) as error:
        adopt(model, weights, part, "runs/a")
    message = str(error.value.code)
    assert message.startswith("runs/a: ") and words in message and "\n" not in message
    assert same(before, parameters(model)) == set(before)


def open_lm_state(width=32, depth=2, heads=4, hidden=96, vocab=37):
    def gain():
        return 1 + 0.3 * torch.randn(width)

    def matrix(rows, columns):
        return torch.randn(rows, columns) / columns ** 0.5

    torch.manual_seed(5)
    rates = 1e4 ** -torch.arange(0, 1, 2 * heads / width)
    state = {"tok_embeddings.weight": matrix(vocab, width), "norm.weight": gain(),
             "output.weight": matrix(vocab, width)}
    for layer in range(depth):
        state |= {f"layers.{layer}.{name}": tensor for name, tensor in {
            "attention.in_proj.weight": matrix(3 * width, width),
            "attention.out_proj.weight": matrix(width, width),
            "attention.pos_embed.inv_freq": rates,
            "attention.q_norm.weight": gain(), "attention.k_norm.weight": gain(),
            "feed_forward.w12.weight": matrix(2 * hidden, width),
            "feed_forward.w3.weight": matrix(width, hidden),
            "attention_norm.weight": gain(), "ffn_norm.weight": gain()}.items()}
    return state


def open_lm_logits(state, tokens, depth=2):
    """What open_lm computes: in one matrix each, q k v and gate up; RoPE on halves of a head."""
    def linear(x, name):
        return x @ state[f"{name}.weight"].T

    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"])

    def turn(x):  # (B,T,H,Hd)
        angle = torch.arange(x.shape[1])[:, None, None] * rates                  # (T,1,Hd/2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = state["tok_embeddings.weight"][tokens]
    for i in range(depth):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        rates = state[f"{at}.pos_embed.inv_freq"]
        q, k, v = linear(layer_norm(x, f"{at}_norm"), f"{at}.in_proj").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (-1, 2 * len(rates))) for part in (
            layer_norm(q, f"{at}.q_norm"), layer_norm(k, f"{at}.k_norm"), v))
        q, k, v = (part.transpose(1, 2) for part in (turn(q), turn(k), v))       # (B,H,T,Hd)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.out_proj")
        gate, up = linear(layer_norm(x, f"layers.{i}.ffn_norm"), f"{ff}.w12").chunk(2, -1)
        x = x + linear(F.silu(gate) * up, f"{ff}.w3")
    return linear(layer_norm(x, "norm"), "output")


@pytest.mark.parametrize("prefix, key", [("", None), ("module.", "state_dict"), ("model.", None),
                                         ("module.model.", "state_dict")])
def test_open_lm_weights_give_the_same_logits(prefix, key, tmp_path):
    state = open_lm_state()
    named = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({key: named, "epoch": 3} if key else named, tmp_path / "dclm.pt")
    config, weights = read_weights(tmp_path / "dclm.pt")
    assert config == dict(width=32, depth=2, heads=4, vocab_size=37, mlp_multiple=16)
    model = build(**config)
    adopt(model, weights, "decoder", "dclm.pt")
    batch = make_batch(model.cfg, [["t" * 24], ["t" * 20]])
    batch["doc"] = torch.ones_like(batch["doc"])
    logits = model.head(hidden(model, batch))
    assert torch.allclose(logits, open_lm_logits(state, batch["tokens"]), atol=1e-5)


def test_open_lm_heads_come_from_the_file_or_the_flag():
    state, zero_bias = open_lm_state(), {"norm.bias": torch.zeros(32)}
    config, weights = from_open_lm(state)
    no_rates = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
    told, given = from_open_lm({**no_rates, **zero_bias}, heads=4)
    assert told == config and same(weights, given) == set(weights) == set(given)
    for changed, words in (
            (no_rates, "0 heads for width 32: give --heads"),
            ({"a": state["norm.weight"]}, "tok_embeddings"),
            ({**state, "norm.bias": torch.ones(32)}, "no place for its norm.bias"),
            ({**state, "layers.0.attention.gate.weight": torch.ones(1)}, "attention.gate.weight"),
            ({**state, "step": 3}, "its step"), (open_lm_state(hidden=100), "hidden size 100")):
        with pytest.raises(SystemExit) as error:
            from_open_lm(changed, source="dclm.pt")
        message = str(error.value.code)
        assert message.startswith("dclm.pt") and words in message and "\n" not in message


class Foreign:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_hold_no_weights_say_so_and_run_no_code(tmp_path):
    torch.save({"model": Foreign(tmp_path / "ran")}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"config": {}}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_bytes(b"no weights")
    for name, words in (("foreign.pt", "not a checkpoint"), ("list.pt", "not a checkpoint"),
                        ("empty.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                        ("none.pt", "does not exist"), ("", "does not exist")):
        with pytest.raises(SystemExit) as error:
            read_weights(tmp_path / name)
        message = str(error.value.code)
        assert words in message and str(tmp_path / name) in message and "\n" not in message
    assert not (tmp_path / "ran").exists()
