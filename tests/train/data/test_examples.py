"""Examples as SmolLM2 and Llama 2 see them: which ids, which of them count, and what is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_jax.chat import chat_template, encode_chat, encode_turns
from llama_jax.errors import DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.examples import ExampleEncoder, Unit
from llama_jax.train.data.forms import Example, Forms
from llama_jax.train.data.records import BadRecord, TooLongRecord

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama2" / "tokenizer.model")


def encoded(tokenizer: Tokenizer, objective, row, seq_len=100, too_long="drop", template=True) -> Unit:
    chosen = chat_template(tokenizer) if template else None
    forms = Forms(objective, "text", template, ("bad", "good"))
    encode = ExampleEncoder(Encoder(tokenizer), chosen, objective, seq_len, too_long)
    example: Example = forms.read(forms.detect(row), row)
    return encode(example)


def spelled(tokenizer: Tokenizer, unit: Unit) -> list[tuple[str, str]]:
    """Of each segment what is given and what is learned."""
    texts = []
    for segment in unit.segments:
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
    ({"prompt": "un", "completion": "happy </s>"}, "<s> un", "happy </s></s>"),
    ({"prompt": "", "completion": "all"}, "<s>", "all</s>"),
    ({"text": "all of it"}, "<s>", "all of it</s>"),
]


@pytest.mark.parametrize(("row", "given", "learned"), CASES)
def test_plain_text_goes_on_from_what_generate_is_given(llama2, row, given, learned):
    unit = encoded(llama2, "sft", row)
    assert spelled(llama2, unit) == [(given, learned)]
    prompt = llama2.encode(row.get("prompt", ""))
    assert unit.segments[0].ids[: len(prompt)].tolist() == prompt
    assert unit.segments[0].ids.tolist().count(llama2.eos_id) == 1


def test_a_vocabulary_without_bos_learns_all_but_the_first_token(smollm2_vocabulary):
    (segment,) = encoded(smollm2_vocabulary, "sft", {"text": "one two three"}).segments
    assert segment.ids.tolist() == [*smollm2_vocabulary.encode("one two three"), smollm2_vocabulary.eos_id]
    assert segment.mask.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("row", [{"messages": HI}, {"instruction": "hi", "output": "Hello!"}])
def test_conversations_go_through_the_template(smollm2_vocabulary, row):
    unit = encoded(smollm2_vocabulary, "sft", row)
    ((given, learned),) = spelled(smollm2_vocabulary, unit)
    assert given.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert learned == "Hello!<|im_end|>"


def test_a_pair_is_two_segments_with_one_prompt(smollm2_vocabulary):
    row = {
        "prompt": HI[:1],
        "chosen": HI[1:],
        "rejected": [{"role": "assistant", "content": "Go"}],
        "margin": 0.5,
    }
    unit = encoded(smollm2_vocabulary, "dpo", row)
    (given, chosen), (again, rejected) = spelled(smollm2_vocabulary, unit)
    assert given == again
    assert (chosen, rejected, unit.value) == ("Hello!<|im_end|>", "Go<|im_end|>", 0.5)


def test_what_is_classified_ends_as_hugging_faces_does(llama2, smollm2_vocabulary):
    (segment,) = encoded(llama2, "classify", {"text": "fine", "label": 1}).segments
    assert segment.ids.tolist() == llama2.encode("fine")
    assert segment.mask.tolist() == [0] * (len(segment) - 1) + [1]
    (segment,) = encoded(smollm2_vocabulary, "regress", {"messages": HI, "label": 1}).segments
    template = chat_template(smollm2_vocabulary)
    assert segment.ids.tolist() == encode_chat(smollm2_vocabulary, template, HI, False)


def test_messages_without_a_template(llama2):
    message = r"the model came with no chat template; set data\.template to llama-2, chatml or a file"
    with pytest.raises(DataError, match=message):
        encoded(llama2, "sft", {"messages": HI}, template=False)


# What cannot be learned from


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


def test_answers_that_become_the_same(llama2):
    """Llama 2's template strips them."""
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "a"), ("rejected", "a "))
    }
    with pytest.raises(BadRecord, match="chosen and rejected become the same tokens"):
        encoded(llama2, "dpo", {"prompt": HI[:1], **answers})


def test_a_busy_machine_costs_no_record(llama2, monkeypatch):
    """Rendering has a deadline; were it missed by chance, the batches would not be those of the seed."""
    late = [TokenizerError("took more than 2 s")]

    def encode(*args, **settings):
        if late:
            raise late.pop()
        return encode_turns(*args, **settings)

    expected = spelled(llama2, encoded(llama2, "sft", {"messages": HI}))
    monkeypatch.setattr("llama_jax.train.data.examples.encode_turns", encode)
    assert spelled(llama2, encoded(llama2, "sft", {"messages": HI})) == expected
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


def test_what_fits_exactly_is_left_alone(llama2):
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
    too_long("nothing to learn is left", llama2, "sft", row, seq_len=11, too_long="truncate")


@pytest.mark.parametrize(
    ("chosen", "rejected", "lengths"), [(10, 10, (5, 5)), (10, 3, (6, 4)), (2, 30, (3, 7))]
)
def test_truncation_of_a_pair_shares_what_the_prompts_leave(llama2, chosen, rejected, lengths):
    row = {"prompt": "hi", "chosen": words(chosen), "rejected": words(rejected, "b")}
    prompt = len(llama2.encode("hi"))
    unit = encoded(llama2, "dpo", row, seq_len=10 + 2 * prompt, too_long="truncate")
    assert tuple(len(segment) - prompt for segment in unit.segments) == lengths
    assert all(
        segment.mask.tolist() == [0] * prompt + [1] * (len(segment) - prompt) for segment in unit.segments
    )


def test_truncation_that_leaves_no_pair(llama2):
    row = {"prompt": "hi", "chosen": words(10) + " b", "rejected": words(10) + " c"}
    too_long("differ only beyond that", llama2, "dpo", row, seq_len=16, too_long="truncate")
    row = {"prompt": words(20), "chosen": " b", "rejected": " c"}
    too_long("its prompt leaves no room", llama2, "reward", row, seq_len=16, too_long="truncate")


def test_truncation_keeps_a_label_at_the_last_token(llama2):
    row = {"text": words(20), "label": 1}
    (segment,) = encoded(llama2, "classify", row, seq_len=6, too_long="truncate").segments
    assert segment.ids.tolist() == llama2.encode(words(20))[:6]
    assert segment.mask.tolist() == [0] * 5 + [1]
