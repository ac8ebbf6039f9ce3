"""Compiled programs are kept in the cache folder, apart for each kind of CPU."""

from __future__ import annotations

import jax
import pytest

from llama_jax.console import compilation_cache


@pytest.fixture
def settings(monkeypatch):
    made = {}
    monkeypatch.setattr(jax.config, "update", made.__setitem__)
    return made


def test_programs_are_kept_in_the_cache_folder(settings, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    compilation_cache.keep_compiled_programs()
    (folder,) = settings.values()
    assert folder.startswith(str(tmp_path / "compiled"))


def test_another_kind_of_cpu_has_another_folder(settings, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.keep_compiled_programs()
    here = settings["jax_compilation_cache_dir"]
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "pdp11")
    compilation_cache.keep_compiled_programs()
    assert settings["jax_compilation_cache_dir"] != here


def test_the_users_own_folder_is_left_alone(settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    compilation_cache.keep_compiled_programs()
    assert not settings


def test_without_a_home_nothing_is_kept(settings, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "~nobody-has-this-name/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.keep_compiled_programs()
    assert not settings
