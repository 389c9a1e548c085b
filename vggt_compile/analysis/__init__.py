"""What a model's attention looks like, measured on its own queries and keys: the grounds for a plan."""
