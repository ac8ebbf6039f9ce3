"""The command line: output on stdout and stderr, exit statuses, one-line errors."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.cli import output
from llama_jax.console import loading, terminal
from llama_jax.errors import InputError
from tests import tiny
from tests.random_models import random_model
from tests.tokenizer import vocabularies

NEW = 6
SMOL = "smollm2-135m"


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line and returns its status, stdout and stderr."""

    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        status = cli.main([str(arg) for arg in args])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


def assert_error(done, *parts):
    """Asserts exit status 2, an empty stdout, and one line on stderr that contains these parts."""
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert str(part) in done.err


# Output


def test_generate_prints_prompt_and_continuation(run, tiny_path):
    done = run("generate", tiny_path, "--prompt", "ab", "--max-new-tokens", NEW)
    assert done.status == 0
    assert done.out == "ab" + lj.load(tiny_path).generate("ab", max_new_tokens=NEW) + "\n"
    assert done.err.count("\n") == 1
    assert "prefill" in done.err
    assert "decode" in done.err


@pytest.mark.slow
def test_generate_on_a_mesh_prints_the_text_of_one_device(run, tiny_path):
    arguments = "generate", tiny_path, "--prompt", "ab", "--max-new-tokens", NEW
    done = run(*arguments, "--mesh", "context=4,tensor=2")
    assert (done.status, done.out) == (0, run(*arguments).out)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("contxt=8", "mesh axis 'contxt' is unknown; the axes are data, fsdp, expert, context, tensor"),
        ("context", "mesh part 'context' is not AXIS=SIZE, as in fsdp=4,tensor=2"),
        ("context=16", "it needs 16 devices and there are 8; CPU devices can be simulated"),
        ("tensor=8", "num_attention_heads 4 does not divide over axis tensor of size 8"),
    ],
)
def test_a_mesh_that_does_not_fit(run, tiny_path, spec, message):
    assert_error(run("generate", tiny_path, "--prompt", "ab", "--mesh", spec), message)


def test_generate_json_is_one_object(run, tiny_path):
    args = ("generate", tiny_path, "--prompt", "ab", "--max-new-tokens", NEW)
    done = run(*args, "--json")
    result = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert run(*args).out == result["prompt"] + result["text"] + "\n"
    assert len(result["tokens"]) == NEW
    assert result["finish_reason"] == "length"
    assert result["decode_tokens_per_second"] > 0


def test_generate_accepts_stdin_and_prompts_that_begin_with_a_dash(run, tiny_path):
    rest = ("--max-new-tokens", NEW, "--json")
    assert json.loads(run("generate", tiny_path, "--prompt", "-", *rest, stdin=b"a b").out)["prompt"] == "a b"
    assert json.loads(run("generate", tiny_path, "--prompt", "--ab", *rest).out)["prompt"] == "--ab"


@pytest.mark.parametrize("draft", ["--prompt-lookup", "--draft-model"])
def test_speculative_decoding_gives_the_same_text_in_fewer_forward_passes(run, tiny_path, draft):
    args = ("generate", tiny_path, "--prompt", "abcabcabc", "--max-new-tokens", NEW, "--json")
    flags = [draft, *([tiny_path] if draft == "--draft-model" else []), "--num-draft-tokens", 3]
    plain = json.loads(run(*args).out)
    done = json.loads(run(*args, *flags).out)
    assert done["text"] == plain["text"] and done["new_tokens"] == len(plain["tokens"])
    assert done["rounds"] + done["accepted"] >= done["new_tokens"] and done["accepted"] <= done["drafted"]
    assert draft == "--prompt-lookup" or done["rounds"] < done["new_tokens"]
    summary = run(*args[:-1], *flags).err
    assert f"{done['new_tokens']} tokens in {done['rounds']} forward passes" in summary


def test_one_token_has_no_decode_rate(run, tiny_path):
    done = run("generate", tiny_path, "--prompt", "ab", "--max-new-tokens", 1, "--json")
    assert json.loads(done.out)["decode_tokens_per_second"] is None


