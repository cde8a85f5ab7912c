"""From metadata rows to the inputs of the encode units."""
