"""Self-supervised pretraining for nnU-Net, as a plugin.

Imported at every interpreter start by the start-up file, so it imports nothing.
"""
