"""Sources: what they yield, in which order, and what they say about bad input."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import sysconfig
import types
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from foreshock.core import plugins
from foreshock.core.config import Spec
from foreshock.core.errors import ConfigError, DataError
from foreshock.proxy.data import source as sources
from foreshock.proxy.data.source import TextSource, TokenSource, parse_source
from foreshock.proxy.data.sources import local_python, synthetic_v1
from foreshock.proxy.data.sources.binary import Binary
from foreshock.proxy.data.sources.huggingface import Huggingface
from foreshock.proxy.data.sources.jsonl import Jsonl
from foreshock.proxy.data.sources.local_python import LocalPython
from foreshock.proxy.data.sources.synthetic_v1 import SyntheticV1
from foreshock.proxy.data.sources.text import Text

ALL = sys.maxsize


def ids(source: TokenSource, limit: int) -> np.ndarray:
    return np.concatenate(list(source.chunks(limit)))


# --- every source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", plugins.names(sources.FAMILY))
def test_every_source_is_a_frozen_keyword_only_declaration(name):
    cls = plugins.declaration(sources.FAMILY, name)
    assert issubclass(cls, TextSource | TokenSource)
    assert cls.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))


def test_data_imports_no_torch():
    code = (
        "import sys, pkgutil, importlib, foreshock.proxy.data as d\n"
        "for m in pkgutil.walk_packages(d.__path__, d.__name__ + '.'): importlib.import_module(m.name)\n"
        "print(sorted({'torch', 'datasets', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- parse_source -----------------------------------------------------------------------------------------------


def test_parse_source_by_name_and_by_path(tmp_path, monkeypatch):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("x")
    lines.write_text("{}")
    assert parse_source("local-python") == Spec("local_python")
    assert parse_source("synthetic-v1:seed=3") == Spec("synthetic_v1", {"seed": 3})
    assert parse_source(str(text)) == Spec("text", {"path": str(text)})
    assert parse_source(str(tmp_path)) == Spec("text", {"path": str(tmp_path)})
    assert parse_source(str(lines)) == Spec("jsonl", {"path": str(lines)})
    monkeypatch.chdir(tmp_path)
    assert parse_source("a.txt") == Spec("text", {"path": str(text)})  # one corpus, however it is called
    assert parse_source("hf:a/b") == Spec("huggingface", {"dataset": "a/b"})
    full = parse_source("jsonl:path=x.jsonl,text_field=content")
    assert full == Spec("jsonl", {"path": "x.jsonl", "text_field": "content"})


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("local-pyton", ConfigError, "did you mean 'local_python'"),
        ("synthetic_v1:sed=3", ConfigError, "did you mean 'seed'"),
        ("synthetic_v1:seed=-1", ConfigError, "synthetic_v1:seed must be 0 or more"),
        ("no/such/folder", DataError, "no file or folder 'no/such/folder'"),
        ("missing.txt", DataError, "no file or folder 'missing.txt'"),
        ("missing.bin", DataError, "no file or folder 'missing.bin'"),
        ("text", ConfigError, "text:path=corpus.txt"),
        ("jsonl", ConfigError, "jsonl:path"),
        ("binary:vocab_size=5", ConfigError, "binary:path"),
        ("binary:path=x.bin", ConfigError, "vocab_size=50257"),
        ("binary:path=x.bin,vocab_size=9,dtype=uint8", ConfigError, "uint16"),
        ("hf:", ConfigError, "must name a dataset"),
    ],
)
def test_parse_source_errors_name_field_and_fix(text, error, message):
    with pytest.raises(error, match=message):
        parse_source(text)


# --- local_python -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """A made-up standard library and no other package."""
    files = {
        "b.py": "b" * 30,
        "a.py": "a" * 20,
        "pkg/inner.py": "i" * 10,
        "pkg/copy_of_a.py": "a" * 20,
        "pkg/empty.py": "",
        "pkg/notes.txt": "no",
        "pkg/tests/t.py": "no",
        "test/t.py": "no",
        "site-packages/s.py": "no",
        "_sysconfigdata_linux.py": "no",
        "config-3.11/python-config.py": "no",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(local_python, "_PACKAGES", ())
    return tmp_path


def test_local_python_is_sorted_deduplicated_and_free_of_tests(small_stdlib):
    assert list(LocalPython().documents(ALL)) == [b"a" * 20, b"b" * 30, b"i" * 10]


def test_local_python_keeps_whole_files_within_the_limit(small_stdlib):
    assert list(LocalPython().documents(50)) == [b"a" * 20, b"b" * 30]
    assert list(LocalPython().documents(49)) == [b"a" * 20]
    assert [Path(row[0]).name for row in LocalPython().stamp(49)] == ["a.py"]


def test_local_python_stamp_sees_a_new_file_and_a_changed_one(small_stdlib):
    before = LocalPython().stamp(ALL)
    (small_stdlib / "a.py").write_text("c" * 21)
    changed = LocalPython().stamp(ALL)
    (small_stdlib / "new.py").write_text("new")
    assert before != changed
    assert LocalPython().stamp(ALL) != changed


def test_local_python_packages_come_after_and_change_nothing_before(small_stdlib, monkeypatch):
    without = list(LocalPython().documents(60))
    monkeypatch.setattr(local_python, "_PACKAGES", ("numpy", "no_such_package_at_all"))
    everything = LocalPython().documents(ALL)
    assert list(LocalPython().documents(60)) == without
    assert list(islice(everything, len(without))) == without
    assert LocalPython().facts(60)["packages"].keys() == {"python"}
    assert LocalPython().facts(ALL)["packages"]["numpy"] == np.__version__


def test_local_python_here_is_the_standard_library():
    documents = list(LocalPython().documents(1_000_000))
    assert 900_000 < sum(map(len, documents)) <= 1_000_000
    assert len({hashlib.sha256(d).digest() for d in documents}) == len(documents)
    assert any(b"def literal_eval(" in d for d in documents)


def test_local_python_without_sources_says_so(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "/no/such/folder")
    with pytest.raises(DataError, match="no sources in '/no/such/folder'"):
        LocalPython().stamp(ALL)


# --- synthetic_v1 -----------------------------------------------------------------------------------------------


def test_synthetic_golden():
    """These ids are the same on every machine and with every version of numpy."""
    tokens = ids(SyntheticV1(), 4096)
    assert hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest() == (
        "b8d8010650ccd978cf3aad4a5cc30358dffd794718cb91680ce334a06a6e0bac"
    )
    assert hashlib.sha256(ids(SyntheticV1(seed=3), 4096).astype("<u2").tobytes()).hexdigest() == (
        "46767375edaa0f5a578de823e2863b4b0515c3f913076110692e9d3185d7bb4f"
    )


def test_synthetic_equals_a_slow_reading_of_its_definition():
    bits = np.random.PCG64(7)
    favourites = {}
    for pair in range(256):
        raw = bits.random_raw(16).tolist()
        favourites[divmod(pair, 16)] = sorted(range(16), key=raw.__getitem__)
    before, last, expected = 0, 0, []
    for word in bits.random_raw(250).tolist():
        for byte in word.to_bytes(8, "little"):
            rank, below = 0, synthetic_v1.WEIGHTS[0]
            while byte >= below:
                rank += 1
                below += synthetic_v1.WEIGHTS[rank]
            before, last = last, favourites[before, last][rank]
            expected.append(last)
    assert ids(SyntheticV1(seed=7), 2000).tolist() == expected


def test_synthetic_is_one_stream_whatever_the_limit_and_chunk(monkeypatch):
    whole = ids(SyntheticV1(), 10_000)
    monkeypatch.setattr(synthetic_v1, "_CHUNK", 1 << 10)
    assert np.array_equal(ids(SyntheticV1(), 10_000), whole)
    assert np.array_equal(ids(SyntheticV1(), 2_500), whole[:2_500])
    monkeypatch.setattr(synthetic_v1, "LENGTH", 5_000)
    assert np.array_equal(ids(SyntheticV1(), ALL), whole[:5_000])


def test_synthetic_entropy_matches_a_naive_estimate():
    tokens = ids(SyntheticV1(), 1_000_000).astype(np.int64)
    triples = np.bincount((tokens[:-2] * 16 + tokens[1:-1]) * 16 + tokens[2:], minlength=16**3).reshape(256, 16)
    conditional = triples / triples.sum(1, keepdims=True)
    estimate = -(triples * np.log(conditional, where=triples > 0, out=np.zeros((256, 16)))).sum() / triples.sum()
    # The plug-in estimate is low by about (256 · 15) / (2n) = 0.002; its spread is about 0.0013.
    assert SyntheticV1().facts(0)["entropy"] == pytest.approx(estimate + 256 * 15 / 2e6, abs=0.006)


def test_synthetic_entropy_is_that_of_its_transition_table():
    """Entropy rate from the stationary distribution, which the closed form does not need."""
    moves = np.zeros((256, 256))
    for state, row in enumerate(synthetic_v1.transitions(np.random.PCG64(0))):
        np.add.at(moves[state], row, 1 / 256)
    stationary = np.full(256, 1 / 256)
    for _ in range(200):
        stationary = stationary @ moves
    assert np.allclose(stationary @ moves, stationary, atol=1e-12)
    logs = np.log(moves, where=moves > 0, out=np.zeros_like(moves))
    assert synthetic_v1.entropy_rate() == pytest.approx(-(stationary[:, None] * moves * logs).sum(), rel=1e-9)
    assert synthetic_v1.entropy_rate() < math.log(16)


# --- text -------------------------------------------------------------------------------------------------------


def test_text_directory_is_recursive_sorted_and_skips_binary_and_hidden(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "z" / "one.txt").write_text("naïve")
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") + b" text")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git" / "config").write_text("no")
    assert list(Text(path=str(tmp_path)).documents(ALL)) == [b"first", b"second", "naïve".encode()]


def test_text_is_cut_at_the_limit_even_inside_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("aé" * 3)
    assert list(Text(path=str(tmp_path / "a.txt")).documents(2)) == ["aé".encode()[:2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", b"", "is empty"), ("a.txt", b"\0\1\2", "only binary"), ("a.txt", b"\xff\xfe", "only binary")],
)
def test_text_refuses_empty_and_binary_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    source = Text(path=str(path))
    with pytest.raises(DataError, match=message):
        source.stamp(ALL), list(source.documents(ALL))


def test_text_refuses_missing_and_empty_directories(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        Text(path=str(tmp_path / "no")).stamp(ALL)
    with pytest.raises(DataError, match=r"directory .* is empty"):
        Text(path=str(tmp_path)).stamp(ALL)


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    """As the operating system would say it; permissions do not stop the superuser, so it is made to."""
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for source in (Text(path=str(tmp_path / "a.txt")), Jsonl(path=str(tmp_path / "a.txt"))):
        with pytest.raises(DataError, match=r"cannot read .*a\.txt': Permission denied; check"):
            list(source.documents(ALL))


# --- jsonl ------------------------------------------------------------------------------------------------------


def test_jsonl_yields_the_text_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "é"}\n\n{"content": "two", "other": 1}\n')
    assert list(Jsonl(path=str(path), text_field="content").documents(ALL)) == ["é".encode(), b"two"]
    assert list(Jsonl(path=str(path), text_field="content").documents(3)) == ["é".encode(), b"t"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\nnot json', "line 2 .* is not JSON"),
        ('{"body": "x"}', "has no text 'text', but body; name the key .*,text_field=body"),
        ('{"text": 3}', "has no text 'text'"),
        ("[1]", "but list"),
    ],
)
def test_jsonl_names_the_bad_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(Jsonl(path=str(path)).documents(ALL))


def test_jsonl_refuses_binary(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\0\1")
    with pytest.raises(DataError, match=r"line 1 .* is not JSON"):
        list(Jsonl(path=str(path)).documents(ALL))


# --- binary -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_binary_reads_little_endian_ids(tmp_path, dtype):
    path = tmp_path / "a.bin"
    np.arange(1000, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)
    assert ids(Binary(path=str(path), dtype=dtype, vocab_size=1000), 900).tolist() == list(range(900))


def test_binary_finds_an_id_beyond_the_vocabulary_in_any_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("foreshock.proxy.data.sources.binary._CHUNK", 16)
    tokens = np.zeros(100, dtype="<u2")
    tokens[77] = 50
    tokens.tofile(tmp_path / "a.bin")
    path = str(tmp_path / "a.bin")
    with pytest.raises(DataError, match="id 50 at position 77, not below vocab_size=50; raise"):
        ids(Binary(path=path, vocab_size=50), ALL)
    assert len(ids(Binary(path=path, vocab_size=51), ALL)) == 100
    assert len(ids(Binary(path=path, vocab_size=50), 77)) == 77


def test_binary_refuses_odd_size_empty_and_missing(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(DataError, match="there is no file"):
        Binary(path=str(path), vocab_size=9).stamp(ALL)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        Binary(path=str(path), vocab_size=9).stamp(ALL)
    path.write_bytes(b"abc")
    with pytest.raises(DataError, match="no multiple of uint16; set dtype"):
        ids(Binary(path=str(path), vocab_size=9), ALL)


# --- huggingface ------------------------------------------------------------------------------------------------


def test_huggingface_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install foreshock\[hf\]"):
        list(Huggingface(dataset="some/name").documents(ALL))


def test_huggingface_streams_rows_up_to_the_limit(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        yield from ({"body": text} for text in ("one", "", "three", "never read"))
        raise AssertionError("read past the limit")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Huggingface(dataset="some/name", subset="en", split="validation", text_field="body")
    assert list(source.documents(6)) == [b"one", b"", b"thr"]
    assert calls == [(("some/name", "en"), {"split": "validation", "streaming": True})]


def test_huggingface_failures_are_explained(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("doesn't exist on the hub")

    def rows(*_, **__):
        return [{"body": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=missing))
    with pytest.raises(DataError, match="cannot read the dataset 'n': doesn't exist on the hub"):
        list(Huggingface(dataset="n").documents(ALL))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=rows))
    with pytest.raises(DataError, match="no text column 'text', but body; set text_field"):
        list(Huggingface(dataset="n").documents(ALL))


def test_declarations_are_json(tmp_path):
    for name in plugins.names(sources.FAMILY):
        options = {"binary": {"path": "x", "vocab_size": 9}, "huggingface": {"dataset": "x"}, "text": {"path": "x"}}
        spec = Spec(name, options.get(name, {"path": "x"} if name == "jsonl" else {}))
        json.dumps(dataclasses.asdict(plugins.load(sources.FAMILY, spec)))
