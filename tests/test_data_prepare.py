"""From a config to tokens: tiers, split, cache, and what bad input says."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foreshock.core.config import Spec
from foreshock.core.errors import DataError
from foreshock.core.run_config import DataConfig, TrainConfig
from foreshock.proxy.data import cache, corpus
from foreshock.proxy.data import prepare as preparing
from foreshock.proxy.data.batches import held_out_batches
from foreshock.proxy.data.bigram import bigram_loss, bigram_of
from foreshock.proxy.data.prepare import EVERYTHING, compare_manifests, prepare, tier
from foreshock.proxy.data.source import parse_source

TRAIN = TrainConfig(steps=10)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FORESHOCK_CACHE", str(folder))
    return folder


@pytest.fixture
def library(tmp_path):
    """150 documents of known content, sorted."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03}.txt").write_text(f"document {number}: " + "word " * (number % 7 + 3))
    return folder


def data_of(source, **changes):
    spec = source if isinstance(source, Spec) else parse_source(str(source))
    return DataConfig(**{"source": spec, "seq_len": 8, "batch_size": 2} | changes)


class Calls:
    """Counts how often something was tokenized."""

    def __init__(self):
        self.seen = []

    def __call__(self, done, total):
        self.seen.append((done, total))


# --- tokens -----------------------------------------------------------------------------------------------------


def test_tokens_are_the_documents_with_an_end_after_each(library):
    tokens = prepare(data_of(library), TRAIN)
    documents = [path.read_bytes() for path in sorted(library.iterdir())]
    expected = {False: [], True: []}
    for document in documents:
        expected[corpus.is_held_out(document)] += [*document, 256]
    assert tokens.train_tokens.tolist() == expected[False]
    assert tokens.held_out_tokens.tolist() == expected[True]
    assert tokens.vocab_size == 257
    assert tokens.manifest["documents"] == {
        "train": 150 - tokens.manifest["documents"]["held_out"],
        "held_out": expected[True].count(256),
    }
    assert not tokens.train_tokens.flags.writeable


def test_held_out_share_is_five_per_cent():
    """Binomial with n = 20 000: five standard deviations are 154."""
    held_out = sum(corpus.is_held_out(str(number).encode()) for number in range(20_000))
    assert abs(held_out - 1000) < 154


def test_few_documents_hold_out_the_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("é" * 1000)
    tokens = prepare(data_of(path), TRAIN)
    assert bytes(tokens.train_tokens[:-1].tolist()).decode() == "é" * 950
    assert bytes(tokens.held_out_tokens[:-1].tolist()).decode() == "é" * 50
    assert tokens.train_tokens[-1] == tokens.held_out_tokens[-1] == 256
    assert tokens.manifest["split"] == "last 5 %"


def test_blocks_change_nothing(library, monkeypatch, tmp_path):
    whole = prepare(data_of(library), TRAIN)
    monkeypatch.setattr(corpus, "_BLOCK", 4)
    monkeypatch.setenv("FORESHOCK_CACHE", str(tmp_path / "other"))
    assert prepare(data_of(library), TRAIN).hash == whole.hash


@pytest.mark.parametrize("block", [4, 5, 6, 7])
def test_blocks_divide_no_character(tmp_path, monkeypatch, block):
    monkeypatch.setattr(corpus, "_BLOCK", block)
    text = "aé€😀" * 50
    gathered = corpus.gather([text.encode()], tmp_path / "text")
    blocks = [block for piece in gathered.pieces for block in gathered.blocks(piece)]
    assert "".join(block.decode() for block in blocks) == text
    junk = b"\x80" * 50
    gathered = corpus.gather([junk], tmp_path / "junk")
    assert b"".join(block for piece in gathered.pieces for block in gathered.blocks(piece)) == junk


