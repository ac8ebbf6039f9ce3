"""Laws of decoding under grammars: the tokens are those of a loop on the host, whatever the batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes
from llama_jax.decoding import constraints
from llama_jax.errors import InputError
from llama_jax.tokenizer import load_tokenizer
from tests.decoding.compiled import counting_compiles
from tests.random_models import SMALL, random_model, random_prompts
from tests.tiny import PIECES, write_vocabulary
from tests.uncached import logprobs_by_forward, pick

GREEDY = lj.Sampling(temperature=0.0)
RANDOM = lj.Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1)
samplings = pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
KEYS = jax.random.split(jax.random.key(0), 4)
EOS, NEW = 2, 12
CONFIG, STACKED = random_model(3, SMALL.replace(vocab_size=len(PIECES), max_position_embeddings=128))
PARAMS = lj.unstack(STACKED)
TOKENS, LENGTHS = random_prompts(3, CONFIG, [3, 17, 1, 9])
# Texts of these characters have several spellings: `ab` is a token, as are `a` and `b`, and the byte of each.
TEXTS = ("ab", "abab", "cab", "ba", "abc ab", "é")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tok.bin"
    write_vocabulary(path, PIECES)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    """Of each row of the batch; the third has none."""
    letters = lj.grammar(tokenizer, regex="[a-d]{2,4}( [x-z]+)?")
    return [lj.grammar(tokenizer, choices=TEXTS), letters, None, lj.grammar(tokenizer, choices=["a"])]


def run(grammar, rows=slice(None), sampling=GREEDY, **settings):
    settings = {"max_new_tokens": NEW, "eos_id": EOS} | settings
    prompts = TOKENS[rows], LENGTHS[rows]
    return lj.generate(CONFIG, PARAMS, *prompts, KEYS[rows], sampling, grammar=grammar, **settings)


def allowed_by_hand(tokenizer, ids, texts):
    """Which tokens may follow `ids`: those with which a text begins, and the end after a whole one."""
    so_far, bytes_of = tokenizer.decode(ids).encode(), tokenizer.table.pieces
    targets = [text.encode() for text in texts]
    if ids and "\ufffd" in so_far.decode():  # within a character
        so_far = b"".join(bytes_of[id] for id in ids).removeprefix(b" ")
    first = not ids
    allowed = np.zeros(tokenizer.vocab_size, bool)
    for id, piece in enumerate(bytes_of):
        # At its start SentencePiece's decoder drops a space.
        piece = piece[1:] if first and id in tokenizer.table.space_prefixed else piece
        is_text = id > 2 and (piece or id in tokenizer.table.space_prefixed)
        allowed[id] = is_text and any(text.startswith(so_far + piece) for text in targets)
    allowed[EOS] = so_far in targets
    return allowed


def test_greedy_is_the_best_allowed_token_of_forward(tokenizer, grammars):
    out = run([grammars[0]] * 4)
    logprobs = logprobs_by_forward(CONFIG, STACKED, TOKENS, LENGTHS, out.tokens)
    np.testing.assert_allclose(
        out.logprobs,
        np.where(np.arange(NEW) < out.lengths[:, None], pick(logprobs, out.tokens), 0),
        atol=1e-5,
    )
    for row, length in enumerate(np.asarray(out.lengths)):
        ids = out.tokens[row, :length].tolist()
        assert ids[-1] == EOS
        assert tokenizer.decode(ids) in TEXTS
        for step, id in enumerate(ids):
            allowed = allowed_by_hand(tokenizer, ids[:step], TEXTS)
            assert id == np.where(allowed, logprobs[row, step], -np.inf).argmax()


def test_the_mask_is_that_of_a_search_over_all_texts(tokenizer, grammars):
    """After every sequence of up to three tokens that the grammar allows."""
    advance = jax.jit(constraints.advance)
    allowed = jax.jit(constraints.allowed, static_argnums=2)
    pending, seen = [((), constraints.for_rows(grammars[0], 1))], 0
    while pending:
        ids, state = pending.pop()
        found = np.asarray(allowed(state, np.array([EOS, -1]), CONFIG.vocab_size))[0]
        np.testing.assert_array_equal(found, allowed_by_hand(tokenizer, list(ids), TEXTS), err_msg=str(ids))
        seen += 1
        following = [id for id in np.flatnonzero(found).tolist() if id != EOS and len(ids) < 3]
        pending += [((*ids, id), advance(state, np.array([id]))) for id in following]
    assert seen > 100


@samplings
def test_a_row_does_not_depend_on_the_grammars_of_others(grammars, sampling):
    out = run(grammars, sampling=sampling)
    for row, grammar in enumerate(grammars):
        same = run(grammar, sampling=sampling)  # in every row
        np.testing.assert_array_equal(out.tokens[row], same.tokens[row])
        np.testing.assert_allclose(out.logprobs[row], same.logprobs[row], atol=1e-5)
    assert out.lengths[2] == NEW or EOS in out.tokens[2]


@samplings
def test_stream_and_several_sequences_are_as_without_a_grammar(grammars, sampling):
    out = run(grammars, sampling=sampling)
    request = (CONFIG, PARAMS, TOKENS, LENGTHS, KEYS, sampling)
    steps = list(lj.stream(*request, max_new_tokens=NEW, eos_id=EOS, grammar=grammars))
    streamed = np.stack([token for token, _ in steps], axis=1)
    np.testing.assert_array_equal(streamed, out.tokens[:, : streamed.shape[1]])

    four = constraints.for_rows(grammars, 4).grammars
    stacked = constraints.stack(grammars[:2], at_least=four)  # of the sizes of other tests' programs

    def sequences(rows, index, count):
        constraint = lj.Constraint(grammars=stacked, index=np.array(index), state=np.zeros_like(index))
        settings = {"max_new_tokens": NEW, "eos_id": EOS, "num_return_sequences": count}
        prompts = TOKENS[rows], LENGTHS[rows], KEYS, sampling
        return lj.generate(CONFIG, PARAMS, *prompts, grammar=constraint, **settings)

    np.testing.assert_array_equal(
        sequences([0, 1], [0, 1], 2).tokens, sequences([0, 0, 1, 1], [0, 0, 1, 1], 1).tokens
    )


def test_a_text_that_the_limit_ends_is_the_beginning_of_one(tokenizer):
    grammar = lj.grammar(tokenizer, regex="[ab]{9}")
    out = run(grammar, max_new_tokens=2)
    assert (out.lengths == 2).all()
    assert (out.tokens != EOS).all()
    for row in np.asarray(out.tokens):
        assert set(tokenizer.decode(row)) <= set("ab")


def test_no_other_grammar_of_the_size_recompiles(tokenizer, grammars):
    run(grammars)
    run(grammars[0])
    for text in ("x", "yz"):  # the first call of each may compile what is not the grammar's
        lj.grammar(tokenizer, choices=[text])
    others = [
        lj.grammar(tokenizer, regex="[0-9]+"),
        None,
        lj.grammar(tokenizer, choices=["q", "r"]),
        grammars[0],
    ]
    with counting_compiles() as compiled:
        run(others)
        run(others[0])
        run(others, sampling=RANDOM, max_new_tokens=7)
    assert not compiled


def test_works_inside_jit_and_under_vmap(grammars):
    out = run(grammars, sampling=RANDOM)
    whole = [grammar for grammar in grammars if grammar is not None]

    def in_jit(whole, keys):
        rows = [whole[0], whole[1], None, whole[2]]
        settings = {"max_new_tokens": NEW, "eos_id": EOS, "grammar": rows}
        return lj.generate(CONFIG, PARAMS, TOKENS, LENGTHS, keys, RANDOM, **settings).tokens

    keys = jnp.stack([KEYS, KEYS[::-1]])
    both = jax.jit(jax.vmap(in_jit, (None, 0)))(whole, keys)
    np.testing.assert_array_equal(both[0], out.tokens)


def test_on_a_mesh_it_gives_the_same_tokens(tokenizer, grammars):
    """Three rows, which the mesh does not divide: empty ones are added."""
    rows, mesh = slice(0, 3), meshes.make_mesh("data=2,fsdp=2,tensor=2")
    with jax.set_mesh(mesh):
        params = lj.shard_params(jax.device_get(PARAMS), mesh, CONFIG)
        settings = {"max_new_tokens": NEW, "eos_id": EOS, "grammar": grammars[rows]}
        out = lj.generate(CONFIG, params, TOKENS[rows], LENGTHS[rows], KEYS[rows], GREEDY, **settings)
        beams = lj.beam_search(CONFIG, params, TOKENS[rows], LENGTHS[rows], 4, **settings)
    np.testing.assert_array_equal(out.tokens, run(grammars).tokens[rows])
    expected = lj.beam_search(CONFIG, PARAMS, TOKENS, LENGTHS, 4, **settings | {"grammar": grammars})
    np.testing.assert_array_equal(beams.tokens, expected.tokens[rows])


def test_beam_search_keeps_to_the_grammar(tokenizer, grammars):
    settings = {"max_new_tokens": NEW, "eos_id": EOS, "num_return_sequences": 4}
    request = (CONFIG, PARAMS, TOKENS, LENGTHS, 4)
    out = lj.beam_search(*request, grammar=grammars, **settings)
    for row, texts in ((0, TEXTS), (3, ("a",))):
        assert np.isfinite(out.scores[row]).sum() > 1  # also `a` has several spellings
        for beam in np.flatnonzero(np.isfinite(out.scores[row])):
            ids = out.tokens[row, beam, : out.lengths[row, beam]].tolist()
            assert ids[-1] == EOS
            assert tokenizer.decode(ids) in texts
    best, counts = np.asarray(out.tokens[:, 0]), np.asarray(out.lengths[:, 0])
    logprobs = pick(logprobs_by_forward(CONFIG, STACKED, TOKENS, LENGTHS, best), best)
    total = np.where(np.arange(NEW) < counts[:, None], logprobs, 0).sum(-1)
    np.testing.assert_allclose(out.scores[:, 0], total / counts, rtol=1e-4)
    free = lj.beam_search(*request, **settings)
    np.testing.assert_array_equal(out.tokens[2], free.tokens[2])


def test_one_beam_is_greedy(grammars):
    greedy = run(grammars)
    beams = lj.beam_search(
        CONFIG, PARAMS, TOKENS, LENGTHS, 1, max_new_tokens=NEW, eos_id=EOS, grammar=grammars
    )
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)


OTHER = lj.DraftModel(CONFIG, lj.unstack(random_model(4, CONFIG)[1]))


@pytest.mark.parametrize(
    "draft",
    [lj.PromptLookup(min_ngram=1), lj.DraftModel(CONFIG, PARAMS), OTHER],
    ids=["lookup", "same", "other"],
)
def test_speculation_gives_the_greedy_tokens(tokenizer, grammars, draft):
    """Rows accept different numbers of drafts: the last has one spelling, which every draft model finds."""
    rows = [*grammars[:3], lj.grammar(tokenizer, choices=["éé"])]
    settings = {"max_new_tokens": NEW, "eos_id": EOS, "draft": draft, "num_draft_tokens": 3}
    request = (CONFIG, PARAMS, TOKENS, LENGTHS, KEYS)
    out = lj.speculative_generate(*request, GREEDY, grammar=rows, **settings)
    np.testing.assert_array_equal(out.output.tokens, run(rows).tokens)
    if isinstance(draft, lj.DraftModel):
        assert out.accepted[3] >= 3


def test_speculation_samples_what_the_grammar_allows(tokenizer, grammars):
    request = (CONFIG, PARAMS, TOKENS, LENGTHS, KEYS, lj.Sampling())
    settings = {"draft": OTHER, "num_draft_tokens": 3, "eos_id": EOS, "max_new_tokens": NEW}
    out = lj.speculative_generate(*request, grammar=grammars, **settings).output
    for row, texts in ((0, TEXTS), (3, ("a",))):
        assert tokenizer.decode(out.tokens[row, : out.lengths[row]]) in texts


@pytest.mark.parametrize(
    "settings",
    [
        {"min_new_tokens": 6},
        {"suppress_tokens": [EOS]},
        {"forced_tokens": [EOS]},
        {"forced_tokens": [-1, 5, 5]},
        {"suppress_tokens": [*range(3, 288)]},
    ],
    ids=["minimum", "no end", "end", "others", "all"],
)
def test_the_grammar_wins_over_logits_processors(tokenizer, settings):
    grammar = lj.grammar(tokenizer, choices=["ab", "ba"])
    out = run(grammar, sampling=lj.Sampling(temperature=0.0, **settings))
    for row, length in enumerate(np.asarray(out.lengths)):
        assert tokenizer.decode(out.tokens[row, :length]) in ("ab", "ba")
        assert out.tokens[row, length - 1] == EOS


def test_a_setting_that_leaves_an_allowed_token_counts(tokenizer):
    grammar = lj.grammar(tokenizer, choices=["ab", "ba"])
    first_b = [id for id, piece in enumerate(tokenizer.table.pieces) if piece.startswith(b"b")]
    out = run(grammar, sampling=lj.Sampling(temperature=0.0, suppress_tokens=first_b))
    for row, length in enumerate(np.asarray(out.lengths)):
        assert tokenizer.decode(out.tokens[row, :length]) == "ab"


def test_rows_join_and_leave_a_fixed_batch(tokenizer, grammars):
    """Between steps: other grammars of at most the size, and rows at the start of one, in one program."""
    first = constraints.stack([grammars[0], grammars[1]])
    other = constraints.stack([grammars[3], grammars[0]], at_least=first)
    assert [np.shape(x) for x in first.arrays] == [np.shape(x) for x in other.arrays]
    constraint = lj.Constraint(grammars=first, index=jnp.array([0, -1, 1, 1]), state=jnp.zeros(4, jnp.int32))
    state = lj.prefill(
        CONFIG, PARAMS, TOKENS, LENGTHS, KEYS, GREEDY, max_new_tokens=NEW, eos_id=EOS, constraint=constraint
    )
    step = jax.jit(functools.partial(lj.decode_step, CONFIG))
    state = step(PARAMS, state)
    constraint = constraints.begin(state.constraint, 1, 1)
    with counting_compiles() as compiled:
        state = step(PARAMS, state.replace(constraint=constraint.replace(grammars=other)))
    assert not compiled
    np.testing.assert_array_equal(state.constraint.index, [0, 1, 1, 1])
    assert tokenizer.decode([int(state.token[1])])[:1] in ("a", "c", "b", "\ufffd", "")


def test_a_constraint_is_not_consumed(grammars):
    constraint = constraints.for_rows(grammars, 4)
    first = run(constraint)
    np.testing.assert_array_equal(run(constraint).tokens, first.tokens)
    np.testing.assert_array_equal(run(grammars).tokens, first.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_id": None}, "a grammar needs eos_id"),
        ({"eos_id": 10**6}, "a grammar needs eos_id"),
        ({"grammar": "[a-z]"}, "grammar is a str; make one with llama_jax.grammar"),
        ({"grammar": [None, "a", None, None]}, "grammar holds a str"),
        ({"grammar": [None]}, "grammar has 1 entries; give one, or one for each of 4 rows"),
    ],
)
def test_invalid_grammars_are_refused(grammars, change, message):
    with pytest.raises(InputError, match=message):
        run(**{"grammar": grammars[0]} | change)


def test_a_grammar_of_another_vocabulary_is_refused(grammars):
    small, params = random_model(0, SMALL)
    with pytest.raises(
        InputError, match=f"vocabulary of {len(PIECES)} tokens and the model has {small.vocab_size}"
    ):
        lj.generate(small, params, [[1]], [1], KEYS[:1], max_new_tokens=2, eos_id=2, grammar=grammars[0])
    with pytest.raises(InputError, match="build them for one"):
        constraints.stack([grammars[0], lj.Grammar(np.zeros(3), *grammars[0].arrays[1:])])


def test_a_list_without_any_grammar_is_no_grammar():
    np.testing.assert_array_equal(run([None] * 4).tokens, run(None).tokens)
