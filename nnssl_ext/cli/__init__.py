"""One file per command; importing one loads no torch."""
