"""The verb that makes a student of fewer layers, heads and channels from a larger model. Read
arguments, then prune, then command."""
