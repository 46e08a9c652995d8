"""The verb that samples traces from the teacher. Read command; sample/sampler.py draws the tokens,
and data/blocks.py keeps what is finished."""
