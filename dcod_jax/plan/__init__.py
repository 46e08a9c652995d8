"""Memory and time of a recipe on a TPU slice that is not at hand, from its compiled programs.

Read command.py, then programs.py (what is compiled), chips.py, hlo.py and estimate.py (what it
would cost), and remat.py (the recomputation that fits).
"""
