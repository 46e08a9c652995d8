"""One decoder-only transformer with the options of all families, and its files. Read rope,
layer_types, layer_kinds, mixtures, multimodal, families and config (what a config.json means);
linear, layers, experts and blocks (each parameter is declared there); attention with cudnn, remat,
transformer, counts, lora and cached (what is computed); tensors, tensor_files, peft, hf,
gguf_metadata, gguf and gguf_tokenizer (files)."""
