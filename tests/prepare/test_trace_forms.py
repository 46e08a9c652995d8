"""Records of public data sets and APIs: what of each is trained on, dropped or refused."""

import io
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dcod_jax import config as configs
from dcod_jax.configs.base import get_config
from dcod_jax.data.templates import READY
from dcod_jax.data.tokenizer import decode
from dcod_jax.data.traces import find_sources
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.grading import Grader
from dcod_jax.prepare.filters import Filter

CASES = Path(__file__).parents[1] / "data" / "cases" / "trace_forms.jsonl"


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in GPT-2's order of bytes with Qwen's NFC, and the ids that the cases name."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in order] + [chr(256 + i) for i in range(256 - len(order))]
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = {("Ġ", "s"): 262, ("Ġ", "i"): 307, ("Ġi", "s"): 308, ("T", "h"): 310}
    merges |= {("Th", "e"): 309, ("u", "m"): 332}
    vocab |= {left + right: place for (left, right), place in merges.items()}
    unused = set(range(900)) - set(vocab.values())
    vocab |= {f"<unused{place}>": place for place in unused}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # 900, 901, 902
    backend.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = READY["chatml"]
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=20.0, workers=1) as found:
        yield found


def outcome(path: Path, tokenizer, grader, keys) -> dict:
    """{"kept": [[prompt, supervised], ...], "dropped": {reason: n}, "unread": [...]}."""
    config = get_config()
    for key, value in keys.items():
        configs.assign(config, key, value)
    quarantine = io.StringIO()
    run = Filter(config, tokenizer, quarantine, grader=grader, advance=lambda n: None)
    kept = []
    for _, trace in run.run(find_sources(str(path))):
        ids, mask = trace.token_ids, trace.completion_mask
        cut = int(mask.argmax())
        parts = [decode(tokenizer, ids[:cut].tolist()), decode(tokenizer, ids[mask].tolist())]
        kept.append(parts if trace.logprobs is None else [*parts, len(trace.logprobs)])
    assert [json.loads(line)["reason"] for line in quarantine.getvalue().splitlines()] == list(
        run.counts.dropped.elements()
    ) or run.counts.dropped
    return {"kept": kept, "dropped": dict(run.counts.dropped), "unread": sorted(run.unread)}


def write(case: dict, directory: Path) -> Path:
    path = directory / case.get("file", "traces.jsonl")
    if "raw_hex" in case:
        path.write_bytes(bytes.fromhex(case["raw_hex"]))
    else:
        records = [*case.get("requests", []), *case["records"]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


ALL = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case["id"])
def test_a_form_gives_what_it_should(case, tmp_path, tokenizer, grader) -> None:
    path, right = write(case, tmp_path), case["right"]
    if "refused" in right:
        with pytest.raises(DcodError, match=right["refused"]):
            outcome(path, tokenizer, grader, case["keys"])
        return
    assert outcome(path, tokenizer, grader, case["keys"]) == right
