"""Pictures and measurements of a trained stage 1 of DIL; no host."""
