"""The ordered layer groups of a backbone: found, chosen to train, and made optimizer groups of."""
