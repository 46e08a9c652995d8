"""The sampler: greedy as transformers, independent of the batch, log-probs as a plain forward."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from dcod_jax.data.turns import stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.models import counts, hf, transformer
from dcod_jax.models.config import from_hf
from dcod_jax.parallel.mesh import make_mesh, tree_shardings
from dcod_jax.sample import decoding
from dcod_jax.sample.sampler import Sample, bucket_length, decoding_params, sample
from dcod_jax.sample.sampling import choose, make_settings

V = 49  # real vocabulary of the tiny models, which have 3 rows more
LENGTHS = (5, 17, 3, 31, 40)
MANY = (9, 40, 3, 33, 17, 61, 5, 12, 70, 26, 8)


@pytest.fixture(scope="module")
def model():
    config = from_hf(tiny.raw_config())
    return config, transformer.init_params(config, jax.random.key(3))


def make_prompts(lengths=LENGTHS, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(2, V - 3, n).tolist() for n in lengths]


def draw(model, prompts, **changes) -> list[Sample]:
    config, params = model
    options = {
        "max_new_tokens": 24,
        "temperature": 1.0,
        "seed": 7,
        "batch_size": 4,
        "eos_ids": (1, 2),
    }
    form = {"valid_vocab": V, "compute_dtype": "float32", "mesh": None}
    form |= {name: changes.pop(name) for name in form if name in changes}
    return sample(decoding_params(config, params, **form), prompts, **(options | changes))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_greedy_equals_transformers(tmp_path, family):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 256,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_class, model_class = classes[family]
    theirs = model_class(config_class(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    prompts = make_prompts()
    ours = draw(
        hf.load_model(tmp_path, dtype=jnp.float32),
        prompts,
        max_new_tokens=32,
        temperature=0.0,
        eos_ids=(1,),
    )
    for prompt, got in zip(prompts, ours, strict=True):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=32,
                do_sample=False,
            )
        assert got.token_ids == out[0, len(prompt) :].tolist()
        assert got.finished == (got.token_ids[-1] == 1)


def test_generation_stops_at_every_id_of_the_generation_config(tmp_path):
    """As transformers does; config.json alone names one of the two ids."""
    torch.set_num_threads(1)
    directory = tiny.write_model(tmp_path)
    prompts = make_prompts()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def run():
        config, params = hf.load_model(directory, dtype=jnp.float32)
        stops = stop_ids(config, tokenizer)
        return draw((config, params), prompts, temperature=0.0, eos_ids=stops)

    before = run()
    second = before[0].token_ids[9]  # an id that comes up in the middle of a text
    assert second != tokenizer.eos_token_id
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, second]}))
    after = run()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    for prompt, got in zip(prompts, after, strict=True):
        with torch.no_grad():
            inputs = torch.tensor([prompt])
            mask = torch.ones_like(inputs)
            out = theirs.generate(inputs, attention_mask=mask, max_new_tokens=24, do_sample=False)
        assert got.token_ids == out[0, len(prompt) :].tolist()
    assert after[0].finished
    assert after[0].token_ids[-1] == second
    assert len(after[0].token_ids) < len(before[0].token_ids)


def test_a_sample_does_not_depend_on_its_neighbours_or_the_batch_size(model):
    prompts = make_prompts()
    together = draw(model, prompts)
    assert len({tuple(s.token_ids) for s in together}) == len(prompts)
    order = [3, 0, 2, 4, 1]
    shuffled = draw(model, [prompts[i] for i in order], indices=order)
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_refilled_rows_give_what_they_give_in_another_order_and_beside_others(model, temperature):
    """Bit for bit, with the same number of rows."""
    options = {"eos_ids": (0, 5, 17, 47), "temperature": temperature}
    prompts = make_prompts(MANY)
    refilled = draw(model, prompts, **options)
    lengths = {len(s.token_ids) for s in refilled}
    assert len(lengths) > 4  # rows fall free at different times
    assert max(lengths) == 24
    order = [5, 0, 10, 3, 8, 7, 1, 9, 2, 6, 4]
    mixed = draw(model, [prompts[i] for i in order], indices=order, **options)
    assert mixed == [refilled[i] for i in order]
    few = draw(model, prompts[3:7], indices=range(3, 7), **options)  # no row is refilled
    assert few == refilled[3:7]


def test_another_number_of_rows_and_another_cache_length_give_the_same_tokens(model):
    prompts = make_prompts(MANY)
    eos = (0, 5, 17, 47)
    refilled = [s.token_ids for s in draw(model, prompts, eos_ids=eos)]
    together = draw(model, prompts, eos_ids=eos, batch_size=16)
    assert [s.token_ids for s in together] == refilled
    alone = [draw(model, [p], indices=[i], eos_ids=eos)[0] for i, p in enumerate(prompts[:4])]
    assert [s.token_ids for s in alone] == refilled[:4]
    longer = draw(model, [*prompts, [7] * 180], eos_ids=eos)
    assert [s.token_ids for s in longer[:-1]] == refilled


def test_stop_strings_end_a_completion_where_the_text_reaches_one(model):
    """Whatever the blocks between two looks, as cutting the whole completion does."""
    prompts = make_prompts((9, 40, 3, 33, 17))

    def decode(ids):
        return "".join(f"<{i}>" for i in ids)

    free = draw(model, prompts, eos_ids=(98,), max_new_tokens=40)
    third, late = free[0].token_ids[3], free[1].token_ids[33]
    strings = (f"<{third}>", f"{late}>")
    got = draw(
        model, prompts, eos_ids=(98,), max_new_tokens=40, stop_strings=strings, decode=decode,
    )  # fmt: skip
    assert {s.stop_reason for s in got} >= {"stop"}
    for whole, cut in zip(free, got, strict=True):
        texts = [decode(whole.token_ids[: n + 1]) for n in range(40)]
        ends = [n for n, text in enumerate(texts) if any(s in text for s in strings)]
        count = ends[0] + 1 if ends else 40
        text = texts[count - 1]
        assert cut.token_ids == whole.token_ids[:count]
        assert cut.logprobs == pytest.approx(whole.logprobs[:count], abs=1e-5)
        assert cut.stop_reason == ("stop" if ends else "length")
        assert cut.finished == bool(ends)
        assert cut.text == text[: min([text.find(s) for s in strings if s in text], default=None)]


def test_a_scanned_model_gives_what_an_unrolled_one_gives(model, monkeypatch):
    prompts = make_prompts()
    unrolled = draw(model, prompts)
    monkeypatch.setattr(decoding, "MAX_SPLIT_LAYERS", 1)
    assert [s.token_ids for s in draw(model, prompts)] == [s.token_ids for s in unrolled]


def test_the_kernels_of_other_platforms_give_what_those_of_a_cpu_give(model, monkeypatch):
    prompts = make_prompts()
    transposed = draw(model, prompts)
    chosen = decoding.decoding_form

    def plain(*args, **options):
        form = chosen(*args, **options)
        assert form.transposed  # this is a CPU
        return dataclasses.replace(form, transposed=False)

    monkeypatch.setattr(decoding, "decoding_form", plain)
    assert [s.token_ids for s in draw(model, prompts)] == [s.token_ids for s in transposed]


def test_copies_of_a_prompt_differ_and_the_seed_decides(model):
    prompts = make_prompts((9, 40)) * 2
    first = draw(model, prompts)
    assert first[0].token_ids != first[2].token_ids
    assert draw(model, prompts) == first
    assert draw(model, prompts, seed=8) != first


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_recorded_logprobs_are_those_of_a_plain_forward_at_temperature_1(model, temperature):
    config, params = model
    prompts = make_prompts()
    drawn = draw(model, prompts, temperature=temperature)
    tokens = np.zeros((len(prompts), 64), np.int32)
    for row, (prompt, got) in enumerate(zip(prompts, drawn, strict=True)):
        tokens[row, : len(prompt) + len(got.token_ids)] = prompt + got.token_ids
    plain = jax.jit(lambda rows: transformer.logits(config, params, rows))
    logits = np.asarray(plain(tokens), np.float64)[..., :V]
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, (prompt, got) in enumerate(zip(prompts, drawn, strict=True)):
        at = np.arange(len(got.token_ids)) + len(prompt) - 1
        np.testing.assert_allclose(got.logprobs, table[row, at, got.token_ids], atol=2e-5)


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = jnp.array([0.5, -1.0, 1.5, 0.0, -0.3, 9.0, 9.0])  # the last two are padding
    count, temperature = 20_000, 0.8
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))
    tokens, logprobs = choose(
        jnp.tile(logits, (count, 1)),
        keys,
        make_settings(temperature=temperature),
        valid_vocab=5,
    )
    exact = np.exp(np.asarray(logits[:5], np.float64) / temperature)
    expected = count * exact / exact.sum()
    observed = np.bincount(np.asarray(tokens), minlength=5)
    assert observed.shape == (5,)
    assert ((observed - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees, p = 0.001
    at_one = np.asarray(jax.nn.log_softmax(logits[:5]))
    np.testing.assert_allclose(logprobs, at_one[np.asarray(tokens)], atol=1e-6)


def test_a_stop_token_ends_its_row_and_is_kept(model):
    prompts = make_prompts()
    free = draw(model, prompts, eos_ids=(98, 99))
    assert all(not s.finished and len(s.token_ids) == 24 for s in free)
    stops = (free[0].token_ids[5], free[1].token_ids[0])
    for whole, cut in zip(free, draw(model, prompts, eos_ids=stops), strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if token in stops]
        length = ends[0] + 1 if ends else 24
        assert cut.token_ids == whole.token_ids[:length]
        assert cut.logprobs == whole.logprobs[:length]
        assert cut.finished == bool(ends)


def test_padded_vocabulary_is_never_drawn(model):
    config, params = model
    embedding = params["embed_tokens"]["embedding"]
    loud = {**params, "embed_tokens": {"embedding": embedding.at[V:].multiply(5.0)}}
    prompts = make_prompts()
    every = draw((config, loud), prompts, valid_vocab=config.vocab_size)
    assert max(max(s.token_ids) for s in every) >= V
    real = draw((config, loud), prompts)
    assert max(max(s.token_ids) for s in real) < V


@pytest.fixture(scope="module")
def on_one_device(model):
    """(config, parameters, prompts, samples); four kv heads, which four pieces divide."""
    config = dataclasses.replace(model[0], num_kv_heads=4)
    params = transformer.init_params(config, jax.random.key(3))
    prompts = make_prompts((7, 30, 4, 12))
    return config, params, prompts, draw((config, params), prompts)


@pytest.mark.parametrize(
    ("share", "axes"),
    [
        (1.0, {"data": 8}),
        (0.4, {"data": 2, "tensor": 4}),
        (0.0, {"data": 2, "fsdp": 4}),
    ],
    ids=["whole", "pieces", "neither"],
)
def test_eight_devices_give_the_samples_of_one(on_one_device, monkeypatch, share, axes):
    """Weights are laid out once for decoding, as they fit; no step gathers one.

    share: of the weights that fit into what a device may hold of them.
    """
    config, params, prompts, one = on_one_device
    size = 4 * counts.num_params(config)
    monkeypatch.setattr(decoding, "memory", lambda _: share * size / decoding.WEIGHTS_SHARE)
    mesh = make_mesh(2, 4)
    placed = jax.device_put(params, tree_shardings(mesh, transformer.logical_axes(config)))
    texts: list[str] = []
    run = decoding.decode

    def kept(*args, **options):
        if not texts:
            texts.append(run.lower(*args, **options).compile().as_text())
        return run(*args, **options)

    monkeypatch.setattr(decoding, "decode", kept)
    many = draw((config, placed), prompts, mesh=mesh)
    form = decoding.decoding_form(config, valid_vocab=V, compute_dtype="float32", mesh=mesh)
    assert {axis: n for axis, n in form.mesh.shape.items() if n > 1} == axes
    gathers = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", texts[0])
    matrix = config.hidden_size**2 // 2  # half of the smallest one
    found = [shape for shape in gathers if math.prod(map(int, shape.split(","))) >= matrix]
    assert bool(found) == (share == 0), gathers
    assert [s.token_ids for s in many] == [s.token_ids for s in one]
    np.testing.assert_allclose(
        np.concatenate([s.logprobs for s in many]),
        np.concatenate([s.logprobs for s in one]),
        atol=1e-5,
    )


def test_few_shapes_are_compiled():
    lengths = {bucket_length(n) for n in range(1, 4097)}
    assert len(lengths) <= 24
    assert all(n <= bucket_length(n) < max(n + 32, 1.25 * n) for n in range(1, 4097))
    assert [bucket_length(n) for n in (1, 32, 33, 256, 257, 1100)] == [32, 32, 64, 256, 320, 1280]


def test_each_program_is_compiled_once(model):
    """For a row's first prompt and for another one, on one device with a mesh and without."""
    config, params = model
    mesh = make_mesh(1, devices=jax.devices()[:1])
    laid_out = jax.device_put(params, tree_shardings(mesh, transformer.logical_axes(config)))
    programs = (decoding.prefill, decoding.decode)
    before = [program._cache_size() for program in programs]
    # A vocabulary that no other test has.
    options = {"valid_vocab": 46, "eos_ids": (0, 5, 17, 47)}
    found = draw((config, laid_out), make_prompts(MANY), mesh=mesh, **options)
    assert draw(model, make_prompts(MANY), **options) == found
    assert [program._cache_size() for program in programs] == [n + 1 for n in before]


def test_progress_counts_every_sequence_and_token(model):
    seen = []
    prompts = make_prompts()
    drawn = draw(model, prompts, on_batch=lambda rows, tokens: seen.append((rows, tokens)))
    assert sum(rows for rows, _ in seen) == len(prompts)
    assert sum(tokens for _, tokens in seen) == sum(len(s.token_ids) for s in drawn)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[5], []], {}, "prompt 1 has 0 tokens"),
        ([[5] * 240], {}, "max_position_embeddings=256"),
        ([[5]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[5]], {"batch_size": 0}, "batch_size=0"),
        ([[5]], {"indices": [1, 2]}, "2 indices for 1 prompts"),
    ],
)
def test_what_cannot_be_sampled_is_refused(model, prompts, changes, message):
    with pytest.raises(DcodError, match=message):
        draw(model, prompts, **changes)


def test_no_prompts_no_samples(model):
    assert draw(model, []) == []
