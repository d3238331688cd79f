"""One file per source of data, each ending in a nnU-Net raw dataset."""
