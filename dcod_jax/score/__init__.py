"""The teacher's log-probabilities of the traces, stored beside them.

Read teacher.py (what a teacher is), scoring.py (batches and the compiled step), server.py with
dialects.py (a teacher behind a server), alignment.py (one with another tokenizer), command.py.
"""
