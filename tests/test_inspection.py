"""Captures are what the weights compute by hand; edits replace values in every function of the library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import inspection, rope
from llama_jax.errors import ConfigError, InputError
from llama_jax.layers import rms_norm
from llama_jax.meshes import make_mesh
from llama_jax.model import unstack
from llama_jax.sharding import use_mesh
from llama_jax.taps import SITES

MODEL = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MIXTURE = MODEL.replace(num_experts=4, num_experts_per_tok=2)
WINDOWED = MODEL.replace(sliding_window=4, window_layers=(True, False) * 2)  # a period of two
BATCH, LENGTH = 2, 10


@functools.cache
def params(config: lj.LlamaConfig = MODEL) -> Any:
    return lj.init(config, jax.random.key(0))


@functools.cache
def tokens() -> Any:
    return np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, LENGTH)).astype(np.int32)


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


def by_hand() -> dict[str, np.ndarray]:
    """Every site, from the weights and the papers' formulas."""
    weights, ids = params(), tokens()
    table = rope.rotary(MODEL, jnp.broadcast_to(jnp.arange(LENGTH), ids.shape))
    norm = functools.partial(rms_norm, eps=MODEL.rms_norm_eps)
    found: dict[str, list[Any]] = {name: [] for name in SITES if name.startswith("block.")}
    x = weights["embed"]["embedding"][ids]
    outside = {"embedding": x}
    for layer in unstack(weights)["layers"]:
        a, f = layer["attention"], layer["feed_forward"]
        here = {"block.residual_pre": x}
        h = norm(x, layer["attention_norm"]["scale"])
        q, k = (rope.rotate(jnp.einsum("btd,dnh->btnh", h, a[name]), table) for name in ("wq", "wk"))
        v = jnp.einsum("btd,dkh->btkh", h, a["wv"])
        keys, values = (jnp.repeat(y, 2, axis=2) for y in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, keys) / np.sqrt(MODEL.head_dim)
        scores = jnp.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -jnp.inf)
        attention = jax.nn.softmax(scores, axis=-1)
        heads = jnp.einsum("bnts,bsnh->btnh", attention, values)
        out = jnp.einsum("btnh,nhd->btd", heads, a["wo"])
        x = x + out
        h = norm(x, layer["ffn_norm"]["scale"])
        gate, up = h @ f["w_gate"], h @ f["w_up"]
        ffn = (jax.nn.silu(gate) * up) @ f["w_down"]
        here |= {"block.q": q, "block.k": k, "block.v": v, "block.attention_weights": attention}
        here |= {"block.attention_heads": heads, "block.attention_out": out, "block.residual_mid": x}
        x = x + ffn
        here |= {"block.gate": gate, "block.up": up, "block.ffn_out": ffn, "block.residual_post": x}
        for name, value in here.items():
            found[name].append(value)
    outside["final_norm"] = norm(x, weights["final_norm"]["scale"])
    outside["logits"] = outside["final_norm"] @ weights["lm_head"]["kernel"]
    return {name: jnp.stack(values) for name, values in found.items() if values} | outside


def test_every_site_is_what_the_weights_compute():
    logits, found = lj.capture(MODEL, params(), tokens(), sites=list(lj.sites(MODEL)))
    expected = by_hand()
    assert list(found) == list(lj.sites(MODEL)) and found.keys() == expected.keys()
    close(found, expected)
    close(logits, lj.forward(MODEL, params(), tokens()), 1e-5)


@pytest.mark.parametrize("config", [MODEL, MIXTURE, WINDOWED], ids=["dense", "mixture", "windowed"])
def test_scanned_layers_capture_what_unrolled_ones_do_and_some_layers_what_all_do(config):
    names = list(lj.sites(config))
    _, scanned = lj.capture(config, params(config), tokens(), sites=names)
    _, unrolled = lj.capture(config, unstack(params(config)), tokens(), sites=names)
    close(scanned, unrolled)
    for weights, chosen in ((params(config), [3, 1]), (unstack(params(config)), [1, 3])):
        _, some = lj.capture(config, weights, tokens(), sites=names, layers=chosen)
        for name in names:
            whole = scanned[name]
            close(some[name], whole[jnp.array(chosen)] if name.startswith("block.") else whole)


