"""Encoded examples for SmolLM2 and Llama 2: ids, mask, and truncation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_jax.chat import chat_template, encode_chat, encode_turns
from llama_jax.errors import DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.examples import EncodedExample, ExampleEncoder
from llama_jax.train.data.formats import RecordFormats
from llama_jax.train.data.records import BadRecord, TooLongRecord

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama2" / "tokenizer.model")


def encoded(
    tokenizer: Tokenizer, objective, row, seq_len=100, too_long="drop", template=True
) -> EncodedExample:
    chosen = chat_template(tokenizer) if template else None
    formats = RecordFormats(objective, "text", template, ("bad", "good"))
    encode = ExampleEncoder(Encoder(tokenizer), chosen, objective, seq_len, too_long)
    return encode(formats.read(formats.detect(row), row))


def decode_segments(tokenizer: Tokenizer, example: EncodedExample) -> list[tuple[str, str]]:
    """The prompt and the masked text of each segment."""
    texts = []
    for segment in example.segments:
        assert segment.ids.dtype == segment.mask.dtype == np.int32
        begin = int(segment.mask.argmax())
        parts = segment.ids[:begin], segment.ids[segment.mask > 0]
        texts.append(tuple(tokenizer.decode(part, skip_special_tokens=False) for part in parts))
    return texts


CASES = [
    ({"prompt": "2 + 2 =", "completion": " 4"}, "<s> 2 + 2 =", "4</s>"),
    (
        {"prompt": "2 + 2 = ", "completion": "four"},
        "<s> 2 + 2 = ",
        "four</s>",
    ),  # the space stays with the prompt
    ({"prompt": "un", "completion": "happy </s>"}, "<s> un", "happy </s>"),  # one EOS
    ({"prompt": "", "completion": "all"}, "<s>", "all</s>"),
    ({"text": "all of it"}, "<s>", "all of it</s>"),
]


@pytest.mark.parametrize(("row", "given", "learned"), CASES)
def test_plain_text_starts_with_the_prompt_of_generate(llama2, row, given, learned):
    example = encoded(llama2, "sft", row)
    assert decode_segments(llama2, example) == [(given, learned)]
    prompt = llama2.encode(row.get("prompt", ""))
    assert example.segments[0].ids[: len(prompt)].tolist() == prompt
    assert example.segments[0].ids.tolist().count(llama2.eos_id) == 1


def test_a_vocabulary_without_bos_learns_all_but_the_first_token(smollm2_vocabulary):
    (segment,) = encoded(smollm2_vocabulary, "sft", {"text": "one two three"}).segments
    assert segment.ids.tolist() == [*smollm2_vocabulary.encode("one two three"), smollm2_vocabulary.eos_id]
    assert segment.mask.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("row", [{"messages": HI}, {"instruction": "hi", "output": "Hello!"}])
def test_conversations_go_through_the_template(smollm2_vocabulary, row):
    example = encoded(smollm2_vocabulary, "sft", row)
    ((given, learned),) = decode_segments(smollm2_vocabulary, example)
    assert given.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert learned == "Hello!<|im_end|>"


def test_a_pair_is_two_segments_with_one_prompt(smollm2_vocabulary):
    row = {
        "prompt": HI[:1],
        "chosen": HI[1:],
        "rejected": [{"role": "assistant", "content": "Go"}],
        "margin": 0.5,
    }
    example = encoded(smollm2_vocabulary, "dpo", row)
    (given, chosen), (again, rejected) = decode_segments(smollm2_vocabulary, example)
    assert given == again
    assert (chosen, rejected, example.value) == ("Hello!<|im_end|>", "Go<|im_end|>", 0.5)


def test_classifier_inputs_end_as_in_hugging_face(llama2, smollm2_vocabulary):
    (segment,) = encoded(llama2, "classify", {"text": "fine", "label": 1}).segments
    assert segment.ids.tolist() == llama2.encode("fine")
    assert segment.mask.tolist() == [0] * (len(segment) - 1) + [1]
    (segment,) = encoded(smollm2_vocabulary, "regress", {"messages": HI, "label": 1}).segments
    template = chat_template(smollm2_vocabulary)
    assert segment.ids.tolist() == encode_chat(smollm2_vocabulary, template, HI, False)


def test_messages_without_a_template(llama2):
    names = "llama-2, llama-3, mistral, chatml or a Jinja file"
    message = rf"the model has no chat template; set data\.template to {names}"
    with pytest.raises(DataError, match=message):
        encoded(llama2, "sft", {"messages": HI}, template=False)


# Bad examples


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"messages": [*HI, *HI[1:]]}, "refused conversation", "refuses these messages: after an optional"),
        ({"messages": HI[1:]}, "refused conversation", "refuses these messages"),
    ],
)
def test_conversations_that_the_template_refuses(llama2, row, reason, message):
    with pytest.raises(BadRecord, match=message) as raised:
        encoded(llama2, "sft", row)
    assert raised.value.reason == reason


def test_answers_with_the_same_encoding(llama2):
    """Llama 2's template strips them."""
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", "a "))
    }
    with pytest.raises(BadRecord, match="chosen and rejected are encoded as the same tokens"):
        encoded(llama2, "dpo", {"prompt": HI[:1], **answers})


