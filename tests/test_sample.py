"""python -m pytest tests/test_sample.py   (about 5 seconds)

The tools beside the model: sample, convert, check, experts, facts and words."""
import base64
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from data import read_meta
from helpers import (build, hidden, make_batch, one_line, read_weights, refused, same, save_run,
                     write_lines)
from model import Attention, adopt, attention_mask, rope_table
from test_pack import llava, picture
from tools import check, convert, experts, facts, sample, words
from tools.pack import pack
from world import World

CONVERSATION = json.dumps([llava(None, "why?", "so")])


def test_sample_prints_a_caption(tmp_path, printed, monkeypatch):
    (tmp_path / "cat.png").write_bytes(picture())
    save_run(tmp_path / "run", build(vocab_size=264))
    args = [str(tmp_path / "run"), "--prompt", "a cat", "--max-new-tokens", "3"]
    for more in ([], ["--image", str(tmp_path / "cat.png")]):
        assert printed(sample.main, args + more).startswith("a cat")
    monkeypatch.setattr(sample, "generate", lambda model, parts, *_: asked.extend(parts) or [])
    sample.main(args + more + (asked := []))
    assert [asked[0], asked[2]] == [[256], [*b"a cat"]] and asked[1].shape == (4, 48)  # as trained


def test_data_that_have_moved_can_be_named(tmp_path, printed):
    """The tokenizer lies in them; one with other ids is refused."""
    for name, ranks in (("a", range(256)), ("b", reversed(range(256)))):
        lines = (f"{base64.b64encode(bytes([i])).decode()} {rank}" for i, rank in enumerate(ranks))
        (tmp_path / f"{name}.tiktoken").write_text("\n".join(lines), "utf-8")
        pack({"conversation": [str(write_lines(tmp_path / "c.json", CONVERSATION))]},
             tmp_path / name, str(tmp_path / f"{name}.tiktoken"), split="val", workers=1)
        pack({"text": [str(write_lines(tmp_path / "t.jsonl", '{"text": "t"}'))]},
             tmp_path / name, str(tmp_path / f"{name}.tiktoken"), val_fraction=0, workers=1)
    meta = read_meta(tmp_path / "a")
    save_run(tmp_path / "run", build(vocab_size=264), data=str(tmp_path / "gone"),
             mixture="0-0-0-100", tokenizer=str(tmp_path / "gone" / "tokenizer.tiktoken"),
             tokenizer_hash=meta["tokenizer_hash"])
    run, page, a, b = (str(tmp_path / name) for name in ("run", "page.png", "a", "b"))
    asked = [run, "--prompt", "x", "--max-new-tokens", "2"]
    assert "\nx" in printed(sample.main, [*asked, "--data", a])
    sample.main([run, "--data", a, "--out", page])  # of a text without a picture
    assert Path(page).is_file()
    refused("another tokenizer", sample.main, [*asked, "--data", b])
    refused("another --data", sample.main, asked)
    (tmp_path / "b").rename(tmp_path / "gone")  # packed anew in the same place
    refused("another tokenizer", sample.main, asked)
    refused("data.json", sample.main, [*asked, "--data", str(tmp_path)])
    save_run(tmp_path / "moe", build(vocab_size=264, moe="learned"), data=a, mixture="0-0-0-100")
    refused("another tokenizer", experts.main, [str(tmp_path / "moe")])  # it read bytes
    save_run(tmp_path / "world", build(vocab_size=264))  # it reads bytes, as other data do
    pack({"text": [str(tmp_path / "t.jsonl")]}, tmp_path / "c", val_fraction=0, workers=1)
    sample.main([str(tmp_path / "world"), "--data", str(tmp_path / "c"), "--prompt", "x"])


def test_mistakes_of_sample_end_in_one_line(tmp_path):
    run, broken, other = (tmp_path / name for name in ("run", "broken", "other"))
    for folder in (run, broken, other):
        save_run(folder, build(vocab_size=264))
    (broken / "ckpt.pt").write_bytes(b"not a checkpoint")
    ckpt = torch.load(other / "ckpt.pt", weights_only=True)
    ckpt["config"]["model"]["width"] = 64
    torch.save(ckpt, other / "ckpt.pt")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for args, named in (([tmp_path / "nowhere"], broken), ([broken], broken), ([other], other),
                        ([run, "--image", tmp_path / "none.png"], "none.png"),
                        ([run, "--image", tmp_path / "no.png"], "no.png"),
                        ([run, "--prompt", "x" * 30], "give 1 to 23"),
                        ([run, "--temperature", "nan"], "--temperature nan"),
                        ([run, "--top-k", "-1"], "--top-k -1"),
                        ([run, "--promt", "x"], "--prompt")):
        assert str(named) in one_line(SystemExit, sample.main, [str(arg) for arg in args])


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
def test_converted_weights_give_the_logits_of_open_lm(prefix, key, tmp_path):
    state, source, out = open_lm_state(), tmp_path / "dclm.pt", tmp_path / "new" / "ours.pt"
    named = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({key: named, "epoch": 3} if key else named, source)
    convert.main([str(source), "--out", str(out)])
    assert [path.name for path in out.parent.iterdir()] == ["ours.pt"]
    config, weights = read_weights(out)
    assert config == dict(width=32, depth=2, heads=4, vocab_size=37, mlp_multiple=16)
    model = build(**config)
    adopt(model, weights, "decoder", "ours.pt")
    batch = make_batch(model.cfg, [["t" * 24], ["t" * 20]])
    batch["doc"] = torch.ones_like(batch["doc"])
    logits = model.head(hidden(model, batch))
    assert torch.allclose(logits, open_lm_logits(state, batch["tokens"]), atol=1e-5)


