"""The door for formats, and what is done with every export."""
