"""One documented checkpoint schema, its readers and writers, and the transfer of weights to other plans."""
