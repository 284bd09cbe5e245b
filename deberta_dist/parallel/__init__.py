"""Who owns what: the mesh of ranks, the layout of weights over it, and the three ways to split a model."""
