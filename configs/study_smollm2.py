"""SFT and DisCorD on a real model and real traces: held-out nll and drift, no accuracy.

    python tools/get_smollm2.py --layers 24
    python -m dcod_jax.train --config configs/study_smollm2.py --config.data.traces=TRAIN.jsonl
    python -m dcod_jax.drift --config configs/study_smollm2.py --config.drift.prompts=TEST.jsonl

TRAIN and TEST are GSM8K's files (question, answer), or the first lines of them.

The student is SmolLM2-135M-Instruct without six of its thirty layers. The weights use the log-probs
of the whole model, which did not write the traces but fits a small machine. For traces with several
completions in a field `code`:

    --config.run_dir=runs/study-qwen --config.data.traces=TRACES.jsonl
    --config.prepare.completion_field=code

Neither model solves such problems, so nothing is graded.
"""

from dcod_jax.configs.quickstart_smollm2 import get_config as smollm2


def get_config():
    c = smollm2()
    c.run_dir = "runs/study-smollm2"
    c.generate.prompts = ""
    c.data.traces = ""
    c.prepare.prompt_field = "question"  # GSM8K's names: its worked answers are the traces
    c.prepare.completion_field = "answer"
    c.data.max_length = 320
    c.data.seq_len = 320
    c.drift.limit = 16
    c.drift.max_new_tokens = 64
    c.drift.batch_size = 16
    return c
