"""Training: the verb, the loop of one run, its jitted step, its checkpoints and its numbers.

Read loop.py, setup.py, step.py with forward.py and metrics.py, checkpoints.py, then telemetry.py
and command.py.
"""
