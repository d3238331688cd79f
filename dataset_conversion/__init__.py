"""Sources of data, each ending in a nnU-Net raw dataset: one file per source; phantoms, patches and foreground beside them."""
