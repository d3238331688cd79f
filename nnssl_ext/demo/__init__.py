"""The main job end to end, as a user would type it: real commands in child processes, and a page about the outcome."""
