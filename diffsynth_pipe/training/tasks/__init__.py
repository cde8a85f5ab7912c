"""Training tasks, one file each; a task's name is its file name."""
