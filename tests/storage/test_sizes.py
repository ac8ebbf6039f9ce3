"""Sizes of files in a folder that another process is changing."""

from __future__ import annotations

import shutil

from llama_jax.storage.sizes import file_sizes


def test_sizes_of_files_by_the_end_of_their_names(tmp_path):
    for name, size in [("a.whl", 3), ("in/b.whl", 5), ("in/c.txt", 7)]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    assert sorted(file_sizes(tmp_path)) == [3, 5, 7]
    assert sorted(file_sizes(tmp_path, ".whl")) == [3, 5]
    assert list(file_sizes(tmp_path / "absent")) == []


def test_what_is_removed_meanwhile_is_left_out(tmp_path):
    for name in ("one", "two", "folder/three"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1234")
    sizes = file_sizes(tmp_path)
    assert next(sizes) == 4  # the top level is listed
    shutil.rmtree(tmp_path)
    assert list(sizes) == []
