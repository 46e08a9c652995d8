"""The teacher's log-probabilities of the traces, stored beside them.

Read teacher.py (what a teacher is), scoring.py (batches and the compiled step), command.py.
"""
