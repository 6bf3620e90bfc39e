"""Layer groups of a backbone: find them, choose which train, and build optimizer groups."""
