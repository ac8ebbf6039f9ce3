"""`model.rope_scaling` and a run's context: read from files and flags, completed, recorded, and checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters
from llama_jax.console.parser import UsageError
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.text.convert import convert
from llama_jax.text.pretrained import open_model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.config.help import describe, names
from llama_jax.train.config.read import load_config, to_toml
from llama_jax.train.config.rope_scaling import RopeScalingConfig
from llama_jax.train.config.run import AdapterConfig, ModelConfig, RunConfig
from llama_jax.train.export import export_adapter
from llama_jax.train.initialization import check_context, model_config
from llama_jax.train.metrics.run_log import log_adapter
from llama_jax.train.provenance import check_model, is_same_model, provenance
from llama_jax.train.trainable import TrainableSpec
from llama_jax.weights import open_source
from llama_jax.weights.derived import WithContext
from llama_jax.weights.run_adapters import read_context
from llama_jax.weights.runs import RUN, STEP_METADATA_FILE, StepMetadata
from llama_jax.weights.tensors import StoredTensors
from tests import tiny
from tests.random_models import random_model

YARN = {"rope_type": "yarn", "factor": 8.0}
BASE = tiny.CONFIG  # a context of 32 tokens
LLAMA3 = lj.RopeScaling("llama3", 8.0, 32, low_freq_factor=1.5, high_freq_factor=3.0)


def extended(base: lj.LlamaConfig = BASE, **settings: object) -> lj.LlamaConfig:
    """The model of a run that starts from `base`; `rope_scaling` as a dict of its settings."""
    if scaling := settings.pop("rope_scaling", None):
        settings["rope_scaling"] = RopeScalingConfig(**scaling)  # type: ignore[arg-type]
    return ModelConfig(init_from="base", **settings).extended(base)  # type: ignore[arg-type]


@pytest.fixture
def read(tmp_path):
    def read(text: str, *flags: str) -> RunConfig:
        (tmp_path / "run.toml").write_text(text)
        return load_config(tmp_path / "run.toml", flags)

    return read


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("[model.rope_scaling]\nrope_type = 'yarn'\nfactor = 8", ()),
        ("[model]\nrope_scaling = {type = 'yarn', factor = 8.0}", ()),
        ("[model]\nrope_scaling = {kind = 'yarn', rope_type = 'yarn', factor = 8.0}", ()),
        ("", ("--model.rope_scaling.rope_type", "yarn", "--model.rope_scaling.factor=8")),
        ("", ("--model.rope_scaling", '{"rope_type": "yarn", "factor": 8.0}')),
        ("", ("--model.rope_scaling", "{kind = 'yarn', factor = 8}")),
        (
            "[model.rope_scaling]\ntype = 'linear'\nfactor = 2",
            ("--model.rope_scaling.kind", "yarn", "--model.rope_scaling.factor", "8."),
        ),
    ],
)
def test_it_is_read_from_files_and_flags(read, text, flags):
    run = read(text, *flags)
    assert run.model.rope_scaling == RopeScalingConfig(**YARN)
    assert read(to_toml(run)) == run
    scaling = lj.RopeScaling("yarn", 8.0, 4096)
    assert run.model.build() == lj.presets.LLAMA2_7B.replace(
        rope_scaling=scaling, max_position_embeddings=32_768
    )


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (
            "[model]\nrope_scaling = 3",
            (),
            "model.rope_scaling is 3; it must be a table of rope_type, factor,",
        ),
        ("[model]\nrope_scaling = 3", ("--model.rope_scaling.factor", "8"), "is 3; it must be a table"),
        ("[model]\nrope_scaling = {}", (), "model.rope_scaling is empty; set model.rope_scaling.rope_type"),
        (
            "[model.rope_scaling]\nrope_type = 'yarn'\nbeta_fats = 3",
            (),
            "unknown key model.rope_scaling.beta_fats; did you mean beta_fast?",
        ),
        ("[model.rope_scaling]\nrope_theta = 3.0", (), "rope_scaling.rope_theta; that is model.rope_theta"),
        ("", ("--model.rope_scaling.rope_theta", "3"), "rope_scaling.rope_theta; that is --model.rope_theta"),
        ("", ("--model.rope_scaling.facter", "3"), "did you mean model.rope_scaling.factor?"),
        ("", ("--model.rope_scaling.factor", "big"), "--model.rope_scaling.factor is 'big'; it must be a n"),
        ("", ("--model.rope_scaling", "yarn"), "--model.rope_scaling is 'yarn'; it must be a table of"),
        ("", ("--model.rope_scaling.factor", "8"), "model.rope_scaling.rope_type is missing; it must be one"),
        ("[model.rope_scaling]\ntype = 'yarm'", (), "rope_type is 'yarm'; did you mean yarn?"),
        ("[model.rope_scaling]\ntype = 'dynamic'", (), 'rope_type is "dynamic", which scales only texts bey'),
        (
            "[model.rope_scaling]\ntype = 'yarn'\nkind = 'ntk'",
            (),
            "model.rope_scaling.kind is 'ntk' and model.rope_scaling.rope_type 'yarn': remove one",
        ),
        (
            "[model.rope_scaling]\nrope_type = 'linear'\nfactor = 2\nbeta_slow = 2",
            (),
            'model.rope_scaling.beta_slow is set, which only "yarn" has, and rope_type is "linear"',
        ),
    ],
)
def test_bad_settings_are_one_line(read, text, flags, message):
    with pytest.raises((ConfigError, UsageError)) as error:
        read(text, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_key_has_help():
    keys = [name for name in names() if name.startswith("model.rope_scaling.")]
    assert [key.rpartition(".")[2] for key in keys] == [f.name for f in dataclasses.fields(RopeScalingConfig)]
    for key in keys:
        name, text = describe(key, 80).split("\n", 1)
        assert name == f"  --{key}" and len(text.strip()) > 20


@pytest.mark.parametrize(
    ("base", "settings", "scaling", "context"),
    [
        (BASE, {"rope_scaling": YARN}, lj.RopeScaling("yarn", 8.0, 32), 256),
        (
            BASE,
            {"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 128},
            lj.RopeScaling("yarn", 4.0, 32),
            128,
        ),
        (BASE, {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, lj.RopeScaling("linear", 2.5), 80),
        (BASE, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, lj.RopeScaling("ntk", 4.0), 128),
        (
            BASE,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "max_position_embeddings": 512},
            lj.RopeScaling("llama3", 8.0, 32),
            512,
        ),
        (BASE, {"max_position_embeddings": 64, "rope_theta": 5e5}, None, 64),
        # A model that is scaled already: its original context, and what is not set of the same type.
        (
            BASE.replace(rope_scaling=lj.RopeScaling("yarn", 2.0, 16, beta_fast=16.0)),
            {"rope_scaling": {"factor": 4.0}},
            lj.RopeScaling("yarn", 4.0, 16, beta_fast=16.0),
            64,
        ),
        (
            BASE.replace(rope_scaling=LLAMA3, max_position_embeddings=256),
            {"rope_scaling": YARN},
            lj.RopeScaling("yarn", 8.0, 32),
            256,
        ),
        (BASE.replace(rope_scaling=LLAMA3), {"rope_scaling": {"rope_type": "default"}}, None, 32),
        (BASE.replace(rope_scaling=LLAMA3), {}, LLAMA3, 32),
        (
            BASE.replace(rope_scaling=LLAMA3, max_position_embeddings=512),
            {"rope_scaling": {"high_freq_factor": 4.0}},
            dataclasses.replace(LLAMA3, high_freq_factor=4.0),
            512,
        ),
        (
            BASE.replace(rope_scaling=lj.RopeScaling("yarn", 2.0, 16, attention_factor=0.9)),
            {"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 64},
            lj.RopeScaling("yarn", 4.0, 16),
            64,
        ),
        (
            BASE.replace(rope_scaling=lj.RopeScaling("yarn", 2.0, 16, attention_factor=0.9)),
            {"rope_scaling": {"beta_slow": 2.0}},
            lj.RopeScaling("yarn", 2.0, 16, attention_factor=0.9, beta_slow=2.0),
            32,
        ),
    ],
)
def test_what_is_not_set_follows_from_the_model(base, settings, scaling, context):
    model = extended(base, **settings)
    assert (model.rope_scaling, model.max_position_embeddings) == (scaling, context)
    assert model.rope_theta == settings.get("rope_theta", base.rope_theta)
    assert model.replace(rope_scaling=None, max_position_embeddings=32, rope_theta=1e4) == BASE


LINEAR = BASE.replace(rope_scaling=lj.RopeScaling("linear", 4.0))


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (BASE, {"rope_scaling": {"factor": 2.0}}, "model.rope_scaling.rope_type is missing"),
        (BASE, {"rope_scaling": {"rope_type": "yarn"}}, "model.rope_scaling.factor is missing"),
        (
            BASE,
            {"rope_scaling": {"rope_type": "ntk", "factor": 0.5}},
            "model.rope_scaling.factor is 0.5; it mu",
        ),
        (
            BASE,
            {"rope_scaling": YARN, "max_position_embeddings": 100},
            "leave it out, or set model.rope_scaling.factor to 3.125",
        ),
        (LINEAR, {"rope_scaling": YARN}, "original_max_position_embeddings is missing, and nothing says"),
        (LINEAR, {"rope_scaling": {"factor": 8.0}}, "original_max_position_embeddings is missing, and"),
        (
            BASE.replace(rope_scaling=lj.RopeScaling("yarn", 4.0, 8)),
            {"max_position_embeddings": 64},
            "scales 8 tokens by 4 to 32; leave",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_an_error(base, settings, message):
    with pytest.raises(ConfigError) as error:
        extended(base, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_new_model_is_scaled_from_the_context_of_its_preset_or_from_what_is_given():
    yarn = RopeScalingConfig(**YARN)
    assert ModelConfig(preset="tiny", rope_scaling=yarn).build().max_position_embeddings == 2048
    with pytest.raises(ConfigError, match=r"original_max_position_embeddings is missing"):
        ModelConfig(rope_scaling=yarn, max_position_embeddings=512).build()
    given = dataclasses.replace(yarn, original_max_position_embeddings=64)
    model = ModelConfig(rope_scaling=given, max_position_embeddings=512).build()
    assert (model.rope_scaling, model.max_position_embeddings) == (lj.RopeScaling("yarn", 8.0, 64), 512)


@pytest.mark.parametrize(
    ("flags", "base", "fix"),
    [
        (["--model.preset", "tiny"], None, "--model.max_position_embeddings 500"),
        (["--model.init_from=x"], BASE, "--model.rope_scaling.rope_type yarn --model.rope_scaling.factor 16"),
        (
            ["--model.init_from=x", "--model.max_position_embeddings=64"],
            BASE,
            "--model.max_position_embeddings 500",
        ),
        (
            ["--model.init_from=x", "--model.rope_scaling={kind='yarn',factor=8}"],
            BASE,
            "--model.rope_scaling.factor 16",
        ),
        (
            ["--model.init_from=x"],
            LINEAR,
            "--model.rope_scaling.factor 63 --model.max_position_embeddings 504",
        ),
    ],
)
@pytest.mark.parametrize("objective", ["pretrain", "sft"])
def test_sequences_beyond_the_context_are_refused_and_the_advice_works(read, flags, base, fix, objective):
    def check(*flags: str) -> int:
        run = read(f"[train]\nseq_len = 500\nobjective = '{objective}'", *flags)
        model = run.model.build() if base is None else run.model.extended(base)
        check_context(run, model)
        return model.max_position_embeddings

    with pytest.raises(ConfigError) as error:
        check(*flags)
    context = check(*flags, "--train.seq_len", "32")
    assert str(error.value) == (
        f"train.seq_len is 500 and the model's context (max_position_embeddings) {context}: extend it with "
        f"{fix}, or set train.seq_len to at most {context}"
    )
    assert check(*flags, *fix.split()) >= 500


def started_with(run: RunConfig, model: lj.LlamaConfig) -> StepMetadata:
    record = provenance(
        run, Path("R"), data="d", model=model, spec=TrainableSpec(), base="b", base_model="base"
    )
    return StepMetadata(1, model, {}, {}, json.loads(json.dumps(record)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": RopeScalingConfig("yarn", 4.0)},
            "model.rope_scaling.factor is 4.0 and the run in R was started with 8.0",
        ),
        (
            {"rope_scaling": RopeScalingConfig("ntk", 8.0)},
            'model.rope_scaling.rope_type is "ntk" and the run in R was started with "yarn"',
        ),
        ({}, 'model.rope_scaling.rope_type is "default" and the run in R was started with "yarn"'),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 8.0), "rope_theta": 5e5},
            "model.rope_theta is 500000.0 and the run in R was started with 10000.0",
        ),
    ],
)
def test_a_run_is_resumed_with_the_context_that_it_was_started_with(settings, message):
    run = RunConfig(model=ModelConfig(init_from="base", rope_scaling=RopeScalingConfig(**YARN)))
    started = started_with(run, run.model.extended(BASE))
    assert is_same_model(run, started)
    check_model(run, run.model.extended(BASE), Path("R"), started)
    changed = RunConfig(model=ModelConfig(init_from="base", **settings))
    assert not is_same_model(changed, started)
    with pytest.raises(ConfigError) as error:
        check_model(changed, changed.model.extended(BASE), Path("R"), started)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model on the disk."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_vocabulary(folder / "tok.bin", tiny.PIECES)
    config, params = random_model(3, BASE)
    return lj.save(lj.Model(config, params, load_tokenizer(folder / "tok.bin"), folder), folder / "model")


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_adapter_is_loaded_with_the_context_that_it_was_trained_with(base, kind, tmp_path):
    run = RunConfig(
        model=ModelConfig(init_from=str(base), rope_scaling=RopeScalingConfig(**YARN)),
        adapter=AdapterConfig(type=kind),  # type: ignore[arg-type]
    )
    model = model_config(run, load_tokenizer(base))
    assert model == extended(rope_scaling=YARN)
    spec, params = TrainableSpec.from_config(run, "cpu"), lj.load_params(base)[1]
    trainable = adapters.init(spec.adapter, model, params, jax.random.key(1))
    export_adapter(run, tmp_path / "run", model, spec, trainable, 7)
    (tmp_path / "run" / "config.toml").write_text(to_toml(run))
    assert open_model(tmp_path / "run").config == model
    assert open_model(base, tmp_path / "run" / "adapter").config == model
    assert open_model(base).config == BASE
    logged: list[str] = []
    log_adapter(run, trainable, {"base": params}, logged.append)
    assert "do not record the context" in logged[-1] and len(logged) == 2
    if kind == "lora":
        merged = convert(tmp_path / "run", tmp_path / "merged")
        scaling = json.loads((merged / "config.json").read_text())["rope_scaling"]
        assert scaling["original_max_position_embeddings"] == 32 and scaling["rope_type"] == "yarn"
        assert open_model(merged).config == model
    record = tmp_path / "run" / "adapter" / "origin.json"
    fields = json.loads(record.read_text())
    fields["context"]["rope_scaling"]["factor"] = 0.1
    record.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"origin.json: not the context of a model: .*factor is 0.1"):
        open_model(tmp_path / "run")


def test_a_step_records_the_context_of_its_adapter(base, tmp_path):
    run = RunConfig(
        model=ModelConfig(init_from=str(base), rope_scaling=RopeScalingConfig(**YARN)),
        adapter=AdapterConfig(type="lora"),
    )
    spec, model = TrainableSpec.from_config(run, "cpu"), extended(rope_scaling=YARN)
    record = provenance(run, tmp_path, data="d", model=model, spec=spec, base="b", base_model=str(base))
    fields = {"step": 5, "time": 1e9, "model": dataclasses.asdict(model), "keep": {}, "run": record}
    file = tmp_path / "checkpoints" / "5" / RUN / STEP_METADATA_FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(fields))
    context = read_context(file.parents[1])
    assert WithContext(StoredTensors(open_source(base)), **context).config == model


def test_an_adapter_on_its_base_s_own_context_records_none(base, tmp_path):
    run = RunConfig(model=ModelConfig(init_from=str(base)), adapter=AdapterConfig(type="lora"))
    spec = TrainableSpec.from_config(run, "cpu")
    trainable = adapters.init(spec.adapter, BASE, lj.load_params(base)[1], jax.random.key(1))
    export_adapter(run, tmp_path, BASE, spec, trainable, 7)
    assert "context" not in json.loads((tmp_path / "adapter" / "origin.json").read_text())
    step = provenance(run, tmp_path, data="d", model=BASE, spec=spec, base="b", base_model=str(base))
    assert "context" not in step and "adapter" in step


def test_an_extended_model_computes_what_its_exports_compute(base, tmp_path):
    """Far beyond the original context: the scaling is in config.json, and in GGUF's fields."""
    params = lj.load_params(base)[1]
    tokens = np.random.default_rng(0).integers(3, BASE.vocab_size, (1, 200))
    for kind in ("linear", "yarn", "llama3"):
        model = extended(rope_scaling={"rope_type": kind, "factor": 8.0})
        expected = lj.forward(model, params, tokens)
        for format in ("hf", "gguf") if kind == "yarn" else ("hf",):
            path = lj.save(
                lj.Model(model, params, load_tokenizer(base), base), tmp_path / f"{kind}.{format}", format
            )
            config, loaded = lj.load_params(path)
            assert config.max_position_embeddings == 256
            np.testing.assert_allclose(lj.forward(config, loaded, tokens), expected, rtol=1e-4, atol=1e-4)
