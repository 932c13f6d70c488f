"""Models at work: loaded from a path, and behind an interface over HTTP."""
