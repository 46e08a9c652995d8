"""Tuning: a small grid over config keys, halved by what a validation set says.

Read grid.py (what is tried, and for how many steps), then command.py.
"""
