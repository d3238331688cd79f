"""Registration without training: frozen features, a coupled convex search, and instance optimisation."""
