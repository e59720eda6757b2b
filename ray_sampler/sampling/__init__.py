"""How pictures are made of a network and noise. Knows no Ray and no files."""
