"""The verb that shows a trace dataset, token by token, and exports it. Read arguments, then
command: its printing and its export."""
