"""Stop strings: the same text is shown however it is cut into parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import InputError
from llama_jax.text.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def shown(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    """All that is shown of a text that comes in parts, and whether it was stopped."""
    watch = StopStrings(stops)
    text = "".join(watch.push(part)[0] for part in parts)
    stopped = watch.stopped
    return text + watch.flush(), stopped


def by_definition(stops: list[str], text: str) -> tuple[str, bool]:
    """The text before the first stop string to be complete; of two, before the longer."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(stops=STOPS, text=LETTERS, data=st.data())
def test_any_parts_show_what_the_definition_says(stops, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert shown(stops, parts) == by_definition(stops, text)


@given(stops=STOPS, parts=st.lists(LETTERS))
def test_what_is_held_back_is_the_longest_end_that_may_begin_a_stop_string(stops, parts):
    watch, so_far, told = StopStrings(stops), "", ""
    for part in parts:
        so_far += part
        told += watch.push(part)[0]
        if watch.stopped:
            break
        held = so_far[len(told) :]
        ends = [so_far[len(so_far) - n :] for n in range(1, min(5, len(so_far)) + 1)]
        possible = [end for end in ends if any(stop.startswith(end) for stop in stops)]
        assert held == max(possible, key=len, default="")
        assert told + held == so_far


def test_after_a_stop_string_nothing_is_shown_until_the_next_text():
    watch = StopStrings(["\nUser:"])
    assert watch.push("Hi.\nUs") == ("Hi.", False)
    assert watch.push("er: me") == ("", True)
    assert watch.push("more") == ("", True)
    assert watch.flush() == ""
    assert watch.push("\nUse") == ("", False)
    assert watch.flush() == "\nUse"


def test_of_two_complete_at_once_the_one_that_began_first_counts():
    assert StopStrings(["b", "ab"]).push("xab") == ("x", True)
    assert StopStrings(["abc", "b"]).push("xab") == ("xa", True)  # complete before the other


def test_one_string_is_one_stop_string():
    assert StopStrings("ab").push("a b ab") == ("a b ", True)
    assert StopStrings().push("ab") == ("ab", False)


def test_a_long_hostile_stop_string_takes_linear_work():
    length = 100_000
    watch = StopStrings("a" * length + "b")
    assert watch.push("a" * (length + 7)) == ("a" * 7, False)
    assert watch.push("c") == ("a" * length + "c", False)


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], r"stop_strings\[0\] is empty, and would stop every text; leave it out"),
        (["a", 3], r"stop_strings\[1\] is 3; it must be a string"),
        (3, "stop_strings is '3'; it must be a string, or a list of them"),
        ([["a"]], r"stop_strings\[0\] is \['a'\]; it must be a string"),
    ],
)
def test_bad_stop_strings(stops, message):
    with pytest.raises(InputError, match=message):
        StopStrings(stops)
