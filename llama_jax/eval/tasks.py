"""Tasks of lm-evaluation-harness, by name or from files: loaded without the network, and evaluated.

Needs the `eval` extra.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import importlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from llama_jax.errors import InputError, LlamaJaxError
from llama_jax.eval.harness import HarnessModel

TaskDict = dict[str, Any]  # as `TaskManager.load` returns it
_SUFFIXES = (".yaml", ".yml")
_SEED = 1234  # lm-eval's own default, of the few-shot examples too
_BOOTSTRAP = 1000  # draws for the deviation of a metric that has no closed form


def load_tasks(names: Sequence[str], *, download: bool = False) -> TaskDict:
    """Loads tasks with their data.

    Args:
      names: of tasks, groups and tags that lm-eval knows, with `*` for several; paths of YAML files; folders,
        of which all tasks are meant.
      download: whether a dataset that is not on disk is fetched from the Hugging Face Hub. Otherwise the
        network is not touched.

    Returns:
      What `lm_eval.evaluate` takes.

    Raises:
      InputError: for a task that is unknown, given twice, or cannot be loaded, by its name.
    """
    folders = [name for name in names if Path(name).is_dir()]
    by_name = [name for name in names if name not in folders and not name.endswith(_SUFFIXES)]
    manager = (
        _known_tasks()
        if by_name and not folders
        else TaskManager(include_path=folders, include_defaults=bool(by_name))
    )
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        for spec in _specs(name, manager, is_folder=name in folders):
            with _network(download):
                found = _load(manager, spec, download)
            _check_kinds(found["tasks"])
            if twice := set(found["tasks"]) & set(loaded["tasks"]):
                raise InputError(f"task {sorted(twice)[0]} is given twice, last as {name!r}; give it once")
            for kind, entries in found.items():
                loaded[kind] |= entries
    return loaded


@functools.cache  # seconds: 14,000 files
def _known_tasks() -> TaskManager:
    return TaskManager()


def _specs(name: str, manager: TaskManager, *, is_folder: bool) -> list[str]:
    """What a name stands for, as `TaskManager.load` takes it."""
    if is_folder:
        inside = TaskManager(include_path=name, include_defaults=False).all_subtasks
        if not inside:
            raise InputError(f"{name}: no YAML file in this folder describes a task; give another one")
        return list(inside)
    if name.endswith(_SUFFIXES):
        if not Path(name).is_file():
            raise InputError(f"{name}: there is no such task file; check the path")
        return [name]
    if Path(name).is_file():
        raise InputError(f"{name}: is no YAML file; give the task's description, which names its data")
    matching = [known for known in manager.all_tasks if fnmatch.fnmatchcase(known, name)]
    if not matching:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists them"
        raise InputError(f"there is no task {name!r} in lm-eval, nor a file or folder of this name; {hint}")
    return matching


def _load(manager: TaskManager, spec: str, download: bool) -> TaskDict:
    try:
        return dict(manager.load([spec]))
    except Exception as error:
        hint = "correct the file" if spec.endswith(_SUFFIXES) else "check its data"
        if not download and _is_offline(error):
            hint = "its dataset is not on this disk: --download fetches it"
        raise InputError(f"task {spec}: cannot be loaded: {_reason(error)}; {hint}") from None


def _check_kinds(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"task {name} runs code that the model writes; run it where that is safe, by "
                "lm_eval.simple_evaluate(..., confirm_run_unsafe_code=True)"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name} has images or sounds, which this model does not read")


def _is_offline(error: BaseException | None) -> bool:
    """Whether an error comes of the network that is not touched."""
    while error is not None:
        if isinstance(error, ConnectionError) or any(word in str(error) for word in ("ffline", " Hub")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Keeps the libraries that load data and metrics off the network, and quiet."""
    datasets: Any = importlib.import_module("datasets")
    quiet = datasets.are_progress_bars_disabled()
    switches: list[tuple[Any, str]] = [
        (importlib.import_module("datasets.config"), "HF_HUB_OFFLINE"),
        (importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE"),
        (importlib.import_module("evaluate.config"), "HF_EVALUATE_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in switches]
    try:
        datasets.disable_progress_bars()
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value or not allowed)  # read at each request
        yield
    finally:
        if not quiet:
            datasets.enable_progress_bars()
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def evaluate_tasks(
    model: HarnessModel,
    tasks: TaskDict,
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    log_samples: bool = False,
    chat: bool = False,
    multiturn: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Evaluates a model on tasks, with lm-eval's own seeds; the arguments are those of `simple_evaluate`.

    Args:
      model: what is evaluated.
      tasks: from `load_tasks`.
      num_fewshot: examples before each question, except in tasks that always have none.
      limit: the first questions of each task; below 1, a share of them.
      log_samples: whether the result has every question and answer.
      chat: whether prompts are conversations in the model's chat template.
      multiturn: whether the examples are turns of the conversation.
      system: its system message.

    Returns:
      What `lm_eval.evaluate` returns.

    Raises:
      InputError: for a task whose questions or answers cannot be read, by its name.
    """
    random.seed(0)
    np.random.seed(_SEED)  # noqa: NPY002  # what tasks draw from
    for name, task in tasks["tasks"].items():
        own = task.get_config("num_fewshot")
        shots = own if own == 0 or num_fewshot is None else num_fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_SEED)
        for method in ("build_all_requests", "process_results"):
            setattr(task, method, _explained(getattr(task, method), name))
    # lm-eval would fork this process, whose threads are XLA's.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):
        results: Any = evaluator.evaluate(
            model,
            tasks,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            log_samples=log_samples,
            system_instruction=system,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
        )
    return dict(results)


def _explained(method: Callable[..., Any], task: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def explained(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except LlamaJaxError:
            raise
        except Exception as error:
            raise InputError(
                f"task {task}: {_reason(error)} in {method.__name__}; correct its file or its data"
            ) from None

    return explained


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON does not have, and text for other objects."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
