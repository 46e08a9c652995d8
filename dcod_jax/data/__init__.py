"""From raw traces to device batches. Read lines, json_text, presets, columns, schema, unpack,
records, calls, reasoning, told, answers, raw, forms and traces (what users have); templates with
template_process, tokenizer, turns, borders, chat and conversation (token ids and masks); teachers,
codec, kept, dataset, blocks and scores (what is on disk); packing and pipeline (the batches)."""
