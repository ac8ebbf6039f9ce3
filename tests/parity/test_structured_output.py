"""SmolLM2 fills a JSON schema on the command line: the tokens of transformers under outlines-core's masks."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.structured_output.json_schema import regex_of
from llama_jax.structured_output.vocabulary import vocabulary_of
from llama_jax.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
outlines_core = pytest.importorskip("outlines_core")

from tests.parity import hf  # noqa: E402

pytestmark = pytest.mark.parity

CAT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "color": {"enum": ["black", "white", "red"]},
    },
    "required": ["name", "age", "color"],
    "additionalProperties": False,
}
PROMPT = "Describe a cat as JSON: "
NEW = 48


class Guided(transformers.LogitsProcessor):
    """Masks logits by an index of outlines-core, on the host, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt_length: int) -> None:
        tokens: dict[bytes, list[int]] = {}
        for id, piece in enumerate(vocabulary_of(tokenizer).pieces):
            if piece:
                tokens.setdefault(piece, []).append(id)
        vocabulary = outlines_core.Vocabulary(tokenizer.eos_id, tokens)
        self.guide = outlines_core.Guide(outlines_core.Index(regex_of(CAT), vocabulary))
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.prompt_length:
            self.guide.advance(int(input_ids[0, -1]))
        masked = torch.full_like(scores, -torch.inf)
        allowed = self.guide.get_tokens()
        masked[0, allowed] = scores[0, allowed]
        return masked


def test_smollm2_fills_a_schema(
    smollm2: lj.Model, smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cat.json"
    file.write_text(json.dumps(CAT))
    args = ["generate", str(smollm2_path), "--prompt", PROMPT, "--json-schema", str(file), "--json"]
    assert cli.main([*args, "--max-new-tokens", str(NEW)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finish_reason"] == "stop"
    cat = json.loads(found["text"])
    jsonschema.validate(cat, CAT)
    assert list(cat) == list(CAT["properties"])

    ids, tokenizer = smollm2.encode_prompt(PROMPT), smollm2.tokenizer
    model = hf.model(smollm2.config, smollm2.params)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
            logits_processor=[Guided(tokenizer, len(ids))],
        )
    assert out[0, len(ids) :].tolist() == found["tokens"]
