"""`llama-jax data prepare`: runners, killed commands, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_jax import cli
from llama_jax.errors import DataError, LlamaJaxError
from llama_jax.train.data import DataConfig
from llama_jax.train.prepare import chunks, job, local, shards
from llama_jax.train.prepare.local import LocalRunner
from llama_jax.train.prepare.steps import Settings, prepare
from tests.train.data.conftest import prepared

BEAM = importlib.util.find_spec("apache_beam") is not None
NEEDS_BEAM = (pytest.mark.stores, pytest.mark.skipif(not BEAM, reason="needs the extra `beam`"))


def contents(out: Path) -> dict[str, bytes]:
    """The files of a folder by name; of a manifest what does not depend on installed packages."""
    found = {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }
    for name in [name for name in found if name.endswith("tokens.json")]:
        found[name] = json.dumps({**json.loads(found[name]), "versions": {}}).encode()
    return found


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes many small chunks and shards."""
    monkeypatch.setattr(job, "_LEAST_CHUNK", 4000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)


@pytest.fixture
def twice(tmp_path: Path, corpora: dict[str, str], texts: list[str]) -> str:
    """A corpus in which a third of the documents occur twice."""
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[::2]]]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "twice.jsonl")


@pytest.fixture
def whole(tmp_path: Path, many: None, twice: str, tokenizer) -> dict[str, bytes]:
    """What an unbroken command writes."""
    prepared(tmp_path / "whole", tokenizer, twice)
    found = contents(tmp_path / "whole")
    assert len([name for name in found if name.startswith("train-")]) > 3
    assert json.loads(found["tokens.json"])["duplicates"] == 30
    return found