def test_stories260k_golden_text(run, shared_data):
    folder = shared_data / "stories260K"
    done = run("generate", folder / "stories260K.bin", "--prompt", "", "--max-new-tokens", 200)
    assert done.out == (folder / "golden_greedy_200.txt").read_text().rstrip("\n") + "\n"


def test_inspect_totals(run, tiny_path):
    result = json.loads(run("inspect", tiny_path, "--batch", 3, "--length", 8, "--json").out)
    c = tiny.CONFIG
    assert result["format"] == "llama2c"
    assert result["parameters"] == c.num_params == sum(result["parameters_by_part"].values())
    assert result["weight_bytes"] == {"float32": 4 * c.num_params, "bfloat16": 2 * c.num_params}
    assert result["kv_cache"]["bytes"]["float32"] == 4 * 2 * 2 * 3 * 8 * c.num_key_value_heads * c.head_dim
    assert result["bytes_in_file"] == sum(group["bytes"] for group in result["tensors"])


def test_inspect_groups_layers(run, tiny_path):
    done = run("inspect", tiny_path)
    assert done.status == 0
    assert done.err == ""
    assert len(done.out.splitlines()) < 60
    assert re.search(rf"^wq\[\*\] +{tiny.CONFIG.num_hidden_layers} ", done.out, re.MULTILINE)
    assert f"{tiny.CONFIG.num_params:,}" in done.out


