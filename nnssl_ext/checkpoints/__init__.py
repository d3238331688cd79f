"""One documented checkpoint schema; readers and writers for nnU-Net and nnssl files."""
