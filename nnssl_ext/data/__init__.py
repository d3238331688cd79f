"""Reading regions of nnU-Net-preprocessed cases, and the sampler that makes a run reproducible."""
