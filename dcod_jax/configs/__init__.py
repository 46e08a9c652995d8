"""The base config and the shipped recipes. Read base first: it has every key. The others are
recipes that `--config NAME` finds."""
