"""Training a vocabulary: exact round trips, Llama's layout, determinism."""

from __future__ import annotations

import gzip
import json
import lzma
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax import cli
from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.texts import read_texts
from llama_jax.tokenizer.train import train_sentencepiece

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SOURCES = [(STDLIB / name).read_text() for name in ("argparse.py", "ast.py", "json/decoder.py", "random.py")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(SOURCES, tmp_path_factory.mktemp("v") / "tok.model", vocab_size=1000)


@pytest.fixture(scope="module")
def trained(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def test_layout_equals_llamas(trained):
    assert trained.vocab_size == 1000
    assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, None)
    assert dict(trained.special_tokens) == {"<s>": 1, "</s>": 2}
    assert trained.piece(3 + ord("A")) == "A"  # the byte
    assert [trained.piece(3 + byte) for byte in (0xE4, 0xFF)] == ["<0xE4>", "<0xFF>"]


@pytest.mark.parametrize(
    "text", [*SOURCES, "x", " x", "  x\t\ty \n\n\n  z  ", "\t", "\0a\0", "\r\n", "🦙 café\ufeff"]
)
def test_source_and_odd_whitespace_round_trip_exactly(trained, text):
    assert trained.decode(trained.encode(text)) == text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")))
def test_any_text_round_trips_exactly(trained, text):
    ids = trained.encode(text, add_bos=False)
    assert trained.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_digits_are_split_and_no_space_is_prepended(trained):
    assert [trained.piece(token) for token in trained.encode("12345", add_bos=False)] == list("12345")


def test_indentation_and_line_ends_have_pieces(trained):
    """Code needs far fewer tokens than bytes, and one token per indentation."""
    assert len(trained.encode("        ", add_bos=False)) == 1
    assert len(trained.encode("):\n", add_bos=False)) == 1
    assert len("".join(SOURCES)) / sum(len(trained.encode(text)) for text in SOURCES) > 2.5


def test_training_is_deterministic(path, tmp_path):
    again = train_sentencepiece(iter(SOURCES), tmp_path / "new" / "tok.model", vocab_size=1000)
    assert again.read_bytes() == path.read_bytes()
    assert [file.name for file in again.parent.iterdir()] == ["tok.model"]


def test_large_corpora_are_subsampled_evenly(tmp_path):
    """The vocabulary has words from every part of a corpus five times as large as `max_bytes`."""
    words = [f"{letter * 5}ing" for letter in "bcdfghjklm"]
    texts = [f"{word} {word}\n" * 2000 for word in words]
    out = train_sentencepiece(texts, tmp_path / "t.model", vocab_size=330, max_bytes=60_000)
    tokenizer = load_tokenizer(out)
    for word in words:
        assert len(tokenizer.encode(f" {word}", add_bos=False)) == 1, word


def test_long_lines_are_not_skipped(tmp_path):
    out = train_sentencepiece(["abcé" * 20_000], tmp_path / "t.model", vocab_size=270)
    tokenizer = load_tokenizer(out)
    assert len(tokenizer.encode("abcé" * 100)) < 120


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "there is no text to train a vocabulary on"),
        (["", "\t"], 300, "there is no text to train a vocabulary on"),
        (["fox"], 259, r"vocab_size is 259; it must be above 259 \(3 control tokens and 256 bytes\)"),
        (["fox"], 1 << 30, r"vocab_size is 1073741824; it must be above 259 .* at most 1048576"),
        ([SOURCES[0]], 270, r"vocab_size is 270; the characters of this text alone need \d+: increase it"),
        (
            ["the fox\n"] * 10,
            5000,
            r"vocab_size is 5000; this text allows at most \d\d\d: reduce it, or add",
        ),
    ],
)
def test_invalid_vocab_size_or_texts(tmp_path, texts, vocab_size, message, capfd):
    with pytest.raises(TokenizerError, match=message) as raised:
        train_sentencepiece(texts, tmp_path / "t.model", vocab_size=vocab_size)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_suggested_vocab_size_works(tmp_path):
    with pytest.raises(TokenizerError) as raised:
        train_sentencepiece(["the quick fox\n"] * 10, tmp_path / "t.model", vocab_size=5000)
    most = int(str(raised.value).split("at most ")[1].split(":")[0])
    assert (
        load_tokenizer(
            train_sentencepiece(["the quick fox\n"] * 10, tmp_path / "t.model", vocab_size=most)
        ).vocab_size
        == most
    )


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match=r"t\.model cannot be written \(.*\); write it elsewhere"):
        train_sentencepiece(SOURCES[:1], tmp_path / "file" / "t.model", vocab_size=400)
    with pytest.raises(TokenizerError, match=r"t\.json must be named \.model"):
        train_sentencepiece(SOURCES[:1], tmp_path / "t.json", vocab_size=400)


