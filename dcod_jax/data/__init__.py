"""From raw traces to device batches. Read lines, json_text, presets, columns, raw, forms and traces
(what users have; schema checks a record); tokenizer and chat (token ids and masks); codec, dataset,
blocks and scores (what is on disk); then packing and pipeline (what the train loop gets)."""
