"""Distribution-corrected offline distillation of LLM reasoning, in JAX.

Read cli.py (the verbs), configs/base.py (every key) and train/loop.py; docs/design.md lists the
rooms.
"""

__version__ = "0.1.0"
