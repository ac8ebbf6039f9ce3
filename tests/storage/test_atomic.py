"""Files that appear whole or not at all."""

from __future__ import annotations

import pytest

from llama_jax.errors import InputError
from llama_jax.storage.atomic import atomic_file, write_atomically


@pytest.mark.parametrize("content", ["grün\n", b"\x00\xff"])
def test_what_is_written_is_all_that_is_in_the_folder(tmp_path, content):
    path = tmp_path / "new" / "file"
    for _ in range(2):
        write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as partial:
        partial.write_text("after \ud800", encoding="utf-8")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    path = tmp_path / "file"
    path.symlink_to("victim")
    write_atomically(path, "ours")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not path.is_symlink() and path.read_text() == "ours"


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/inside: cannot be written: \S.*; free some space, or choose"):
        write_atomically(tmp_path / "file" / "inside", "")
