"""Qwen2.5-1.5B-Instruct learns from Qwen2.5-7B-Instruct on GSM8K, the recipe of docs/tutorial.md.

    dcod train    --config configs/gsm8k_qwen25.py
    dcod evaluate --config configs/gsm8k_qwen25.py

Needs two HF directories in models/ (Qwen2.5-1.5B-Instruct, Qwen2.5-7B-Instruct), data/prompts.jsonl
({prompt, answer} a line, from GSM8K's training file) and data/gsm8k_test.jsonl (GSM8K's own test
file). The sizes fit eight TPU v5e chips. Copy this file and change it for your own job.
"""

from dcod_jax.configs.base import get_config as base


def get_config():
    c = base()
    c.run_dir = "runs/gsm8k"
    c.student.path = "models/Qwen2.5-1.5B-Instruct"
    c.teacher.path = "models/Qwen2.5-7B-Instruct"

    # One system message for traces, training and evaluation: that of Qwen2.5-Math.
    c.prepare.system_prompt = (
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    c.generate.prompts = "data/prompts.jsonl"
    c.generate.samples = 4
    c.generate.max_new_tokens = 512
    c.generate.batch_size = 256
    c.prepare.overlap_files = ("data/gsm8k_test.jsonl",)

    c.data.eval_fraction = 0.02
    c.data.max_length = 1024
    c.data.seq_len = 1024
    c.data.batch_size = 64  # 65,536 positions a step

    c.optim.learning_rate = 1e-5
    c.optim.warmup_steps = 20
    c.train.steps = 400
    c.train.eval_every = 50
    c.train.save_every = 50

    c.mesh.fsdp = -1  # all devices; batch_size must be a multiple of their number
    c.mesh.data = 1
    c.evaluate.sets = ("gsm8k=data/gsm8k_test.jsonl",)
    c.evaluate.instruction = ""  # the system message says it
    c.evaluate.max_new_tokens = 512
    c.evaluate.batch_size = 256
    c.report.at_end = True
    c.compare = ("sft loss.weights.name=uniform", "discord loss.weights.name=sigmoid")
    return c
