"""A server of a small model, and OpenAI's own client of it."""

import openai
import pytest

from tests.serving import http


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with http.serving(http.load(tmp_path_factory.mktemp("model"))) as running:
        yield running
        running.until_idle()


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client
