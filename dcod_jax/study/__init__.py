"""The study of what the weights do: methods over seeds and conditions, on embedded arithmetic.

Read command.py, conditions.py (what is run), lab.py (one run), then domain.py (the problems).
"""