def test_captures_are_differentiable_and_map_over_examples():
    def energy(weights: Any, row: Any) -> jax.Array:
        _, found = lj.capture(MODEL, weights, row[None], sites=["block.residual_post"], layers=[-1])
        return (found["block.residual_post"] ** 2).mean()

    grads = jax.jit(jax.vmap(jax.grad(energy), (None, 0)))(params(), tokens())
    for row in range(BATCH):
        close(jax.tree.map(lambda g: g[row], grads), jax.grad(energy)(params(), tokens()[row]))  # noqa: B023
    _, tangent = jax.jvp(lambda w: energy(w, tokens()[0]), (params(),), (params(),))
    assert np.isfinite(float(tangent)) and float(tangent) != 0


def test_patching_a_run_with_its_own_capture_changes_nothing():
    names = [name for name in lj.sites(MODEL) if name != "logits"]
    logits, found = lj.capture(MODEL, params(), tokens(), sites=names)
    close(lj.forward(MODEL, params(), tokens(), edit=inspection.patch(found)), logits)


def test_patching_the_residual_stream_of_another_run_gives_its_logits_from_there_on():
    other = (tokens() + 1) % MODEL.vocab_size
    theirs, found = lj.capture(MODEL, params(), other, sites=["block.residual_post"], layers=[2])
    edit = inspection.patch(found, layers=2)
    close(lj.forward(MODEL, params(), tokens(), edit=edit), theirs)
    some = lj.forward(MODEL, params(), tokens(), edit=inspection.patch(found, layers=2, positions=[6]))
    ours = lj.forward(MODEL, params(), tokens())
    close(some[:, :6], ours[:, :6])
    assert np.abs(some[:, 6:] - ours[:, 6:]).max(axis=(0, 2)).min() > 1e-4


def test_patching_maps_over_layers_and_positions():
    other = (tokens() + 1) % MODEL.vocab_size
    _, found = lj.capture(MODEL, params(), other, sites=["block.residual_post"])

    def last(stream: Any, layer: Any, position: Any) -> jax.Array:
        patched = {"block.residual_post": stream[None]}
        edit = inspection.patch(patched, layers=layer, positions=position[None])
        return lj.forward(MODEL, params(), tokens(), edit=edit)[:, -1]

    layers, positions = jnp.arange(4), jnp.array([2, 7])
    over = jax.vmap(jax.vmap(last, (None, None, 0)), (0, 0, None))
    mapped = jax.jit(over)(found["block.residual_post"], layers, positions)
    for layer in range(4):
        for place, position in enumerate(positions):
            alone = last(found["block.residual_post"][layer], jnp.int32(layer), position)
            close(mapped[layer, place], alone)


def test_an_edit_of_the_last_residual_is_the_same_edit_of_the_logits():
    vector = jax.random.normal(jax.random.key(3), (MODEL.hidden_size,))
    steered = lj.forward(MODEL, params(), tokens(), edit=inspection.steer(vector, layers=3, scale=0.5))
    last = by_hand()["block.residual_post"][-1] + 0.5 * vector
    x = rms_norm(last, params()["final_norm"]["scale"], eps=MODEL.rms_norm_eps)
    close(steered, x @ params()["lm_head"]["kernel"])


