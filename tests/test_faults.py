"""What an attack found, and what must happen instead: nothing is lost, and one line says what is
wrong.   python -m pytest tests/test_faults.py"""
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from data import Shards
from helpers import FLAGS, one_line, python, write_rows
from test_pack import llava, pack_one, write_tar
from tools import curves, table
from tools import pack as pack_file
from tools.pack import pack, read_source

TINY = [*FLAGS, "--tokens", "5K"]


def start(out, *flags):
    train.main([*TINY, "--out", str(out), *flags])
    return next(path.parent for path in Path(out).glob("*/log.jsonl"))


def again(out, *flags):
    """The line that the same command ends in, had it been cut off before its result was written."""
    (out / "results.jsonl").unlink()
    return one_line(SystemExit, start, out, *flags)


TEXTS = [{"text": f"text number {i} " * 20} for i in range(40)]


# -- checkpoints, logs and results -----------------------------------------------------------------


def test_a_run_belongs_to_the_data_and_not_to_their_place(tmp_path):
    """The same data elsewhere are the same run; other data in the same folder are another."""
    data, moved, out = tmp_path / "data", tmp_path / "moved", tmp_path / "out"

    def names(data):
        start(out, "--data", str(data), "--mixture", "0-0-100")
        return [*train.finished(out)]

    def pack_texts(texts):
        path = write_rows(tmp_path / f"{len(texts)}.jsonl", texts)
        pack({"text": [path]}, data, val_fraction=0.3, workers=1)
    pack_texts(TEXTS)
    before = names(data)
    data.rename(moved)
    assert names(moved) == before
    pack_texts(TEXTS[:20])
    assert len(names(data)) == 2


def test_a_folder_of_conversations_alone_asks_for_all_four_shares(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [llava(None, "why?", "so")] * 9)
    pack_one(tmp_path, "conversation", path, val_fraction=0.3)
    line = one_line(SystemExit, start, tmp_path / "runs", "--data", str(tmp_path / "out"))
    assert "caption-interleaved-text-conversation" in line


