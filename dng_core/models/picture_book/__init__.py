"""The picture book: drawn scenes with captions, and the text-to-image model and the judge that are trained on them."""
