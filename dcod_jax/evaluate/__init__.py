"""Accuracy of models on benchmarks and problem files. Read in this order: benchmarks, problems,
options and prompts (what is asked), answers, prose and expressions (found), numerals, spelling,
operations, algebra, units, regions, parts and equality (compared), grading (the verdict),
generations (sample and grade), statistics and metrics (the numbers), command (the verb),
lm_eval_model (EleutherAI's harness)."""
