"""The persistent compilation cache is in the cache directory, with one subdirectory per CPU type."""

from __future__ import annotations

import jax
import pytest

from llama_jax.console import compilation_cache


@pytest.fixture
def settings(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    return updates


def test_cache_directory(settings, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    compilation_cache.enable_compilation_cache()
    (folder,) = settings.values()
    assert folder.startswith(str(tmp_path / "compiled"))


def test_cpu_types_have_separate_directories(settings, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.enable_compilation_cache()
    here = settings["jax_compilation_cache_dir"]
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "pdp11")
    compilation_cache.enable_compilation_cache()
    assert settings["jax_compilation_cache_dir"] != here


def test_user_setting_takes_precedence(settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    compilation_cache.enable_compilation_cache()
    assert not settings


def test_without_a_home_directory_the_cache_is_disabled(settings, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "~nobody-has-this-name/cache")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.enable_compilation_cache()
    assert not settings
