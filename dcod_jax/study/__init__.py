"""The study: what the weights do, on embedded arithmetic, over methods, seeds and conditions.

Runs every arm (a loss) of every condition (where traces, start or student differ) over seeds, from
one warm start and on the same batches, each with the learning rate that its own small grid found on
validation problems; grades it on three sets of problems, measures drift, and notes what it cost.
Each finished run is a line of run_dir/results.jsonl, and the same command goes on after an
interruption. tools/make_study_page.py writes the tables of docs/study.md from that file.
"""
