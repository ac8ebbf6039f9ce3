"""`HarnessModel` gives what lm-eval's own `hf` model gives: scores, answers and prompts; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from benchmarks.eval_vs_lm_eval import TASKS, write_tasks
from llama_jax import cli
from llama_jax.eval.windows import Window, sliding_windows

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.parity

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Lima."},
    {"role": "user", "content": " And who? "},
]
TEXTS = (
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris, of course"),  # the space is the continuation's
    ("", "Paris is a city."),
    ("One two three four five", " six"),
    ("One two three four five", " six seven"),
    ("One two three four five", " seven"),
    ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"),
    ("word " * 200, " and so on"),  # more than `max_length`: its first tokens are cut
    ("x", " much longer than its context" * 8),
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), count=8, people=4)


@pytest.fixture(scope="module")
def small(smollm2, tmp_path_factory) -> Path:
    """A small random model with SmolLM2's vocabulary."""
    config = smollm2.config.replace(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=1024,
    )
    params = jax.tree.map(lambda x: 8 * x, lj.init(config, jax.random.key(1)))
    model = lj.Model(config, params, smollm2.tokenizer, smollm2.path)
    return lj.save(model, tmp_path_factory.mktemp("small") / "hf", format="hf")


def hf(path: Path, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(path), device="cpu", dtype="float32", **{"batch_size": 4, **settings})


def ours(path: Path, **settings: Any) -> Any:
    from llama_jax.eval.harness import HarnessModel

    return HarnessModel(lj.load(path, scan_layers=False), **{"batch_size": 4, **settings})


@pytest.fixture(scope="module")
def pair(small) -> tuple[Any, Any]:
    return hf(small), ours(small)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, 0, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