def test_models_lists_sources_and_cache_status(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    (model,) = (model for model in json.loads(run("models", "--json").out)["models"] if model["name"] == SMOL)
    assert model["licence"] == "Apache-2.0"
    assert model["cached"] is False
    done = run("models")
    assert SMOL in done.out
    assert model["requirement"] in done.out
    assert "downloaded on first use" in done.out


def test_tokenizer_encode_and_decode(run, tiny_path):
    encoded = json.loads(run("tokenizer", "encode", tiny_path, "ab a", "--json").out)
    assert encoded["pieces"][0] == "<s>"
    ids = run("tokenizer", "encode", tiny_path, stdin=b"ab a").out
    assert ids.split() == [str(token) for token in encoded["ids"]]
    assert run("tokenizer", "decode", tiny_path, *ids.split()).out == "ab a\n"
    assert json.loads(run("tokenizer", "decode", tiny_path, "--json", stdin=ids.encode()).out) == {
        "text": "ab a"
    }
    assert run("tokenizer", "decode", tiny_path, *ids.split(), "--special").out.startswith("<s>")


def test_options_may_stand_before_optional_arguments(run, tiny_path):
    encoded = run("tokenizer", "encode", tiny_path, "ab a", "--json").out
    ids = [str(token) for token in json.loads(encoded)["ids"]]
    for args in (
        [tiny_path, "--json", "ab a"],
        ["--json", tiny_path, "ab a"],
        ["--json", "--", tiny_path, "ab a"],
    ):
        assert run("tokenizer", "encode", *args).out == encoded
    special = run("tokenizer", "decode", tiny_path, *ids, "--special").out
    assert run("tokenizer", "decode", tiny_path, "--special", *ids).out == special
    assert run("tokenizer", "decode", tiny_path, ids[0], "--special", *ids[1:]).out == special
    # What starts with a dash and is no option: a number, a text.
    assert_error(run("tokenizer", "decode", tiny_path, "--special", "-1"), "-1")
    assert json.loads(run("tokenizer", "encode", tiny_path, "--json", "- ab -c").out)["pieces"][-1] == "c"
    assert_error(run("tokenizer", "encode", tiny_path, "-j", "ab"), "unexpected argument '-j'")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    names = [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"]
    rows = [[name, "float32 / bfloat16", "30", "rounded to bfloat16", "0.1"] for name in names]
    output.print_table(rows, ("tensor", "dtype", "count", "", "max"), right=(2, 4))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(name in line for name in names for line in lines) == len(names)
    assert len(lines) == (6 if width > 110 else 10)
    output.print_table([["a", "", "1"]], ("name", "nothing", "value"))
    assert "nothing" not in capsys.readouterr().out
    output.print_table([["text", "a built-in page of English " * 4]], ("outputs", ""))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines[2:]).split() == ["text", *("a built-in page of English " * 4).split()]


def test_control_characters_reach_a_file_and_no_terminal(monkeypatch, capsys):
    text = "a\x1b]0;title\x07\tb\x9b2J\r\n"
    terminal.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.write(text)
    output.print_table([["\x1b[2Jx"]], ("name",))
    terminal.note("warning: \x1b[2J")
    shown = "".join(capsys.readouterr())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.startswith("a\\x1b]0;title\\x07\tb\\x9b2J\\r\n") and "\\x1b[2Jx" in shown


def test_no_color_leaves_no_style(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal.console()
    console.file, console._force_terminal = io.StringIO(), True
    console.print("x", style="bold green")
    assert console.file.getvalue() == "x\n"


def test_bench_json(run, tiny_path):
    args = ("bench", tiny_path, "--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 1)
    done = run(*args, "--json")
    result = json.loads(done.out)
    assert result["batch"] == 1
    assert result["bytes_per_step"] > result["weight_bytes"] == 4 * tiny.CONFIG.num_params
    assert result["bandwidth_share"] == pytest.approx(result["bytes_per_second"] / result["memory_bandwidth"])
    assert result["peak_host_bytes"] >= result["peak_host_bytes_before_load"] > 0


@pytest.mark.parametrize(
    "verb", ["generate", "inspect", "models", "bench", "tokenizer encode", "tokenizer decode"]
)
def test_help_has_examples(run, verb):
    done = run(*verb.split(), "--help")
    assert done.status == 0
    assert f"llama-jax {verb}" in done.out.partition("examples:")[2]


def test_exit_status_of_the_process(tiny_path):
    command = [sys.executable, "-m", "llama_jax.cli"]
    good = subprocess.run([*command, "models"], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([*command, "tokenizer", "decode", tiny_path, "9999"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def test_closed_pipe_prints_no_error():
    command = [sys.executable, "-m", "llama_jax.cli", "models", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_ctrl_c_prints_no_traceback(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_jax.cli.models.run", interrupt)
    done = run("models")
    assert done.status == 130
    assert "Traceback" not in done.err


@pytest.mark.parametrize("args", [["models"], ["models", "--json"], ["nonsense"]])
@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_closed_stream_prints_no_traceback(args, closed):
    code = f"import sys; sys.{closed} = None; from llama_jax import cli; sys.exit(cli.main({args}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (2 if args == ["nonsense"] else 0)
    assert "Traceback" not in done.stderr
    assert "error" not in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_unwritable_stdout():
    command = [sys.executable, "-m", "llama_jax.cli", "models"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write the output")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "raised", [MemoryError("Unable to allocate 13 TiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_out_of_memory(run, monkeypatch, raised):
    def fail(_):
        raise raised

    monkeypatch.setattr("llama_jax.cli.models.run", fail)
    assert_error(run("models"), "not enough memory", raised, "use a smaller batch")


def test_other_runtime_errors_keep_their_traceback(run, monkeypatch):
    def fail(_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("llama_jax.cli.models.run", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        run("models")


def test_unavailable_platform(tiny_path):
    command = [sys.executable, "-m", "llama_jax.cli", "generate", tiny_path, "--prompt", "a"]
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "JAX cannot use the platform 'tpu'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(run, shell):
    script = run("completion", shell).out
    assert all(verb in script for verb in cli.SUBCOMMANDS)
    for word in (
        "--max-new-tokens",
        "--train.steps",
        "--list-configs",
        "--tensors-only",
        "--vocab-size",
        SMOL,
    ):
        assert word in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ge"], ["generate"]),
        (["generate", "smol"], [SMOL]),
        (["generate", "m", "--num-b"], ["--num-beams"]),
        (["train", "--optimizer.w"], ["--optimizer.warmup_steps", "--optimizer.weight_decay"]),
        (["tokenizer", "d"], ["decode"]),
        (["tokenizer", "decode", "m", "--sp"], ["--special"]),
        (["data", "p"], ["prepare"]),
        (["data", "prepare", "c", "--run"], ["--runner"]),
        (["data", "prepare", "c", "--data.fi"], ["--data.field", "--data.files"]),
        (["nothing", "--x"], []),
    ],
)
def test_bash_completes(run, words, expected):
    script = run("completion", "bash").out
    typed = f"COMP_WORDS=(llama-jax {' '.join(words)}); COMP_CWORD={len(words)}; _llama_jax"
    command = f"{script}\n{typed}; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


# Bad usage


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["generte", "x"], ["generte", "did you mean generate?"]),
        (["--verbose"], ["unknown option '--verbose'; the commands are", "generate"]),
        (["--verion"], ["did you mean --version?"]),
        (["verion"], ["did you mean version?"]),
        (["generate", "m", "--quiet"], ["unknown option --quiet; see: llama-jax generate --help"]),
        (["generate", "m", "--temp", "1"], ["did you mean --temperature?"]),
        (["generate"], ["missing", "MODEL", "--prompt", "--help"]),
        (["generate", "m", "--promt", "x"], ["--promt", "did you mean --prompt?"]),
        (["generate", "m", "--zzz"], ["--zzz", "--help"]),
        (
            ["generate", "m", "--draft", "prompt"],
            ["unknown option --draft", "did you mean --prompt-lookup or --draft-model MODEL?"],
        ),
        (
            ["generate", "m", "--prompt", "x", "--prompt-lookup", "--draft-model", "m"],
            ["--draft-model", "not allowed with argument --prompt-lookup"],
        ),
        (["generate", "m", "--prompt"], ["--prompt", "expected one argument"]),
        (["generate", "m", "--prompt", "x", "more"], ["unexpected", "more"]),
        (["generate", "m", "--prompt", "x", "--temperature", "hot"], ["--temperature", "hot", "number"]),
        (["generate", "m", "--prompt", "x", "--top-k", "1.5"], ["--top-k", "1.5", "integer"]),
        (
            ["generate", "m", "--prompt", "x", "--max-new-tokens", "0"],
            ["--max-new-tokens", "0", "at least 1"],
        ),
        (["generate", "m", "--prompt", "x", "--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["generate", "m", "--prompt", "x", "--seed", "9" * 20], ["--seed", "9" * 20, "too large"]),
        (["inspect", "m", "--batch", "9" * 5000], ["--batch", "9" * 20]),
        (["inspect", "m", "--length", "-1"], ["--length", "-1", "at least 1"]),
        (["tokenizer", "encod", "m"], ["encod", "did you mean encode?"]),
        (["tokenizer", "decode", "m", "twelve"], ["twelve", "integers"]),
    ],
)
def test_bad_usage(run, args, parts):
    assert_error(run(*args), *parts)


# Bad input


@pytest.mark.parametrize("verb", ["generate", "inspect", "bench", "tokenizer encode"])
def test_no_such_model(run, tmp_path, verb):
    rest = ["--prompt", "x"] if verb == "generate" else []
    assert_error(run(*verb.split(), tmp_path / "nothing.gguf", *rest), tmp_path / "nothing.gguf", SMOL)
    assert_error(run(*verb.split(), "smollm2-135", *rest), "smollm2-135", f"did you mean {SMOL}?")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "0"], ["top_p", "0"]),
        (["--top-p", "1.5"], ["top_p", "1.5"]),
        (["--top-k", "-1"], ["top_k", "-1"]),
        (["--min-p", "2"], ["min_p", "2"]),
        (["--repetition-penalty", "0"], ["repetition_penalty", "0"]),
        (["--max-new-tokens", "1000"], ["1000", tiny.CONFIG.max_position_embeddings]),
        (["--prompt", "a" * 40], ["41", tiny.CONFIG.max_position_embeddings]),
        (["--num-beams", "2", "--prompt-lookup"], ["--num-beams 2", "(--prompt-lookup)", "leave one"]),
        (["--num-beams", "2", "--draft-model", "m"], ["--num-beams 2", "(--draft-model m)", "leave one"]),
        (["--draft-model", "nowhere"], ["nowhere"]),
        (["--prompt", "lone \udc80 surrogate"], ["surrogate"]),
    ],
)
def test_bad_generation(run, tiny_path, options, parts):
    assert_error(run("generate", tiny_path, "--prompt", "ab", *options), *parts)


def test_stdin_is_not_utf8(run, tiny_path):
    assert_error(run("generate", tiny_path, "--prompt", "-", stdin=b"ab\xff"), "UTF-8", "0xff", "offset 2")


def test_empty_prompt_without_bos(run, tmp_path):
    vocabulary = vocabularies.write_json(tmp_path / "tokenizer.json", vocabularies.byte_level_json())
    config, params = random_model(5, tiny.CONFIG.replace(vocab_size=331))
    path = lj.save(config, params, tmp_path / "model", tokenizer=vocabulary)
    assert_error(run("generate", path, "--prompt", ""), "prompt is empty")


@pytest.mark.parametrize("verb", ["generate", "inspect", "bench"])
def test_truncated_checkpoint(run, tmp_path, verb):
    path = tiny.write_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    rest = ["--prompt", "x"] if verb == "generate" else []
    assert_error(run(verb, path, *rest), path)


def test_file_is_not_a_checkpoint(run, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert_error(run("inspect", path), path)


def test_terminal_escape_sequences_in_names_are_escaped(run, tmp_path):
    path = tmp_path / "\x1b[31m.gguf"
    path.write_bytes(b"")
    assert_error(run("inspect", path), "\\x1b[31m.gguf: the file is empty")


@pytest.mark.parametrize("verb", ["generate", "inspect", "bench", "tokenizer encode"])
def test_empty_name_is_not_the_current_directory(run, verb, tiny_path, monkeypatch):
    monkeypatch.chdir(tiny_path.parent)
    rest = ["--prompt", "x"] if verb == "generate" else []
    assert_error(run(*verb.split(), "", *rest), "'' is neither a path nor a known model", SMOL)


def test_vocabulary_size_mismatch(run, tmp_path):
    path = tiny.write_model(tmp_path)
    tiny.write_vocabulary(tmp_path / "tok.bin", [*tiny.PIECES, " ab"])
    assert_error(run("generate", path, "--prompt", "a"), tiny.CONFIG.vocab_size, tiny.CONFIG.vocab_size + 1)


def test_ids_out_of_range(run, tiny_path):
    assert_error(run("tokenizer", "decode", tiny_path, "9999"), "9999", tiny.CONFIG.vocab_size)
    assert_error(run("tokenizer", "decode", tiny_path, "-1"), "-1")


def test_bench_requires_two_new_tokens(run, tiny_path):
    assert_error(run("bench", tiny_path, "--new-tokens", 1), "new_tokens", "at least 2")


def test_version_and_help_of_a_command(run):
    version = importlib.metadata.version("llama-jax")
    for argument in ("--version", "-V", "-v", "version"):
        done = run(argument)
        assert (done.status, done.out) == (0, f"llama-jax {version}\n")
    assert run("help", "verify").out == run("verify", "--help").out
    assert run("help").out == run("--help").out
    assert run("help", "tokenizer", "encode").out == run("tokenizer", "encode", "--help").out
    assert run("help", "train", "log").out == run("train", "--help", "log").out


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("f32", "float32")])
def test_abbreviated_dtypes(run, tiny_path, monkeypatch, short, full):
    def load(model, dtype, *_):
        raise InputError(f"loads it as {dtype}")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "load", load)
        for dtype in (short, full):
            done = run("generate", tiny_path, "--prompt", "a", "--dtype", dtype)
            assert_error(done, f"loads it as {full}")
    assert_error(run("generate", tiny_path, "--prompt", "a", "--dtype", "int3"), "int3", "bfloat16")
