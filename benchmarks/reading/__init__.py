"""Images from files: a folder of JPEGs, one pass over it by hand, and the stages of such a pass."""
