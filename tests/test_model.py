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
from model import (PRESETS, Model, ModelConfig, attention_mask, generate, head_loss,  # noqa: E402
                   prompt_batch, rope_table, rotate)

KINDS = [dict(), dict(fusion="late"), dict(moe="learned"), dict(moe="modality"),
         dict(fusion="late", moe="learned", top_k=2)]
NAMES = ["early", "late", "moe", "modality", "late-moe-top2"]
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


def test_paper_sizes_to_the_printed_digit():
    printed = {"275m": "0.275", "464m": "0.464", "932m": "0.932", "1.63b": "1.627",
               "2.28b": "2.280", "3.35b": "3.354", "8.13b": "8.129"}
    for name, billions in printed.items():
        assert f"{count_on_meta(name)['N'] / 1e9:.3f}" == billions, name


def test_paper_late_sizes():
    """Decoder and encoder matrices, in millions; the legend's 3.714 counts everything."""
    expected = {"289m": (247, 42), "494m": (412, 82), "1b": (834, 170), "1.75b": (1440, 308),
                "2.43b": (2012, 418), "3.7b": (3028, 679)}
    for name, (decoder, encoder) in expected.items():
        n = count_on_meta(name)
        assert (round(n["N"] / 1e6), round(n["N_vision"] / 1e6)) == (decoder, encoder), name
    assert f"{n['N_total'] / 1e9:.3f}" == "3.714"


def count_on_meta(name):
    fields = {key: value for key, value in PRESETS[name].items() if key != "lr"}
    with torch.device("meta"):
        return Model(ModelConfig(**fields)).num_params()


@every_kind
def test_counts_equal_the_parameters_there_are(kind):
    model = build(**kind)
    cfg, n, w, h = model.cfg, model.num_params(), 32, 96  # int(8*32/3) = 85 -> 96
    assert cfg.hidden == h and n["N_total"] == sum(p.numel() for p in model.parameters())
    active = cfg.top_k if cfg.moe == "learned" else 1
    inner = 2 * (4 * w * w + active * 3 * w * h)
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
    for args, words in (([tmp_path / "nowhere"], "does not exist"), ([broken], "not a checkpoint"),
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
