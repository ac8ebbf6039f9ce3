"""A finetuned run, converted with the commands of docs/export.md, says elsewhere what it says here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import llama_jax as lj
from llama_jax.cli import main

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

pytestmark = pytest.mark.parity

MESSAGES = [{"role": "user", "content": "Where do whales live?"}]
PROMPT, COUNT = "Once upon a time, there was a whale who", 24
CONFIG = """\
[model]
init_from = "smollm2-135m"
[data]
files = "{folder}/chats.jsonl"
validation_fraction = 0
[train]
objective = "sft"
run_dir = "{folder}/run"
steps = 3
global_batch_size = 2
seq_len = 48
dtype = "float32"
[adapter]
type = "lora"
[optimizer]
learning_rate = 1e-2
warmup_steps = 0
[eval]
every = 0
max_new_tokens = 0
[log]
tensorboard = false
plot = false
"""
# What vLLM's LlamaForCausalLM has parameters for; q, k, v and gate, up are joined as they are read.
VLLM = re.compile(
    r"(model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|"
    r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))|lm_head)\.weight"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    chats = [[*MESSAGES, {"role": "assistant", "content": f"In the {where}."}] for where in ("sea", "ocean")]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    # In a process of its own, which has one device: eight simulated ones take ten times as long.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "llama_jax", "train", str(folder / "run.toml")]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


@pytest.fixture(scope="module")
def here(run: Path) -> dict[str, Any]:
    """What the run itself continues, in tokens and in a chat."""
    model, plain = lj.load(run, dtype="float32"), lj.load("smollm2-135m", dtype="float32")
    prompt = model.tokenizer.encode(PROMPT)
    chat = lj.Conversation(model)
    said = "".join(chat.say(MESSAGES[0]["content"], max_new_tokens=COUNT, temperature=0.0))
    told = model.generate(PROMPT, max_new_tokens=COUNT, temperature=0.0)
    assert told != plain.generate(PROMPT, max_new_tokens=COUNT, temperature=0.0)  # it learned something
    return {"prompt": prompt, "told": told, "said": said}


def test_hugging_face_says_the_same(run: Path, here: dict[str, Any], tmp_path: Path) -> None:
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "hf", "--dtype", "float32"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)

    def continued(ids: Any) -> str:
        ids = torch.tensor([ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    assert tokenizer.encode(PROMPT) == here["prompt"]
    assert continued(here["prompt"]) == here["told"]
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert continued(tokenizer.encode(rendered)).strip() == here["said"].strip()


def test_llama_cpp_says_the_same(run: Path, here: dict[str, Any], tmp_path: Path) -> None:
    from tests.parity.test_gguf import LlamaCpp  # skips where xllamacpp is not installed

    assert main(["convert", str(run), str(tmp_path / "mine.gguf"), "--dtype", "float32"]) == 0
    server = LlamaCpp(tmp_path / "mine.gguf")
    plain = server.ask("v1/completions", prompt=here["prompt"], max_tokens=COUNT, temperature=0)
    assert plain["choices"][0]["text"] == here["told"]
    chat = server.ask("v1/chat/completions", messages=MESSAGES, max_tokens=COUNT, temperature=0)
    assert chat["choices"][0]["message"]["content"].strip() == here["said"].strip()


def test_vllm_finds_every_tensor_and_no_other(run: Path, tmp_path: Path) -> None:
    """Its architecture by name, and its parameters; vLLM itself needs an accelerator."""
    assert main(["convert", str(run), str(tmp_path / "out"), "--to", "hf"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()
    names: list[str] = []
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            names += file.keys()
    assert all(VLLM.fullmatch(name) for name in names)
    assert len(names) == 2 + 9 * config["num_hidden_layers"]
