"""The training methods, pure torch: one folder each, none imports another, none knows a host."""