def test_ablated_layers_pruned_heads_and_cut_attention():
    zero = [inspection.ablate(f"block.{part}_out", layers=1) for part in ("attention", "ffn")]
    _, found = lj.capture(
        MODEL, params(), tokens(), sites=["block.residual_post"], edit=inspection.together(*zero)
    )
    close(found["block.residual_post"][1], found["block.residual_post"][0])
    pruned = np.zeros((4, 4), bool)
    pruned[2, 1] = True
    _, found = lj.capture(
        MODEL, params(), tokens(), sites=["block.attention_heads"], edit=inspection.prune_heads(pruned)
    )
    norms = np.abs(found["block.attention_heads"]).sum((1, 2, 4))
    assert (norms == 0).tolist() == pruned.tolist()
    edit = inspection.knock_out([0, 2], layers=[1], heads=[3], queries=[5])
    weights = {}
    for name, one in (("before", None), ("after", edit)):
        _, found = lj.capture(MODEL, params(), tokens(), sites=["block.attention_weights"], edit=one)
        weights[name] = np.array(found["block.attention_weights"])
    cut = weights["after"][1, :, 3, 5]
    assert (cut[:, [0, 2]] == 0).all() and cut.sum(-1) == pytest.approx(1, abs=1e-5)
    weights["after"][1, :, 3, 5] = weights["before"][1, :, 3, 5]
    close(weights["after"][:2], weights["before"][:2])
    mean = by_hand()["block.ffn_out"].mean((1, 2))[2]
    _, found = lj.capture(
        MODEL,
        params(),
        tokens(),
        sites=["block.ffn_out"],
        edit=inspection.ablate("block.ffn_out", layers=2, mean=mean, positions=[4]),
    )
    close(found["block.ffn_out"][2, :, 4], jnp.broadcast_to(mean, (BATCH, MODEL.hidden_size)))


@functools.cache
def bias_edit() -> Any:
    """Steering that changes the text, of embeddings, a block and the logits."""
    vector = jax.random.normal(jax.random.key(4), (MODEL.hidden_size,))
    up = jnp.zeros((MODEL.vocab_size,)).at[7].set(0.02)
    return inspection.together(
        inspection.steer(vector, layers=[1, 2], scale=2.0),
        inspection.steer(up, layers=None, site="logits"),
        inspection.knock_out([1], layers=[0]),
    )


def test_generated_tokens_are_those_of_the_edited_forward_pass():
    edit, ids, lengths = bias_edit(), tokens()[:, :6], np.array([6, 4])
    greedy = lj.Sampling(temperature=0.0)
    out = lj.generate(MODEL, params(), ids, lengths, jax.random.key(0), greedy, max_new_tokens=8, edit=edit)
    plain = lj.generate(MODEL, params(), ids, lengths, jax.random.key(0), greedy, max_new_tokens=8)
    assert (np.asarray(out.tokens) != np.asarray(plain.tokens)).any()
    for row in range(BATCH):
        text = np.concatenate([ids[row, : lengths[row]], np.asarray(out.tokens[row])])[None]
        logits = lj.forward(MODEL, params(), text[:, :-1], edit=edit)[0, lengths[row] - 1 :]
        assert np.asarray(logits.argmax(-1)).tolist() == np.asarray(out.tokens[row]).tolist()
        logs = jax.nn.log_softmax(logits)[np.arange(8), np.asarray(out.tokens[row])]
        close(np.asarray(out.logprobs[row]), logs, 1e-4)
    streamed = lj.stream(
        MODEL, params(), ids, lengths, jax.random.key(0), greedy, max_new_tokens=8, edit=edit
    )
    assert np.array_equal(np.stack([token for token, _ in streamed], 1), out.tokens)
    drafted = lj.speculative_generate(
        MODEL, params(), ids, lengths, jax.random.key(0), greedy, max_new_tokens=8, edit=edit
    )
    assert np.array_equal(drafted.output.tokens, out.tokens)
    beams = lj.beam_search(MODEL, params(), ids, lengths, 1, max_new_tokens=8, edit=edit)
    assert np.array_equal(beams.tokens.reshape(BATCH, -1), out.tokens)