def test_bpe_learns_from_training_documents_only_and_is_kept(library):
    pytest.importorskip("tokenizers")
    data = data_of(library, tokenizer=Spec("bpe", {"vocab_size": 300}))
    tokens = prepare(data, TRAIN)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokens.folder / "tokenizer.json"))
    documents = [path.read_bytes() for path in sorted(library.iterdir())]
    expected = "".join(d.decode() + "<|endoftext|>" for d in documents if not corpus.is_held_out(d))
    assert tokenizer.decode(tokens.train_tokens.tolist(), skip_special_tokens=False) == expected
    assert tokens.vocab_size == tokenizer.get_vocab_size() <= 300
    # A held-out document of its own letters adds no merge of them.
    number = next(n for n in range(999) if corpus.is_held_out(f"{n} ".encode() + b"qzqz " * 500))
    (library / "held.txt").write_bytes(f"{number} ".encode() + b"qzqz " * 500)
    assert "qz" not in (prepare(data, TRAIN).folder / "tokenizer.json").read_text()


def test_synthetic_is_known_to_the_bit():
    tokens = prepare(DataConfig(source=Spec("synthetic_v1")), TrainConfig())
    assert tokens.hash == "02d67bc85c40ccaefc4734ee07f10e1a0adb713db0a3db0516ce891b47825eb0"
    assert (len(tokens.train_tokens), len(tokens.held_out_tokens)) == (3_800_000, 200_000)
    assert tokens.manifest["entropy"] == pytest.approx(1.3790391614670527)
    assert tokens.manifest["tokenizer"] is None
    assert tokens.vocab_size == 16


def test_local_python_manifest_says_what_was_read():
    tokens = prepare(DataConfig(), TrainConfig())
    manifest = tokens.manifest
    assert manifest["packages"].keys() == {"python"}  # 4 MB lie inside the standard library
    assert 3_900_000 < manifest["bytes"] <= 4_000_000
    assert manifest["documents"]["held_out"] >= 3
    assert manifest["hash"] == tokens.hash
    assert manifest["sha256"]["train"] == cache.sha256(tokens.train_tokens)
    assert len(manifest["documents"]) == 2
    json.dumps(manifest)


def test_binary_is_mapped_where_it_lies(tmp_path):
    path = tmp_path / "a.bin"
    np.arange(1000, dtype="<u4").tofile(path)
    data = data_of(Spec("binary", {"path": str(path), "dtype": "uint32", "vocab_size": 1000}))
    tokens = prepare(data, TRAIN)
    assert tokens.train_tokens.tolist() == list(range(950))
    assert tokens.held_out_tokens.tolist() == list(range(950, 1000))
    assert not (tokens.folder / "tokens.bin").exists()
    np.arange(1000, dtype="<u4")[::-1].tofile(path)
    os.utime(path, ns=(0, 0))
    assert prepare(data, TRAIN).hash != tokens.hash


def test_binary_takes_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.arange(1000, dtype="<u2").tofile("a.bin")
    data = data_of(Spec("binary", {"path": "a.bin", "vocab_size": 1000}))
    first = prepare(data, TRAIN)
    assert np.array_equal(prepare(data, TRAIN).train_tokens, first.train_tokens)


# --- tiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "bytes_per_token", "expected"),
    [
        (250, 1.0, 4_000_000),
        (3710, 1.0, 4_000_000),
        (3711, 1.0, 16_000_000),
        (2000, 3.5, 16_000_000),
        (20_000, 1.0, 64_000_000),
        (200_000, 1.0, 256_000_000),
        (2_000_000, 1.0, EVERYTHING),
    ],
)
def test_the_tier_is_the_first_that_holds_the_tokens_needed(steps, bytes_per_token, expected):
    """16 x 64 tokens a step; 95 % of a tier is for training: 3.8 MB are 3710.9 steps."""
    assert tier(DataConfig(), TrainConfig(steps=steps), bytes_per_token) == expected


def test_a_larger_need_starts_with_the_same_documents(library, monkeypatch):
    monkeypatch.setattr(preparing, "TIERS", (6000, 16_000))
    small, large = prepare(data_of(library), TRAIN), prepare(data_of(library), TrainConfig(steps=600))
    assert small.manifest["bytes"] == 6000
    assert large.manifest["bytes"] > 6000
    start = small.train_tokens.tolist()[:-10]  # the last document is cut
    assert large.train_tokens.tolist()[: len(start)] == start


