"""The commands, one file each. What is heavy is imported inside them, so that `--help` is immediate."""
