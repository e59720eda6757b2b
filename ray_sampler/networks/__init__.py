"""Networks: their weights, from whatever file they come in, and what those weights tell."""
