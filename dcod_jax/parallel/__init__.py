"""The mesh of devices, collectives on it, and several processes as one run.

Read mesh.py, collectives.py, hosts.py, then monitor.py (lost and stuck peers) and exit_report.py.
"""
