"""Tables and pictures of finished runs, and the benchmarks."""
