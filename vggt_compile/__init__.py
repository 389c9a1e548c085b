"""Speed for feed-forward 3D reconstruction models: a torch.compile backend for the VGGT family."""