def evaluate(model: Any, folder: Path, **settings: Any) -> dict[str, Any]:
    from llama_jax.eval.tasks import evaluate_tasks, load_tasks

    return evaluate_tasks(model, load_tasks([str(folder)]), log_samples=True, **settings)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same prompts, answers and scores, to 1e-3."""
    assert found["results"].keys() == expected["results"].keys()
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, abs=1e-3, rel=1e-3), (task, name)
        samples = zip(found["samples"][task], expected["samples"][task], strict=True)
        for one, two in samples:
            assert one["arguments"] == two["arguments"]
            if task == "facts_generate":
                assert one["resps"] == two["resps"]
            elif task == "facts_choice":
                for (a,), (b,) in zip(one["resps"], two["resps"], strict=True):
                    assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]


@pytest.mark.parametrize(
    "settings", [{}, {"num_fewshot": 2}, {"num_fewshot": 2, "limit": 3, "chat": True, "multiturn": True}]
)
def test_tasks_score_as_with_hf(pair, tasks, settings):
    theirs, mine = (evaluate(model, tasks, **settings) for model in pair)
    assert_same(mine, theirs)
    assert len(theirs["samples"]["facts_choice"]) == settings.get("limit", 8)


def test_smollm2_scores_as_with_hf(smollm2, tasks, tmp_path):
    path = lj.save(smollm2, tmp_path / "hf", format="hf")
    theirs, mine = (evaluate(make(path), tasks, limit=2) for make in (hf, ours))
    assert_same(mine, theirs)
    assert mine["results"]["facts_rolling"]["bits_per_byte,none"] < 1.5  # it knows English


def test_log_likelihoods_are_those_of_hf(small):
    requests = instances("loglikelihood", *TEXTS)
    theirs, mine, one = (
        make(small, max_length=128, **rest).loglikelihood(requests)
        for make, rest in ((hf, {}), (ours, {}), (ours, {"batch_size": 1}))
    )
    for a, b, c in zip(theirs, mine, one, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
        assert c[0] == pytest.approx(b[0], abs=1e-4) and c[1] == b[1]


def test_rolling_log_likelihoods_are_those_of_hf(small):
    requests = instances("loglikelihood_rolling", ("The quick brown fox. " * 30,), ("Hello",))
    theirs, mine = (make(small, max_length=64).loglikelihood_rolling(requests) for make in (hf, ours))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_rolling_windows_are_sliding_windows_without_overlap():
    from lm_eval.utils import get_rolling_token_windows

    for count in (1, 7, 8, 9, 16, 29):
        ids = list(range(1, count + 1))
        rolling = get_rolling_token_windows(ids, prefix_token=0, max_seq_len=8, context_len=1)
        assert [Window(*w) for w in rolling] == list(sliding_windows(ids, 0, 8, 8))


def test_generation_is_that_of_hf(pair):
    greedy = {"do_sample": False, "max_gen_toks": 20}
    letters = {**greedy, "until": ["e", "an"]}
    prompts = ("Once upon a time", "A", "The cat sat on the mat, and then")
    arguments = [(prompt, dict(kwargs)) for kwargs in (greedy, letters) for prompt in prompts]
    theirs, mine = (model.generate_until(instances("generate_until", *arguments)) for model in pair)
    assert mine == theirs
    assert any(mine[n] != mine[n + 3] for n in range(3)) and not any("e" in text for text in mine[3:])


def test_sampled_texts_differ_by_seed_alone(pair):
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    requests = [instances("generate_until", ("Once", {**kwargs, "seed": seed})) for seed in (1, 1, 2)]
    first, again, other = (pair[1].generate_until(request)[0] for request in requests)
    assert first == again != other


@pytest.mark.parametrize("history", [CHAT[:2], CHAT, CHAT[1:3], CHAT[:3]])
def test_chats_are_rendered_as_by_hf(pair, history):
    for is_open in (True, False):
        theirs, mine = (model.apply_chat_template(history, add_generation_prompt=is_open) for model in pair)
        assert mine == theirs
    assert pair[0].chat_template(True) == pair[1].chat_template(True)


def test_the_name_and_the_class_are_lm_evals_doors(small, pair, tasks, monkeypatch):
    import lm_eval.tasks

    import llama_jax.eval.harness  # noqa: F401  # registers the name

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # seconds: pip's list of packages
    manager = lm_eval.tasks.TaskManager(include_defaults=False)  # seconds, too
    given = {"tasks": [str(tasks / "facts_choice.yaml")], "task_manager": manager}
    given |= {"limit": 2, "bootstrap_iters": 0, "batch_size": 4}
    named = lm_eval.simple_evaluate("llama_jax", {"pretrained": str(small)}, **given)
    made = lm_eval.simple_evaluate(pair[1], **given)
    assert named["results"] == made["results"]


@pytest.mark.parametrize(
    ("settings", "kwargs", "message"),
    [
        ({"max_length": 5000}, None, "max_length is 5000; the model's context has 1024 positions"),
        ({"device": "cuda"}, None, "HarnessModel has no argument 'device'"),
        ({"batch_size": "auto"}, None, "batch_size is 'auto'"),
        ({}, {"max_gen_toks": 1024}, "max_gen_toks is 1024, and the model's context 1024"),
        ({}, {"num_beams": 2}, "generation_kwargs has num_beams"),
    ],
)
def test_bad_settings(small, settings, kwargs, message):
    with pytest.raises(lj.LlamaJaxError, match=message):
        ours(small, **settings).generate_until(instances("generate_until", ("x", kwargs)))


@pytest.fixture
def run(capsys):
    def run(*args):
        status = cli.main(["eval", *map(str, args)])
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return run


def test_the_command_prints_scores_and_writes_samples(run, small, pair, tasks, tmp_path):
    done = run(
        small, "--tasks", tasks, "--json", "--log-samples", "--out", tmp_path / "out", "--batch-size", 4
    )
    report, expected = json.loads(done.out), evaluate(pair[1], tasks)
    assert done.status == 0
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert report["results"][task][name] == pytest.approx(value, abs=1e-3)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report
    for task in TASKS:
        lines = (tmp_path / "out" / f"samples_{task}.jsonl").read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in lines] == list(range(8))
    table = run(small, "--tasks", tasks / "facts_choice.yaml", "--limit", 2).out
    assert "facts_choice" in table and "acc_norm" in table


def test_bad_tasks(run, small, tasks, tmp_path):
    def error(*args: Any) -> str:
        done = run(small, "--tasks", *args)
        assert (done.status, done.out) == (2, "")
        # The command turns lm-eval's bars off, which has no effect where tqdm is imported already.
        (line,) = (line for line in done.err.splitlines() if line and "it/s]" not in line)
        assert line.startswith("error: ")
        return line

    assert "there is no task 'helaswag'" in (line := error("helaswag")) and "did you mean hellaswag?" in line
    assert "its dataset is not on this disk: --download fetches it" in error("hellaswag")
    assert "nowhere.yaml: there is no such task file" in error("nowhere.yaml")
    assert "given twice" in error(f"{tasks},{tasks / 'facts_choice.yaml'}")
    (tmp_path / "empty").mkdir()
    assert "describes a task" in error(tmp_path / "empty")
    choice, generate = ((tasks / f"facts_{kind}.yaml").read_text() for kind in ("choice", "generate"))
    question = json.loads((tasks / "questions.jsonl").read_text().splitlines()[-1])["question"]
    last = f"{{{{passage.x.y if question == '{question}' else passage}}}}"  # lm-eval tries the first one
    for name, text, part in (
        ("broken", "task: [", "cannot be loaded"),
        ("shape", "a: b", "cannot be loaded: ValueError: Unknown config shape"),
        ("nodata", choice.replace("questions", "nothing"), "cannot be loaded: FileNotFoundError"),
        ("field", choice.replace("doc_to_choice: choices", "doc_to_choice: x"), "correct the file"),
        (
            "template",
            generate.replace("{{passage}}", last),
            "UndefinedError: 'str object' has no attribute 'x'",
        ),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        assert part in error(tmp_path / f"{name}.yaml", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
