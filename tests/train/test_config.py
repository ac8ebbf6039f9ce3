"""A run's configuration: TOML round trip, flags override the file, Llama 2's defaults, one-line errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import llama_jax as lj
from llama_jax.console.parser import UsageError
from llama_jax.errors import ConfigError, LlamaJaxError
from llama_jax.train.config.data import SourceConfig
from llama_jax.train.config.read import RENAMED, RENAMED_VALUES, keys, load_config, to_toml
from llama_jax.train.config.run import EvalConfig, ModelConfig, RunConfig
from llama_jax.train.loop import should_stop_early

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_round_trips_through_toml_and_builds_a_model(path, write):
    run = load_config(path)
    assert load_config(write(to_toml(run))) == run
    assert run.model.build(run.tokenizer.vocab_size or 32_000).num_params > 0
    assert len(path.read_text().splitlines()) < 60


def test_mixture_round_trips_through_toml(write):
    text = """
        [data]
        validation_fraction = 0
        mixture = [
            { files = "a/*.txt", weight = 2 },
            { files = 'b "c".jsonl', exclude = ["*/é*"], field = "body" },
        ]
        [model]
        vocab_size = 300
    """
    run = load_config(write(text))
    assert run.data.mixture[0] == SourceConfig("a/*.txt", weight=2.0)
    assert run.data.validation_fraction == 0.0 and type(run.data.validation_fraction) is float
    assert load_config(write(to_toml(run))) == run


def test_empty_file_gives_the_defaults_of_llama_2(write):
    """arXiv 2307.09288, section 2.2."""
    run = load_config(write(""))
    assert run == RunConfig()
    o = run.optimizer
    assert (o.name, o.schedule, o.b1, o.b2, o.eps) == ("adamw", "cosine", 0.9, 0.95, 1e-5)
    assert (o.weight_decay, o.max_grad_norm, o.warmup_steps, o.min_lr_ratio) == (0.1, 1.0, 2000, 0.1)
    assert run.model.build() == lj.presets.LLAMA2_7B


def test_flags_override_the_file_and_the_last_flag_wins(write):
    path = write("[train]\nsteps = 10\nseed = 3\n[model]\ntie_word_embeddings = true\n")
    flags = "--train.steps 20 --train.steps=30 --mesh.fsdp -1 --optimizer.learning_rate 1 --train.run_dir a=b"
    run = load_config(
        path, [*flags.split(), "--model.tie_word_embeddings=false", "--data.exclude", "['*/x']"]
    )
    assert (run.train.steps, run.train.seed, run.mesh.fsdp, run.train.run_dir) == (30, 3, -1, "a=b")
    assert run.model.tie_word_embeddings is False and run.data.exclude == ("*/x",)
    assert run.optimizer.learning_rate == 1.0 and type(run.optimizer.learning_rate) is float
    assert load_config(path, ["--train.run_dir", "7"]).train.run_dir == "7"  # strings are not parsed


def test_model_fields_override_the_preset():
    assert ModelConfig(preset="LLaMA2_70B").build() == lj.presets.LLAMA2_70B
    model = ModelConfig(preset="tiny", num_hidden_layers=3).build(vocab_size=500)
    assert model == lj.presets.TINY.replace(num_hidden_layers=3, vocab_size=500)
    assert ModelConfig(preset="tiny", vocab_size=512).build(vocab_size=512).vocab_size == 512


def test_keys_lists_every_section():
    sections = keys()
    assert list(sections) == [f.name for f in dataclasses.fields(RunConfig)]
    assert ("warmup_steps", "2000") in sections["optimizer"] and ("mixture", "()") in sections["data"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nsteps = 3", "run.toml: unknown section [trian]; did you mean train?"),
        (
            "[zzz]",
            "run.toml: unknown section [zzz]; there are model, tokenizer, data, train, optimizer, adapter,",
        ),
        ("train = 3", "run.toml: train is 3; it must be a section, [train]"),
        ("[train]\nstep = 3", "run.toml: unknown key train.step; did you mean steps?"),
        (
            "[[data.mixture]]\nfiles = 'a'\nwieght = 2",
            "unknown key data.mixture.wieght; did you mean weight?",
        ),
        ("[[data.mixture]]\nweight = 2", "data.mixture.files is missing; give a string"),
        ("[data]\nmixture = ['a']", "data.mixture is 'a'; it must be a table of files, exclude,"),
        ("[data]\nmixture = 'a'", "data.mixture is 'a'; it must be a list"),
        ("[data]\nexclude = [3]", "data.exclude is 3; it must be a string"),
        ("[train]\nsteps = 2.5", "train.steps is 2.5; it must be a whole number"),
        ("[train]\nsteps = true", "train.steps is True; it must be a whole number"),
        ("[train]\nsteps = '3'", "train.steps is '3'; it must be a whole number"),
        ("[train]\nsteps = 0", "train.steps is 0; it must be a number, at least 1"),
        ("[train]\nsteps = 3000000000", "train.steps is 3000000000; it must be below 2^31"),
        ("[train]\nseed = 9223372036854775808", "train.seed is 9223372036854775808; it must fit 64 bits"),
        ("[train]\nrun_dir = ''", "train.run_dir is empty"),
        ("[train]\nz_loss = nan", "train.z_loss is nan; it must be a number, at least 0"),
        ("[train]\ndtype = 'float16'", "train.dtype is 'float16'; did you mean bfloat16?"),
        ("[train]\nremat = 'ful'", "train.remat is 'ful'; did you mean full?"),
        ("[train]\nquantization = 'int88'", "train.quantization is 'int88'; did you mean int8?"),
        ("[train]\nstochastic_rounding = true", 'true and train.quantization is "none"; it rounds gradients'),
        (
            '[train]\nquantization_scales = "tensor"',
            'train.quantization_scales is "tensor" and train.quantization is',
        ),
        ("[train]\nattention = 'flash'", "train.attention is 'flash'"),
        (
            "[train]\nglobal_batch_size = 7\ngradient_accumulation_steps = 2",
            "train.global_batch_size 7 is not a multiple of train.gradient_accumulation_steps 2",
        ),
        ("[optimizer]\nname = 'adam'", "optimizer.name is 'adam'; did you mean adamw?"),
        ("[optimizer]\nschedule = 'cosin'", "did you mean cosine?; it must be one of cosine, wsd, constant"),
        ("[optimizer]\nb2 = 1.0", "optimizer.b2 is 1.0; it must be at least 0 and below 1"),
        (
            "[optimizer]\nmin_lr_ratio = 1.5",
            "optimizer.min_lr_ratio is 1.5; it must be at least 0 and at most 1",
        ),
        (
            "[optimizer]\nlearning_rate = -1",
            "optimizer.learning_rate is -1.0; it must be a number, at least 0",
        ),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate is inf"),
        ("[mesh]\nfsdp = 0", "mesh.fsdp is 0; it must be at least 1, or -1 to infer it"),
        ("[mesh]\ndata = -1", "mesh.data and mesh.fsdp are both -1; only one axis size can be inferred"),
        ("[mesh]\nslices = 0", "mesh.slices is 0"),
        ("[model]\npreset = 'llama2_7bb'", "model.preset is 'llama2_7bb'; did you mean llama2_7b?"),
        (
            "[model]\ninit_from = 'x'\nhidden_size = 8",
            "model.init_from is 'x', which determines the architecture; remove model.hidden",
        ),
        ("[tokenizer]\n", "tokenizer: give either tokenizer.path"),
        ("[tokenizer]\npath = 'a'\nvocab_size = 3", "tokenizer: give either tokenizer.path"),
        ("[eval]\nbatches = 0", "eval.batches is 0"),
        ("[log]\nevery = 0", "log.every is 0"),
        ("[checkpoint]\nkeep = 0", "checkpoint.keep is 0"),
        (
            "[distributed]\nnum_processes = 2",
            "distributed.num_processes and distributed.process_id go together",
        ),
        (
            "[distributed]\ncoordinator = 'a:1'\nnum_processes = 2\nprocess_id = 2",
            "distributed.process_id is 2; with 2 processes it must be at most 1",
        ),
        (
            "[train]\nobjective = 'orpo'\n[preference]\nlabel_smoothing = 0.1",
            'preference.label_smoothing is 0.1 and train.objective "orpo"; it applies to "dpo" and "simpo"',
        ),
        (
            "[train]\nobjective = 'simpo'\n[preference]\nloss_type = 'ipo'",
            'preference.loss_type is "ipo" and train.objective "simpo"; it applies to "dpo": leave it out',
        ),
        (
            "[train]\nobjective = 'dpo'\n[preference]\nsimpo_gamma = 1.0",
            'preference.simpo_gamma is 1.0 and train.objective "dpo"; it applies to "simpo": leave it out',
        ),
        (
            "[train]\nobjective = 'orpo'\n[preference]\nprecompute_ref_log_probs = true",
            'true and train.objective "orpo", which has no reference model; it applies to "dpo" and "kto"',
        ),
        (
            "[train]\nobjective = 'kto'\n[preference]\ndesirable_weight = 0\nundesirable_weight = 0",
            "preference.desirable_weight and preference.undesirable_weight are both 0",
        ),
        ("[train]\nobjective = 'orpo'\n[preference]\nbeta = 0", "preference.beta is 0; it must be above 0"),
        ("[train]\nobjective = 'simpo'\n[preference]\nbeta = -1", "preference.beta is -1.0; it must be a"),
        ("steps = = 3", "run.toml: not TOML: Invalid value (at line 1, column 9)"),
        (b"\xff", "run.toml: not TOML: 'utf-8' codec"),
        ("a = " + "[" * 20_000, "run.toml: not TOML: maximum recursion depth exceeded"),
        ("a = " + "1" * 20_000, "run.toml: not TOML: Exceeds the limit"),
        ("[optimizer]\nlearning_rate = " + "1" * 400, "optimizer.learning_rate is 111"),
    ],
)
def test_bad_file_is_a_one_line_error_that_names_the_place(text, message, write):
    with pytest.raises(ConfigError) as error:
        load_config(write(text))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.stpes", "3"], "unknown setting --train.stpes; did you mean train.steps?"),
        (["--zzz.yyy", "3"], "unknown setting --zzz.yyy; see: --help"),
        (["--train", "3"], "unknown setting --train"),
        (["--train.steps"], "--train.steps needs a value"),
        (["train.steps=3"], "unexpected argument 'train.steps=3'; settings are --section.key VALUE"),
        (["--train.steps", "many"], "--train.steps is 'many'; it must be a whole number"),
        (["--train.steps", "4.0"], "train.steps is 4.0; it must be a whole number"),
        (["--train.steps="], "--train.steps is ''; it must be a whole number"),
        (["--train.steps", "[" * 20_000], "it must be a whole number"),
        (["--optimizer.learning_rate", "fast"], "--optimizer.learning_rate is 'fast'; it must be a number"),
        (
            ["--model.tie_word_embeddings", "True"],
            "--model.tie_word_embeddings is 'True'; it must be true or false",
        ),
        (["--data.exclude", "["], '--data.exclude is \'[\'; it must be a list such as ["a", "b"]'),
        (
            ["--train.remat", "everything"],
            "train.remat is 'everything'; it must be one of none, save_dots, save_projections",
        ),
    ],
)
def test_bad_flag_is_a_one_line_error_that_names_it(flags, message, write):
    with pytest.raises((ConfigError, UsageError)) as error:
        load_config(write(""), flags)
    assert message in str(error.value) and "\n" not in str(error.value)


# Spelled out once more, so that RENAMED cannot lose one unnoticed.
NEW_OF_OLD = {
    "train.batch_size": "train.global_batch_size",
    "train.accumulate": "train.gradient_accumulation_steps",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "data.held_out": "data.validation_fraction",
    "data.held_out_files": "data.validation_files",
    "adapter.kind": "adapter.type",
    "adapter.targets": "adapter.target_modules",
    "preference.kind": "preference.loss_type",
    "preference.reference": "preference.precompute_ref_log_probs",
    "distributed.processes": "distributed.num_processes",
    "distributed.process": "distributed.process_id",
}


def test_every_renamed_setting_leads_to_one_that_exists():
    assert RENAMED == NEW_OF_OLD
    settings = {f"{section}.{key}" for section, entries in keys().items() for key, _ in entries}
    assert set(RENAMED.values()) | set(RENAMED_VALUES) <= settings
    assert not set(RENAMED) & settings


@pytest.mark.parametrize(("old", "new"), NEW_OF_OLD.items())
def test_renamed_setting_is_an_error_that_gives_the_new_name(old, new, write):
    section, key = old.split(".")
    path = write(f"[{section}]\n{key} = 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}: unknown key {old}; it is now {new}"
    for flags in ([f"--{old}", "1"], [f"--{old}=1"]):
        with pytest.raises(UsageError) as usage:
            load_config(write(""), flags)
        assert str(usage.value) == f"unknown setting --{old}; it is now --{new}"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(name, old, new) for name, values in RENAMED_VALUES.items() for old, new in values.items()],
)
def test_renamed_value_is_an_error_that_gives_the_new_value(name, old, new, write):
    section, key = name.split(".")
    for text, flags in ((f"[{section}]\n{key} = '{old}'\n", []), ("", [f"--{name}", old])):
        with pytest.raises(ConfigError) as error:
            load_config(write(text), flags)
        assert str(error.value) == f"{name} is '{old}', which is now '{new}'"
    assert getattr(getattr(load_config(write(""), [f"--{name}", new]), section), key) == new


def test_unreadable_file_is_named(tmp_path):
    for path, reason in ((tmp_path / "no.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(LlamaJaxError) as error:
            load_config(path)
        assert str(error.value).startswith(f"{path}: cannot be read: {reason}")


def test_invalid_model_is_a_config_error():
    with pytest.raises(
        ConfigError, match=r"model.vocab_size is 100; the tokenizer has 300 tokens: leave it out, or give"
    ):
        ModelConfig(vocab_size=100).build(300)
    with pytest.raises(ConfigError, match="model: hidden_size 10 is not a multiple of num_attention_heads 4"):
        ModelConfig(hidden_size=10, num_attention_heads=4).build()


def test_early_stopping_counts_evaluations_without_a_lower_loss():
    stops = lambda losses, **c: should_stop_early(losses, EvalConfig(patience=2, every=1, **c))  # noqa: E731
    assert not stops([3.0, 3.0])
    assert stops([3.0, 3.0, 3.0]) and stops([3.0, 2.0, 2.5, 2.1])
    assert not stops([3.0, 2.0, 2.5, 1.9]) and not stops([3.0, 2.9, 2.8])
    assert stops([3.0, 2.95, 2.9], min_improvement=0.2)
    assert not should_stop_early([3.0] * 9, EvalConfig())
    with pytest.raises(ConfigError, match=r"eval\.every is 0"):
        EvalConfig(patience=2, every=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [(".0001", 1e-4), ("3.e-4", 3e-4), ("+.5", 0.5), ("1e-3", 1e-3), ("2", 2.0), ("1_0.5", 10.5)],
)
def test_numbers_as_people_type_them(text, value, write):
    run = load_config(write(""), ["--optimizer.learning_rate", text])
    assert run.optimizer.learning_rate == value


@pytest.mark.parametrize("text", ["wq,wv", "wq, wv,", '["wq", "wv"]'])
def test_lists_as_people_type_them(text, write):
    flags = ("--model.init_from", "a", "--adapter.type", "lora", "--adapter.target_modules", text)
    run = load_config(write(""), flags)
    assert run.adapter.target_modules == ("wq", "wv")
    assert load_config(write(""), ["--data.exclude", "*/x"]).data.exclude == ("*/x",)