def test_needing_more_than_there_is_means_epochs(library, monkeypatch):
    monkeypatch.setattr(preparing, "TIERS", (1000,))
    tokens = prepare(data_of(library), TrainConfig(steps=5000))
    assert tokens.manifest["tier"] == "everything"
    assert tokens.manifest["epochs"] == pytest.approx(5000 * 16 / len(tokens.train_tokens), abs=1e-3)
    assert tokens.manifest["epochs"] > 5


# --- cache ------------------------------------------------------------------------------------------------------


def test_progress_reaches_the_total_once_and_the_second_call_reads_the_cache(library):
    first, second = Calls(), Calls()
    tokens = prepare(data_of(library), TRAIN, first)
    again = prepare(data_of(library), TRAIN, second)
    assert first.seen[-1] == (tokens.manifest["bytes"], tokens.manifest["bytes"])
    assert first.seen == sorted(first.seen)
    assert second.seen == []
    assert again.hash == tokens.hash
    assert again.manifest == tokens.manifest
    assert np.array_equal(again.train_tokens, tokens.train_tokens)


def test_a_changed_corpus_is_tokenized_again_and_a_touched_one_has_the_same_hash(library):
    before = prepare(data_of(library), TRAIN)
    os.utime(library / "000.txt", ns=(0, 0))
    assert prepare(data_of(library), TRAIN).hash == before.hash
    (library / "new.txt").write_text("something new")
    assert prepare(data_of(library), TRAIN).hash != before.hash


def truncate(folder):
    with (folder / "tokens.bin").open("r+b") as file:
        file.truncate(1000)


def flip(folder):
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[500] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    os.utime(folder / "tokens.bin", ns=(0, 0))


def lose(folder):
    (folder / "tokens.bin").unlink()


def tear(folder):
    entry = folder / "entry.json"
    entry.write_bytes(entry.read_bytes()[:100])


def swap(folder):
    (folder / "entry.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, flip, lose, tear, swap])
def test_a_damaged_entry_is_rebuilt(library, damage):
    before = prepare(data_of(library), TRAIN)
    expected = before.train_tokens.tolist()
    damage(before.folder)
    calls = Calls()
    after = prepare(data_of(library), TRAIN, calls)
    assert calls.seen
    assert after.hash == before.hash
    assert after.train_tokens.tolist() == expected


def test_a_copied_entry_is_taken_by_its_checksum(library):
    before = prepare(data_of(library), TRAIN)
    os.utime(before.folder / "tokens.bin", ns=(0, 0))
    calls = Calls()
    assert prepare(data_of(library), TRAIN, calls).hash == before.hash
    assert calls.seen == []


def test_a_build_cut_short_leaves_nothing_and_the_next_one_works(library, cache_folder):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(library), TRAIN, stop)
    assert [path for path in (cache_folder / "tokens").iterdir() if path.is_dir()] == []
    tokens = prepare(data_of(library), TRAIN)
    leftover = tokens.folder.with_suffix(".building")  # as a kill would leave it
    tokens.folder.rename(leftover)
    assert prepare(data_of(library), TRAIN).hash == tokens.hash
    assert not leftover.exists()