def test_a_checkpoint_with_a_flipped_bit_or_of_another_config_is_refused(tmp_path):
    path = start(tmp_path) / "ckpt.pt"
    content, state = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    content[content.index(state["model"]["head.weight"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    line = again(tmp_path)
    assert str(path) in line and "checksum" in line
    state["config"]["model"]["width"] = 24
    torch.save(state, path)
    assert "another width" in one_line(SystemExit, start, tmp_path)


def test_lines_that_are_no_results_do_not_stop_a_study_or_its_tools(tmp_path, printed):
    folder, broken = start(tmp_path, "--eval-every", "5"), b'{"step": 10, "val_loss": \xff'
    for path, first in ((tmp_path / "results.jsonl", b'{}\n123\n{"run": "x"}\n\xff\xfe\n'),
                        (folder / "log.jsonl", b"123\n")):
        path.write_bytes(first + path.read_bytes() + broken)
    said = printed(start, tmp_path)
    assert "line 1, 2, 3, 4, 6" in said and "finished before" in said
    assert printed(table.main, [str(tmp_path), "--where", "status=ok"]).count("| 1 |") == 1
    found, _ = curves.read([tmp_path])
    (tokens, lines), = found.values()
    assert tokens == [2560, 5120] and len(lines) == 2


def test_two_processes_do_not_train_one_run(tmp_path):
    folder = start(tmp_path)
    with train.only_process(folder, "trains"):
        assert "another process" in again(tmp_path)


def test_a_run_that_another_process_ends_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    flags, done = [*TINY, "--tokens", "2K,4K", "--out"], []
    train.main([*flags, str(tmp_path / "other")])

    def train_one(run, machine):
        for row in train.finished(tmp_path / "other").values():
            train.append_result(tmp_path / "own", row)
        done.append(run)
        return True
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(train, "train_one", train_one)
    assert train.main([*flags, str(tmp_path / "own")]) == 0 and len(done) == 1


def test_a_run_that_ends_between_the_look_and_the_lock_has_one_row(tmp_path, monkeypatch):
    start(tmp_path)
    results = tmp_path / "results.jsonl"
    row, lock = results.read_text("utf-8"), train.only_process

    def late(*args):
        results.write_text(row, "utf-8")  # the other process ends, and leaves its lock
        return lock(*args)
    results.unlink()
    monkeypatch.setattr(train, "only_process", late)
    start(tmp_path)
    assert results.read_text("utf-8") == row


def test_an_error_ends_the_workers_of_the_loader_too(tmp_path):
    """They ignore SIGTERM, and Python would wait for them for ever."""
    pack_one(tmp_path, "text", write_rows(tmp_path / "a.jsonl", TEXTS), val_fraction=0.3)
    path, = (tmp_path / "out/text").glob("*/tokens")
    path.write_bytes(b"\x7f\x7f\0\0" * (path.stat().st_size // 4))  # no such token
    done = python("train.py", *TINY, "--data", tmp_path / "out", "--mixture", "0-0-100",
                  "--workers", "1", "--out", tmp_path / "runs")
    assert done.returncode == 1 and "IndexError" in done.stderr


def test_a_full_disk_ends_in_a_line_and_the_same_command_goes_on(tmp_path):
    """A limit on the size of files stands for the full disk."""
    flags = [*TINY, "--out", str(tmp_path), "--save-every", "2"]
    code = ("import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * "
            "2)\nimport train\ntry:\n    train.main(sys.argv[2:])\nexcept SystemExit as error:\n"
            "    sys.exit(error.code)")
    done = python("-c", code, "30000", *flags)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "goes on" in done.stderr and str(tmp_path) in done.stderr
    assert not list(tmp_path.glob("*/ckpt.pt"))
    start(tmp_path)
    assert len(train.finished(tmp_path)) == 1


def test_any_folder_and_any_terminal(tmp_path):
    """A folder with spaces and umlauts, and an output without umlauts, as files on Windows are."""
    out, env = str(tmp_path / "Übung 1 ß"), {**os.environ, "PYTHONIOENCODING": "ascii"}
    for command in (["train.py", *TINY], ["-m", "tools.sweep", *TINY, "--width", "16,24"],
                    ["-m", "tools.table"]):
        place = [out] if "tools.table" in command else ["--out", out]
        done = python(*command, *place, env=env)
        assert done.returncode == 0, done.stderr
    assert len(train.finished(out)) == 2


# -- killed at any step ----------------------------------------------------------------------------


def killed_at(points, out, *flags):
    """Trains, kills at each of these steps, and lets the same command finish. (A fork server
    has imported torch already, so that a life costs little more than its training.) -> its folder
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch._dynamo", "train"])
    for point in [*points, math.inf]:
        life = processes.Process(target=train.main, args=([*flags, "--out", str(out)],))
        life.start()
        while life.is_alive() and sum(lines(path) for path in out.glob("*/log.jsonl")) <= point:
            time.sleep(0.001)
        life.kill()
        life.join()
        assert life.exitcode == (0 if point == math.inf else -signal.SIGKILL)
    return next(out.glob("*/log.jsonl")).parent


def lines(path):
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize("kills, more", [
    (20, ""), (2, "--fusion late --moe learned --experts 2 --workers 1")])
def test_killed_at_any_step_and_the_same_log_result_and_weights(tmp_path, kills, more):
    """FUZZ=10 in the environment kills ten times as often."""
    kills *= int(os.environ.get("FUZZ", "1"))
    flags = [*TINY, *more.split(), "--tokens", f"{2 * kills}K", "--tokens-per-step", "128",
             "--save-every", "7"]
    points = sorted(random.Random(0).sample(range(10 * kills), kills))  # of 15 * kills steps
    # Both in processes of their own, because another number of threads adds in another order.
    runs = killed_at(points, tmp_path / "killed", *flags), killed_at([], tmp_path / "whole", *flags)
    logs = [(run / "log.jsonl").read_bytes() for run in runs]
    assert logs[0] == logs[1]
    ours, theirs = (torch.load(run / "ckpt.pt", weights_only=True)["model"] for run in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows = [train.finished(run.parent)[run.name] for run in runs]
    timed = ("tok_per_s", "wall_s", "peak_mem_mb")
    assert len({str({k: v for k, v in row.items() if k not in timed}) for row in rows}) == 1
    assert lines(tmp_path / "killed" / "results.jsonl") == 1


# -- what happens around a run ---------------------------------------------------------------------


def test_a_folder_that_is_deleted_while_it_trains(tmp_path, monkeypatch):
    """At the next line of its log; the same command trains it from its start."""
    whole = start(tmp_path / "whole")
    measure = train.Trainer.measure

    def delete(trainer, *args):
        if trainer.step == 5:
            shutil.rmtree(trainer.run.folder)
        return measure(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "measure", delete)
        assert "goes on" in one_line(SystemExit, start, tmp_path / "out")
    again = start(tmp_path / "out")
    assert (again / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


# -- packing ---------------------------------------------------------------------------------------


def test_a_line_that_is_too_long_is_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_file, "MAX_LINE", 2000)
    long = {"text": "x" * 9000}
    path = write_rows(tmp_path / "a.jsonl", [*TEXTS[:3], long, *TEXTS[3:]])
    meta, shards = pack_one(tmp_path, "text", path)
    assert meta["skipped"] == {"line too long": [1, "a.jsonl: 4"]}
    assert len(shards.docs["text"]) == len(TEXTS)


def test_memory_does_not_grow_with_a_line(tmp_path):
    """320 MB of zeros in 13 kB, and a list of records of 90 MB."""
    import pyarrow
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        for _ in range(80):
            file.write(bytes(4 << 20))
        file.write(("\n" + json.dumps(TEXTS[0]) + "\n").encode())
    talk = json.dumps(llava(None, "what? " * 300, "this"))
    with open(tmp_path / "b.json", "w", encoding="utf-8") as file:
        file.write("[" + ",\n".join([talk] * 50_000) + "]")
    (tmp_path / "small.jsonl").write_text(json.dumps(TEXTS[0]) + "\n", encoding="utf-8")
    code = ("import resource, sys, pathlib\nfrom tools.pack import read_source\n"
            "n = sum(1 for _ in read_source(pathlib.Path(sys.argv[1]), sys.argv[2]))\n"
            "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    found = [python("-c", code, tmp_path / name, kind).stdout.split()
             for name, kind in (("small.jsonl", "text"), ("a.jsonl.zst", "text"),
                                ("b.json", "conversation"))]
    assert [int(n) for n, _ in found] == [1, 2, 50_000]
    base, *peaks = (int(kb) for _, kb in found)
    assert max(peaks) - base < 300_000


@pytest.mark.parametrize("content, n", [
    ("[]", 0), (' [ {"a": 1},{"a": 2} ] \n', 2), ('[{"a": 1}, {"a": 2}', 2), ('{"a": 1}', 0),
    ("", 0), ('[{"a": "' + "x" * 3_000_000 + '"}, {"a": 2}]', 2)])
def test_lists_of_records(tmp_path, content, n):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    found, whole = 0, True
    try:
        for _ in pack_file.list_records(tmp_path / "a.json"):
            found += 1
    except ValueError:
        whole = False
    assert found == n
    assert whole == (content.strip()[-1:] == "]")


def test_a_file_whose_name_is_no_utf8_is_packed_and_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write("{broken\n" + json.dumps(TEXTS[0]))
    done = python("-m", "tools.pack", "--text", path, "--out", tmp_path / "out", "--val-fraction",
                  "0", env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert "1 docs" in done.stdout and "caf\\udce9.jsonl: 1" in done.stdout
    assert len(Shards(tmp_path / "out").docs["text"]) == 1


def test_links_that_lead_around_and_names_of_any_length(tmp_path):
    write_rows(tmp_path / "in" / f"{'x' * 240}.jsonl", TEXTS)
    for name in "ab":
        (tmp_path / "in" / name).symlink_to(".")
    meta, _ = pack_one(tmp_path, "text", tmp_path / "in")
    assert sum(split["text"]["docs"] for split in meta["splits"].values()) == len(TEXTS)


def test_a_file_that_cannot_be_read_for_now_is_read_by_the_next_call(tmp_path, monkeypatch):
    sound, late = (write_rows(tmp_path / f"{name}.jsonl", TEXTS) for name in ("a", "b"))
    read = pack_file.read_samples

    def failing(path):
        if path.name == "b.jsonl":
            raise OSError(5, "Input/output error")
        return read(path)
    with monkeypatch.context() as patch:
        patch.setattr(pack_file, "read_samples", failing)
        pack({"text": [sound, late]}, tmp_path / "out", workers=1)
    meta = pack({"text": [sound, late]}, tmp_path / "out", workers=1)
    assert sum(split["text"]["docs"] for split in meta["splits"].values()) == 2 * len(TEXTS)


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    with train.only_process(tmp_path / "out", "packs"):
        assert "another process" in one_line(SystemExit, pack_one, tmp_path, "text", path)
    assert pack_one(tmp_path, "text", path)[0]["splits"]


def test_a_damaged_shard_is_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    pack_one(tmp_path, "text", path)
    shard, = (tmp_path / "out").glob("*/*/shard.json")
    shard.write_text("{", encoding="utf-8")
    assert str(shard) in one_line(SystemExit, pack_one, tmp_path, "text", path)


def parts_of(path, kind):
    (_, parts, _), = read_source(Path(path), kind)
    return parts


def test_the_bound_is_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_file, "MAX_BYTES", 100)
    members = ("a.jpg", 60), ("a.txt", 60), ("b.jpg", 60), ("b.txt", 30)
    write_tar(tmp_path / "a.tar", [(name, b"x" * size) for name, size in members])
    first, second = (parts for _, parts, _ in read_source(tmp_path / "a.tar", "caption"))
    assert first == ["sample too large"] and second == [b"x" * 60, "x" * 30]


def test_a_link_is_not_followed_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"fine")
    outside = "image outside the folder"
    for name, found in (("a.jpg", outside), ("b.jpg", b"fine"), ("../secret", outside),
                        (str(tmp_path / "secret"), outside), ("c.jpg", "missing image")):
        record = {"texts": ["t", None], "images": [None, name]}
        parts = parts_of(write_rows(tmp_path / "in" / "a.jsonl", [record]), "interleaved")
        assert parts[1] == found, name


@pytest.mark.parametrize("kind, record, reason", [
    ("caption", {"caption": "x" * 10_001}, "caption too long"),
    ("caption", {"caption": "a\0b"}, "caption with NUL"),
    ("text", {"content": "x"}, "no field 'text'"),
    ("interleaved", {"texts": ["a", None, "b"], "images": [None] * 3}, "neither text nor image"),
    ("conversation", llava(None, "<image> what?", "this"), "missing image"),
    ("conversation", {"conversations": llava(None, "what?", "this")["conversations"][::-1]},
     "turns are not human")])
def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path, kind, record, reason):
    parts = parts_of(write_rows(tmp_path / "a.jsonl", [record]), kind)
    part = parts[len(parts) // 2]  # between two texts, or alone
    assert isinstance(part, pack_file.Skip) and part.startswith(reason)
