"""The distillation loss: divergence x teacher x weights, as per-token values and sums of a batch.

Read divergences.py, weights.py (weight_errors.py refuses what cannot be), head.py (the vocabulary
head), distributions.py, adaptive.py, reduce.py (the only place that averages), routing.py (of
experts), distill.py (all of them together).
"""
