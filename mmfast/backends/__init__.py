"""Attention of other libraries as backends of `mmfast.attention`: where they are installed, and only if asked for."""
