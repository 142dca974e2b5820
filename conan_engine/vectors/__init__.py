"""The vectors of a corpus, of any size: made, kept on disk, searched."""
