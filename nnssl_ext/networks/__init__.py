"""Backbones behind one contract, the segmentation networks that nnU-Net builds from the plans, heads and decoders of the methods,
the moving teacher, and what methods of one kind share (`PlainMethod`, `StudentTeacher`, `DenseContrast`)."""
