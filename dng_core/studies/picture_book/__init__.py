"""The studies on the picture book: what its model draws, and what is left of a thing that is to be avoided."""
