"""Meta-architectures the plugin registers in fast-reid."""
