"""One self-contained HTML page about runs, from what their directories hold.

Read command.py with arguments.py, then data.py (metrics, accuracy, drift) and traces.py (weights).
"""