def test_heads_come_from_the_file_or_the_flag():
    state, zero_bias = open_lm_state(), {"norm.bias": torch.zeros(32)}
    no_rates = {name: tensor for name, tensor in state.items() if "inv_freq" not in name}
    config, weights = convert.convert(state)
    told, given = convert.convert({**no_rates, **zero_bias}, heads=4)
    assert told == config and same(weights, given) == set(weights) == set(given)


@pytest.mark.parametrize("change, named", [
    (lambda s: {k: v for k, v in s.items() if "inv_freq" not in k}, "--heads"),
    (lambda s: {k: v for k, v in s.items() if "q_norm" not in k}, "q_norm"),
    (lambda s: {"a": s["norm.weight"]}, "tok_embeddings"), (lambda s: [s], "list"),
    (lambda s: {**s, "norm.bias": torch.ones(32)}, "norm.bias"),
    (lambda s: {**s, "layers.0.attention.gate.weight": torch.ones(1)}, "attention.gate.weight"),
    (lambda s: {**s, "step": 3}, "step"), (lambda s: open_lm_state(hidden=100), "100"),
    (lambda s: None, "dclm.pt")])
def test_what_our_decoder_has_no_place_for_is_named(change, named, tmp_path):
    changed, source, out = change(open_lm_state()), tmp_path / "dclm.pt", tmp_path / "ours.pt"
    if changed:
        torch.save(changed, source)
    message = one_line(SystemExit, convert.main, [str(source), "--out", str(out)])
    assert named in message and str(source) in message and not out.exists()


