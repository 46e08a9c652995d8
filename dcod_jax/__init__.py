"""Distribution-corrected offline distillation of LLM reasoning, in JAX."""

__version__ = "0.1.0"