@pytest.mark.parametrize("custom_vjp", [False, True])
def test_the_loss_of_an_edited_model_is_that_of_its_logits(custom_vjp):
    edit = bias_edit()
    loss = lj.next_token_loss(MODEL, params(), tokens(), edit=edit, num_chunks=2, custom_vjp=custom_vjp)
    logits = lj.forward(MODEL, params(), tokens(), edit=edit)
    logs = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(logs, tokens()[:, 1:, None], 2)
    assert float(loss.mean) == pytest.approx(float(-taken.mean()), abs=1e-5)
    logprobs = lj.token_logprobs(MODEL, params(), tokens(), edit=edit, num_chunks=2)
    close(logprobs[:, 1:], taken[..., 0])


def test_a_mesh_captures_and_edits_what_one_device_does():
    names, edit = list(lj.sites(MODEL)), bias_edit()
    logits, found = lj.capture(MODEL, params(), tokens(), sites=names, layers=[0, 3], edit=edit)
    with use_mesh(make_mesh("fsdp=2,tensor=2,context=2")):
        sharded = lj.init(MODEL, jax.random.key(0))
        again, theirs = lj.capture(MODEL, sharded, tokens(), sites=names, layers=[0, 3], edit=edit)
        close((logits, found), jax.device_get((again, theirs)), 1e-4)


def test_other_arrays_of_an_edit_do_not_compile_again():
    def run(scale: float, layer: int) -> Any:
        edit = inspection.steer(jnp.ones(MODEL.hidden_size), layers=layer, scale=scale)
        return lj.forward(MODEL, params(), tokens(), edit=edit)

    from llama_jax.model import _forward

    first = run(1.0, 0)
    size = _forward._cache_size()
    assert np.abs(run(2.0, 1) - first).max() > 0
    assert _forward._cache_size() == size


def test_without_edit_the_program_is_the_same():
    def lowered(weights: Any) -> str:
        return jax.jit(functools.partial(lj.forward, MODEL)).lower(weights, tokens()).as_text()

    assert lowered(lj.with_edit(params(), None)) == lowered(params())
    identity = lj.with_edit(params(), lambda site, layer, value: value)
    close(lj.forward(MODEL, identity, tokens()), lj.forward(MODEL, params(), tokens()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lj.capture(MODEL, params(), tokens(), sites=["block.resid_post"]),
            "did you mean 'block.residual_post'",
        ),
        (
            lambda: lj.capture(MIXTURE, params(MIXTURE), tokens(), sites=["block.gate"]),
            "this model has embedding,",
        ),
        (
            lambda: lj.capture(MODEL, params(), tokens(), sites=["logits"], layers=[4]),
            "layer 4 is not one of the 4 layers",
        ),
        (lambda: lj.capture(MODEL, params(), tokens(), sites=["logits"], layers=[1, -3]), "name one twice"),
        (lambda: lj.capture(MODEL, params(), tokens(), sites="logits"), "give a list of names"),
        (
            lambda: lj.capture(
                MODEL,
                params(),
                tokens(),
                sites=["block.attention_weights"],
                options=lj.ForwardOptions(attention_backend="blockwise"),
            ),
            "which never has them in memory",
        ),
        (
            lambda: lj.forward(MODEL, params(), tokens(), edit=lambda site, layer, x: x[..., :1]),
            "edit returned float32",
        ),
        (
            lambda: lj.forward(MODEL, params(), tokens(), edit=lambda site, layer, x: x.astype(int)),
            "return a value of",
        ),
        (lambda: lj.forward(MODEL, params(), tokens(), edit=3), "edit is int; it must be a function"),
        (lambda: inspection.steer(jnp.ones(3), layers=-1), "layers of an edit count from 0"),
        (lambda: inspection.ablate("block.ffn", layers=0), "site 'block.ffn' is unknown"),
        (lambda: inspection.patch({"block.q": jnp.ones((2, 1))}, layers=[1]), "was captured in 2 layers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((InputError, ConfigError)) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
