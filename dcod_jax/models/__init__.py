"""One decoder-only transformer with the options of all families, and its files. Read in this
order: families and config (what a config.json means), linear and layers (each parameter is declared
there), attention, transformer, cached (with a cache of keys and values), tensors (between files and
params), hf and gguf."""