# llama-jax tokenizer train


@pytest.fixture
def run(capsys):
    def run(*args):
        status = cli.main(["tokenizer", "train", *map(str, args)])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


def test_command_accepts_files_and_globs(run, tmp_path, path):
    for i, text in enumerate(SOURCES):
        (tmp_path / f"{i}.py").write_text(text)
    done = run(f"{tmp_path}/*.py", tmp_path / "0.py", "--vocab-size", 1000, "--out", tmp_path / "t.model")
    assert (done.status, done.out) == (0, f"{tmp_path / 't.model'}\n")
    assert (tmp_path / "t.model").read_bytes() == path.read_bytes()


def test_command_reads_json_lines(run, tmp_path, path):
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"code": text}) + "\n\n" for text in SOURCES)
    args = (tmp_path / "a.jsonl", "--vocab-size", 1000, "--out", tmp_path / "t.model", "--json")
    done = run(*args, "--field", "code")
    assert json.loads(done.out) == {"out": str(tmp_path / "t.model"), "vocab_size": 1000, "files": 1}
    assert (tmp_path / "t.model").read_bytes() == path.read_bytes()
    done = run(*args)
    assert done.status == 2
    assert "a.jsonl:1: not an object with a text field 'text'; see --field" in done.err


def test_json_and_compressed_files_are_the_same_texts(tmp_path):
    rows = [{"text": text} for text in (*SOURCES, "naïve")]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    files = {
        "a.jsonl": lines,
        "b.json": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
        "c.json": b"\xef\xbb\xbf \n" + array,
        "d.json.gz": gzip.compress(array),
        "e.jsonl.gz": gzip.compress(lines[:100]) + gzip.compress(lines[100:]),
        "f.jsonl.xz": lzma.compress(lines),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert [*read_texts([tmp_path / name], "text")] == [row["text"] for row in rows], name
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress("é\r\n".encode()))
    assert [*read_texts([tmp_path / "g.txt.gz"], "text")] == ["é\r\n"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.zst", b"(", "a.jsonl.zst is compressed with zstd, which Python cannot read: zstd -d"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz is damaged"),
        ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz cannot be read (Not a gzipped file"),
        ("a.json", b'[{"text": "a"}, {}]', "a.json: record 2: not an object with a text field 'text'"),
        ("a.json", b'[{"text": "a"}', "a.json is not JSON"),
    ],
)
def test_damaged_files_are_one_line(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        list(read_texts([tmp_path / name], "text"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("none.txt", "--vocab-size", 300, "--out", "t.model"), "no file matches 'none.txt' (relative to "),
        (("bad.txt", "--vocab-size", 300, "--out", "t.model"), "bad.txt is not UTF-8"),
        (("bad.jsonl", "--vocab-size", 300, "--out", "t.model"), "bad.jsonl:2: not JSON"),
        (("bad.txt", "--vocab-size", "many", "--out", "t.model"), "'many' is not an integer"),
        (("bad.txt", "--out", "t.model"), "missing --vocab-size"),
        (("bad.txt", "--vocab-sise", 300, "--out", "t.model"), "did you mean --vocab-size?"),
    ],
)
def test_command_errors(run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    done = run(*args)
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not (tmp_path / "t.model").exists()


def test_mistyped_subcommand(capsys):
    assert cli.main(["tokenizer", "trian"]) == 2
    assert "did you mean train?; the commands are encode, decode, train" in capsys.readouterr().err