def test_a_template_timeout_is_retried(llama2, monkeypatch):
    """Rendering has a timeout, and is retried: a timeout must not change the batches."""
    late = [TokenizerError("took more than 2 s")]

    def encode(*args, **settings):
        if late:
            raise late.pop()
        return encode_turns(*args, **settings)

    expected = decode_segments(llama2, encoded(llama2, "sft", {"messages": HI}))
    monkeypatch.setattr("llama_jax.train.data.sides.encode_turns", encode)
    assert decode_segments(llama2, encoded(llama2, "sft", {"messages": HI})) == expected
    late += [TokenizerError("took more than 2 s")] * 2
    with pytest.raises(BadRecord, match="took more than 2 s"):
        encoded(llama2, "sft", {"messages": HI})


# Too long


def words(count: int, word: str = "a") -> str:
    return f" {word}" * count


def too_long(message, *args, **settings):
    with pytest.raises(TooLongRecord, match=message) as raised:
        encoded(*args, **settings)
    assert raised.value.reason == "too long"


def test_an_example_that_fits_exactly_is_unchanged(llama2):
    row = {"prompt": "hi", "completion": words(10)}
    whole = encoded(llama2, "sft", row)
    for rule in ("drop", "truncate", "fail"):
        assert len(encoded(llama2, "sft", row, seq_len=len(whole), too_long=rule)) == len(whole)
    too_long(f"{len(whole)} tokens, and train.seq_len is 10", llama2, "sft", row, seq_len=10)


def test_truncation_cuts_the_end_of_the_answer(llama2):
    row = {"prompt": "hi", "completion": words(10)}
    (whole,), (cut,) = (
        encoded(llama2, "sft", row, seq_len=n, too_long="truncate").segments for n in (100, 7)
    )
    assert cut.ids.tolist() == whole.ids[:7].tolist()
    assert cut.mask.tolist() == whole.mask[:7].tolist()
    row = {"prompt": words(10), "completion": " b"}
    too_long("truncation leaves nothing to train on", llama2, "sft", row, seq_len=11, too_long="truncate")


@pytest.mark.parametrize(
    ("chosen", "rejected", "lengths"), [(10, 10, (5, 5)), (10, 3, (6, 4)), (2, 30, (3, 7))]
)
def test_truncation_of_a_pair_shares_the_remaining_room(llama2, chosen, rejected, lengths):
    row = {"prompt": "hi", "chosen": words(chosen), "rejected": words(rejected, "b")}
    prompt = len(llama2.encode("hi"))
    example = encoded(llama2, "dpo", row, seq_len=10 + 2 * prompt, too_long="truncate")
    assert tuple(len(segment) - prompt for segment in example.segments) == lengths
    assert all(
        segment.mask.tolist() == [0] * prompt + [1] * (len(segment) - prompt) for segment in example.segments
    )


def test_truncation_that_leaves_no_pair(llama2):
    row = {"prompt": "hi", "chosen": words(10) + " b", "rejected": words(10) + " c"}
    too_long("are the same after truncation", llama2, "dpo", row, seq_len=16, too_long="truncate")
    row = {"prompt": words(20), "chosen": " b", "rejected": " c"}
    too_long("the prompt leaves no room", llama2, "reward", row, seq_len=16, too_long="truncate")


def test_truncation_keeps_a_label_at_the_last_token(llama2):
    row = {"text": words(20), "label": 1}
    (segment,) = encoded(llama2, "classify", row, seq_len=6, too_long="truncate").segments
    assert segment.ids.tolist() == llama2.encode(words(20))[:6]
    assert segment.mask.tolist() == [0] * 5 + [1]
