"""Max pooling of maps, which remembers where each maximum was in a few bits."""
