"""The sampler: a fixed number of rows decode side by side. Read in this order: sampler (which
prompt is in which row), decoding (the compiled prefill and decode steps), sampling (the choice of
the next token)."""
