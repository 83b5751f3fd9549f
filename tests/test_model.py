"""python -m pytest tests/test_model.py   (about 10 seconds)"""
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F

from helpers import (build, hidden, make_batch, one_line, parameters, python, read_weights, same,
                     save_run, tiny)
from model import (PRESETS, Model, ModelConfig, adopt, attention_mask, generate, head_loss,
                   on_meta, prompt_batch, rope_table, rotate, split_heads)
from tools.sample import sampler

KINDS = [dict(), dict(fusion="late"), dict(moe="learned"), dict(moe="modality"),
         dict(fusion="late", moe="learned", top_k=2, granularity=2)]
NAMES = ["early", "late", "moe", "modality", "late-moe-top2-fine"]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=NAMES)
ROWS = [["tIttt", "tttt"], ["tItIttt"]]  # with P = 4: 8 + 4 positions, and 13


def changed(model, before, batch):
    """(B,T) bool: positions whose hidden state (so whose logits) differ by more than noise."""
    return (hidden(model, batch) - before).abs().amax(-1) > 1e-5


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out.loss + out.balance).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_mask_against_a_plain_loop():
    generator = torch.Generator().manual_seed(1)
    doc = torch.randint(0, 3, (3, 12), generator=generator).sort(1)[0]
    image = torch.randint(-1, 3, (3, 12), generator=generator)
    mask = attention_mask(doc, image)
    assert mask.shape == (3, 1, 12, 12) and mask.dtype == torch.bool
    for b, q, k in itertools.product(range(3), range(12), range(12)):
        same_image = image[b, q] == image[b, k] and image[b, q] >= 0
        expected = doc[b, q] == doc[b, k] and (k <= q or same_image)
        assert mask[b, 0, q, k] == expected, (b, q, k)
    assert mask.any(-1).all(), "a row that sees nothing makes NaN"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_dense_mask():
    """Uncompiled, as a CPU can; tools.check compares it compiled, with gradients, on a GPU."""
    model = build(context=256)
    batch = make_batch(model.cfg, [["tIttt" * 9, "tttt" * 20], ["tItIttt"], []])
    dense = hidden(model, batch)
    model.flex = True
    assert torch.allclose(hidden(model, batch), dense, atol=1e-5)


def test_import_does_not_wait_for_the_compiler():
    code = "import sys, model; sys.exit('torch._dynamo' in sys.modules)"
    assert python("-c", code, timeout=60).returncode == 0


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


@pytest.mark.parametrize("compiling", [False, True])
def test_rope_turns_pairs_by_their_angles(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    table, x = rope_table(12, 8), torch.randn(2, 12, 3, 8)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    by_hand = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    assert torch.allclose(rotate(x, table), by_hand, atol=1e-6)


@every_kind
def test_initial_loss_is_near_log_vocabulary(kind):
    """Logits of std about 1 add half a nat to ln V; more means a wrong init."""
    model = build(vocab_size=512, width=64, **kind)
    out = model(make_batch(model.cfg, [["tIt" + "t" * 16]] * 8))
    assert math.log(512) - 0.2 < out.loss.item() / len(out.token_loss) < math.log(512) + 0.9


@every_kind
def test_a_batch_without_images_or_targets_touches_every_parameter(kind):
    model = build(**kind)
    _, grads = gradients(model, make_batch(tiny(), [["tttttt"], ["ttt", "tt"]]))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert not name.startswith("vision") or not grad.any(), f"{name}: the image is a dummy"
    batch = make_batch(tiny(), [["tt"], ["It"]])
    batch["target_index"] = batch["target_index"][:0]
    out, grads = gradients(model, batch)
    assert len(out.token_loss) == 0 and out.loss.item() == 0 and out.token_loss.shape == (0,)
    assert all(grad.isfinite().all() for grad in grads.values())


@every_kind
def test_loss_does_not_depend_on_padding(kind):
    model = build(**kind)
    short, long = (make_batch(tiny(), ROWS, length=n) for n in (13, 24))
    long["tokens"][long["doc"] == 0] = 5  # whatever lies there
    a, b = model(short), model(long)
    assert a.token_loss.shape == b.token_loss.shape
    assert torch.allclose(a.token_loss, b.token_loss, atol=1e-5)
    assert torch.allclose(a.balance, b.balance, rtol=1e-6)
    if a.expert_counts is not None:
        assert torch.equal(a.expert_counts, b.expert_counts)


def test_loss_is_the_sum_over_text_targets():
    model, batch = build(), make_batch(tiny(), ROWS)
    out = model(batch)
    logits = model.head(hidden(model, batch))
    plain = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-1,
                            reduction="sum")
    assert len(out.token_loss) == (batch["targets"] >= 0).sum() == 3 + 3 + 4
    assert torch.allclose(out.loss, plain) and torch.allclose(out.token_loss.sum(), plain)
    assert not out.token_loss.requires_grad


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunked_loss_equals_plain(rows):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16), torch.randn(29, 16)
    targets, results = torch.randint(29, (7,)), []
    for limit in (10 ** 9, rows * 29):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, losses = head_loss(a, w, targets, limit)
        (3 * loss).backward()
        with torch.no_grad():  # as in evaluation, where no gradient is computed
            assert torch.equal(head_loss(a, w, targets, limit)[1], losses)
        results.append((loss.detach(), losses, a.grad, w.grad))
    for plain, chunked in zip(*results):
        assert torch.allclose(plain, chunked, atol=1e-5)


