"""Does pretraining help? A matrix of stock nnU-Net fine-tunings, cell by cell, and what it says."""