@pytest.mark.stores
@pytest.mark.skipif(not BEAM, reason="needs the extra `beam`")
def test_beam_writes_the_same_bytes(tmp_path, whole, twice, tokenizer, vocabulary_paths, capsys):
    """By the command; and a killed one goes on with what its workers have left."""
    path = vocabulary_paths["sentencepiece"]
    (tmp_path / "run.toml").write_text(
        f'[data]\nfiles = "{twice}"\n[tokenizer]\npath = "{path}"\nvocab_size = 0\n'
    )
    out = tmp_path / "beam"
    words = ["data", "prepare", str(tmp_path / "run.toml"), str(out), "--runner"]
    assert cli.main([*words, "direct", "--direct_num_workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["folders"][0]
    assert (report["folder"], report["documents"], report["duplicates"]) == (str(out), 60, 30)
    assert contents(out) == whole


def test_worker_processes_write_the_same_bytes(tmp_path, whole, twice, tokenizer):
    class Runner(LocalRunner):
        def write_shards(self, *arguments):  # in this process, which has started already
            LocalRunner().write_shards(*arguments)

    prepared(tmp_path / "out", tokenizer, twice, settings=Settings(Runner(2)))
    assert contents(tmp_path / "out") == whole


class Killed(BaseException):
    """What stops a command where it stands."""


@pytest.mark.parametrize("stage", ["_write_chunk", "_write_shard"])
def test_a_killed_command_goes_on(tmp_path, whole, twice, tokenizer, stage, monkeypatch):
    """A finished piece with its digest is kept; a damaged one, and what is half written, is made again."""
    out, calls = tmp_path / "out", []

    def counted(original):
        def call(*arguments):
            calls.append(arguments[1:])
            original(*arguments)
            if len(calls) == 3:
                raise Killed

        return call

    original = getattr(local, stage)
    monkeypatch.setattr(local, stage, counted(original))
    with pytest.raises(Killed):
        prepared(out, tokenizer, twice)
    assert not (out / "tokens.json").exists()
    kind, suffix = ("work/chunks", "*.ids") if stage == "_write_chunk" else ("", "train-*.arrayrecord")
    damaged, *kept = sorted((out / kind).glob(suffix))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (out / "work" / "chunks" / "00000-00001.ids.0.part").write_bytes(b"half")
    before = {path: path.stat().st_ino for path in kept}
    calls.clear()
    calls += [()] * 3
    prepared(out, tokenizer, twice)
    assert contents(out) == whole
    total = len([name for name in whole if name.endswith("arrayrecord")])
    if stage == "_write_shard":
        assert {path: path.stat().st_ino for path in kept} == before
        assert len(calls) - 3 == total - 2


def test_a_complete_folder_is_left_alone(tmp_path, corpora, tokenizer, monkeypatch):
    out, notes = tmp_path / "out", []
    first = prepared(out, tokenizer, corpora["jsonl"])
    inodes = {path: path.stat().st_ino for path in out.iterdir()}
    assert prepared(out, tokenizer, corpora["jsonl"], settings=Settings(note=notes.append)) == first
    assert notes == [f"{out} is complete; there is nothing to do"]
    assert {path: path.stat().st_ino for path in out.iterdir()} == inodes


def test_other_inputs_are_refused(tmp_path, corpora, tokenizer, texts):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("some text\n")
    prepared(out, tokenizer, str(tmp_path / "a.txt"), validation_fraction=0)
    for message, files, run in (
        (r"with train\.seed = 0, and this is 1; use", "a.txt", {"seed": 1}),
        (r'with data\.bad_records = "fail", and this is "skip"; use', "a.txt", {"bad_records": "skip"}),
        (r"with another tokenizer or data\.parse_special; use", "a.txt", {"parse_special": False}),
        (r"with the files '\S+a.txt', and these are '\S+\*\.txt'; use", "*.txt", {}),
    ):
        with pytest.raises(DataError, match=rf"{out} was begun {message} another OUT"):
            prepared(out, tokenizer, str(tmp_path / files), validation_fraction=0, **run)
    (tmp_path / "a.txt").write_text("same text\n")
    with pytest.raises(DataError, match=r"was begun the files have changed since"):
        prepared(out, tokenizer, str(tmp_path / "a.txt"), validation_fraction=0)


def test_a_folder_with_other_things_is_refused(tmp_path, corpora, tokenizer):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"exists and was not begun by `llama-jax data prepare`; use another"):
        prepared(tmp_path, tokenizer, corpora["jsonl"])
    with pytest.raises(DataError, match=r"exists and was not begun"):
        prepared(tmp_path / "thesis.txt", tokenizer, corpora["jsonl"])
    with pytest.raises(DataError, match=r"cannot write \S+ \(Not a directory\); free some space or use"):
        prepared(tmp_path / "thesis.txt" / "out", tokenizer, corpora["jsonl"])


def test_a_disk_without_space_is_one_line(tmp_path, corpora, tokenizer, many):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"cannot write \S+ \(.*\); free some space .* goes on where"
        ) as caught:
            prepared(tmp_path / "out", tokenizer, corpora["jsonl"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.part"))
    (manifest,) = prepared(tmp_path / "out", tokenizer, corpora["jsonl"])
    assert manifest["documents"] == 60


@pytest.mark.parametrize("runner", ["local", pytest.param("beam", marks=NEEDS_BEAM)])
def test_a_bad_record_names_its_line(tmp_path, tokenizer, runner):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n{"text": "more"}\n')
    settings = Settings(LocalRunner() if runner == "local" else beam_runner())
    with pytest.raises(LlamaJaxError, match=r"a\.jsonl:2: field 'text' is of type int.* \"skip\"$"):
        prepared(tmp_path / "out", tokenizer, str(path), settings=settings)


def beam_runner():
    from llama_jax.train.prepare.pipeline import BeamRunner

    return BeamRunner("direct")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runner", "datafow"], "unknown --runner 'datafow'; did you mean dataflow?"),
        (["--runer", "direct"], "unknown option --runer; did you mean --runner?"),
        (["--workers", "many"], "--workers: 'many' is not an integer"),
        (["--project", "p"], "unknown option --project"),
        (["--train.objective", "sft"], 'train.objective is "sft", whose examples'),
        (
            ["--tokenizer.path", "", "--tokenizer.vocab_size", "300"],
            "tokenizer.path is not set; train a vocabulary with",
        ),
        (["--data.files", "nope*"], "no file matches data.files = 'nope*'"),
    ],
)
def test_the_command_explains_what_it_refuses(tmp_path, corpora, vocabulary_paths, words, message, capsys):
    path = vocabulary_paths["sentencepiece"]
    (tmp_path / "run.toml").write_text(
        f'[data]\nfiles = "{corpora["jsonl"]}"\n[tokenizer]\npath = "{path}"\nvocab_size = 0\n'
    )
    assert cli.main(["data", "prepare", str(tmp_path / "run.toml"), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_runner_without_beam_names_the_extra(tmp_path, corpora, vocabulary_paths, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    (tmp_path / "run.toml").write_text(
        f'[data]\nfiles = "{corpora["jsonl"]}"\n[tokenizer]\npath = "{vocabulary_paths["sentencepiece"]}"\n'
    )
    words = ["data", "prepare", str(tmp_path / "run.toml"), str(tmp_path / "out"), "--runner", "flink"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(
        "error: this runner needs apache_beam: pip install 'llama-jax[beam]', or in a clone -e '.[beam]'"
    )


@pytest.mark.stores
@pytest.mark.skipif(not BEAM, reason="needs the extra `beam`")
def test_an_option_that_beam_does_not_have(tmp_path, corpora, capsys):
    from llama_jax.console.parser import UsageError
    from llama_jax.train.prepare.pipeline import BeamRunner

    with pytest.raises(UsageError, match=r"unknown option --projct, .*; did you mean --project\?"):
        BeamRunner("dataflow", ["--projct", "p"])
    BeamRunner("flink", ["--a_job_servers_option", "3"])


def test_scattering_is_the_inverse_of_gathering(tmp_path, many, twice, tokenizer):
    """Each record of a split is in one shard, at one place, by either way."""
    whole = job.open_job(
        DataConfig(files=twice, validation_fraction=0.2), tokenizer, tmp_path / "out", seed=3
    )
    for key in whole.chunks():
        chunks.write_chunk(whole, *key)
    planned = shards.plan_shards(whole, [20_000])
    assert len(whole.chunks()) > 2 and {shard.split for shard in planned} == {"train", "validation"}
    found: dict[tuple[int, int], bytes] = {}
    for key in whole.chunks():
        for index, place, record in shards.scatter(whole, *key, planned):
            assert (index, place) not in found
            found[index, place] = record
    for index, shard in enumerate(planned):
        assert list(shards.gather(whole, shard)) == [found.pop((index, place)) for place in shard.places]
    assert not found


def test_ranks_number_the_records_of_each_split(tmp_path, corpora, tokenizer):
    section = job.open_job(
        DataConfig(files=corpora["jsonl"], validation_fraction=0.3), tokenizer, tmp_path, seed=0
    ).sections[0]
    assert section.count("train") + section.count("validation") == 60
    for split in ("train", "validation"):
        numbers = section.records_at(np.arange(section.count(split)), split)
        assert (section.is_validation(np.arange(60))[numbers] == (split == "validation")).all()
        assert section.ranks(numbers, split).tolist() == list(range(section.count(split)))


def test_two_commands_do_not_share_a_folder(tmp_path, corpora, tokenizer):
    """The kernel's lock belongs to a process: another one is needed to be refused."""
    import subprocess

    out = tmp_path / "out"
    prepared(out, tokenizer, corpora["jsonl"])
    plan = out / "prepare.json"
    holder = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", holder, str(plan)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(DataError, match=r"is being prepared by another process; wait for it"):
            prepare(DataConfig(files=corpora["jsonl"]), tokenizer, out, seed=0)
        process.communicate(b"\n")
