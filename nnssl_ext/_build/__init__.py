"""The build backend that adds the start-up files to the wheel."""
