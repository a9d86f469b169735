"""Speed beside the host itself."""
