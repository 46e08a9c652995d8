"""Log-probs that come with the traces: kept, ignored, compared with the tokenizer, refused."""

import math
from pathlib import Path

import numpy as np
import pytest
from prepare_inputs import record, save_tokenizer, write

from dcod_jax.data import chat
from dcod_jax.data.dataset import TraceDataset
from dcod_jax.data.tokenizer import load_tokenizer
from dcod_jax.errors import DcodError
from dcod_jax.prepare.command import prepare


def scored_record(tokenizer, number: int = 1, **changes) -> dict:
    entry = record(number)
    messages = [
        {"role": "user", "content": entry["prompt"]},
        {"role": "assistant", "content": entry["completion"]},
    ]
    ids, mask = chat.encode(tokenizer, messages)
    completion = ids[mask].tolist()
    values = [-0.01 * i for i in range(len(completion))]
    return entry | {"token_ids": completion, "logprobs": values} | changes


def test_delivered_logprobs_are_kept_when_required(config, tokenizer_dir) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    records = [scored_record(tokenizer, i, model="big", temperature=1.0) for i in range(3)]
    write(Path(config.data.traces), records)
    config.prepare.logprobs = "require"
    config.teacher.name = "Big-7B"
    dataset = TraceDataset(prepare(config) / "train")
    assert dataset.scored
    np.testing.assert_array_equal(
        dataset.read([1])[0].logprobs, np.asarray(records[1]["logprobs"], np.float32)
    )
    assert dataset.manifest["teacher"]["name"] == "Big-7B"
    assert dataset.manifest["sampled_by"] == {"models": ["big"], "temperatures": [1.0]}


def test_ignored_logprobs_are_told(config, tokenizer_dir) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    write(Path(config.data.traces), [scored_record(tokenizer, i) for i in range(3)])
    dataset = TraceDataset(prepare(config) / "train")
    assert not dataset.scored
    assert dataset.manifest["delivered_logprobs"] == {"policy": "ignore", "traces_ignored": 3}


def test_token_texts_of_an_api_are_compared_by_bytes(config, tokenizer_dir) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    entry = scored_record(tokenizer, completion="It is é 2.\n#### 2")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hé 2"}]
    ids, mask = chat.encode(tokenizer, messages)
    tokens = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
    assert tokens == ["h", "Ã", "©", "Ġ", "2", "<|im_end|>"]
    texts: list[list[int] | None] = [[104], [0xC3], [0xA9], [32], [50], None]
    content = [
        {"token": "<|im_end|>" if text is None else "?", "bytes": text, "logprob": -0.5}
        for text in texts
    ]
    choice = {"message": {"role": "assistant", "content": "hé 2"}, "logprobs": {"content": content}}
    entry = {"prompt": "q", "choices": [choice]}
    config.prepare.logprobs = "require"
    write(Path(config.data.traces), [entry])
    assert TraceDataset(prepare(config) / "train").scored
    content[1]["bytes"] = [0xC4]
    write(Path(config.data.traces), [entry])
    config.data.dataset = config.run_dir + "/other"
    with pytest.raises(DcodError, match=r"traces.jsonl:1: token 1 of the completion is b'\\xc3'"):
        prepare(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(logprobs=r["logprobs"][:-2]), r"14 logprobs for the 16 tokens"),
        (lambda r: r.update(logprobs=r["logprobs"][:-1]), r"end-of-turn token '<\|im_end\|>'"),
        (lambda r: r.update(token_ids=[*r["token_ids"], 5]), r"17 token_ids for the 16 tokens"),
        (lambda r: r["token_ids"].__setitem__(4, 7), r"token_ids\[4\] is 7 \('\(?.'\), our token"),
        (
            lambda r: r["token_ids"].__setitem__(4, "7"),
            r"token_ids\[4\] must be a token id, found '7'",
        ),
        (lambda r: r["logprobs"].__setitem__(2, math.nan), r"logprobs\[2\] is NaN"),
        (lambda r: r["logprobs"].__setitem__(2, 0.001), r"logprobs\[2\] is 0.001, above 0"),
        (lambda r: r["logprobs"].__setitem__(2, -math.inf), r"logprobs\[2\] is -inf"),
        (lambda r: r["logprobs"].__setitem__(2, None), r"logprobs\[2\] is None; expected a number"),
        (lambda r: r.pop("token_ids"), r"logprobs without token_ids"),
        (lambda r: r.pop("logprobs"), r"no logprobs"),
    ],
)
def test_logprobs_that_do_not_fit_are_refused(config, tokenizer_dir, change, message: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    broken = scored_record(tokenizer, 2)
    change(broken)
    write(Path(config.data.traces), [scored_record(tokenizer, 1), broken])
    config.prepare.logprobs = "require"
    config.prepare.filter_correct = False
    with pytest.raises(DcodError, match=r"traces\.jsonl:2: .*" + message):
        prepare(config)


def test_logprobs_of_another_tokenizer_are_refused(config, tokenizer_dir, tmp_path) -> None:
    other = load_tokenizer(save_tokenizer(tmp_path / "other", merges=[("I", "t")]))
    write(Path(config.data.traces), [scored_record(other)])
    config.prepare.logprobs = "require"
    with pytest.raises(DcodError, match=r"traces.jsonl:1: \d+ logprobs for the \d+ tokens"):
        prepare(config)
