"""Model families, one file each; a family's name is its file name."""
