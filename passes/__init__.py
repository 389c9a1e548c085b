"""Graph passes, one file an axis or a clean-up."""
