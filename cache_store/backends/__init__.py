"""Cache backends, one file each; a backend's name is its file name."""
