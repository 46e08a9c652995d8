"""From raw traces to device batches. Read raw, forms and traces (what users have); tokenizer and
chat (token ids and masks); codec, dataset, blocks and scores (what is on disk); then packing and
pipeline (what the train loop gets)."""
