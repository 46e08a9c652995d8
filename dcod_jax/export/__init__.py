"""Export of a trained student as a Hugging Face directory that was checked. Read command (the
verb), then check (what was written, read back) and card (the model card)."""
