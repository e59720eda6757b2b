"""Features of pictures, and distances between sets of features."""
