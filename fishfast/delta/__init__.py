"""What training changed, as a file: saved, loaded, applied to models and checkpoints."""
