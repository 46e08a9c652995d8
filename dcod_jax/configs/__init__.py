"""The base config and the shipped recipes, which `--config NAME` finds. Read base first: it has
every key. Then quickstart, quickstart_lacking, quickstart_smollm2 and lightning_opd (trainings),
and study, study_letters and study_styles (comparisons)."""
