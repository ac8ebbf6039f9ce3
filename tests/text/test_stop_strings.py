"""Stop strings: the result does not depend on the chunk boundaries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import InputError
from llama_jax.text.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def truncate(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    """The truncated text, pushed in parts, and whether a stop string was found."""
    watcher = StopStrings(stops)
    text = "".join(watcher.push(part)[0] for part in parts)
    stopped = watcher.stopped
    return text + watcher.flush(), stopped


def truncate_reference(stops: list[str], text: str) -> tuple[str, bool]:
    """The text before the first completed stop string; of two, before the longer one."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(stops=STOPS, text=LETTERS, data=st.data())
def test_any_chunks_match_the_reference(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert truncate(stops, parts) == truncate_reference(stops, text)


@given(stops=STOPS, parts=st.lists(LETTERS))
def test_the_buffer_is_the_longest_suffix_that_is_a_prefix_of_a_stop_string(stops, parts):
    watcher, text, released = StopStrings(stops), "", ""
    for part in parts:
        text += part
        released += watcher.push(part)[0]
        if watcher.stopped:
            break
        buffered = text[len(released) :]
        ends = [text[len(text) - n :] for n in range(1, min(5, len(text)) + 1)]
        possible = [end for end in ends if any(stop.startswith(end) for stop in stops)]
        assert buffered == max(possible, key=len, default="")
        assert released + buffered == text


def test_after_a_stop_string_the_text_is_empty_until_flush():
    watcher = StopStrings(["\nUser:"])
    assert watcher.push("Hi.\nUs") == ("Hi.", False)
    assert watcher.push("er: me") == ("", True)
    assert watcher.push("more") == ("", True)
    assert watcher.flush() == ""
    assert watcher.push("\nUse") == ("", False)
    assert watcher.flush() == "\nUse"


def test_of_two_completed_at_once_the_longer_one_matches():
    assert StopStrings(["b", "ab"]).push("xab") == ("x", True)
    assert StopStrings(["abc", "b"]).push("xab") == ("xa", True)  # completed first


def test_a_single_stop_string_and_none():
    assert StopStrings("ab").push("a b ab") == ("a b ", True)
    assert StopStrings().push("ab") == ("ab", False)


def test_a_long_adversarial_stop_string_takes_linear_time():
    length = 100_000
    watcher = StopStrings("a" * length + "b")
    assert watcher.push("a" * (length + 7)) == ("a" * 7, False)
    assert watcher.push("c") == ("a" * length + "c", False)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], r"stop_strings\[0\] is empty and would match everywhere; leave it out"),
        (["a", 3], r"stop_strings\[1\] is 3; it must be a string"),
        (3, "stop_strings is '3'; it must be a string, or a list of them"),
        ([["a"]], r"stop_strings\[0\] is \['a'\]; it must be a string"),
    ],
)
def test_bad_stop_strings(stops, message):
    with pytest.raises(InputError, match=message):
        StopStrings(stops)
