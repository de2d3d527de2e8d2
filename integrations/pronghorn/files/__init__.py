"""Files of our own: written whole or not at all, with their format and a digest, which reading checks."""