def test_the_heads_gradient_does_not_get_worse_with_chunks():
    """In bf16 and 64 chunks, against fp64. Summed in bf16 it would be wrong by 1 %."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(512, 64), torch.randn(96, 64) / 8, torch.randint(96, (512,))
    exact = weight.double().requires_grad_()
    F.cross_entropy(x.bfloat16().double() @ exact.T, targets, reduction="sum").backward()
    w = weight.clone().requires_grad_()
    head_loss(x.bfloat16(), w, targets, 8 * 96)[0].backward()
    assert (w.grad - exact.grad).norm() / exact.grad.norm() < 0.004


@every_kind
def test_bf16_activations_change_little(kind):
    """As on CUDA: weights fp32, activations bf16. Loss and gradients stay near those of fp32, if
    each token goes to all experts: a choice that bf16 turns over changes much."""
    kind = {**kind, "top_k": 8} if kind.get("moe") == "learned" else kind
    model, batch = build(**kind), make_batch(tiny(), ROWS)
    plain, expected = gradients(model, batch)
    model.dtype = torch.bfloat16
    out, found = gradients(model, batch)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(plain.loss.item(), rel=0.01)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    found, expected = (torch.cat([g.flatten() for g in by_name.values()])
                       for by_name in (found, expected))
    assert (found - expected).norm() < 0.05 * expected.norm()


@every_kind
def test_checkpointing_changes_nothing(kind):
    batch = make_batch(tiny(), ROWS)
    (a, plain), (b, recomputed) = (gradients(build(checkpointing=flag, **kind), batch)
                                   for flag in (False, True))
    assert torch.equal(a.loss, b.loss) and a.balance == b.balance
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], atol=1e-6), name


@every_kind
def test_two_captions_of_two_pictures_are_learnt(kind):
    """The rows differ in their image and in the text after it only."""
    model, batch = build(**kind), make_batch(tiny(), [["tItt"], ["tItt"]])
    batch["tokens"] = torch.where(batch["patch_index"] >= 0, 0, batch["tokens"][:1])
    batch["targets"][1, 4] = (batch["targets"][0, 4] + 1) % 37  # after the last patch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(120):
        out = model(batch)
        optimizer.zero_grad()
        ((out.loss + 0.01 * out.balance) / len(out.token_loss)).backward()
        optimizer.step()
    assert model(batch).loss.item() / len(out.token_loss) < 0.1  # ln 2 / 2 without the image


def test_the_encoder_knows_where_a_patch_stands():
    model = build(fusion="late")
    x, = model.vision(torch.ones(1, model.cfg.n_patches, model.cfg.patch_dim))  # all are alike
    assert not torch.allclose(x[0], x[1], atol=0.01)


def test_pixels_become_minus_one_to_one():
    model, batch = build(), make_batch(tiny(), [["tItt"]])
    batch["images"] = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 4, 24)
    seen = []
    model.vision.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(batch)
    assert seen[0].unique().tolist() == [-1, 1] and seen[0].dtype == torch.float32


def count_on_meta(name, **changes):
    fields = {key: value for key, value in PRESETS[name].items() if key != "lr"}
    return on_meta(ModelConfig(**{**fields, **changes})).num_params()


def in_billions(count, printed, cut=False):
    """count as the paper would print it: as many decimals as `printed`, rounded or cut off."""
    decimals = len(printed.partition(".")[2])
    scaled = count / 1e9 * 10 ** decimals
    return f"{(math.floor if cut else round)(scaled) / 10 ** decimals:.{decimals}f}"


@pytest.mark.parametrize("definition, cut, changes, legend", [
    ("N", False, {}, {"275m": "0.275", "464m": "0.464", "932m": "0.932", "1.63b": "1.627",
                      "2.28b": "2.280", "3.35b": "3.354", "8.13b": "8.13"}),
    ("sum", True, {}, {"289m": "0.289"}),
    ("N_total", False, {}, {"494m": "0.494", "3.7b": "3.714"}),
    ("sum", False, {}, {"1b": "1", "1.75b": "1.748", "2.43b": "2.430"}),
    ("sum", True, dict(vision_width=1024),  # one encoder for all (Fig. 19)
     {"289m": "0.555", "1b": "1.14", "2.43b": "2.320", "3.7b": "3.33"}),
    ("N_total", False, dict(moe="learned"), {"275m": "1.20", "464m": "2.15", "932m": "4.51",
                                             "1.63b": "8.18", "2.28b": "11.8", "3.35b": "17.5"})])
def test_sizes_are_those_of_the_legends(definition, cut, changes, legend):
    """No one definition gives all late sizes, so each says which does (sum: N + N_vision)."""
    for name, printed in legend.items():
        n = count_on_meta(name, **changes)
        n["sum"] = n["N"] + n["N_vision"]
        assert in_billions(n[definition], printed, cut) == printed, name


def test_early_and_late_sizes_are_pairs_of_equal_flops():
    pairs = (("275m", "289m", "0.270"), ("464m", "494m", "0.456"), ("932m", "1b", "0.927"),
             ("1.63b", "1.75b", "1.607"), ("2.28b", "2.43b", "2.240"), ("3.35b", "3.7b", "3.397"))
    for early, late, printed in pairs:
        n = count_on_meta(late)
        cost = n["N"] + 0.544 * n["N_vision"]
        assert in_billions(cost, printed) == printed, late
        assert abs(cost / count_on_meta(early)["N"] - 1) < 0.02, late


@every_kind
def test_counts_equal_the_parameters_there_are(kind):
    model = build(**kind)
    cfg, n, w, h = model.cfg, model.num_params(), 32, 96  # int(8*32/3) = 85 -> 96
    assert cfg.hidden == h
    active = cfg.top_k if cfg.moe == "learned" else 1
    inner = 2 * (4 * w * w + active * 3 * w * h // cfg.granularity)
    assert n["N_nonembedding"] == inner and n["N"] == inner + 2 * 37 * w
    v, g = 16, 48  # the encoder's width and hidden
    assert n["N_vision"] == (2 * (4 * v * v + 3 * v * g) if cfg.fusion == "late" else 0)
    assert model.flops(1000, 400) == 6 * (n["N_vision"] * 400 + n["N"] * 1000)


def test_shared_weights_and_shared_experts_count_once():
    """An edit that ties the head, or adds an expert for every token, gives the N that there is."""
    model = build(moe="learned", top_k=2)
    before = model.num_params()
    for block in model.blocks:
        block.ffn.shared = torch.nn.Linear(32, 96, bias=False)
        block.ffn.shared_router = torch.nn.Linear(32, 1, bias=False)
    assert model.num_params()["N"] == before["N"] + len(model.blocks) * 32 * 96
    model.head.weight = model.embedding.weight
    assert model.num_params()["N"] == before["N"] + len(model.blocks) * 32 * 96 - 37 * 32


@pytest.mark.parametrize("kind", [dict(fusion="late", image_size=64),
                                  dict(moe="learned", experts=32, granularity=8)])
def test_init_follows_the_fan_in_and_the_depth(kind):
    """Also of the encoder and of experts."""
    torch.manual_seed(0)
    for name, p in Model(ModelConfig(width=256, depth=3, **kind)).named_parameters():
        if p.ndim > 1:
            writes = re.search(r"blocks\.(\d).*\.(out|w_down)", name)  # to the residual stream
            fan_in = p.shape[-1] * (2 * (int(writes[1]) + 1) if writes else 1)
            wanted = 0.9866 / math.sqrt(fan_in)  # std of a normal of std 1 cut at 3
            assert p.std().item() == pytest.approx(wanted, rel=0.03), name


def test_auto_heads():
    dims = {64: 32, 96: 48, 128: 64, 800: 80, 1088: 64, 5120: 64, 12: 6}
    assert {w: split_heads(w) for w in dims} == dims


@pytest.mark.parametrize("wrong, words", [
    (dict(width=30, heads=4), "width 30 does not split into 4 heads"),
    (dict(width=33), "width 33"), (dict(width=20, heads=4), "even"),
    (dict(fusion="late", vision_width=33), "vision-width 33"),
    (dict(context=5), "at least 6"), (dict(image_size=9), "multiple of --patch-size 4"),
    (dict(moe="learned", experts=2, top_k=3), "--top-k 3 exceeds --experts 2"),
    (dict(granularity=2), "--granularity 2 needs --moe learned"),
    (dict(moe="learned", granularity=5), "granularity 5 does not divide ffn hidden 96")])
def test_wrong_config_says_so_in_one_line(wrong, words):
    assert words in one_line(SystemExit, tiny, **wrong)


@every_kind
def test_cached_generation_equals_uncached(kind):
    model = build(**kind).eval()
    shape = 3, model.cfg.n_patches, model.cfg.patch_dim
    first, second, third = torch.randint(256, shape, dtype=torch.uint8)
    prompt = [[3], first, [5, 6], second, third, [7]]
    ids = generate(model, prompt, 6)
    assert len(ids) == 6
    for n in range(6):  # the whole sequence again for each token, no cache
        batch = prompt_batch(prompt + [ids[:n]], model.cfg, "cpu")
        assert model.head(hidden(model, batch)[0, -1]).argmax().item() == ids[n]


def test_sampling():
    model = build().eval()
    draw = [generate(model, [[1, 2]], 12, choose=sampler(2.0, 0, seed)) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    greedy = generate(model, [[1, 2]], 12)
    assert generate(model, [[1, 2]], 12, stop=greedy[3]) == greedy[:greedy.index(greedy[3])]
    assert generate(model, [[1, 2]], 12, choose=sampler(2.0, 1, 0)) == greedy
    assert generate(model, [[1, 2]], 12, choose=sampler(1e-6, 0, 0)) == greedy  # cold
    assert max(generate(model, [[1]], 20, n_vocab=5, choose=sampler(50.0, 99, 0))) < 5
    assert len(generate(model, [[1] * 20], 99)) == 4, "ends with the context of 24"
    assert "has 24" in one_line(ValueError, generate, model, [[1] * 24], 1)
    assert "give 1 to 23" in one_line(ValueError, generate, model, [[]], 1)


@every_kind
def test_weights_of_a_run_go_back_in_part_by_part(kind, tmp_path):
    source = build(seed=1, **kind)
    save_run(tmp_path / "run", source)
    config, weights = read_weights(tmp_path / "run")
    assert ModelConfig(**config) == source.cfg
    assert "rope" not in weights, "no buffer that the config determines"
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
    (dict(vocab_size=40), "decoder", ("embedding.weight is (37, 32) there, (40, 32) in this model: "
                                      "pack the data with the tokenizer")),
    (dict(depth=3), "decoder", "blocks.2.attention_norm.weight is missing there"),
    (dict(depth=1), "decoder", "blocks.1.attention_norm.weight is (32,) there, missing in this"),
    (dict(moe="learned"), "decoder", "blocks.0.ffn.w_gate is missing there"),
    (dict(patch_size=2), "vision", "vision.weight is (32, 48) there, (32, 12) in this model"),
    (dict(fusion="late"), "vision", "--vision-width")])
def test_weights_that_do_not_fit_say_so_and_change_nothing(changes, part, words):
    weights, model = parameters(build(seed=1)), build(**changes)
    before = parameters(model)
    message = one_line(SystemExit, adopt, model, weights, part, "runs/a")
    assert message.startswith("runs/a: ") and words in message
    assert same(before, parameters(model)) == set(before)


class Foreign:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_hold_no_weights_say_so_and_run_no_code(tmp_path):
    torch.save({"model": Foreign(tmp_path / "ran")}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"config": {}}, tmp_path / "empty.pt")
    torch.save({"tok_embeddings.weight": torch.ones(2)}, tmp_path / "dclm.pt")
    (tmp_path / "text.pt").write_bytes(b"no weights")
    for name, words in (("foreign.pt", "not a checkpoint"), ("list.pt", "not a checkpoint"),
                        ("empty.pt", "not a checkpoint"), ("text.pt", "not a checkpoint"),
                        ("dclm.pt", "python -m tools.convert"),
                        ("none.pt", "does not exist"), ("", "does not exist")):
        message = one_line(SystemExit, read_weights, tmp_path / name)
        assert words in message and str(tmp_path / name) in message
    assert not (tmp_path / "ran").exists()
