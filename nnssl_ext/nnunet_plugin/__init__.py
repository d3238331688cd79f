"""How stock nnU-Net finds our classes."""
