"""The study of what the weights do: methods over seeds and conditions, on embedded problems.

Read command.py, conditions.py (what is run), lab.py (one run), then domain.py (the problems) with
arithmetic.py and letters.py.
"""
