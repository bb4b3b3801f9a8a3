"""Training clip-small on images of real data sets and captions made from their class names."""