def test_processes_that_race_build_once_and_agree(tmp_path, cache_folder):
    """The source writes a line each time it is read; every process opens the same tokens."""
    (tmp_path / "slow_source.py").write_text(
        "import os, time\n"
        "from dataclasses import dataclass\n"
        "from foreshock.proxy.data.source import TextSource\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Slow(TextSource):\n"
        "    log: str = ''\n"
        "    def stamp(self, limit): return None\n"
        "    def documents(self, limit):\n"
        "        with open(self.log, 'a') as file: file.write('read\\n')\n"
        "        time.sleep(0.5)\n"
        "        yield b'some text ' * 1000\n"
    )
    log = tmp_path / "log"
    code = (
        "from foreshock.core.config import Spec\n"
        "from foreshock.core.run_config import DataConfig, TrainConfig\n"
        "from foreshock.proxy.data.prepare import prepare\n"
        f"spec = Spec('slow_source:Slow', {{'log': {str(log)!r}}})\n"
        "data = DataConfig(source=spec, seq_len=8, batch_size=2)\n"
        "print(prepare(data, TrainConfig(steps=1)).hash)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    hashes = {racer.communicate()[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(hashes) == 1
    assert log.read_text() == "read\n"


def test_an_unwritable_cache_names_the_variable(tmp_path, library, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FORESHOCK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot write the token cache .* FORESHOCK_CACHE"):
        prepare(data_of(library), TRAIN)


def test_a_full_disk_leaves_no_entry(library, cache_folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "encode", full)
    with pytest.raises(DataError, match="No space left on device; free space"):
        prepare(data_of(library), TRAIN)
    assert [path for path in (cache_folder / "tokens").iterdir() if path.is_dir()] == []


# --- bad input --------------------------------------------------------------------------------------------------


def test_a_missing_corpus_touches_nothing(tmp_path, cache_folder):
    with pytest.raises(DataError, match="there is no file"):
        prepare(data_of(Spec("text", {"path": str(tmp_path / "no.txt")})), TRAIN)
    assert not cache_folder.exists()


@pytest.mark.parametrize("content", ['{"text": ""}\n', "\n\n"])
def test_a_corpus_without_text_is_empty(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="the corpus is empty"):
        prepare(data_of(path), TRAIN)


@pytest.mark.parametrize(
    ("shape", "part"),
    [({"batch_size": 3, "seq_len": 19}, "held-out"), ({"batch_size": 100, "seq_len": 64}, "training")],
)
def test_a_batch_larger_than_the_data_names_the_fields(tmp_path, shape, part):
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)  # 951 training and 51 held-out tokens
    fields = rf"data\.batch_size={shape['batch_size']} x data\.seq_len={shape['seq_len']} .* the {part} data has"
    with pytest.raises(DataError, match=fields):
        prepare(data_of(path, **shape), TRAIN)
    prepare(data_of(path, batch_size=3, seq_len=16), TRAIN)  # 51 tokens exactly


# --- bigram and comparison --------------------------------------------------------------------------------------


def test_bigram_is_computed_once_per_evaluation(library, monkeypatch):
    data = data_of(library)
    tokens = prepare(data, TRAIN)
    batches = held_out_batches(tokens.held_out_tokens, seq_len=8, batch_size=2, count=TRAIN.eval_batches)
    loss = bigram_of(tokens, data, TRAIN)
    assert loss == bigram_loss(tokens.train_tokens, batches, 257)
    other = bigram_of(tokens, replace(data, seq_len=4), TRAIN)
    monkeypatch.setattr("foreshock.proxy.data.bigram.bigram_loss", None)
    assert bigram_of(tokens, data, TRAIN) == loss != other


def test_compared_manifests_differ_only_where_tokens_do(library):
    first = prepare(data_of(library), TRAIN).manifest
    longer = prepare(data_of(library), TrainConfig(steps=20)).manifest
    assert first["epochs"] != longer["epochs"]
    assert compare_manifests(first, longer) == []
    (library / "new.txt").write_text("something new")
    assert compare_manifests(first, prepare(data_of(library), TRAIN).manifest) == ["the tokens differ"]
    synthetic = prepare(data_of("synthetic-v1"), TRAIN).manifest
    text = "\n".join(compare_manifests(first, synthetic))
    assert f"source is text:path={library} in the first and synthetic_v1:seed=0 in the second" in text
    assert "tokenizer is bytes in the first and None in the second" in text


def test_cache_folder_is_the_users_unless_named(monkeypatch):
    monkeypatch.delenv("FORESHOCK_CACHE")
    assert cache.cache_folder().name == "foreshock"
    monkeypatch.setenv("FORESHOCK_CACHE", "elsewhere")
    assert cache.cache_folder() == Path("elsewhere")
