"""Methods of registration against each other on labelled pairs."""
