"""The verb that turns raw traces into a trace dataset. Read command first; then filters (what is
kept, and why the rest is dropped), overlap (duplicates and evaluation sets) and delivered
(log-probs that came with the traces)."""
