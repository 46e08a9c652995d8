"""Training: the verb, the loop of one run, its jitted step, its checkpoints and its numbers.

Read loop.py; settings.py, setup.py and learned_from.py (what it begins with); step.py with
forward.py, optim.py and metrics.py; checkpoints.py with checkpointer.py, local_checkpoints.py,
checkpoint_reader.py and checksums.py; held_out.py and on_policy.py (what it samples); telemetry.py
with trace_weights.py and profiling.py; then command.py.
"""