def test_check_ends_with_the_command_that_avoids_the_faults(monkeypatch, capsys, tmp_path):
    """(test_readme.py runs it whole.) A NaN is a fault, and so is what does not run."""
    (run,), cpu = train.parse_runs(["--width", "16"]), train.Machine(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.run", lambda *_, **__: check.subprocess.CompletedProcess((), 0))
        patch.setattr(train, "finished", lambda out: {"": {"loss": 1 + (out.name == "alone")}})
        assert check.check_ranks(tmp_path, 8, run, cpu, 2) == 0.5  # a lower loss is a fault, too
        patch.setattr(check, "seconds", lambda *_: [1e-3])  # of two micro-steps
        tokens = 2e3 * train.divide_step(run, cpu)[0] * run.model.context
        assert f"{tokens:,.0f} tokens/s" in check.speed(run, cpu)
    for name, found in (("attention", 0.5), ("experts", math.nan), ("ranks", 0.0)):
        monkeypatch.setattr(check, f"check_{name}", lambda *args, found=found, **options: found)
    monkeypatch.setattr(check, "check_compiled", lambda *args: 1 / 0)
    one_line(SystemExit, check.main, ["--width", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(
        "train.py --width 16 --attention dense --experts-by loop --compile off")
    assert any("tokens/s" in line for line in lines)


def test_check_sees_a_wrong_mask():
    torch.manual_seed(0)
    attention, rope = Attention(64, 32, 0), rope_table(64, 32)
    doc, image = check.two_documents(2, 64, "cpu")
    x, one = check.random(2, 64, 64, device="cpu"), torch.ones_like(doc)
    right = check.outputs(attention, [x], attention_mask(doc, image), rope)
    everything = (doc[:, :, None] == doc[:, None])[:, None]
    for wrong in (attention_mask(one, image), attention_mask(doc, -one), everything):
        far = check.distance(check.outputs(attention, [x], wrong, rope), right)
        assert far > 10 * check.LIMIT
    assert check.distance(right, right) == 0 < check.distance([right[0] * 2, right[1]], right)
    assert math.isnan(check.distance([right[0] * math.nan, right[1]], right))


def test_check_compares_no_attention_that_training_does_not_take():
    """FlexAttention would fail at the head dim of width 16, and in fp32 on a T4."""
    for width, dtype in ((16, torch.bfloat16), (64, torch.float32)):
        run, = train.parse_runs(["--width", str(width)])
        machine = train.Machine(torch.device("cpu"), dtype=dtype)
        assert "not compared" in check.check_attention(run, machine)


def test_check_of_bf16_finds_no_fault_in_sound_experts():
    """Were each token sent to one expert, rounding would change the choice of some."""
    run, = train.parse_runs(["--moe", "learned", "--width", "64"])
    assert check.check_bf16(run, train.Machine(torch.device("cpu"))) < check.LIMIT


def test_specialisation_of_hand_made_counts(pages):
    def h2(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    counts = torch.tensor([
        [[10, 0, 20], [0, 30, 0]],     # all unimodal: 1; floor at 1/2: 0
        [[5, 10, 15], [5, 10, 15]],    # all mixed: 0
        [[1, 6, 0], [3, 6, 0]],        # 3/4 and 1/2 image, one expert never used
        [[23, 23, 23], [77, 77, 77]],  # no preference, captions' mixture (77 % image)
    ])
    found = experts.specialization(counts)
    assert found["score"] == pytest.approx([1, 0, (1 - h2(0.75)) / 2, 1 - h2(0.77)])
    assert found["floor"] == pytest.approx([0, 0, 1 - h2(9 / 16), 1 - h2(0.77)])
    assert [*experts.table({"caption": counts})][3] == ["2", "0.094", f"{1 - h2(9 / 16):.3f}"]
    experts.draw({"caption": torch.tensor([[[30.0, 10], [4, 16]]])}, "experts.png")
    bars = {bar.get_label(): [one.get_height() for one in bar]
            for bar in pages["experts.png"].axes[1].containers}
    assert bars == {"image tokens": [80, 20], "text tokens": [25, 75]}  # of expert 1 and of 0


class Knows:
    """Instead of a Model. It is certain of the facts of things that are met more than the 17th,
    leaves two of the 64 values to those before the 65th, and guesses in a wrong way otherwise."""
    rope = torch.zeros(1)

    def decode(self, batch):
        tokens = batch["tokens"]
        names = ["".join(map(chr, row)) for row in (tokens[:, 5:9]).tolist()]
        rank = torch.tensor([self.ranks[name] for name in names])
        p = torch.where(rank < 16, 1.0, torch.where(rank < 64, 0.5, 1e-3)) ** 0.25  # of a letter
        return torch.stack([tokens.roll(-1, 1), p[:, None].expand(tokens.shape)], -1), None

    def head(self, x):
        truth, p = x[..., 0].long(), x[..., 1:].double()
        rest = (1 - p).clamp(min=1e-30).log().expand(*truth.shape, 257) - math.log(256)
        return rest.scatter(-1, truth[..., None], p.log())


def test_the_bits_of_facts_are_those_that_a_model_knows(monkeypatch, capsys):
    world, model = World(), Knows()
    model.ranks = {name: rank for rank, name in enumerate(world.names)}
    means, total = facts.in_bands(facts.known(model, world))
    assert means == pytest.approx([6, 6, 5, 0, 0, 0], abs=1e-4)
    assert total == pytest.approx(4 * (16 * 6 + 48 * 5), rel=1e-4)
    model.num_params = lambda: {"N": 100, "N_total": 400}
    monkeypatch.setattr(facts, "load_model", lambda run: (model, {"data": "procedural"}))
    facts.main(["run"])
    assert "| run | 1.34K | 13.4400 | 3.3600 | 6.0 | 6.0 | 5.0 |" in capsys.readouterr().out


def test_the_words_of_documents_share_out_their_loss(tmp_path, printed, monkeypatch):
    runs = [str(tmp_path / name) for name in "ab"]
    for seed, run in enumerate(runs):
        save_run(tmp_path / run, build(seed, vocab_size=264, context=128, image_size=32,
                                       patch_size=8))
    lines = printed(words.main, [*runs, "--documents", "3"]).splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    for kind in ("caption", "interleaved", "text"):
        *each, total = [float(loss) for found, _, loss, *_ in rows if found == kind]
        assert sum(each) == pytest.approx(total, abs=0.01) and 5 < total < 7  # untrained
    assert ["interleaved", "change: act"] in [row[:2] for row in rows]
    what = words.words_of([None, "red x", None, "red"], words.vocabulary(World()))
    assert what == 3 * ["colour"] + 2 * ["other"] + 3 * ["change: colour"] + ["other"]
    found = iter(3 * ([{"name": 1.0, "other": 3.0}] + [{"name": 2.0, "other": 3.0}]))
    monkeypatch.setattr(words, "contributions", lambda *_: next(found))
    said = printed(words.main, runs)  # the two differ by 1 / sqrt(2) in the mean loss, 4.5
    assert "| name | 1.500 | 33 % | 15.7 % |" in said
