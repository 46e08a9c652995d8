"""lm-evaluation-harness on this library's models: any of its tasks, without torch.

    pip install '.[lm-eval]'
    python -m dcod_jax.evaluate.lm_eval_model run --model dcod_jax --tasks ifeval \\
        --apply_chat_template --batch_size 64 \\
        --model_args pretrained=runs/qwen-1.5b/export,dtype=bfloat16

The words after the module are those of `lm_eval`. In Python: import this module, then
lm_eval.simple_evaluate(model="dcod_jax", model_args=...). Truncation, windows and the split of
context and continuation are those of the harness's own "hf" model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from dcod_jax.data.templates import TemplateChoice, clock
from dcod_jax.data.tokenizer import chat_template, load_tokenizer, tokenizer_fingerprint
from dcod_jax.data.turns import stop_ids
from dcod_jax.errors import DcodError
from dcod_jax.evaluate.generations import Sampling, sample_options, text_of
from dcod_jax.files import as_path
from dcod_jax.models.hf import load_model
from dcod_jax.parallel.mesh import make_mesh
from dcod_jax.sample.sampler import decoding_params, sample
from dcod_jax.score.scoring import ScoreSettings, score_traces
from dcod_jax.types import Trace

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = ("temperature", "top_p", "top_k", "min_p")


@register_model("dcod_jax")
class DcodLM(TemplateLM):
    """A checkpoint (HF directory or .gguf) as a model of lm-evaluation-harness.

    `dtype` is that of weights and compute, `batch_size` the sequences decoded together,
    `batch_tokens` the tokens scored together, `max_length` the longest input (0: the model's own).
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "float32",
        batch_size: int | str = 16,
        batch_tokens: int = 16384,
        max_length: int = 0,
        max_gen_toks: int = 256,
        chat_template: str = "",
        seed: int = 0,
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        max_batch_size: int | None = None,  # the harness passes these two to every model
        device: str | None = None,
    ):
        super().__init__()
        if batch_size != "auto" and not str(batch_size).isdigit():
            raise DcodError(f"batch_size={batch_size!r} must be a number or auto (16)")
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.path = as_path(pretrained)
        self.dtype, self.seed, self.max_gen_toks = dtype, seed, max_gen_toks
        self.mesh = make_mesh(data, fsdp, tensor=tensor)
        self.tokenizer = load_tokenizer(self.path, template=TemplateChoice(chat_template))
        self.config, self.params = load_model(self.path, dtype=jnp.dtype(dtype), mesh=self.mesh)
        limit = self.config.max_position_embeddings
        if not 0 <= max_length <= limit:
            raise DcodError(f"max_length={max_length} must be in [0, {limit}], the model's own")
        self.max_length = max_length or limit
        self.score_settings = ScoreSettings(
            top_k=1,
            batch_tokens=batch_tokens,
            head_chunk=512,
            compute_dtype=dtype,
            valid_vocab=len(self.tokenizer),
        )

    # ------------------------------------------------------------ text and tokens

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: bos, or eos where there is no bos."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else cast(int, bos)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness caches requests: never another tokenizer's."""
        return f"dcod_jax__{tokenizer_fingerprint(self.tokenizer)[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a bos is added where the tokenizer does so and the text has none yet."""
        if add_special_tokens is None:
            bos = str(self.tokenizer.bos_token or "")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; DcodError where the model has no template."""
        template = chat_template(self.tokenizer)
        if template is None:
            raise DcodError(f"{self.path} has no chat template; give model_args chat_template=FILE")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **clock(template),
        )
        return cast(str, text)

    # ------------------------------------------------------------ log-likelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each of its tokens is the most probable one)."""
        traces = []
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise DcodError(
                    f"request {place}: {len(context)} context and {len(continuation)} continuation "
                    f"tokens; expected both, and a continuation of at most {self.max_length}"
                )
            ids = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            mask = np.arange(len(ids)) >= len(ids) - len(continuation)
            traces.append(Trace(str(place), ids, mask))
        scored = score_traces(
            self.config, self.params, traces, settings=self.score_settings, mesh=self.mesh
        )
        answers = []
        for (key, _, continuation), trace in zip(requests, scored, strict=True):
            if trace.logprobs is None or trace.topk_ids is None:
                raise RuntimeError("scoring gave no log-probs")
            greedy = bool((trace.topk_ids[:, 0] == np.asarray(continuation)).all())
            answers.append((float(np.sum(trace.logprobs, dtype=np.float64)), greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, in windows of max_length that predict each token once."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in pieces:
                windows.append((None, *utils.make_disjoint_window(piece)))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[place] += value
        for request, value in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return totals

    # ------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, cut before the first of its stop strings.

        Requests with the same settings are decoded together; a context that leaves no room is cut
        at its left end.
        """
        model = decoding_params(
            self.config,
            self.params,
            valid_vocab=len(self.tokenizer),
            compute_dtype=self.dtype,
            mesh=self.mesh,
        )
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        texts = [""] * len(requests)
        for settings, places in groups.items():
            sampling, limit = self._sampling(json.loads(settings))
            room = self.max_length - limit
            if room < 1:
                raise DcodError(
                    f"max_gen_toks={limit} leaves no room in max_length={self.max_length}"
                )
            drawn = sample(
                model,
                [self.tok_encode(requests[place].args[0])[-room:] for place in places],
                indices=places,
                max_new_tokens=limit,
                batch_size=self.batch_size,
                eos_ids=stop_ids(self.config, self.tokenizer),
                **sample_options(sampling, self.tokenizer),
            )
            for place, answer in zip(places, drawn, strict=True):
                texts[place] = text_of(self.tokenizer, answer)
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _sampling(self, settings: Mapping[str, Any]) -> tuple[Sampling, int]:
        """(how tokens are drawn, longest continuation) of a request's generation settings."""
        known = {*_LIMITS, *_DRAWING, "until", "do_sample"}
        if unknown := sorted(set(settings) - known):
            raise DcodError(
                f"the task asks for {', '.join(unknown)}, which the sampler does not have; it has "
                f"{', '.join(sorted(known))} (--gen_kwargs overrides a task's settings)"
            )
        until = settings.get("until") or []
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        limit = next((settings[n] for n in _LIMITS if settings.get(n)), self.max_gen_toks)
        drawing = {name: settings[name] for name in _DRAWING if settings.get(name) is not None}
        if settings.get("do_sample") is False or not drawing.get("temperature"):
            drawing = {}  # greedy
        return Sampling(seed=self.seed, stop=stop, **drawing), int(limit)


def main() -> None:
    """The harness's own command line, with this model known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
