"""On PYTHONPATH before the site's packages: the verbs run as where torch is not installed."""

raise ImportError("torch is not installed here")
