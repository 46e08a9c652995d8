"""How errors compound on the student's own text (ExAccErr). Read in this order: curves (KLs to
curves with intervals, on arrays), scores (sequences sampled and scored by both models), command
(the verb: blocks on disk, drift.json, the table)."""
