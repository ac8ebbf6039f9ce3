"""Live comparison of distillation with TRL's losses, thirty steps each, from a teacher of another size."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from llama_jax import init
from llama_jax.train.config.distillation import DistillationConfig
from llama_jax.train.config.run import RunConfig, TokenizerConfig, TrainConfig
from llama_jax.train.network import Network
from llama_jax.train.objectives import make_metrics_fn
from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from tests.parity import hf  # noqa: E402  (needs torch)
from tests.parity.curves import (  # noqa: E402
    assert_alike,
    conversations,
    our_curve,
    packed,
    padded,
    start,
    their_curve,
)

pytestmark = pytest.mark.parity

TEACHER = MODEL.replace(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
LEARNING_RATE = 2e-3


def teacher_params() -> Any:
    """Weights that give it an opinion, numpy f32."""
    draw = Draw(21)
    shapes = jax.eval_shape(lambda key: init(TEACHER, key), jax.random.key(0))

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        return draw.uniform(like.shape, std=0.5, mean=1.0 if path[-1].key == "scale" else 0.0)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def of_all_logits(
    student: Any, teacher: Any, labels: Any, *, beta: float, temperature: float, **_: Any
) -> Any:
    gkd = pytest.importorskip("trl.experimental.gkd")
    loss = gkd.GKDTrainer.generalized_jsd_loss
    return loss(student, teacher, labels=labels, beta=beta, temperature=temperature)


def of_top_k(student: Any, teacher: Any, labels: Any, *, beta: float, temperature: float, top_k: int) -> Any:
    """TRL's divergence over the teacher's tokens and a tail, which it computes for a teacher on a server."""
    module = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    logs = [torch.log_softmax(logits / temperature, -1) for logits in (student, teacher)]
    ids = logs[1].topk(top_k).indices
    mask = torch.ones_like(ids, dtype=torch.bool)
    (q, mask), (p, _) = (module._add_tail_bucket(x.gather(-1, ids), mask) for x in logs)
    return module._jsd_divergence(q, p, beta, mask)[labels != -100].sum() / (labels != -100).sum()


SETTINGS = [
    {"beta": 0.0},
    {"beta": 1.0, "temperature": 2.0},
    {"beta": 0.3, "temperature": 0.7},
    {"beta": 0.0, "top_k": 4},
    {"beta": 0.5, "top_k": 4, "temperature": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distillation(settings: dict[str, Any]) -> None:
    settings = {"temperature": 1.0, "top_k": 0, **settings}
    loss_of = of_top_k if settings["top_k"] else of_all_logits
    teacher, model = hf.model(TEACHER, teacher_params()), hf.model(MODEL, params()).train()

    def their_loss(batch: Any) -> tuple[Any, dict[str, float]]:
        labels = batch.pop("labels")
        with torch.no_grad():
            target = teacher(**batch, use_cache=False).logits
        logits = model(**batch, use_cache=False).logits
        return loss_of(logits[:, :-1], target[:, :-1], labels[:, 1:], **settings), {}

    theirs = their_curve(their_loss, list(model.parameters()), map(padded, conversations()), LEARNING_RATE)
    run = RunConfig(
        train=TrainConfig(objective="distill", dtype="float32", attention="xla", loss_chunks=3),
        tokenizer=TokenizerConfig(path="the teacher's"),
        distillation=DistillationConfig(teacher="the teacher", **settings),
    )
    metrics_fn = make_metrics_fn(run, MODEL, "cpu")
    of_teacher = Network(jax.tree.map(jax.numpy.asarray, teacher_params()), TEACHER)

    def our_loss(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return metrics_fn(weights, batch, teacher=of_teacher)[0].mean, {}

    ours = our_curve(our_loss, start(), (packed(examples, 2) for examples in conversations()), LEARNING_RATE)
    assert theirs["loss"][-1] < 0.95 * theirs["loss"][0]
    assert_alike(ours, theirs)
