"""On the path of the processes that tests start: no verb needs torch, which only tests install."""

from importlib.machinery import PathFinder

_find = PathFinder.find_spec


def _without_torch(name, path=None, target=None):
    return None if name == "torch" else _find(name, path, target)


PathFinder.find_spec = staticmethod(_without_torch)
