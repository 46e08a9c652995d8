"""Export of a trained student as a Hugging Face directory that was checked. Read command.py."""
