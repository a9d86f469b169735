"""Image lists, samplers, pair loaders and built-in data sets."""
