"""What model families share; a family imports from here, never from another family."""
