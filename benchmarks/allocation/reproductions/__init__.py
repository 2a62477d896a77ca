"""Published claims about bit allocation, measured here. One script each; docs/reproductions.md has what came out."""
