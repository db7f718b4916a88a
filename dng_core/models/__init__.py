"""Networks: what they are, their weights, the data they see, and how they are trained."""
