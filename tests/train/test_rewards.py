"""Reward functions: built-in ones, and others in processes, which raise, hang, die or return nonsense."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.train.config.rl import RLConfig
from llama_jax.train.rl import builtin_rewards
from llama_jax.train.rl.rewards import Completions, RewardError, Rewards, names_of

FUNCTIONS = """
import os, time
print("imported")
def length(completions, **_):
    print("called")
    return [len(text) for text in completions]
def of_column(completions, number, prompts, **_):
    return [n if p.startswith("p") else None for n, p in zip(number, prompts, strict=True)]
def raises_on_b(completions, **_):
    if "b" in completions:
        raise RuntimeError("no b")
    return [2.0] * len(completions)
def hangs_on_b(completions, **_):
    if "b" in completions:
        time.sleep(60)
    return [3.0] * len(completions)
def dies_on_b(completions, **_):
    if "b" in completions:
        os._exit(3)
    return [4.0] * len(completions)
def short(completions, **_):
    return [0.0]
def nan(completions, **_):
    return [float("nan")] * len(completions)
def words(completions, **_):
    return ["good"] * len(completions)
def one(completions, **_):
    return 1.0
def always(completions, **_):
    raise KeyError("answer")
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


def batch(texts: str = "abc") -> Completions:
    return Completions(
        prompts=["p1", "q2", "p3"][: len(texts)],
        completions=list(texts),
        completion_ids=[[1], [2], [3]][: len(texts)],
        columns={"number": [5, 6, 7][: len(texts)]},
        places=lambda i: f"prompts.jsonl:{i + 1}",
    )


def test_functions_are_called_with_prompts_completions_and_columns(functions):
    specs = (f"{functions}:length", f"{functions}:of_column")
    lines: list[str] = []
    with Rewards(RLConfig(specs), lines.append) as rewards:
        scores = rewards(batch())
    np.testing.assert_array_equal(scores, [[1, 5], [1, math.nan], [1, 7]])
    assert names_of((*specs, "other.py:length", "format:a:b")) == [
        "length",
        "of_column",
        "length_2",
        "format",
    ]
    assert not lines


@pytest.mark.parametrize(
    ("name", "what", "good"),
    [
        ("raises_on_b", "raised RuntimeError: no b", 2.0),
        ("hangs_on_b", "took more than 0.5 s (rl.reward_timeout)", 3.0),
        ("dies_on_b", "ended its process", 4.0),
    ],
)
def test_a_failing_reward_is_named_with_its_example_and_scored_by_the_rule(functions, name, what, good):
    lines: list[str] = []
    spec = f"{functions}:{name}"
    with Rewards(RLConfig((spec,), reward_timeout=0.5, failed_reward=-1.0), lines.append) as rewards:
        assert rewards(batch())[:, 0].tolist() == [good, -1.0, good]
        assert lines == [
            f"prompts.jsonl:2: the reward function {spec!r} {what}; scored -1 (rl.failed_reward)"
        ]
        assert rewards(batch("ac"))[:, 0].tolist() == [good, good]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"short' returned 1 rewards for 3 completions; it must return one for each"),
        ("nan", r"nan' returned nan as a reward; it must be a finite number, or None"),
        ("words", r"words' returned str 'good' as a reward; it must be a number, or None"),
        ("one", r"one' returned a value of type float; it must return a list of numbers"),
        ("always", r"prompts.jsonl:1: .*always' raised KeyError: 'answer', and on every other example"),
    ],
)
def test_what_is_no_reward_stops_the_run(functions, name, message):
    with (
        Rewards(RLConfig((f"{functions}:{name}",)), print) as rewards,
        pytest.raises(RewardError, match=message),
    ):
        rewards(batch())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.at_all:f", r"'nowhere.at_all:f' cannot be imported \(ModuleNotFoundError: No module named"),
        ("math:no_such_reward", r"math has no function 'no_such_reward'"),
        ("missing.py:f", r"no such file as missing.py"),
        ("exact", r"not a built-in reward \(exact_match, "),
        ("overlong:3", r"overlong needs two numbers of tokens"),
        ("format:(", r"cannot be imported"),
    ],
)
def test_functions_that_cannot_be_imported_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        Rewards(RLConfig((spec,)), print)


@pytest.mark.parametrize(
    ("spec", "completion", "answer", "expected"),
    [
        ("exact_match", " 42 ", "42", 1),
        ("exact_match", "42.", "42", 0),
        ("numeric_match", "12 + 30 = 42", 42, 1),
        ("numeric_match", "it is 1,042.50", "#### 1042.5", 1),
        ("numeric_match", "42 and then 7", "42", 0),
        ("numeric_match", "none", "none", 0),
        ("format:<a>.*</a>", "<a>x\ny</a>", "", 1),
        ("format:<a>.*</a>", "so: <a>x</a>", "", 0),
    ],
)
def test_built_in_rewards(spec: str, completion: str, answer: Any, expected: float):
    function = builtin_rewards.find(spec)
    assert function is not None
    messages = [{"role": "assistant", "content": completion}]
    for given in (completion, messages):
        assert function(completions=[given], answer=[answer], completion_ids=[[]], prompts=[""]) == [expected]


def test_overlong_completions_are_punished_softly():
    function = builtin_rewards.find("overlong:10,4")
    assert function is not None
    ids = [[0] * n for n in (3, 6, 8, 10, 20)]
    assert function(completion_ids=ids, completions=[""] * 5) == [0, 0, -0.5, -1, -1]


def test_processes_end_with_their_context(functions):
    with Rewards(RLConfig((f"{functions}:length",)), print) as rewards:
        process = rewards._functions[0]._process
        assert process is not None and process.poll() is None
    assert process.poll() is not None
    assert Path(functions).exists()
