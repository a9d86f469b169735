"""What stands in for packages that the host imports and that cannot be installed on current stacks."""
